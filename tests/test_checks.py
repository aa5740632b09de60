"""The checks under which every other test runs: they are on, and find what jaxtyped alone would find."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

import tvlens as tv
from tests.checks import cheaper
from tvlens.vectors import TaskVector

# What the hook puts on tvlens is the cheaper one; the original is found in its own module.
from jaxtyping._decorator import jaxtyped  # isort: skip


def test_checks_of_tvlens_are_on() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        tv.load_task(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxtyping.TypeCheckError, match="prompt layer d_model"):
        TaskVector(torch.zeros(3, 8), (0, 1, 2))


@pytest.mark.parametrize("how", [jaxtyped, cheaper(jaxtyped)], ids=["jaxtyped", "cheaper"])
def test_wrong_arguments_returns_and_fields_are_found(how: Callable[..., Any]) -> None:
    check = how(typechecker=beartype)

    @check
    def plain(x: int, *, names: tuple[str, ...] = ()) -> int:
        return x if x else "no number"  # pyright: ignore[reportReturnType]

    @check
    def shaped(x: Float[Tensor, "row d"], y: Float[Tensor, "d"]) -> Float[Tensor, " row"]:  # noqa: F821
        return x @ y

    @check
    def of_one_not_known(x: "NotKnown") -> None: ...  # noqa: F821  # pyright: ignore

    @check
    def several(n: int) -> Iterator[int]:
        yield from range(n)

    @check
    @dataclass
    class Fields:
        name: str
        values: Float[Tensor, "row d"] | None = None

    @check
    @dataclass
    class Names:
        names: dict[str, int]

    assert plain(3, names=("a",)) == 3 and shaped(torch.ones(2, 3), torch.ones(3)).tolist() == [
        3,
        3,
    ]
    assert of_one_not_known(3) is None and list(several(3)) == [0, 1, 2]
    assert Fields("a", torch.ones(2, 3)).name == "a" and Names({"a": 1}).names == {"a": 1}
    assert plain.__annotations__["x"] is int and plain.__wrapped__.__name__ == "plain"
    for wrong in (
        lambda: plain("3"),
        lambda: plain(3, names=(1,)),
        lambda: plain(0),
        lambda: shaped(torch.ones(2, 3), torch.ones(2)),
        lambda: several("3"),
        lambda: Fields(3),
        lambda: Fields("a", torch.ones(3)),
        lambda: Names({1: 1}),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            wrong()
