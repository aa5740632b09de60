"""Extract a task vector: what the demonstrations leave behind at the last token.

While the model reads [S, x'], it must work out at the last token what to do with x'. Read the residual
stream there, after every block, average over a few dummy queries x', and x' fades while the task stays:
theta(S).
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from tvlens.engine import Output, Read, Request, run
from tvlens.models.runner import runner
from tvlens.prompts import Prompts, check_prompts
from tvlens.sites import SITES, check_layer
from tvlens.vectors import TaskVector


def extract(
    model: Any,
    prompts: Prompts,
    *,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    position: int = -1,
    plan: str = "auto",
    memory: int | None = None,
) -> TaskVector:
    """Read theta(S) of every prompt's demonstrations, as Hendel et al. do.

    Args:
        model: A TransformerLens model.
        prompts: Prompts with at least one dummy query each.
        site: Where to read; a site of width d_model.
        layers: Which layers, negative ones from the end; all if not given.
        position: Token position; -1 is the last token.
        plan: How the engine runs the prompts, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        One theta for each set of demonstrations and layer, averaged over the dummy queries.

    Raises:
        ValueError: No dummy queries, an unknown site, or a layer outside the model.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=3, n=4)
        >>> tv.extract(model, prompts).values.shape == (4, model.cfg.n_layers, model.cfg.d_model)
        True

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 3.1.
    """
    requests = dummy_requests(model, prompts, site=site, layers=layers, position=position)
    return average(model, prompts, requests, run(model, requests, plan=plan, memory=memory))


def dummy_requests(
    model: Any,
    prompts: Prompts,
    *,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    position: int = -1,
) -> list[Request]:
    """What `extract` asks the engine for, so that other requests can share the same run."""
    check_prompts(prompts)
    if not prompts.dummies:
        raise ValueError(
            "theta is read on dummy queries, but these prompts have none. "
            "Make them with build_prompts(..., n_dummy=2)."
        )
    stepper = runner(model)
    if site in SITES and SITES[site].dims != ("d_model",):
        wide = ", ".join(name for name, known in SITES.items() if known.dims == ("d_model",))
        raise ValueError(
            f"a task vector is read from a site of width d_model: {wide}; not {site!r}."
        )
    asked = range(stepper.n_layers) if layers is None else layers
    wanted = tuple(check_layer(layer, stepper.n_layers) for layer in asked)
    read = Read(site, wanted, position)
    return [Request(dummy, reads=(read,)) for dummy in prompts.dummies]


def average(
    model: Any, prompts: Prompts, requests: Sequence[Request], outputs: Sequence[Output]
) -> TaskVector:
    """Average what was read on the dummy queries, and note where it came from."""
    from tvlens.models import facts

    read = requests[0].reads[0]
    each = torch.stack([output.activations[0][0] for output in outputs])
    return TaskVector(
        values=each.mean(dim=0),
        layers=read.layers,
        site=read.site,
        made={
            **facts(model).origin,
            "position": read.position,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **{k: v for k, v in prompts.facts.items() if k != "ambiguous"},
        },
    )
