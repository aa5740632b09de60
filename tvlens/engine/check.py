"""What a request may ask of a model, checked before anything runs."""

from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor

from tvlens.engine.request import Edit, Read, Request, Taken
from tvlens.models.runner import Runner
from tvlens.sites import SITES, check_layer


def check(requests: Sequence[Request], runner: Runner) -> None:
    """Refuse what the model or the prompts do not have.

    Args:
        requests: What is asked.
        runner: The model.

    Raises:
        ValueError: With what was asked, what arrived, and what there is.
    """
    if not requests or len({len(request.batch) for request in requests}) != 1:
        sizes = ", ".join(str(len(request.batch)) for request in requests) or "no request"
        raise ValueError(f"a run needs requests of equally many prompts; {sizes} arrived.")
    for request in requests:
        if not request.cells:
            raise ValueError("a request needs at least one cell; ((),) is the clean run.")
        lengths = request.batch.lengths.tolist()
        _check_edits(request, requests, runner, lengths)
        for read in request.reads:
            _check_read(read, runner, lengths)
        columns = request.readout.columns if request.readout is not None else None
        if columns is not None and len(columns) != len(lengths):
            raise ValueError(
                f"a readout of some tokens needs them for {len(lengths)} prompts; "
                f"they arrived for {len(columns)}."
            )


def _check_edits(
    request: Request, requests: Sequence[Request], runner: Runner, lengths: list[int]
) -> None:
    """Look at everything that occurs in the edits once, for there may be thousands of them."""
    places, shapes, positions, others = set(), {}, set(), {}
    for cell in request.cells:
        for edit in cell:
            places.add((edit.site, edit.layer))
            every = edit.position is None
            shape = None
            if isinstance(edit.values, Taken):
                others.setdefault((edit.values.request, edit.site), set()).add(edit.position)
            else:
                shape = edit.values.shape
            shapes.setdefault((edit.site, edit.head, every, shape), edit)
            if edit.where is not None:
                _check_where(edit.where, edit.position, lengths)
            elif not every:
                positions.add(edit.position)
    for site, layer in places:
        _check_place(site, layer, runner)
    for edit in shapes.values():
        _check_shape(edit, runner, lengths)
    for position in positions:
        _check_position(position, lengths)
    for (other, site), found in others.items():
        _check_taken(other, site, found, requests, lengths)


def _check_taken(
    other: int,
    site: str,
    positions: set[int | None],
    requests: Sequence[Request],
    lengths: list[int],
) -> None:
    if site == "pattern":
        raise ValueError("attention weights cannot be taken from another run: read them first.")
    if not 0 <= other < len(requests):
        raise ValueError(
            f"values are to be taken from request {other}, but the requests of this run are 0 to "
            f"{len(requests) - 1}."
        )
    theirs = requests[other].batch.lengths.tolist()
    if None in positions and theirs != lengths:
        raise ValueError(
            f"values of every position are to be taken from request {other}, whose prompts have "
            f"{theirs} tokens where these have {lengths}."
        )


def _check_where(where: Bool[Tensor, " prompt"], position: int | None, lengths: list[int]) -> None:
    if where.shape != (len(lengths),):
        raise ValueError(
            f"where needs one truth value for each of {len(lengths)} prompts; "
            f"shape {tuple(where.shape)} arrived."
        )
    if position is not None:
        active = [n for n, there in zip(lengths, where.tolist(), strict=True) if there]
        _check_position(position, active)


def _check_shape(edit: Edit, runner: Runner, lengths: list[int]) -> None:
    wanted = runner.site_shape(edit.site)
    if edit.head is not None:
        if not 0 <= edit.head < wanted[0]:
            raise ValueError(
                f"head {edit.head} asked for, but {edit.site!r} has {wanted[0]} heads in this "
                f"model: 0 to {wanted[0] - 1}."
            )
        wanted = wanted[1:]
    if isinstance(edit.values, Taken):
        return
    if len(edit.values) not in (1, len(lengths)):
        raise ValueError(
            f"an edit needs values for 1 or {len(lengths)} prompts; {len(edit.values)} arrived."
        )
    found = tuple(edit.values.shape[1:])
    longest = max(lengths)
    if edit.position is None:
        if not found or 1 < found[0] < longest or not found[0]:
            raise ValueError(
                f"an edit of every position needs values for 1 or {longest} positions, after those "
                f"for prompts; {found[0] if found else 'none'} arrived."
            )
        found = found[1:]
    if edit.site == "pattern":
        if not found or found[-1] < longest:
            raise ValueError(
                f"an edit of 'pattern' needs a weight for each of {longest} keys; "
                f"{found[-1] if found else 'none'} arrived."
            )
        found = found[:-1]
    if found != wanted:
        raise ValueError(
            f"an edit of {edit.site!r} needs values of shape {wanted} for each prompt; "
            f"{found} arrived. Was the vector made by another model?"
        )


def _check_read(read: Read, runner: Runner, lengths: list[int]) -> None:
    if not read.layers:
        raise ValueError(f"a read of {read.site!r} needs at least one layer.")
    for layer in read.layers:
        _check_place(read.site, layer, runner)
    if read.position is not None:
        _check_position(read.position, lengths)


def _check_position(position: int, lengths: list[int]) -> None:
    shortest = min(lengths, default=0)
    if lengths and not -shortest <= position < shortest:
        raise ValueError(
            f"position {position} asked for, but the shortest prompt has {shortest} tokens: "
            f"{-shortest} to {shortest - 1}."
        )


def _check_place(site: str, layer: int, runner: Runner) -> None:
    if check_layer(layer, runner.n_layers) != layer:
        raise ValueError(f"the layers of edits and reads count from 0; {layer} arrived.")
    if not runner.has(site, layer):
        there = [name for name in SITES if runner.has(name, layer)]
        raise ValueError(f"this model has no site {site!r}; it has {', '.join(there)}.")
