"""Where a model's weights go: one device, several of a kind, or a map as Hugging Face takes it."""

from dataclasses import dataclass, field
from typing import Any

from tvlens._errors import unknown


@dataclass(frozen=True)
class Places:
    """Where to put a model.

    Attributes:
        device: The device, or the kind of several.
        n_devices: How many.
        read: What Hugging Face is told where it places weights as it reads them; else empty.
    """

    device: str
    n_devices: int = 1
    read: dict[str, Any] = field(default_factory=dict)


def resolve_places(kind: str, *, device: Any, n_devices: int | None, device_map: Any) -> Places:
    """Turn what the user said about devices into places, and check that they are there.

    Args:
        kind: The model kind, ``"hooked"`` or ``"bridge"``.
        device: A name, a torch.device, or None for CUDA where there is one, else the CPU.
        n_devices: How many CUDA devices to spread the blocks over; None for one device.
        device_map: A map as Hugging Face takes it, or None.

    Returns:
        The places.

    Raises:
        ValueError: There are no such devices, what was said contradicts itself, or the model kind cannot
            be spread that way.
    """
    if device_map is not None:
        if kind == "hooked":
            raise ValueError(
                "device_map= is Hugging Face's, and a HookedTransformer is none of its models: use "
                "n_devices=, or backend='bridge'."
            )
        if given := [name for name, v in (("device", device), ("n_devices", n_devices)) if v]:
            raise ValueError(f"device_map= says where weights go: leave {given[0]}= out.")
        return Places("cpu", read={"device_map": device_map})
    place = resolve_device(device)
    if n_devices is None or n_devices == 1:
        return Places(place)
    if n_devices < 1:
        raise ValueError(f"n_devices={n_devices} was asked for; it counts from 1.")
    import torch

    here = torch.cuda.device_count()
    if here < n_devices or place != "cuda":
        raise ValueError(
            f"n_devices={n_devices} on {place!r} was asked for; blocks are spread over CUDA devices, "
            f"and there are {here}: use n_devices={max(here, 1)}, with device='cuda' for more than one."
        )
    if kind == "hooked":
        return Places(place, n_devices)
    free = {i: torch.cuda.mem_get_info(i)[0] for i in range(n_devices)}
    return Places(place, n_devices, {"device_map": "balanced", "max_memory": free})


def resolve_device(device: Any) -> str:
    """Turn what the user said about the device into a name, and check that it is there.

    Args:
        device: A name, a torch.device, or None for CUDA where there is one, else the CPU.

    Returns:
        The device's name, e.g. ``"cuda:0"``.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu"]
    here += ["cuda"] if torch.cuda.is_available() else []
    here += ["mps"] if torch.backends.mps.is_available() else []
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise unknown("device", device, here) from error
    if kind not in here:
        raise ValueError(f"device {str(device)!r} is not on this machine; there are: {here}.")
    return str(device)
