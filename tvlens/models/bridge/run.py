"""Running a TransformerBridge, whole or in parts."""

from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.models.bridge.hooks import has_user_hooks, hook_point, hooked
from tvlens.models.bridge.parts import (
    BridgeBlock,
    d_head,
    indivisible,
    inside,
    kv_heads,
    norm,
    text_config,
)
from tvlens.models.bridge.rotary import Rotary, make_rotary, rotary_of
from tvlens.models.hooked.config import UnsupportedModelError
from tvlens.sites import hook_name, native_names

_indivisible: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_read_out: WeakSet[Any] = WeakSet()


class _Done(Exception):
    """Carries the residual stream out of a forward pass that needs to go no further."""

    def __init__(self, resid: Tensor) -> None:
        self.resid = resid


class BridgeRunner:
    """Drives a TransformerBridge through its own forward, or through the modules underneath in parts."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg
        self.n_layers: int = model.cfg.n_layers
        self._rotary: dict[str, Rotary] = {}
        self._blocks: dict[int, BridgeBlock] = {}
        self._points: dict[tuple[str, int], str | None] = {}
        self._width = 0
        self._check_readout()

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return inside(self.model.embed).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream."""
        return inside(self.model.embed).weight.dtype

    @property
    def steppable(self) -> bool:
        """Whether the model can be run in parts: nothing in it that `BridgeBlock` does not know."""
        if self.model not in _indivisible:
            _indivisible[self.model] = indivisible(self.model)
        return not _indivisible[self.model]

    def has_user_hooks(self) -> bool:
        """Whether someone's own hooks sit on the model; the bridge and its libraries have some of theirs."""
        return has_user_hooks(self.model)

    def site_shape(self, site: str) -> tuple[int, ...]:
        """Shape of a site's activation after batch and position; of ``pattern``, without its keys."""
        cfg = self.cfg
        heads = {"z": cfg.n_heads, "q": cfg.n_heads, "k": kv_heads(cfg), "v": kv_heads(cfg)}
        if site == "pattern":
            return (cfg.n_heads,)
        return (heads[site], d_head(cfg)) if site in heads else (cfg.d_model,)

    def has(self, site: str, layer: int) -> bool:
        """Whether the model has this site: models with parallel attention have no resid_mid."""
        return self._name(site, layer) is not None

    def hook_name(self, site: str, layer: int) -> str:
        """Name of the hook point where the model keeps a site: its own rather than the alias."""
        return self._name(site, layer) or hook_name(site, layer)

    def _name(self, site: str, layer: int) -> str | None:
        """The name of a site's hook point, looked up once."""
        if (site, layer) not in self._points:
            self._points[site, layer] = self._look_up(site, layer)
        return self._points[site, layer]

    def _look_up(self, site: str, layer: int) -> str | None:
        if site == "resid_mid" and type(self.model.blocks[layer]).__name__ == "ParallelBlockBridge":
            return None
        legacy = hook_name(site, layer)
        alias = hook_point(self.model, legacy)
        for name in native_names(site, layer):
            point = hook_point(self.model, name)
            # Where they differ, the alias is the adapter's word on this architecture.
            if point is not None and (alias is None or alias is point):
                return name
        return None if alias is None else legacy

    def hooked(self, hooks: list[tuple[str, Any]]) -> AbstractContextManager[None]:
        """Context in which functions sit on hook points, beside the user's own."""
        return hooked(self.model, hooks)

    def whole(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Int[Tensor, "row position"],
        hooks: list[tuple[str, Any]],
    ) -> Float[Tensor, "row position d_model"]:
        """Run every block over left-padded prompts through the model's own forward, with hooks."""
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        with self.hooked([*self._finite_scores(), *hooks]):
            return self._run_up_to(self._last_norm, tokens, attention_mask=mask, position=position)

    def _finite_scores(self) -> list[tuple[str, Any]]:
        """Keep padding from becoming NaN in double precision."""
        # Hugging Face takes its softmax in single precision, where such masked scores are -inf.
        if self.dtype != torch.float64:
            return []
        lowest = torch.finfo(torch.float32).min
        names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(self.n_layers)]
        there = [name for name in names if hook_point(self.model, name) is not None]
        return [(name, lambda scores, hook: scores.clamp_min(lowest)) for name in there]

    @property
    def _last_norm(self) -> Any:
        return getattr(self.model, "ln_final", None)

    def _run_up_to(
        self, module: Any, tokens: Tensor, *, attention_mask: Tensor | None, position: Tensor
    ) -> Tensor:
        """Run the model's forward up to a module, and give what reaches it."""
        options: dict[str, Any] = {"position_ids": position} if self._takes_positions else {}

        def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Done(args[0] if args else kwargs["hidden_states"])

        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model.original_model(
                input_ids=tokens, attention_mask=attention_mask, use_cache=False, **options
            )
        except _Done as done:
            return done.resid
        finally:
            handle.remove()
        raise RuntimeError("the model's forward never reached its blocks and last norm")

    @cached_property
    def _takes_positions(self) -> bool:
        from inspect import signature

        return "position_ids" in signature(self.model.original_model.forward).parameters

    def prepare(self, width: int) -> None:
        """Have tables of rotary angles for prompts of this many tokens."""
        self._width = max(width, self._width)
        for rotary in self._rotary.values():
            rotary.grow(self._width)

    @torch.no_grad()
    def embed(
        self, tokens: Int[Tensor, " token"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """Embed tokens that stand at these positions of their prompts."""
        # Each token as a prompt of its own: the model does what it does before its first block.
        resid = self._run_up_to(
            self.model.blocks[0],
            tokens[:, None],
            attention_mask=None,
            position=position[:, None],
        )
        return resid[:, 0]

    def embed_position(
        self, tokens: Int[Tensor, " token"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """Give that part of `embed` which is an embedding of the position; zeros where there is none."""
        name = "pos_embed.hook_out"
        kept: list[Tensor] = []
        if hook_point(self.model, name) is not None:
            with self.hooked([(name, lambda out, hook: kept.append(out))]):
                self.embed(tokens, position)
        if not kept:
            return torch.zeros(len(tokens), self.cfg.d_model, device=self.device, dtype=self.dtype)
        return kept[0].detach().flatten(0, -2).expand(len(tokens), -1).to(self.device)

    def block(self, layer: int) -> BridgeBlock:
        """Give one block in parts."""
        if layer not in self._blocks:
            name, _ = rotary_of(self.model, layer)
            if name is not None and name not in self._rotary:
                self._rotary[name] = make_rotary(self.model, name)
                self._rotary[name].grow(self._width)
            rotary = None if name is None else self._rotary[name]
            self._blocks[layer] = BridgeBlock(self.model, layer, rotary)
        return self._blocks[layer]

    def logits(
        self,
        resid: Float[Tensor, "row d_model"],
        columns: Int[Tensor, "row column"] | None = None,
    ) -> Float[Tensor, "row column"]:
        """Read final residuals out through final norm, unembedding, scale and soft cap."""
        return self._logits(resid, columns)

    @torch.no_grad()
    def _check_readout(self) -> None:
        """Compare the read-out with the model's own, once a model: some scale their logits in other ways."""
        if self.model in _read_out or self.has_user_hooks():
            return
        if self._last_norm is None:
            kind = type(self.model.original_model).__name__
            raise UnsupportedModelError(f"this {kind} has no last norm that tvlens knows.")
        tokens = torch.tensor([[3, 5]], device=self.device)
        found = self._logits(self.whole(tokens, torch.ones_like(tokens), [])[0], None)
        out = self.model.original_model(input_ids=tokens, use_cache=False)
        wanted = getattr(out, "logits", out)[0].to(found)
        away = float((found - wanted).norm() / wanted.norm())
        if not away < (1e-3 if self.dtype.itemsize >= 4 else 0.05):
            raise UnsupportedModelError(
                f"logits read out of this {type(self.model.original_model).__name__} are not its own: "
                f"they are {away:.1e} of their norm away. Its last norm or the scale of its logits "
                "is none that tvlens knows."
            )
        _read_out.add(self.model)

    def _logits(self, resid: Tensor, columns: Tensor | None) -> Tensor:
        logits = self.unembed(self.last_norm(resid), columns)
        cap = self.soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    @property
    def soft_cap(self) -> float:
        """Bound of the logits; 0 where there is none."""
        return max(float(getattr(self.cfg, "output_logits_soft_cap", None) or 0.0), 0.0)

    def last_norm(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Give final residuals as the unembedding reads them."""
        # Where blocks are spread, an unembedding tied to the embedding may stand apart from the last norm.
        normed = norm(self._last_norm)(_beside(self._last_norm, resid))
        return _beside(inside(self.model.unembed), normed)

    def unembed(
        self,
        normed: Float[Tensor, "row d_model"],
        columns: Int[Tensor, "row column"] | None = None,
    ) -> Float[Tensor, "row column"]:
        """Unembed what `last_norm` gives, scaled as the model does, up to the soft cap."""
        unembed = inside(self.model.unembed)
        if columns is None:
            logits = unembed(normed)
        else:
            columns = columns.to(normed.device)
            logits = torch.einsum("rd,rcd->rc", normed, F.embedding(columns, unembed.weight))
            if unembed.bias is not None:
                logits = logits + unembed.bias[columns]
        config = text_config(self.model)
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)
        return logits / (getattr(config, "logits_scaling", None) or 1.0)


def _beside(module: Any, x: Tensor) -> Tensor:
    """Bring numbers to where a module's weights are, unless these are on their way from elsewhere."""
    weight = next(iter(module.parameters()), None)
    return x if weight is None or weight.is_meta else x.to(weight.device)
