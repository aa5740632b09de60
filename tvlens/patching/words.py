"""What results of patching say in words."""

from collections.abc import Mapping
from typing import Any

from tvlens.plots.theme import visible


def spoken_place(labels: Mapping[str, Any]) -> str:
    """Write a cell in words.

    Args:
        labels: ``site``, ``layer``, and where there are any ``position``, ``token`` and ``head``.

    Returns:
        As ``resid_pre at layer 3, position 5 (␣Paris)``.
    """
    words = [f"layer {labels['layer']}"]
    if "position" in labels:
        words.append(spoken_position(labels))
    if "head" in labels:
        words.append(f"head {labels['head']}")
    return f"{labels['site']} at {', '.join(words)}"


def spoken_position(labels: Mapping[str, Any]) -> str:
    """Write a position in words, with its token where all prompts have the same there.

    Args:
        labels: ``position``, and ``token`` if it is known.

    Returns:
        As ``position 5 (␣Paris)``.
    """
    token = str(labels.get("token", "")).partition(": ")[2]
    # Where prompts have several tokens there, none of them is named.
    named = f" ({visible(token)})" if token and not token.endswith("…") else ""
    return f"position {labels['position']}{named}"
