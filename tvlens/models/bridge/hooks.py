"""Functions on a bridge's hook points, and whose functions sit there already.

A bridge's own ways to add hooks cost milliseconds and differ between releases. What a function sees here is
what a HookedTransformer has at that place, and what it changes has the effect it would have there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens.models.bridge.parts import d_head, kv_heads
from tvlens.sites import hook_name, native_names

# Hooks that these put on modules are not the user's.
_LIBRARIES = ("transformer_lens", "transformers", "accelerate", "torch")


def hook_point(model: Any, name: str) -> Any:
    """Give a bridge's hook point by name, native or alias; None if it has none of this name.

    Args:
        model: A TransformerBridge.
        name: The name, e.g. ``"blocks.3.attn.q.hook_out"``.

    Returns:
        The hook point.
    """
    found = model
    for part in name.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part, None)
        if found is None:
            return None
    return found if hasattr(found, "fwd_hooks") else None


@contextmanager
def hooked(model: Any, hooks: list[tuple[str, Any]]) -> Iterator[None]:
    """Put functions on hook points, after the user's own, and take them away again.

    Args:
        model: A TransformerBridge.
        hooks: Names of hook points, and functions as TransformerLens takes them.

    Raises:
        ValueError: The model has no hook point of a name.
    """
    added: list[tuple[Any, Any]] = []

    def add(point: Any, function: Any, *, first: bool = False) -> None:
        point.add_hook(function, prepend=first)
        added.append((point, point.fwd_hooks[0 if first else -1]))

    try:
        for name, function in hooks:
            point = hook_point(model, name)
            if point is None:
                raise ValueError(f"this model has no hook point {name!r}.")
            site, layer = _site_of(name)
            if site == "resid_mid":
                function = _Carried(function)
                add(model.blocks[layer].hook_out, function.add, first=True)
            elif site in ("z", "q", "k", "v"):
                heads = model.cfg.n_heads if site in ("z", "q") else kv_heads(model.cfg)
                function = partial(_in_heads, function, heads=(heads, d_head(model.cfg)))
            add(point, function)
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def has_user_hooks(model: Any) -> bool:
    """Say whether someone's own hooks sit on a bridge; the bridge and its libraries have some of theirs.

    Args:
        model: A TransformerBridge.

    Returns:
        Whether there are any, on hook points or on any module.
    """
    # Hugging Face's tree and the bridge's share most modules; this walk sees each of them once.
    seen: set[int] = set()
    ahead = [model, model.original_model]
    while ahead:
        module = ahead.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        if (module._forward_hooks or module._forward_pre_hooks) and _has_users(module):
            return True
        ahead += module._modules.values()
    return False


class _Carried:
    """A function on resid_mid, where a bridge shows what the MLP reads, and not the stream itself.

    What the function changes there is added to the stream after the block as well, where it has gone in a
    HookedTransformer.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.change: Tensor | None = None

    def __call__(
        self, resid: Float[Tensor, "batch position d_model"], hook: Any
    ) -> Float[Tensor, "batch position d_model"]:
        """Let the function change what the MLP reads, and note the change."""
        # A copy: a change in place would reach the stream as well, and be added to it twice.
        own = resid.clone()
        changed = self.function(own, hook=hook)
        own = own if changed is None else changed
        self.change = own - resid
        return own

    def add(
        self, resid: Float[Tensor, "batch position d_model"], hook: Any
    ) -> Float[Tensor, "batch position d_model"] | None:
        """Add the change to the residual after the block."""
        change, self.change = self.change, None
        if change is None or not (change.requires_grad or change.any()):
            return None
        return resid + change


def _site_of(name: str) -> tuple[str | None, int]:
    """Which site and layer a hook point's name stands for."""
    if not name.startswith("blocks."):
        return None, 0
    layer = int(name.split(".")[1])
    for site in ("resid_mid", "z", "q", "k", "v"):
        if name in (hook_name(site, layer), *native_names(site, layer)):
            return site, layer
    return None, layer


def _in_heads(function: Any, activation: Tensor, hook: Any, *, heads: tuple[int, int]) -> Any:
    """Call a function with heads as an axis of their own, where a bridge keeps them side by side."""
    if activation.shape[-2:] == heads:
        return function(activation, hook=hook)
    apart, beside = "batch position head d_head", "batch position (head d_head)"
    result = function(rearrange(activation, f"{beside} -> {apart}", head=heads[0]), hook=hook)
    return None if result is None else rearrange(result, f"{apart} -> {beside}")


def _has_users(module: Any) -> bool:
    """Whether one of a module's hooks is someone's own rather than a library's."""
    if hasattr(module, "fwd_hooks"):
        # A hook point: what sits there is asked for, but for a bridge's own permanent relays.
        own = [
            handle
            for handle in module.fwd_hooks
            if handle.is_permanent and not _is_users(getattr(handle, "user_hook", None))
        ]
        return len(module._forward_hooks) + len(module._forward_pre_hooks) > len(own)
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(map(_is_users, hooks))


def _is_users(hook: Any) -> bool:
    """Whether a function is someone's own rather than a library's."""
    while isinstance(hook, partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.split(".")[0] not in _LIBRARIES
