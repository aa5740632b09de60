"""A check of memory: what a layer sweep and a patching sweep take here, by the engine's own costs."""

import os
from importlib import import_module
from importlib.util import find_spec

import torch

from tvlens.checking.subject import Subject
from tvlens.checking.table import Measured, NotApplicable, check
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, Request
from tvlens.engine.layout import lay_out
from tvlens.engine.memory import peak_memory
from tvlens.engine.plain import run_plain
from tvlens.engine.planner import _bytes, _obstacle, _pieces, default_memory

_PROMPTS = 50  # of a layer sweep
_LENGTH = 40  # tokens of a prompt with five demonstrations
_SITES = ("resid_pre", "attn_out", "mlp_out")  # of a patching sweep


@check(
    "memory",
    what="bytes that a sweep will take beside the weights, against those that are free",
    means="A sweep may run out of memory: give memory= fewer bytes, or load the model in half precision.",
    needs=("supported",),
)
def memory(subject: Subject) -> Measured:
    """Ask the planner what a layer sweep and a full patching sweep would hold at their peak."""
    drive = subject.drive
    weights = sum(p.numel() * p.element_size() for p in subject.model.parameters())
    allowed = subject.memory if subject.memory is not None else default_memory(drive.device)
    length = min(_LENGTH, getattr(subject.model.cfg, "n_ctx", None) or _LENGTH)
    if _obstacle(drive) is None:
        sweep, patching = (
            _planned(subject, request, allowed) for request in _requests(subject, length)
        )
    else:
        one = _one_forward(subject, length)
        sweep, patching = one * _PROMPTS, one
    needed = min(max(sweep, patching), allowed)
    note = (
        f"weights {_said(weights)}; in one piece a layer sweep of {_PROMPTS} prompts {_said(sweep)}, a "
        f"patching sweep of one {_said(patching)}, {length} tokens each; run in parts of at most "
        f"{_said(allowed)}"
    )
    return Measured(float(needed), float(free_memory(drive.device)), note)


def _requests(subject: Subject, length: int) -> list[Request]:
    """A layer sweep over some prompts, and a patching sweep of one prompt over positions and sites."""
    drive, layers = subject.drive, range(subject.drive.n_layers)
    ids = torch.arange(_PROMPTS * length).reshape(_PROMPTS, length) % subject.model.cfg.d_vocab
    many, one = TokenBatch.of_ids(ids), TokenBatch.of_ids(ids[:1])
    values = torch.zeros(1, *drive.site_shape("resid_post"), dtype=drive.dtype)
    swept = tuple((Edit("resid_post", layer, values),) for layer in layers)
    patched = tuple(
        (Edit(site, layer, values, position),)
        for site in _SITES
        for layer in layers
        for position in range(length)
    )
    return [
        Request(many, swept, readout=FirstToken(((0,),) * _PROMPTS)),
        Request(one, patched, readout=FirstToken(((0,),))),
    ]


def _planned(subject: Subject, request: Request, allowed: int) -> int:
    """Bytes that the engine expects a request to hold in one piece, its logits included."""
    drive = subject.drive
    layout = lay_out([request], n_layers=drive.n_layers, whole=False)
    pieces = _pieces(drive, layout, allowed)
    logits = pieces.logits * int(subject.model.cfg.d_vocab) * drive.dtype.itemsize
    return _bytes(drive, [request], layout, pieces) + logits


def _one_forward(subject: Subject, length: int) -> int:
    """Bytes that one forward of a typical prompt takes, measured."""
    ids = torch.arange(length)[None] % subject.model.cfg.d_vocab
    with peak_memory(subject.drive.device) as peak:
        run_plain(subject.drive, [Request(TokenBatch.of_ids(ids))])
    return peak.bytes


def free_memory(device: torch.device) -> int:
    """Give the memory that is free where a model is.

    Args:
        device: Where its weights are.

    Returns:
        Bytes: of the GPU, or of the machine, with what the system would give up, where psutil can say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if find_spec("psutil") is not None:
        return int(import_module("psutil").virtual_memory().available)
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        raise NotApplicable("this system does not say what is free: pip install psutil")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _said(size: int) -> str:
    """Write a number of bytes for people."""
    n = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return ""
