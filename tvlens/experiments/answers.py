"""First token or whole answer? The same prompts judged both ways, with demonstrations and with theta.

Theta goes into the last token of the prompt, and steers the first token of the answer. Where an answer has
several tokens, the rest must follow from that one, and so must its end: nothing else of the prompt says what
an answer looks like.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvlens.answers import AnswerScores, score_answers
from tvlens.experiments._dev import accuracy_by_layer, resolved
from tvlens.extraction import extract
from tvlens.models import load_model
from tvlens.prompts import build_prompts
from tvlens.scoring import of_queries
from tvlens.sites import check_layer
from tvlens.tasks import Task
from tvlens.templates import Template

if TYPE_CHECKING:
    import pandas as pd

TASKS = ("en_fr", "en_es", "person_language", "country_capital")


def whole_answers(
    model: Any,
    tasks: Sequence[Task | str] = TASKS,
    *,
    layer: int | None = None,
    shots: int = 5,
    n: int = 50,
    n_dev: int = 30,
    template: str | Template = "example",
    seed: int = 0,
) -> "pd.DataFrame":
    """Set first-token accuracy against exact match, for demonstrations, theta, and its controls.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: Tasks, or their names; all items are used, however long their answers.
        layer: Where theta goes in; by default the layer at which it answers most dev queries.
        shots: Demonstrations a prompt.
        n: Test prompts a task.
        n_dev: Dev prompts a task that choose the layer.
        template: How a demonstration is written, see `tvlens.Template`.
        seed: Decides all prompts and the random vector.

    Returns:
        One row per task and run (regular, theta, random, baseline): task, run, layer, first (accuracy by
        first token), begins (the text begins with an accepted answer), exact, each with ``_low`` and
        ``_high`` of its 95 % interval; stopped (share of texts that came to an end by themselves), several
        (share of prompts whose likeliest accepted answer has several tokens), first_several and
        exact_several (the same accuracies among those), log_prob (mean, in nats), log_prob_token.

    Raises:
        ValueError: Unknown names, the same task twice, a layer outside the model, or a task too small.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> table = whole_answers(tiny_model(), ["country_capital"], layer=1, n=3, shots=2)
        >>> table["run"].tolist()
        ['regular', 'theta', 'random', 'baseline']

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, who score first tokens.
    """
    import pandas as pd

    model = load_model(model) if isinstance(model, str) else model
    how = {"shots": shots, "template": template, "answers": "any", "seed": seed}
    rows = []
    for task in resolved(tasks).values():
        if layer is None:
            dev = build_prompts(task, model, n=n_dev, split="dev", **how)
            at = int(accuracy_by_layer(model, dev).argmax())
        else:
            at = check_layer(layer, model.cfg.n_layers)
        prompts = build_prompts(task, model, n=n, split="test", **how)
        theta = extract(model, prompts, layers=[at])
        bare = {"view": "zero_shot", "layer": at}
        runs = {
            "regular": score_answers(model, prompts),
            "theta": score_answers(model, prompts, vector=theta, **bare),
            "random": score_answers(model, prompts, vector=theta.random_like(seed=seed), **bare),
            "baseline": score_answers(model, prompts, view="zero_shot"),
        }
        rows += [
            {"task": task.name, "run": run, "layer": at, **_row(scores)}
            for run, scores in runs.items()
        ]
    return pd.DataFrame(rows)


def _row(scores: AnswerScores) -> dict[str, float]:
    """Accuracies of one run."""
    row: dict[str, float] = {}
    for name in ("first", "begins", "exact"):
        rate = getattr(scores, name).float().mean().item()
        parts = zip(("", "_low", "_high"), (rate, *of_queries(rate, scores.queries)), strict=True)
        row |= {f"{name}{part}": value for part, value in parts}
    several = scores.n_tokens > 1
    return row | {
        "stopped": scores.stopped.float().mean().item(),
        "several": several.float().mean().item(),
        "first_several": scores.first[several].float().mean().item(),
        "exact_several": scores.exact[several].float().mean().item(),
        "log_prob": scores.log_prob.mean().item(),
        "log_prob_token": scores.mean_log_prob.mean().item(),
    }
