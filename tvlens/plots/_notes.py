"""What a figure reads off the data besides its numbers: provenance and chosen layer."""

from typing import Any

import xarray as xr

from tvlens import provenance
from tvlens.intervals import accuracy


def notes(data: xr.Dataset) -> dict[str, Any]:
    """Give the provenance of a dataset; empty where a user made the data by hand."""
    text = data.attrs.get(provenance.ATTRIBUTE)
    return provenance.decode(text) if text else {}


def metric_of(note: dict[str, Any]) -> str:
    """Give what was measured in words, from the provenance."""
    name = str(note.get("metric", "metric")).replace("_", " ")
    return "length along theta" if name == "theta" else name


def chosen_layer(data: xr.Dataset) -> int | None:
    """Give the layer that dev prompts choose, the lowest of the best; None without dev outcomes."""
    known = notes(data).get("best_layer")
    if known is not None:
        return int(known)
    if "hypothesis" not in data or "split" not in data or "dev" not in data["split"].values:
        return None
    return int(accuracy(data, "hypothesis", split="dev")["accuracy"].idxmax("layer"))
