import json
import stat
import sys
import types

import numpy as np
import pytest
import torch
import xarray as xr

from tests.fake_results import STRANGE, FakeSweep, sweep_data
from tvlens import provenance
from tvlens._files import replacing
from tvlens.results import Result, load


@pytest.fixture
def result():
    return FakeSweep(sweep_data(layers=6, n=5))


def noted(data, **changes):
    note = provenance.decode(data.attrs["tvlens"]) | changes
    return data.assign_attrs(tvlens=json.dumps(note))


# --- files ----------------------------------------------------------------------------------


def test_round_trip_is_identical_down_to_the_types(result, tmp_path):
    path = result.save(tmp_path / "sweep.nc")
    again = load(path)
    assert type(again) is FakeSweep
    assert again.data.identical(result.data)
    for name, variable in result.data.variables.items():
        assert again.data[name].dtype.kind == variable.dtype.kind, name
    assert again.data["hypothesis"].dtype == bool
    assert again.data["top_probability"].dtype == np.float32
    assert again.provenance == result.provenance


@pytest.mark.parametrize("texts", [STRANGE, ["a\0b", "\0"], ["\ud800", "\\n"], ["", " "]])
def test_any_text_survives(texts, tmp_path):
    # pandas takes no surrogate among objects, so those come as fixed-width text.
    values = np.array(texts, object if "\0" in texts[-1] else str)
    data = sweep_data(layers=6, n=5).assign(odd=("x", values))
    data["odd"].attrs["note"] = "kept"
    again = load(FakeSweep(data).save(tmp_path / "odd.nc"))
    assert again.data["odd"].values.tolist() == texts
    assert again.data.identical(data)


def test_nan_stays_nan(tmp_path):
    data = sweep_data(layers=6, n=5)
    data["hypothesis"] = data["hypothesis"].astype(float).where(data["layer"] < 4)
    again = load(FakeSweep(data).save(tmp_path / "nan.nc"))
    assert again.data.identical(data)
    assert int(again.data["hypothesis"].isnull().sum()) == 20


def test_text_mixed_with_nan_is_refused_before_anything_is_written(tmp_path):
    data = sweep_data(layers=6, n=5).assign(odd=("x", np.array(["a", float("nan")], object)))
    with pytest.raises(TypeError, match="'odd' mixes text with nan"):
        FakeSweep(data).save(tmp_path / "odd.nc")
    assert list(tmp_path.iterdir()) == []


def test_saving_leaves_data_and_folder_as_they_were(result, tmp_path):
    before = result.data.copy(deep=True)
    path = result.save(tmp_path / "sweep.nc")
    assert result.data.identical(before)
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.nc"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_failing_save_keeps_the_old_file(result, tmp_path, monkeypatch):
    path = result.save(tmp_path / "sweep.nc")
    old = path.read_bytes()

    def full(self, target, **kwargs):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    with pytest.raises(OSError, match="No space left"):
        result.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.nc"]


def test_saving_elsewhere_than_nc_or_nowhere(result, tmp_path):
    with pytest.raises(ValueError, match=r"saved as \.nc, got 'sweep\.csv'"):
        result.save(tmp_path / "sweep.csv")
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        result.save(tmp_path / "no" / "sweep.nc")


def test_replacing_moves_only_whole_files(tmp_path):
    target = tmp_path / "a.txt"
    with pytest.raises(KeyError), replacing(target) as part:
        part.write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


# --- bad files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sweep.pkl", "sweep"])
def test_unknown_suffix(name):
    with pytest.raises(ValueError, match=r"unknown file type .*\.nc, \.safetensors"):
        load(name)


def test_missing_file_names_its_neighbours(result, tmp_path):
    result.save(tmp_path / "to_upper.nc")
    with pytest.raises(FileNotFoundError, match=r"no file .*to_uper\.nc.*to_upper\.nc"):
        load(tmp_path / "to_uper.nc")
    (tmp_path / "folder.nc").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load(tmp_path / "folder.nc")


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9, 0.9999])
def test_truncated_file(result, tmp_path, keep):
    path = result.save(tmp_path / "sweep.nc")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(ValueError, match=r"sweep\.nc is no readable netCDF file; is it cut off\?"):
        load(path)


def test_foreign_netcdf(tmp_path):
    path = tmp_path / "weather.nc"
    xr.Dataset({"rain": ("day", [1.0])}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(
        ValueError, match=r"weather\.nc.*no attribute 'tvlens': not written by tvlens"
    ):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no JSON"),
        ("[1]", "no integer 'schema', got None"),
        ('{"schema": true}', "no integer 'schema', got True"),
        ('{"schema": 99, "kind": "fake_sweep"}', "newer tvlens: schema 99.*reads up to 1"),
        ('{"schema": 1, "kind": "fake_swep"}', "unknown result kind 'fake_swep'.*fake_sweep"),
        ('{"schema": 1}', "unknown result kind 'None'"),
    ],
)
def test_damaged_provenance(result, tmp_path, monkeypatch, text, message):
    monkeypatch.setattr("tvlens.results._import_experiments", lambda: None)
    path = tmp_path / "odd.nc"
    result.data.assign_attrs(tvlens=text).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match=rf"cannot read .*odd\.nc: .*{message}"):
        load(path)


def test_unknown_kind_looks_among_the_experiments_first(result, tmp_path, monkeypatch):
    path = tmp_path / "odd.nc"
    noted(result.data, kind="late_kind").to_netcdf(path, engine="h5netcdf")

    def register():
        monkeypatch.setitem(sys.modules["tvlens.results"]._KINDS, "late_kind", Late)

    class Late(FakeSweep):
        kind = "late_kind"

    monkeypatch.delitem(sys.modules["tvlens.results"]._KINDS, "late_kind")
    monkeypatch.setattr("tvlens.results._import_experiments", register)
    assert type(load(path)) is Late


def test_wrong_variables(result, tmp_path):
    path = tmp_path / "odd.nc"
    result.data.drop_vars("regular").to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match=r"needs variable 'regular'; the data has: .*hypothesis"):
        load(path)
    with pytest.raises(ValueError, match=r"'hypothesis' needs dimensions \('prompt', 'layer'\)"):
        FakeSweep(result.data.isel(layer=0))


def test_another_kind_than_asked(result, tmp_path):
    class Other(FakeSweep):
        kind = "other_sweep"

    path = result.save(tmp_path / "sweep.nc")
    with pytest.raises(ValueError, match="holds a FakeSweep, not a Other"):
        Other.load(path)
    with pytest.raises(ValueError, match="holds kind 'other_sweep', got data of 'fake_sweep'"):
        Other(result.data)
    assert type(FakeSweep.load(path)) is type(Result.load(path)) is FakeSweep


def test_vectors_go_to_their_own_loader(tmp_path, monkeypatch):
    module = types.ModuleType("tvlens.vectors")
    module.TaskVector = type("TaskVector", (), {"load": staticmethod(lambda path: path.name)})
    monkeypatch.setitem(sys.modules, "tvlens.vectors", module)
    (tmp_path / "theta.safetensors").touch()
    assert load(tmp_path / "theta.safetensors") == "theta.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "phi.safetensors")


# --- views ----------------------------------------------------------------------------------


def test_data_without_provenance_is_refused(result):
    with pytest.raises(ValueError, match="no attribute 'tvlens'"):
        FakeSweep(result.data.drop_attrs())


def test_results_cannot_be_changed(result):
    with pytest.raises(AttributeError):
        result.data = result.data


def test_two_classes_cannot_share_a_kind():
    with pytest.raises(ValueError, match="'fake_sweep' is taken by FakeSweep"):
        type("Second", (Result,), {"kind": "fake_sweep"})


def test_table_is_tidy(result):
    table = result.to_dataframe()
    assert len(table) == 10 * 6
    assert list(table.columns[-4:]) == ["baseline", "regular", "hypothesis", "control"]
    assert {"prompt", "layer", "depth", "split", "query", "answer"} <= set(table.columns)
    row = table[(table["prompt"] == 7) & (table["layer"] == 3)]
    assert bool(row["hypothesis"].item()) == bool(result.data["hypothesis"][7, 3])


def test_table_of_named_variables(result):
    table = result.to_dataframe("top_token", "top_probability")
    assert len(table) == 6 * 10
    assert "query" not in table
    with pytest.raises(ValueError, match=r"unknown variable 'top_tokens'. Nearest: top_token"):
        result.to_dataframe("top_tokens")


def test_tensors(result):
    tensor = result.to_tensor("hypothesis")
    assert tensor.dtype == torch.bool and tensor.shape == (10, 6)
    tensor[:] = True
    assert not result.data["hypothesis"].values.all()
    assert result.to_tensor("layer").tolist() == list(range(6))
    with pytest.raises(TypeError, match=r"'top_token' holds .* no numbers"):
        result.to_tensor("top_token")
    with pytest.raises(ValueError, match=r"unknown variable 'depht'\. Nearest: depth"):
        result.to_tensor("depht")


def test_text_forms(result):
    lines = repr(result).splitlines()
    assert len(lines) == 3
    assert lines[0] == "FakeSweep: to_upper · fake-135m"
    assert lines[1].strip() == result.finding()
    assert "prompt 10, layer 6" in lines[2]


def test_card_is_escaped():
    html = FakeSweep(sweep_data("<script>alert(1)</script>", layers=6, n=5))._repr_html_()
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; · fake-135m" in html
    assert "plotly" in html and "<details>" in html and "prompt <b>10</b>" in html


def test_default_views():
    class Bare(Result):
        kind = "bare"
        title = "bare"
        plot = FakeSweep.plot

        def finding(self):
            return "Nothing."

    bare = Bare(noted(sweep_data(layers=6, n=5), kind="bare"))
    assert bare.summary() == {"kind": "bare", "title": "bare", "finding": "Nothing."}
    assert list(bare.figures()) == ["main"]
    assert len(bare.to_dataframe()) == 10 * 6 * 10


# --- provenance -----------------------------------------------------------------------------


def test_provenance_records_versions_and_time():
    note = provenance.collect(kind="x", seed=np.int64(3), shape=(1, 2), note=None)
    assert note["schema"] == provenance.SCHEMA and note["kind"] == "x"
    assert note["seed"] == 3 and note["shape"] == [1, 2] and note["note"] is None
    assert {"python", "tvlens", "torch", "transformer-lens"} <= set(note["versions"])
    assert note["created"].endswith("+00:00")
    assert provenance.decode(provenance.encode(note)) == note


def test_provenance_is_strict_json(tmp_path):
    text = provenance.encode({"schema": 1, "a": float("inf"), "p": tmp_path, "v": np.arange(2)})
    assert json.loads(text) == {"schema": 1, "a": None, "p": str(tmp_path), "v": [0, 1]}
    with pytest.raises(TypeError, match="plain values only, got set"):
        provenance.encode({"a": {1}})
