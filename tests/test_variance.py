"""What theta depends on: the split against a direct computation, and no demonstrations as the control."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import tvlens as tv
from tests import tiny
from tvlens.experiments.variance import Variance, _dataset, variance
from tvlens.plots.variance import variance_by_layer
from tvlens.provenance import encode

SETTINGS = {"shots": (0, 1, 3), "n": 6, "n_dummy": 3, "n_dev": 4, "seed": 2, "progress": False}


@pytest.fixture(scope="module")
def found() -> Variance:
    return variance(tiny.model("llama"), "to_upper", layer=-2, **SETTINGS)


def test_equals_plain_runs(found: Variance) -> None:
    """Theta from Hugging Face's hidden states, one prompt at a time; both variances by NumPy."""
    hf, model = tiny.hf("llama"), tiny.model("llama")
    read = {}
    for shots in (0, 1, 3):
        made = tv.build_prompts(
            "to_upper", model, shots=shots, n=6, n_dummy=3, split="test", seed=2
        )
        rows = []
        for dummy in made.dummies:
            with torch.no_grad():
                states = [
                    hf.model(t[m][None], output_hidden_states=True).hidden_states[2][0, -1]
                    for t, m in zip(dummy.tokens, dummy.mask, strict=True)
                ]
            rows.append(torch.stack(states))
        read[shots] = torch.stack(rows, dim=1).double().numpy()  # after block 1
    most = read[3].mean(axis=1)
    for shots, values in read.items():
        here = found.data.sel(shots=shots, layer=1)
        means = values.mean(axis=1)
        assert float(here["between"].mean()) == pytest.approx(
            means.var(axis=0, ddof=1).sum(), rel=1e-3
        )
        within = values.var(axis=1, ddof=1).sum(axis=-1)
        np.testing.assert_allclose(here["within"].values, within, rtol=1e-3)
        for i in range(6):
            other = np.delete(most, i, axis=0).mean(0) if shots == 3 else most.mean(0)
            cosine = means[i] @ other / np.linalg.norm(means[i]) / np.linalg.norm(other)
            assert float(here["likeness"][i]) == pytest.approx(cosine, abs=1e-4)
        own = max(means.var(axis=0, ddof=1).sum() - within.mean() / 3, 0)
        part = found.parts().sel(shots=shots, layer=1)
        assert float(part["share"]) == pytest.approx(own / (own + within.mean()), abs=1e-3)


def test_known_variances_are_found() -> None:
    """Sets that differ by variance 4 an axis and dummies by 1: four fifths are the demonstrations'."""
    g = torch.Generator().manual_seed(0)
    sets = 2 * torch.randn(400, 1, 1, 50, generator=g)
    noise = torch.randn(400, 4, 1, 50, generator=g)
    data = _dataset([1, 2], [5 + noise, 5 + sets + noise])
    note = {"kind": "variance", "n_dummy": 4, "seed": 0, "schema": 1, "layer": 0}
    data.attrs["tvlens"] = encode(note)
    part = Variance(data).parts().isel(layer=0)
    assert float(part["share"][1]) == pytest.approx(0.8, abs=0.02)
    assert float(part["share_low"][1]) < 0.8 < float(part["share_high"][1])
    # Where demonstrations make no difference their share is nothing, although their means do differ.
    assert float(part["share"][0]) < 0.01 and float(data["between"][0].mean()) > 10
    assert float(part["demonstrations"][1] / part["dummy"][1]) == pytest.approx(4, rel=0.05)


def test_no_shots_is_the_control(found: Variance) -> None:
    part = found.parts()
    # Without demonstrations the sets do not differ; with some of them they do.
    assert float(part["share"].sel(shots=0).mean()) < 0.5 * float(part["share"].sel(shots=3).mean())
    assert ((part["share_low"] <= part["share_high"]) & (part["share_high"] <= 1)).all()
    s = found.summary()
    assert (s["shots"], s["fewest"], s["most"], s["layer"]) == (3, 1, 3, 2)
    assert s["share_none"] == pytest.approx(float(part["share"].sel(shots=0, layer=2)))
    assert f"with 0 shots {s['share_none']:.2f}" in found.finding()


def test_layer_is_the_best_on_dev() -> None:
    model = tiny.model("llama")
    result = variance(model, "to_upper", **SETTINGS)
    made = tv.build_prompts("to_upper", model, shots=3, n=4, n_dummy=2, split="dev", seed=2)
    theta = tv.extract(model, made)
    curve = [
        tv.score(model, made, view="zero_shot", vector=theta, layer=i).accuracy
        for i in theta.layers
    ]
    assert result.provenance["layer"] == int(np.argmax(curve))


def test_same_seed_file_and_figure(found: Variance, tmp_path: Path) -> None:
    again = variance(tiny.model("llama"), "to_upper", layer=-2, **SETTINGS)
    xr.testing.assert_identical(again.data.drop_attrs(), found.data.drop_attrs())
    loaded = tv.load(found.save(tmp_path / "v.nc"))
    assert isinstance(loaded, Variance) and loaded.finding() == found.finding()
    figure = loaded.plot()
    curves = [trace for trace in figure.data if trace.name]
    assert [t.name for t in curves if t.showlegend] == ["0 shots", "1 shot", "3 shots"]
    expected = found.parts()["likeness"].sel(shots=1).values
    assert any(np.allclose(t.y, expected) for t in curves if t.name == "1 shot")
    with pytest.raises(ValueError, match="the data lacks likeness, share"):
        variance_by_layer(found.data.drop_vars("likeness"))


def test_bad_input() -> None:
    model = tiny.model("llama")
    for arguments, message in (
        ({"shots": ()}, "one of them above 0"),
        ({"shots": (0,)}, "one of them above 0"),
        ({"shots": (-1, 2)}, "numbers from 0"),
        ({"n": 1}, "n >= 2"),
        ({"n_dummy": 1}, "n_dummy=1 arrived"),
        ({"shots": (30,)}, "Ask for at most"),
        ({"task": "to_uper"}, "Nearest: to_upper"),
    ):
        with pytest.raises(ValueError, match=message):
            variance(model, **({"task": "to_upper", "layer": 1, **SETTINGS} | arguments))


@pytest.mark.slow
def test_smollm2_theta_settles_with_shots(smollm2: Any) -> None:
    result = variance(
        smollm2, "to_upper", shots=(0, 1, 5), n=8, n_dummy=3, layer=18, progress=False
    )
    part = result.parts().sel(layer=18)
    likeness = part["likeness"].values
    assert likeness[0] < likeness[1] < likeness[2]
    assert float(part["share"].sel(shots=0)) < 0.2 < float(part["share"].sel(shots=1))
