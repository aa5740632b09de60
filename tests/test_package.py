"""The package as a whole: light imports, one direction of imports, the shape switch, examples that run."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tvlens"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_import_is_light() -> None:
    code = (
        "import time; t = time.perf_counter(); import tvlens; s = time.perf_counter() - t; import sys; "
        "print(s, *[m for m in ('torch', 'transformer_lens', 'xarray', 'plotly') if m in sys.modules])"
    )
    seconds, *heavy = min(
        (python(code).stdout.split() for _ in range(3)), key=lambda out: float(out[0])
    )
    assert heavy == []
    assert float(seconds) <= 0.3


@pytest.mark.parametrize("module", ["tvlens.tasks", "tvlens.plots", "tvlens.cli", "tvlens.reports"])
def test_no_torch_where_none_is_needed(module: str) -> None:
    done = python(f"import {module}, sys; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves() -> None:
    import tvlens

    for name in tvlens.__all__:
        assert getattr(tvlens, name) is not None
    assert set(tvlens.__all__) <= set(dir(tvlens))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tvlens.nonsense  # noqa: B018


def test_editors_see_the_names_that_load_lazily() -> None:
    import tvlens

    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    lines = re.findall(r"^    from (\S+) import (\w+) as \2$", source, re.M)
    seen = {name: home for home, name in lines}
    assert {n: h for n, h in seen.items() if h != "tvlens"} == tvlens._HOME
    assert tuple(n for n, h in seen.items() if h == "tvlens") == tvlens._MODULES


# A module may import from its own rank and from lower ones.
RANKS = [
    {
        "_errors",
        "_registry",
        "_typing",
        "_files",
        "_netcdf",
        "_tensors",
        "_words",
        "provenance",
        "intervals",
    },
    {"sites", "tasks", "models"},
    {"templates"},
    {"encoding"},
    {"prompts"},
    {"engine"},
    {"vectors"},
    {
        "extraction",
        "injection",
        "scoring",
        "answers",
        "metrics",
        "store",
        "learning",
        "linear_maps",
    },
    {"plots"},
    {"results", "citations"},
    {"patching"},
    {"lens", "attribution", "circuits", "checking"},
    {"function_vectors"},
    {"methods"},
    {"experiments"},
    {"icl"},
    {"executors"},
    {"sweeps"},
    {"reports", "pages", "testing", "widget"},
    {"exercises"},
    {"cli", "_terminal"},
]


def _imports(path: Path) -> set[str]:
    """Modules of tvlens that a file imports when it is itself imported."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tvlens"):
            part = node.module.split(".")
            found |= {part[1]} if len(part) > 1 else {a.name for a in node.names}
    return found


def test_imports_point_one_way() -> None:
    rank = {name: i for i, names in enumerate(RANKS) for name in names}
    seen = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")}
    assert seen - {"__init__"} <= set(rank), "a new part needs its place in RANKS"
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for other in _imports(path):
            assert rank[other] <= rank[part], f"{path.name} of {part} imports {other}"
            if part == "plots":
                assert other in {"plots", "intervals", "provenance", "_errors", "_words"}


@pytest.mark.slow
def test_the_shape_switch_names_the_axis_and_is_off_by_default() -> None:
    code = (
        "import torch, tvlens as tv; from tvlens.vectors import TaskVector; "
        "TaskVector(torch.zeros(3, 8), (0, 1, 2))"
    )
    on = python(code, TVLENS_CHECK_SHAPES="1")
    assert on.returncode and "prompt layer d_model" in on.stderr and "TypeCheckError" in on.stderr
    off = python(code, TVLENS_CHECK_SHAPES="0")
    assert "TypeCheckError" not in off.stderr


def _public_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Public functions, and public methods of public classes; not functions inside functions."""
    scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_")]
    return [
        n for s in scopes for n in s.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"
    ]


def test_every_public_tensor_signature_is_jaxtyped() -> None:
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        for function in _public_functions(ast.parse(path.read_text(encoding="utf-8"))):
            arguments = (*function.args.args, *function.args.kwonlyargs)
            for hint in filter(None, [*(a.annotation for a in arguments), function.returns]):
                shaped, n = re.subn(r"\w+\[(torch\.)?Tensor, '[^']*'\]", "", ast.unparse(hint))
                seen += n
                # Dictionaries of tensors have no one shape, and a result's variables have any.
                bare = shaped if function.name != "to_tensor" else ""
                bare = re.sub(r"(dict|Mapping)\[str, Tensor\]", "", bare)
                assert not re.search(r"(?<!\w)Tensor\b", bare), (
                    f"{path.name}: {function.name}: {bare}"
                )
    assert seen >= 25


def test_version_is_said_once() -> None:
    import tomllib

    import tvlens

    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == tvlens.__version__


def test_nothing_prints_asserts_pickles_or_shows() -> None:
    forbidden = re.compile(r"^\s*(assert |print\()|\.show\(\)|import pickle|torch\.load\(", re.M)
    for path in PACKAGE.rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        outside = re.sub(r'"""[\s\S]*?"""', "", code)
        assert not forbidden.search(outside), path
