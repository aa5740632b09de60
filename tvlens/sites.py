"""The one vocabulary of hook sites: which activations have a name, and where a model keeps them.

A site is a place that every layer has, such as the residual stream after the block. Users say
``site="resid_post"``; the spellings TransformerLens models use for it live here and nowhere else. A
HookedTransformer has one. A TransformerBridge has names of its own and, as aliases that upstream may
remove, the HookedTransformer's as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tvlens._errors import unknown, whole


@dataclass(frozen=True)
class Site:
    """One kind of activation that each layer has.

    Attributes:
        name: The word used throughout tvlens.
        hook: The hook point's name in a HookedTransformer, with the layer to be filled in.
        native: Its names in a TransformerBridge; the first that a model has is meant.
        dims: Names of the axes after batch and position.
        meaning: What the activation is, in a few words.
    """

    name: str
    hook: str
    native: tuple[str, ...]
    dims: tuple[str, ...]
    meaning: str


def _site(
    name: str, hook: str, native: tuple[str, ...], dims: tuple[str, ...], meaning: str
) -> Site:
    block = "blocks.{layer}."
    return Site(name, block + hook, tuple(block + name for name in native), dims, meaning)


_MODEL, _HEAD = ("d_model",), ("head", "d_head")

SITES: dict[str, Site] = {
    site.name: site
    for site in (
        _site("resid_pre", "hook_resid_pre", ("hook_in",), _MODEL, "residual before a block"),
        _site(
            "resid_mid",
            "hook_resid_mid",
            ("ln2.hook_in", "mlp.hook_in"),
            _MODEL,
            "residual after attention",
        ),
        _site("resid_post", "hook_resid_post", ("hook_out",), _MODEL, "residual after a block"),
        # With norms after the layers, what is added to the residual is what they give.
        _site(
            "attn_out",
            "hook_attn_out",
            ("ln1_post.hook_out", "attn.hook_out"),
            _MODEL,
            "what attention adds",
        ),
        _site(
            "mlp_out",
            "hook_mlp_out",
            ("ln2_post.hook_out", "mlp.hook_out"),
            _MODEL,
            "what the MLP adds",
        ),
        _site("z", "attn.hook_z", ("attn.o.hook_in",), _HEAD, "head outputs before W_O"),
        _site("q", "attn.hook_q", ("attn.q.hook_out",), _HEAD, "queries"),
        _site("k", "attn.hook_k", ("attn.k.hook_out",), _HEAD, "keys"),
        _site("v", "attn.hook_v", ("attn.v.hook_out",), _HEAD, "values"),
        _site(
            "pattern",
            "attn.hook_pattern",
            ("attn.hook_pattern",),
            ("head", "key"),
            "attention weights",
        ),
    )
}


def hook_name(site: str, layer: int) -> str:
    """Give the hook point's name of a site in a layer of a HookedTransformer.

    Args:
        site: A name from `SITES`.
        layer: The layer, from 0.

    Returns:
        The name, e.g. ``"blocks.3.hook_resid_post"``.

    Raises:
        ValueError: The site is unknown; the nearest names are offered.

    Example:
        >>> hook_name("resid_post", 3)
        'blocks.3.hook_resid_post'
    """
    if site not in SITES:
        raise unknown("site", site, SITES)
    return SITES[site].hook.format(layer=layer)


def native_names(site: str, layer: int) -> tuple[str, ...]:
    """Give the names that a site in a layer may have in a TransformerBridge, the likeliest first.

    Args:
        site: A name from `SITES`.
        layer: The layer, from 0.

    Returns:
        The names.

    Raises:
        ValueError: The site is unknown; the nearest names are offered.

    Example:
        >>> native_names("attn_out", 3)
        ('blocks.3.ln1_post.hook_out', 'blocks.3.attn.hook_out')
    """
    if site not in SITES:
        raise unknown("site", site, SITES)
    return tuple(name.format(layer=layer) for name in SITES[site].native)


def check_layer(layer: int, n_layers: int) -> int:
    """Turn a layer that may count from the end into one from 0, or say what is valid.

    Args:
        layer: The layer asked for; -1 is the last.
        n_layers: How many the model has.

    Returns:
        The layer, 0 to n_layers - 1.

    Raises:
        ValueError: The layer is outside the model.
        TypeError: It is no whole number.

    Example:
        >>> check_layer(-1, 12)
        11
    """
    layer = whole("layer", layer)
    if not -n_layers <= layer < n_layers:
        raise ValueError(
            f"layer {layer} asked for, but this model has {n_layers} layers: 0 to {n_layers - 1} "
            f"(or -{n_layers} to -1, from the end)."
        )
    return layer % n_layers


def check_layers(layers: int | Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """Turn one layer, several, or none for all of them into a list without repetitions.

    Args:
        layers: The layers asked for; negative ones count from the last.
        n_layers: How many the model has.

    Returns:
        Layers from 0, in the order given.

    Raises:
        ValueError: A layer is outside the model, or there is none.

    Example:
        >>> check_layers([0, -1, 0], 12), check_layers(None, 2)
        ((0, 11), (0, 1))
    """
    given = range(n_layers) if layers is None else layers
    given = [given] if isinstance(given, int) else list(given)
    if not given:
        raise ValueError("layers is empty; leave it out for all layers.")
    return tuple(dict.fromkeys(check_layer(layer, n_layers) for layer in given))
