"""What the panel shows, computed: a prompt seen through the logit lens, and a run with one state changed.

The stream of a prompt is read once and kept; a change is one run of the engine. What is written is a step
from the state that stands there towards another one, so that a strength of 0 changes nothing and 1 replaces.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, Read, Request, run
from tvlens.lens.measures import log_probabilities
from tvlens.models.runner import Runner, runner
from tvlens.patching.pairs import real_tokens, spelled

STREAM = "resid_post"
# Rows whose distributions are computed together: enough for a matrix product, little memory.
_ROWS = 128
_WIDEST = 40  # tokens that a screen has room for


@dataclass(frozen=True, eq=False)
class Map:
    """What the logit lens says of each state, by layer and by token that is shown.

    Attributes:
        top_id: Likeliest tokens, best first.
        top_probability: Their probabilities.
        answer_probability: Probability of the token that is followed; NaN without one.
    """

    top_id: Int[Tensor, "layer shown rank"]
    top_probability: Float[Tensor, "layer shown rank"]
    answer_probability: Float[Tensor, "layer shown"]


@dataclass(frozen=True, eq=False)
class Scene:
    """A prompt, and what every layer would say after each of its tokens.

    Attributes:
        prompt: The prompt.
        tokens: Its tokens as text.
        first: The first position that is shown; long prompts are cut on the left.
        resid: The residual stream after every block.
        map: The stream through the lens.
        seconds: How long it took.
    """

    prompt: TokenBatch
    tokens: tuple[str, ...]
    first: int
    resid: Float[Tensor, "layer position d_model"]
    map: Map
    seconds: float


@dataclass(frozen=True, eq=False)
class Effect:
    """What a change does to the next token, and to the lens.

    Attributes:
        words: The likeliest next tokens of both runs, the likeliest first.
        before: Their probabilities without the change.
        after: Their probabilities with it.
        answer_before: The followed token's probability without the change; NaN without such a token.
        answer_after: The same with it.
        distance: How far the state was moved, as a share of its length.
        map: The lens after the change; the scene's own where nothing was changed, or no map asked for.
        seconds: How long it took.
    """

    words: tuple[str, ...]
    before: Float[Tensor, " word"]
    after: Float[Tensor, " word"]
    answer_before: float
    answer_after: float
    distance: float
    map: Map
    seconds: float


class Desk:
    """A model, and how to look into it at once.

    Args:
        model: A TransformerLens model.
        k: How many of the likeliest tokens are kept.
    """

    def __init__(self, model: Any, *, k: int = 6) -> None:
        self.model, self.k = model, min(k, int(model.cfg.d_vocab))
        self.drive: Runner = runner(model)

    @torch.no_grad()
    def scene(self, prompt: TokenBatch, *, answer: int | None = None) -> Scene:
        """Read a prompt's stream, and look at it through the logit lens.

        Args:
            prompt: One prompt.
            answer: A token id that is followed.

        Returns:
            The scene.
        """
        started = time.perf_counter()
        reads = (Read(STREAM, tuple(range(self.drive.n_layers)), None),)
        (output,) = run(self.model, [Request(prompt, reads=reads)])
        resid = output.activations[0][0, 0]
        tokens = tuple(spelled(self.model, real_tokens(prompt)[0]))
        first = max(0, len(tokens) - _WIDEST)
        seen = self._through_lens(resid[:, first:], answer)
        return Scene(prompt, tokens, first, resid, seen, time.perf_counter() - started)

    @torch.no_grad()
    def effect(
        self,
        scene: Scene,
        written: Float[Tensor, " d_model"] | None,
        *,
        layer: int,
        position: int,
        strength: float = 1.0,
        mode: str = "replace",
        answer: int | None = None,
        whole_map: bool = False,
    ) -> Effect:
        """Run a scene's prompt with one state changed.

        Args:
            scene: The scene.
            written: What is written; None changes nothing.
            layer: After which block.
            position: At which token, from 0.
            strength: 0 changes nothing, 1 replaces the state or adds the vector once.
            mode: ``"replace"`` or ``"add"``.
            answer: A token id that is followed.
            whole_map: Whether the lens is computed anew wherever the change can reach.

        Returns:
            What it does.
        """
        started = time.perf_counter()
        own, last, seen = scene.resid[layer, position], scene.resid[-1, -1], scene.map
        step = torch.zeros_like(own)
        if written is not None:
            there = written.to(own)
            step = strength * (there - own if mode == "replace" else there)
            edit = Edit(STREAM, layer, (own + step)[None], position=position)
            above = range(layer if whole_map else self.drive.n_layers - 1, self.drive.n_layers)
            request = Request(scene.prompt, ((edit,),), (Read(STREAM, tuple(above), None),))
            (output,) = run(self.model, [request])
            resid = output.activations[0][0, 0]
            last = resid[-1, -1]
            if whole_map:
                start = max(position, scene.first)
                seen = _pasted(seen, self._through_lens(resid[:, start:], answer))
        logp = log_probabilities(self.drive, torch.stack([scene.resid[-1, -1], last])).cpu()
        share = logp.exp()
        either = share.amax(dim=0).topk(self.k).indices
        before, after = share[:, either]
        return Effect(
            words=tuple(spelled(self.model, either.tolist())),
            before=before,
            after=after,
            answer_before=float("nan") if answer is None else float(share[0, answer]),
            answer_after=float("nan") if answer is None else float(share[1, answer]),
            distance=float(step.norm() / own.norm().clamp_min(1e-30)),
            map=seen,
            seconds=time.perf_counter() - started,
        )

    def written(
        self, prompt: TokenBatch, *, layer: int, position: int
    ) -> Float[Tensor, " d_model"]:
        """Read one state of a prompt, to write it elsewhere.

        Args:
            prompt: One prompt.
            layer: After which block.
            position: At which token.

        Returns:
            The state.
        """
        (output,) = run(self.model, [Request(prompt, reads=(Read(STREAM, (layer,), position),))])
        return output.activations[0][0, 0, 0]

    def _through_lens(
        self, resid: Float[Tensor, "layer position d_model"], answer: int | None
    ) -> Map:
        parts: list[tuple[Tensor, ...]] = []
        for rows in rearrange(resid, "layer position d -> (layer position) d").split(_ROWS):
            logits = self.drive.logits(rows).float()
            # A softmax over the whole vocabulary, of which a few tokens are kept.
            total = logits.logsumexp(dim=-1, keepdim=True)
            best, ids = logits.topk(self.k, dim=-1)
            followed = total * torch.nan if answer is None else logits[:, [answer]]
            parts.append(
                (ids.cpu(), (best - total).exp().cpu(), (followed - total)[:, 0].exp().cpu())
            )
        joined = [torch.cat(each) for each in zip(*parts, strict=True)]
        pattern = "(layer position) ... -> layer position ..."
        return Map(*(rearrange(each, pattern, layer=len(resid)) for each in joined))


def _pasted(old: Map, new: Map) -> Map:
    """Put what changed over the upper right corner of a map: a change reaches nothing below or before it."""
    layers, shown = new.answer_probability.shape

    def paste(below: Tensor, above: Tensor) -> Tensor:
        both = below.clone()
        both[-layers:, -shown:] = above
        return both

    return Map(
        paste(old.top_id, new.top_id),
        paste(old.top_probability, new.top_probability),
        paste(old.answer_probability, new.answer_probability),
    )
