"""A task as pairs of prompts: the way every search for a circuit begins.

A clean prompt has one right answer. A corrupted one differs in a detail, has equally many tokens, and has
another answer or none. What the model does differently on the two is the behaviour, and which parts carry
the difference is the circuit. Before looking for it, see that the model does the task at all.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens._errors import needs
from tvlens.engine import Request, run
from tvlens.intervals import bootstrap, wilson
from tvlens.metrics import METRICS, VALUE, Targets, WithTop
from tvlens.patching.pairs import answer_ids, as_batch, check_pairs, distinct
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

_KEYS = ("clean", "corrupted", "answers", "wrong")
RUNS = ("clean", "corrupted")
Answer = str | int | Sequence[str | int]
"""An answer as a text or a token id, or several that are all right (or all wrong)."""


@dataclass(frozen=True)
class Contrast:
    """Pairs of prompts with right and wrong answers.

    ``tv.patch(model, **contrast)`` takes it as it is.

    Attributes:
        clean: Prompts whose answer is to be explained.
        corrupted: For each, one that differs in a detail and has equally many tokens.
        answers: The right answer to each clean prompt.
        wrong: The wrong answer that it is compared with.
        name: What the task is called.
        labels: More that is known of each prompt, by name.

    Raises:
        ValueError: There are no prompts, or not equally many of everything.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> contrast = Contrast(("a->A b->",), ("a->a b->",), ("B",), ("b",))
        >>> dict(tv.patch(tiny_model(), **contrast).data["value"].sizes)
        {'site': 1, 'layer': 2, 'position': 8, 'prompt': 1}
    """

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    answers: tuple[Answer, ...]
    wrong: tuple[Answer, ...]
    name: str = "contrast"
    labels: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {key: len(self[key]) for key in _KEYS}
        sizes |= {name: len(values) for name, values in self.labels.items()}
        if not self.clean or len(set(sizes.values())) != 1:
            said = ", ".join(f"{size} {name}" for name, size in sizes.items())
            raise ValueError(
                f"a contrast needs equally many of everything, at least 1; got {said}."
            )

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, key: str) -> Any:
        """Give clean or corrupted prompts, answers or wrong answers, as `keys` names them."""
        if key not in _KEYS:
            raise KeyError(key)
        return getattr(self, key)

    def keys(self) -> tuple[str, ...]:
        """Names of the arguments that `tvlens.patch` takes."""
        return _KEYS


class Behaviour(Result):
    """What a model does on the pairs of a contrast, prompt by prompt."""

    kind: ClassVar[str] = "behaviour"
    references: ClassVar[tuple[str, ...]] = ("wang2023interpretability",)
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "difference": ("run", "prompt"),
        "correct": ("run", "prompt"),
    }
    method: ClassVar[str] = (
        "Logit difference: logit of the right answer less that of the wrong one, of several their means. "
        "Preferred: it is above zero. Said: the likeliest of all tokens is a right answer. Corrupted prompts "
        "are measured with the clean prompts' answers. Intervals, 95 %: bootstrap over prompts; Wilson."
    )

    def means(self) -> dict[str, tuple[float, float, float]]:
        """Give the key numbers with their ends.

        Returns:
            Mean, lower and upper end: ``preferred`` and ``said`` (shares of clean prompts), ``difference``
            and ``corrupted`` (logit differences of clean and of corrupted prompts).

        Example:
            >>> found.means()["difference"]  # doctest: +SKIP
        """
        clean = self.data.sel(run="clean")
        found = {}
        for name, right in (("preferred", clean["difference"] > 0), ("said", clean["correct"] > 0)):
            found[name] = (float(right.mean()), *wilson(int(right.sum()), right.size))
        for name, each in (("difference", "clean"), ("corrupted", "corrupted")):
            values = self.data["difference"].sel(run=each).values
            found[name] = (float(values.mean()), *bootstrap(values))
        return found

    @property
    def title(self) -> str:
        """The task and the model."""
        return f"{self.provenance['task']}: {self.provenance['model']}"

    def finding(self) -> str:
        """How often the model is right, and by how much, in one sentence."""
        said = {
            name: f"{mean:.2f} ({low:.2f} to {high:.2f})"
            for name, (mean, low, high) in self.means().items()
        }
        n = self.data.sizes["prompt"]
        return (
            f"Right answer preferred in {said['preferred']} of {n} prompts and said in {said['said']}; logit "
            f"difference {said['difference']}, in corrupted prompts {said['corrupted']}."
        )

    def summary(self) -> dict[str, Any]:
        """The key numbers with their ends."""
        made = self.provenance
        found: dict[str, Any] = {"task": made["task"], "model": made["model"]}
        for name, (mean, low, high) in self.means().items():
            found |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        return found | {"n_prompts": self.data.sizes["prompt"], "seconds": made["seconds"]}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the logit differences; see `tvlens.plots.heads.logit_differences`."""
        from tvlens.plots.heads import logit_differences

        means = self.means()
        shown = {"clean": means["difference"], "corrupted": means["corrupted"]}
        data = self.data.assign_attrs(finding=self.finding(), means=shown)
        return logit_differences(data, **channels)


def behaviour(
    model: Any, contrast: Contrast, *, plan: str = "auto", memory: int | None = None
) -> Behaviour:
    """See whether a model does a task, before looking for the circuit that does it.

    Args:
        model: A TransformerLens model.
        contrast: Pairs of prompts with answers.
        plan: The engine's plan, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        Logit difference, and whether the likeliest token is right, for every clean and corrupted prompt.

    Raises:
        ValueError: A pair has unequal lengths, or answers are no tokens or cannot be told apart.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> contrast = Contrast(("a->A b->",), ("a->a b->",), ("B",), ("b",))
        >>> dict(behaviour(tiny_model(), contrast).data["difference"].sizes)
        {'run': 2, 'prompt': 1}

    References:
        Wang et al. 2022, arXiv:2211.00593.
    """
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    started = time.perf_counter()
    needs("contrast", contrast, Contrast, "a Contrast, as tv.ioi_prompts(model) gives")
    batches = [as_batch(model, contrast[name], name=name) for name in RUNS]
    check_pairs(model, *batches)
    right = answer_ids(model, batches[0], contrast.answers)
    other = answer_ids(model, batches[0], contrast.wrong, name="wrong")
    distinct(model, right, other)
    readout = WithTop(METRICS["logit_difference"].readout(Targets(len(contrast), right, other)), 1)
    asked = [Request(batch, readout=readout) for batch in batches]
    outputs = run(model, asked, plan=plan, memory=memory)
    difference = np.stack([each.values[VALUE][0].float().cpu().numpy() for each in outputs])
    said = np.stack([each.values["top"][0, :, 0].cpu().numpy() for each in outputs])
    correct = [[token in ids for token, ids in zip(row, right, strict=True)] for row in said]
    labels = {
        name: ("prompt", np.array([str(v) for v in values], dtype=object))
        for name, values in contrast.labels.items()
    }
    texts = {f"{name}_text": ("prompt", np.array(contrast[name], dtype=object)) for name in RUNS}
    note = collect(
        kind=Behaviour.kind, task=contrast.name, model=facts(model).name, n_prompts=len(contrast),
        model_facts=facts(model).to_dict(), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    data = xr.Dataset(
        {
            "difference": (("run", "prompt"), difference),
            "correct": (("run", "prompt"), np.array(correct)),
        },
        coords={"run": list(RUNS), **texts, **labels},
    )
    return Behaviour(data.assign_attrs({ATTRIBUTE: encode(note)}))
