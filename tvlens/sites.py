"""The one vocabulary of hook sites: which activations have a name, and where a model keeps them.

A site is a place that every layer has, such as the residual stream after the block. Users say
``site="resid_post"``; the spelling a TransformerLens model uses for it lives here and nowhere else.
"""

from dataclasses import dataclass

from tvlens._errors import unknown


@dataclass(frozen=True)
class Site:
    """One kind of activation that each layer has.

    Attributes:
        name: The word used throughout tvlens.
        hook: The hook point's name, with the layer to be filled in.
        dims: Names of the axes after batch and position.
        meaning: What the activation is, in a few words.
    """

    name: str
    hook: str
    dims: tuple[str, ...]
    meaning: str


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site("resid_pre", "blocks.{layer}.hook_resid_pre", ("d_model",), "residual before a block"),
        Site(
            "resid_mid", "blocks.{layer}.hook_resid_mid", ("d_model",), "residual after attention"
        ),
        Site(
            "resid_post", "blocks.{layer}.hook_resid_post", ("d_model",), "residual after a block"
        ),
        Site("attn_out", "blocks.{layer}.hook_attn_out", ("d_model",), "what attention adds"),
        Site("mlp_out", "blocks.{layer}.hook_mlp_out", ("d_model",), "what the MLP adds"),
        Site("z", "blocks.{layer}.attn.hook_z", ("head", "d_head"), "head outputs before W_O"),
        Site("q", "blocks.{layer}.attn.hook_q", ("head", "d_head"), "queries"),
        Site("k", "blocks.{layer}.attn.hook_k", ("head", "d_head"), "keys"),
        Site("v", "blocks.{layer}.attn.hook_v", ("head", "d_head"), "values"),
    )
}


def hook_name(site: str, layer: int) -> str:
    """Give the hook point's name of a site in a layer.

    Args:
        site: A name from `SITES`.
        layer: The layer, from 0.

    Returns:
        The name TransformerLens uses, e.g. ``"blocks.3.hook_resid_post"``.

    Raises:
        ValueError: The site is unknown; the nearest names are offered.

    Example:
        >>> hook_name("resid_post", 3)
        'blocks.3.hook_resid_post'
    """
    if site not in SITES:
        raise unknown("site", site, SITES)
    return SITES[site].hook.format(layer=layer)


def check_layer(layer: int, n_layers: int) -> int:
    """Turn a layer that may count from the end into one from 0, or say what is valid.

    Args:
        layer: The layer asked for; -1 is the last.
        n_layers: How many the model has.

    Returns:
        The layer, 0 to n_layers - 1.

    Raises:
        ValueError: The layer is outside the model.

    Example:
        >>> check_layer(-1, 12)
        11
    """
    if not -n_layers <= layer < n_layers:
        raise ValueError(
            f"layer {layer} asked for, but this model has {n_layers} layers: 0 to {n_layers - 1} "
            f"(or -{n_layers} to -1, from the end)."
        )
    return layer % n_layers
