"""Inject a task vector: put theta into a run that never saw the demonstrations.

`inject` puts hooks on the model for the length of a ``with`` block, so that everything run there is
steered: a plain ``model("...")``, ``model.generate``, another tvlens function, your own hooks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tvlens.engine import Edit
from tvlens.models.runner import runner
from tvlens.sites import check_layer
from tvlens.vectors import TaskVector, check_vector


@contextmanager
def inject(
    model: Any,
    vector: TaskVector,
    *,
    layer: int,
    mode: str = "replace",
    scale: float = 1.0,
    position: int = -1,
) -> Iterator[Any]:
    """Steer everything that runs inside the ``with`` block.

    While text is generated with a key-value cache, the vector goes into the prompt and not into every new
    token, which would make each of them the last token once more: it steers the first new token, and the
    rest follow from that. A run that continues a cache is steered if nothing was steered before it.

    Args:
        model: A TransformerLens model.
        vector: What to inject. With one set of demonstrations it goes into every row; with several, row i
            gets vector i, and batches must have exactly as many rows.
        layer: Where; negative counts from the last layer.
        mode: ``"replace"`` as in Hendel et al., or ``"add"``.
        scale: Factor on the vector.
        position: Token position; -1 is the last token, also of left-padded rows. Positions from the start
            are taken for single rows only.

    Yields:
        The same model.

    Raises:
        ValueError: Another width or processing, a layer that is not in the vector or the model, an unknown
            mode, or a position that a prompt does not have.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> theta = tv.extract(model, tv.build_prompts(tv.load_task("to_upper"), model, n=4)).mean()
        >>> with tv.inject(model, theta, layer=1):
        ...     logits = model("example:q->")

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 3.2.
    """
    check_vector(vector, model)
    layer = check_layer(layer, model.cfg.n_layers)
    if (vector.site, layer) == ("resid_pre", 0):
        raise ValueError(
            "layer 0's resid_pre is the embedding; inject from its resid_post upwards."
        )
    edit = Edit(vector.site, layer, vector.at(layer), position=position, mode=mode, scale=scale)
    driver = runner(model)
    if not driver.has(vector.site, layer):
        raise ValueError(f"this model has no site {vector.site!r} at layer {layer}.")
    continues, steered = [False], [False]

    def watch(pattern: Tensor, hook: Any) -> None:
        # More keys than queries: the earlier tokens come from a cache.
        continues[0] = pattern.shape[-1] > pattern.shape[-2]

    def write(activation: Tensor, hook: Any) -> Tensor:
        skip, continues[0] = continues[0] and steered[0], False
        if skip:
            return activation
        _check_rows(len(edit.given), position, activation)
        steered[0] = True
        changed = activation.clone()
        new = edit.scale * edit.given.to(activation)
        changed[:, position] = new if edit.mode == "replace" else new + activation[:, position]
        return changed

    hooks = [
        (driver.hook_name("pattern", 0), watch),
        (driver.hook_name(vector.site, layer), write),
    ]
    with driver.hooked(hooks):
        yield model


def _check_rows(n_vectors: int, position: int, activation: Tensor) -> None:
    """Refuse a batch that the vector or the position does not fit."""
    rows, width = activation.shape[:2]
    if n_vectors not in (1, rows):
        raise ValueError(
            f"this vector has {n_vectors} sets of demonstrations, but the batch has {rows} "
            "rows. Give one row for each, or take .mean()."
        )
    if not -width <= position < width:
        raise ValueError(
            f"position {position} asked for, but this prompt has {width} tokens: "
            f"{-width} to {width - 1}."
        )
    if position >= 0 and rows > 1:
        raise ValueError(
            f"position {position} counts from the start, where rows may be padded; "
            "count from the end (-1 is the last token), or run one row."
        )
