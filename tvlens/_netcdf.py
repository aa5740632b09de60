"""Datasets in netCDF files that are read as they were written, or not at all.

HDF5, below netCDF, reads some damaged files wrongly without a word, and a few without end. So a file ends in
the SHA-256 of all bytes before: HDF5 leaves alone what follows its own last byte, and is handed nothing but
what was saved. An attribute says that the checksum is there, so that it cannot get lost.
"""

import hashlib
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

_ESCAPED = "tvlens_escaped"
_SEALED = "tvlens_sha256_at_end"
_MARK = b"\ntvlens sha256 "
_SIZE = len(_MARK) + 64 + 1
# Deflate packs no better than 1:1032, and no other filter of HDF5 itself comes near it.
_PACKED = 1100


def write_netcdf(data: xr.Dataset, path: Path) -> None:
    """Write a dataset, text that HDF5 cannot hold escaped, and its checksum behind it.

    Args:
        data: The dataset.
        path: The file; it is overwritten.

    Raises:
        TypeError: A variable mixes text with something else.
    """
    _to_file(data).assign_attrs({_SEALED: 1}).to_netcdf(path, engine="h5netcdf")
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(_MARK + digest.encode() + b"\n")


def read_netcdf(path: Path) -> xr.Dataset:
    """Read a dataset, if it is whole, unchanged, and all there.

    Args:
        path: A file that `write_netcdf` wrote, or any netCDF file without a checksum.

    Returns:
        The dataset, in memory.

    Raises:
        ValueError: It is cut off, damaged, no netCDF file, or refers to another file.
    """
    try:
        _check_seal(path)
        _check_whole(path)
        data = xr.load_dataset(path, engine="h5netcdf")
        data.attrs.pop(_SEALED, None)
        return _from_file(data)
    except Exception as error:  # OSError, KeyError or RuntimeError as the damage has it
        raise ValueError(f"{path} is no readable netCDF file; is it cut off? ({error})") from error


def _check_seal(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = max(len(content) - _SIZE, 0)
        said = content[end:]
        if not said.startswith(_MARK):
            if content.find(_SEALED.encode()) >= 0:
                raise ValueError("its checksum is missing: it was cut off or written anew")
            return
        with memoryview(content) as whole, whole[:end] as covered:
            found = hashlib.sha256(covered).hexdigest()
    if said != _MARK + found.encode() + b"\n":
        raise ValueError("its checksum is another one: its content is not what tvlens saved")


def _check_whole(path: Path) -> None:
    """Refuse what lies in other files, and sizes that this one cannot hold."""
    import h5py

    most = _PACKED * path.stat().st_size
    with h5py.File(path, "r") as file:
        for name in file:
            link: Any = file.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                where = getattr(link, "filename", None) or link.path
                raise ValueError(f"{name!r} is not in it, but a link to {where!r}")
            item = file[name]
            if isinstance(item, h5py.Group):
                raise ValueError(f"{name!r} is a group, and tvlens writes none")
            if not isinstance(item, h5py.Dataset):
                continue
            if item.external or item.is_virtual:
                raise ValueError(f"the data of {name!r} are not in it, but in another file")
            if item.nbytes > most:
                raise ValueError(f"{name!r} has shape {item.shape}, more than the file can hold")


def _to_file(data: xr.Dataset) -> xr.Dataset:
    """Escape text that HDF5 cannot hold: NUL, which byte-level tokens hold, and surrogates."""
    data = data.copy()
    for name, variable in data.variables.items():
        if variable.dtype.kind not in "OUT":
            continue
        texts = variable.values.ravel().tolist()
        strange = next((text for text in texts if not isinstance(text, str)), None)
        if strange is not None:
            raise TypeError(f"{name!r} mixes text with {strange!r}; use '' where there is no text")
        if any("\0" in text or not _is_utf8(text) for text in texts):
            safe = [text.encode("unicode_escape").decode("ascii") for text in texts]
            data[name] = (variable.dims, np.array(safe, object).reshape(variable.shape))
            data[name].attrs = {**variable.attrs, _ESCAPED: 1}
    return data


def _from_file(data: xr.Dataset) -> xr.Dataset:
    for name in [name for name, variable in data.variables.items() if _ESCAPED in variable.attrs]:
        variable = data[name]
        texts = [
            text.encode("ascii").decode("unicode_escape")
            for text in variable.values.ravel().tolist()
        ]
        attrs = {key: value for key, value in variable.attrs.items() if key != _ESCAPED}
        # numpy's fixed-width text drops a trailing NUL; objects keep it, but may hold no surrogate.
        values = np.array(texts)
        if values.tolist() != texts:
            values = np.array(texts, object)
        data[name] = (variable.dims, values.reshape(variable.shape), attrs)
    return data


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
