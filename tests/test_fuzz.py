"""Whatever a file or a text holds: it is read as it was meant, or refused with a message."""

import json
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tvlens as tv
from tests import tiny
from tests.fake_results import FakeSweep, sweep_data
from tvlens import provenance
from tvlens.encoding import Encoder
from tvlens.icl._state import State, load_state, save_state
from tvlens.lens.tuned import TunedLens
from tvlens.results import Result
from tvlens.tasks import Task
from tvlens.templates import Role, Template, get_template
from tvlens.testing import tiny_model, tiny_tokenizer
from tvlens.vectors import TaskVector

house = settings(max_examples=40, deadline=None, derandomize=True)
fewer = settings(house, max_examples=15)

ODD = (
    "\u202eabc", "שלום", "مرحبا", "👩‍👩‍👧", "e\u0301", "\u200b", "a\x00b", "\x1b[31m", "<s>", "<|endoftext|>",
    "{x}", "{y}", "%s", "→", "a" * 300, "ﬁ", "\ufeff", "\u2028", "ß", "𝔘",
)  # fmt: skip
texts = st.one_of(
    st.sampled_from(ODD), st.text(max_size=12), st.text("abc XYZ:->\t", min_size=1, max_size=8)
)
words = st.text("abcdefgh XYZ", min_size=1, max_size=6).map(str.strip).filter(bool)
mixed = st.one_of(words, words, texts)

# --- files that were damaged --------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of file: how one is written and read, and when what was read is what was written."""

    suffix: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    same: Callable[[Any, Any], bool]


def _vector() -> TaskVector:
    values = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    return TaskVector(values, (0, 1, 2, 5), "resid_post", {"model": "m", "seed": 7, "task": "up"})


@cache
def _lens() -> TunedLens:
    made = TunedLens.identity(tiny_model())
    noise = torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(0))
    return TunedLens(made.weight + 0.01 * noise, made.bias, made.layers, made.site, made.made)


def _state() -> State:
    weights = {"w": torch.arange(6.0).reshape(2, 3), "deep.b": torch.ones(2)}
    moments = {f"{part}:w": torch.full((2, 3), 0.5) for part in ("exp_avg", "exp_avg_sq")}
    found = {0: torch.rand(3, generator=torch.Generator().manual_seed(0)), 4: torch.ones(3)}
    return State(weights, moments, 4, 1.5, found, {4: {"w": torch.zeros(2, 3)}}, torch.ones(2), 3)


def _flat(state: State) -> list[Any]:
    parts = [state.weights, state.moments, state.measured, *state.kept.values(), {"": state.losses}]
    named = [
        (name, t.dtype, t.tolist())
        for part in parts
        for name, t in sorted(part.items(), key=lambda item: str(item[0]))
    ]
    return [*named, state.step, state.seconds, state.count, sorted(state.kept)]


def _same_vector(a: TaskVector, b: TaskVector) -> bool:
    return (
        a.values.dtype == b.values.dtype
        and torch.equal(a.values, b.values)
        and (a.layers, a.site, dict(a.made)) == (b.layers, b.site, dict(b.made))
    )


def _same_lens(a: TunedLens, b: TunedLens) -> bool:
    equal = torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)
    return equal and (a.layers, a.site) == (b.layers, b.site) and repr(a) == repr(b)


MARK = {"study": "fuzz", "lr": 0.1}
KINDS = {
    "vector": Kind(".safetensors", lambda p: _vector().save(p), tv.load, _same_vector),
    "result": Kind(
        ".nc",
        lambda p: FakeSweep(sweep_data(layers=6, n=5)).save(p),
        tv.load,
        lambda a, b: a.data.identical(b.data),
    ),
    "lens": Kind(
        ".safetensors",
        lambda p: _lens().save(p),
        lambda p: TunedLens.load(p, tiny_model()),
        _same_lens,
    ),
    "state": Kind(
        ".safetensors",
        lambda p: save_state(p, _state(), MARK),
        lambda p: load_state(p, MARK, torch.device("cpu")),
        lambda a, b: _flat(a) == _flat(b),
    ),
}


def _flip(raw: bytearray, rng: random.Random, n: int) -> bytearray:
    for _ in range(n):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return raw


def _zero(raw: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(raw))
    raw[start : start + 64] = bytes(len(raw[start : start + 64]))
    return raw


def _swap(raw: bytearray, rng: random.Random) -> bytearray:
    size = len(raw) // 8
    a, b = sorted(rng.sample(range(8), 2))
    one, two = slice(a * size, (a + 1) * size), slice(b * size, (b + 1) * size)
    raw[one], raw[two] = raw[two], raw[one]
    return raw


def _claim(raw: bytearray, rng: random.Random) -> bytearray:
    """A header that claims to be huge, or numbers anywhere that do."""
    start = rng.choice([0, 0, rng.randrange(len(raw) - 8)])
    raw[start : start + 8] = rng.choice([2**63 - 1, 2**40, len(raw) + 1]).to_bytes(8, "little")
    return raw


def _digit(raw: bytearray, rng: random.Random) -> bytearray:
    """Another number in the metadata: it stays JSON."""
    digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57]
    raw[rng.choice(digits)] ^= 1
    return raw


DAMAGE: dict[str, Callable[[bytearray, random.Random], bytes]] = {
    "a bit": lambda raw, rng: _flip(raw, rng, 1),
    "some bits": lambda raw, rng: _flip(raw, rng, 9),
    "a digit": _digit,
    "zeros": _zero,
    "an end of zeros": lambda raw, rng: raw[: -(n := rng.randrange(1, 4000))] + bytes(min(n, len(raw))),
    "swapped parts": _swap,
    "a huge size": _claim,
    "cut short": lambda raw, rng: raw[: rng.randrange(len(raw))],
    "cut in front": lambda raw, rng: raw[rng.randrange(1, 200) :],
    "longer": lambda raw, rng: raw + rng.randbytes(rng.randrange(1, 100)),
    "another type": lambda raw, rng: raw.replace(b'"F32"', rng.choice([b'"I32"', b'"U32"', b'"F16"'])),
    "another name": lambda raw, rng: raw.replace(b"sha256", b"sha255"),
}  # fmt: skip
SEEDS = 12


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_or_read_right(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    path = tmp_path / f"whole{kind.suffix}"
    kind.write(path)
    whole, right = path.read_bytes(), kind.read(path)
    assert kind.same(right, kind.read(path))
    damaged, refused = tmp_path / f"damaged{kind.suffix}", 0
    cases = [(how, seed) for how in DAMAGE for seed in range(SEEDS)]
    changed = 0
    for how, seed in cases:
        raw = bytes(DAMAGE[how](bytearray(whole), random.Random(f"{name} {how} {seed}")))
        changed += raw != whole
        damaged.write_bytes(raw)
        try:
            found = kind.read(damaged)
        except ValueError as error:
            refused += 1
            assert damaged.name in str(error), (how, seed)
        else:
            assert kind.same(found, right), (how, seed)
    assert changed >= 100 and refused >= 0.9 * changed, (changed, refused)


FOREIGN = {
    "nothing": b"",
    "a zero": b"\0",
    "zeros": bytes(5000),
    "text": "Grüße\n".encode() * 50,
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "zip": b"PK\x03\x04" + bytes(100),
    "HDF5 alone": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "a length alone": (2**63 - 1).to_bytes(8, "little"),
    "an empty header": (2).to_bytes(8, "little") + b"{}",
    "no object": (2).to_bytes(8, "little") + b"[]",
    "deep JSON": (200_002).to_bytes(8, "little") + b'{"' + b"[" * 200_000,
    "huge tensor": (84).to_bytes(8, "little")
    + b'{"values":{"dtype":"F32","shape":[99999999,99999999,9],"data_offsets":[0,4]}}       '
    + bytes(4),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("content", FOREIGN)
def test_foreign_files_are_refused(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / f"foreign{KINDS[name].suffix}"
    path.write_bytes(FOREIGN[content])
    with pytest.raises(ValueError, match=r"foreign\."):
        KINDS[name].read(path)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_refused(name: str, tmp_path: Path) -> None:
    for other, kind in KINDS.items():
        if other != name:
            path = tmp_path / f"{other}{KINDS[name].suffix}"
            kind.write(tmp_path / f"written{kind.suffix}")
            (tmp_path / f"written{kind.suffix}").replace(path)
            with pytest.raises(ValueError, match=f"{other}[.]"):
                KINDS[name].read(path)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    code = f"cos\nsystem\n(S'touch {touched}'\ntR.".encode()
    for suffix in (".nc", ".safetensors"):
        path = tmp_path / f"code{suffix}"
        path.write_bytes(code)
        with pytest.raises(ValueError, match="code"):
            tv.load(path)
    assert not touched.exists()


# --- safetensors whose metadata are no damage but lies -------------------------------------------


def _lie(path: Path, values: torch.Tensor | None = None, **meta: Any) -> Path:
    """A file of schema 1, which has no checksums, with other metadata."""
    told = {"schema": 1, "site": "resid_post", "layers": [0, 1], "made": {}} | meta
    values = torch.ones(1, 2, 4) if values is None else values
    save_file({"values": values}, path, metadata={"tvlens": json.dumps(told)})
    return path


def test_files_from_before_checksums_are_read(tmp_path: Path) -> None:
    assert tv.load(_lie(tmp_path / "old.safetensors")).layers == (0, 1)


@pytest.mark.parametrize(
    "meta",
    [
        {"schema": value} for value in (0, -1, True, "2", None, 1.5, [1], 3)
    ]
    + [{"layers": value} for value in (None, 3, "01", [0, "1"], [0, 0], [0, 1.0], [-1, 0], {}, [0])]
    + [{"site": value} for value in (None, 1, ["resid_post"])]
    + [{"made": value} for value in (1, "x", [1])]
    + [{"schema": 2}],
)  # fmt: skip
def test_metadata_that_lie_are_refused(meta: dict[str, Any], tmp_path: Path) -> None:
    path = _lie(tmp_path / "lie.safetensors", **meta)
    with pytest.raises(ValueError, match=r"."):
        tv.load(path)
    table = tv.VectorStore(tmp_path).list()
    assert table["problem"].tolist() != [""] or meta == {"layers": [0]}


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_numbers_of_another_type_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    path = _lie(tmp_path / "type.safetensors", torch.ones(1, 2, 4).to(dtype))
    with pytest.raises(ValueError, match=r"."):
        tv.load(path)


# --- netCDF files that reach out ------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("how", ["external link", "soft link", "external data", "virtual", "group"])
def test_nothing_outside_a_result_is_read(how: str, sealed: bool, tmp_path: Path) -> None:
    import hashlib

    import h5py

    path, secret = tmp_path / "result.nc", tmp_path / "secret"
    FakeSweep(sweep_data(layers=6, n=5)).data.to_netcdf(path, engine="h5netcdf")
    secret.write_bytes(bytes(range(80)))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["data"] = np.arange(10.0)
    with h5py.File(path, "r+") as file:
        if how == "external link":
            file["out"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "data")
        elif how == "soft link":
            file["out"] = h5py.SoftLink("/regular")
        elif how == "external data":
            file.create_dataset("out", (10,), "f8", external=[(str(secret), 0, 80)])
        elif how == "virtual":
            layout = h5py.VirtualLayout((10,), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "data", (10,))
            file.create_virtual_dataset("out", layout)
        else:
            file.create_group("out")["inside"] = h5py.ExternalLink(
                str(tmp_path / "other.h5"), "data"
            )
    if sealed:
        content = path.read_bytes()
        seal = f"\ntvlens sha256 {hashlib.sha256(content).hexdigest()}\n"
        path.write_bytes(content + seal.encode())
    with pytest.raises(ValueError, match="'out' is|of 'out' are not in it"):
        tv.load(path)


def test_a_result_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    import h5py

    path = tmp_path / "result.nc"
    FakeSweep(sweep_data(layers=6, n=5)).data.to_netcdf(path, engine="h5netcdf")
    with h5py.File(path, "r+") as file:
        file.create_dataset("huge", (10**6, 10**6), "f8", chunks=(1000, 1000))
    with pytest.raises(ValueError, match=r"'huge' has shape \(1000000, 1000000\), more than"):
        tv.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"a":' * 10**5,
        '{"schema": ' + "1" * 10**4 + "}",
        '{"schema": 1e999}',
        '{"schema": -1, "kind": "fake_sweep"}',
        '{"schema": 0, "kind": "fake_sweep"}',
        '{"schema": 1, "kind": ["fake_sweep"]}',
        '{"schema": 1, "kind": {"a": 1}}',
        '{"schema": NaN}',
        "",
    ],
)
def test_hostile_provenance(text: str, tmp_path: Path) -> None:
    path = tmp_path / "result.nc"
    data = sweep_data(layers=6, n=5).assign_attrs(tvlens=text)
    data.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(ValueError, match=r"cannot read .*result\.nc"):
        tv.load(path)


def test_a_result_written_anew_elsewhere_is_no_more_the_saved_one(tmp_path: Path) -> None:
    path = FakeSweep(sweep_data(layers=6, n=5)).save(tmp_path / "a.nc")
    opened = xr.load_dataset(path, engine="h5netcdf")  # any reader of netCDF takes the file
    opened["hypothesis"][0, 0] = ~opened["hypothesis"][0, 0]
    opened.to_netcdf(tmp_path / "b.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="its checksum is missing"):
        tv.load(tmp_path / "b.nc")
    assert "tvlens_sha256_at_end" not in tv.load(path).data.attrs


def test_results_from_before_checksums_are_read() -> None:
    path = Path(__file__).parent / "data" / "icl_stylised.nc"
    assert b"tvlens sha256" not in path.read_bytes() and isinstance(tv.load(path), Result)


# --- task files -----------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
own_form = st.fixed_dictionaries(
    {"items": st.dictionaries(mixed, mixed | st.lists(mixed, max_size=3), min_size=1, max_size=6)},
    optional={
        "name": st.just("odd") | texts,
        "family": st.just("odd") | texts,
        "spaced": st.booleans() | st.integers(),
        "reverse": json_values,
        "source": texts,
        "strange": texts,
    },
)
pairs = st.dictionaries(mixed, mixed, min_size=2, max_size=6)
cells = st.one_of(mixed, st.text(',"\n\r\t ab', max_size=6))


def _read(suffix: str, content: bytes) -> Task | None:
    """The task in a file; nothing where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"odd{suffix}"
        path.write_bytes(content)
        try:
            return Task.from_file(path)
        except ValueError as error:
            assert f"odd{suffix}" in str(error)
            return None


@house
@given(st.one_of(pairs, own_form, json_values))
def test_json_tasks(told: Any) -> None:
    task = _read(".json", json.dumps(told).encode())
    if task is None:
        return
    items = told["items"] if isinstance(told.get("items"), dict) else told
    expected = {x: tuple(y) if isinstance(y, list) else (y,) for x, y in items.items()}
    assert dict(task.answers) == expected
    again = _read(".json", json.dumps({x: list(ys) for x, ys in task.answers.items()}).encode())
    assert again is not None and dict(again.answers) == expected


@house
@given(st.sampled_from([".json", ".csv"]), st.binary(max_size=200) | texts.map(str.encode))
def test_any_bytes_as_a_task(suffix: str, content: bytes) -> None:
    _read(suffix, content)


@house
@given(st.lists(st.lists(cells, min_size=1, max_size=3), max_size=6))
def test_csv_tasks(rows: list[list[str]]) -> None:
    import csv
    import io

    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    task = _read(".csv", text.getvalue().encode("utf-8", "surrogatepass"))
    if task is not None:
        stripped = [[cell.strip() for cell in row] for row in rows]
        header = stripped.index(["input", "output"]) if ["input", "output"] in stripped else None
        kept = [r for i, r in enumerate(stripped) if any(r) and i != header]
        assert [[x, ys[0]] for x, ys in task.answers.items()] == kept


@pytest.mark.parametrize(
    "content",
    [
        "[" * 10**6,
        '{"a":' * 10**5,
        '{"a": ' + "9" * 10**4 + ', "b": "c"}',
        '{"a": 1e400, "b": "c"}',
        '{"a": NaN, "b": "c"}',
        '{"items": {"a": "b", "c": "d"}, "name": "../../etc"}',
        '{"items": {"a": "b", "c": "d"}, "name": "a/b"}',
        '{"a": "\\ud800", "b": "c"}',
        '{"a": "b", "a": "c"}',
    ],
    ids=range(9),
)
def test_hostile_json_tasks(content: str) -> None:
    assert _read(".json", content.encode()) is None


def test_a_reverse_in_a_task_file_names_no_file(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    (tmp_path / "secret.json").write_text('{"a": "secret", "b": "secret2"}')
    told = {"items": {"a": "b", "c": "d"}, "reverse": {"name": "../secret.json", "description": ""}}
    path.write_text(json.dumps(told))
    assert dict(Task.from_file(path).answers) == {"a": ("b",), "c": ("d",)}
    with pytest.raises(ValueError, match="unknown task"):
        tv.load_task("../../tests/data/secret")


# --- templates and prompts ------------------------------------------------------------------------


@house
@given(
    st.one_of(
        texts,
        st.tuples(texts, texts, texts).map(lambda t: t[0] + "{x}" + t[1] + "{y}" + t[2]),
    ),
    st.sampled_from(["auto", "always", "never"]),
)
def test_templates(text: str, spacing: str) -> None:
    try:
        template = Template(text, spacing)
    except ValueError as error:
        assert "a template needs one {x} and, after it, one {y}" in str(error)
        assert (
            text.count("{x}") != 1
            or text.count("{y}") != 1
            or text.index("{x}") > text.index("{y}")
        )
        return
    written = "".join(piece for piece, _ in template.demo_segments("{y}", "{x}"))
    before, rest = text.split("{x}")
    plain = before + "{y}" + rest.replace("{y}", "{x}")
    assert written == plain or (
        spacing == "always" and written.replace(" ", "") == plain.replace(" ", "")
    )
    prompt, lead = template.query("q")
    assert (prompt + lead).startswith(template.pieces[0] + "q")
    assert get_template(template) is template


TOKENIZERS = {
    "characters": tiny_tokenizer,
    "gpt2": lambda: tiny.tokenizer("gpt2"),
    "llama": lambda: tiny.tokenizer("llama"),
    "gemma3": lambda: tiny.tokenizer("gemma3"),
    "qwen2": lambda: tiny.tokenizer("qwen2"),
}


def _check_batch(encoder: Encoder, batch: Any) -> None:
    """Tokens spell the text, roles stand for tokens, and padding is on the left."""
    for row, text in enumerate(batch.text):
        real, roles = batch.mask[row], batch.roles[row]
        assert bool((real[1:] >= real[:-1]).all()) and bool((roles[~real] == int(Role.PAD)).all())
        ids = batch.tokens[row][real].tolist()
        if encoder.bos is not None:
            assert ids[0] == encoder.bos and roles[real][0] == int(Role.BOS)
            ids = ids[1:]
        assert roles[-1] == int(Role.LAST) and (roles == int(Role.LAST)).sum() == 1
        spelt = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if encoder.tokenizer is tiny_tokenizer():
            spelt = "".join(encoder.tokenizer.convert_ids_to_tokens(ids))
        # Llama's puts a space before every first word that has none, and takes one off again.
        assert spelt == text or (
            encoder.tokenizer is tiny.tokenizer("llama") and f" {spelt}" == text
        )


@pytest.mark.parametrize("name", TOKENIZERS)
@fewer
@given(
    answers=st.dictionaries(mixed, mixed, min_size=4, max_size=8),
    template=st.sampled_from(["example", "arrow", "{x} {y}\n", "\u202e{x}:{y}|", "{x}👩‍👧{y}\0"]),
    seed=st.integers(0, 3),
)
def test_prompts_of_any_words(name: str, answers: dict[str, str], template: str, seed: int) -> None:
    encoder = Encoder.of(TOKENIZERS[name]())
    try:
        task = Task("odd", "custom", {x: (y,) for x, y in answers.items()})
        prompts = tv.build_prompts(
            task, encoder.tokenizer, shots=1, n=3, n_dummy=1, template=template, seed=seed
        )
    except ValueError as error:
        assert str(error)
        return
    for batch in (prompts.regular, *prompts.dummies, prompts.zero_shot):
        _check_batch(encoder, batch)
    for i, (text, query) in enumerate(zip(prompts.zero_shot.text, prompts.queries, strict=True)):
        assert query in text and prompts.answers[i] == task.answers[query]
        if name == "characters":  # one token for each character, so the query's are the query
            of = prompts.zero_shot.roles[i] == int(Role.QUERY)
            ids = prompts.zero_shot.tokens[i][of].tolist()
            assert "".join(encoder.tokenizer.convert_ids_to_tokens(ids)) == query


@pytest.mark.parametrize("name", TOKENIZERS)
@house
@given(st.lists(st.tuples(texts, st.sampled_from(list(Role)[1:6])), min_size=1, max_size=4))
def test_any_pieces_as_a_prompt(name: str, pieces: list[tuple[str, Role]]) -> None:
    encoder = Encoder.of(TOKENIZERS[name]())
    try:
        batch = encoder.batch([pieces, [("a", Role.OTHER)]])
    except ValueError as error:
        assert "has no tokens" in str(error) or "has no token for" in str(error)
        return
    _check_batch(encoder, batch)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "tiny"])
def test_ten_thousand_tokens_are_too_many(kind: str) -> None:
    model = tiny_model() if kind == "tiny" else tiny.model(kind)
    long = " ".join("abcdefghij"[i % 10] for i in range(10_000))
    answers = {long: ("a",), **{f"{c}": (c,) for c in "bcdefgh"}}
    with pytest.raises(ValueError, match="a prompt has .* tokens, but the model's context is"):
        tv.build_prompts(
            Task("long", "custom", answers, spaced=False), model, shots=0, n=8, answers="any", n_dummy=0,
            queries=[long],
        )  # fmt: skip
    with pytest.raises(ValueError, match="context"):
        tv.logit_lens(model, long)


def test_words_that_the_tokenizer_does_not_know() -> None:
    model = tiny_model()
    answers = {c: (c.upper(),) for c in "abcdefgh"}
    some = Task("some", "custom", {**answers, "é": ("E",), "i": ("İ", "I"), "j": ("J", "Ĵ")})
    prompts = tv.build_prompts(some, model, shots=1, n=10, n_dummy=0)
    assert prompts.facts["n_unknown"] == 2 and prompts.facts["n_items"] == 9
    unk = model.tokenizer.unk_token_id
    assert unk not in prompts.tokens[prompts.regular.mask]
    assert all(unk not in ids for ids in prompts.answer_ids)  # Ĵ is no right answer of j
    with pytest.raises(ValueError, match="no tokens for 2 of the items, e.g. 'é'"):
        tv.build_prompts(Task("none", "custom", {"é": ("e",), "ü": ("u",)}), model, shots=0, n=1)
    with pytest.raises(ValueError, match=r"no token for '⇒' of the prompt"):
        tv.build_prompts("to_upper", model, shots=1, n=2, template="{x}⇒{y}\\n")
    with pytest.raises(ValueError, match=r"no token for 'é' of the prompt 'caf"):
        tv.logit_lens(model, "café")


@pytest.mark.parametrize(
    "note", ["[]", "3", "null", "[" * 10**6, "{", '{"schema": 99}', '{"schema": 0}']
)
def test_a_note_of_an_unpacked_model_that_says_nothing_is_none(note: str, tmp_path: Path) -> None:
    from tvlens.models._known import KNOWN
    from tvlens.models._wheels import folder_of, is_cached

    known = KNOWN["smollm2-135m"]
    path = folder_of(known, tmp_path) / "tvlens.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 1}')
    assert is_cached(known, tmp_path)
    path.write_text(note)
    assert not is_cached(known, tmp_path)  # so it is unpacked anew


def test_finite() -> None:
    """What `json` calls numbers and are none become null in provenance."""
    told = json.loads(provenance.encode({"schema": 1, "a": math.nan, "b": [math.inf]}))
    assert told == {"schema": 1, "a": None, "b": [None]}
