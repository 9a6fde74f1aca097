"""Feature files: one opener per format, each giving the arrays by name, memory-mapped where the format allows."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class DataError(ValueError):
    """A file that cannot be used: the message is one line and begins with the file's name."""


Arrays = Mapping[str, Any]


def open_arrays(path: Path) -> dict[str, Any]:
    """Open a feature file.

    Args:
        path: A file whose suffix is in `OPENERS`.

    Returns:
        Its arrays by name; formats that hold a single unnamed array give it as "".

    Raises:
        DataError: If the format is unknown, its reader is not installed, or the file is damaged, truncated or pickled.
    """
    opener = OPENERS.get(path.suffix.lower())
    if opener is None:
        raise DataError(f"{path}: unknown format {path.suffix!r}: one of {' '.join(OPENERS)} is read")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    with readable(path):
        return dict(opener(path))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a bad file into a `DataError` of one line."""
    try:
        yield
    except (DataError, KeyboardInterrupt):
        raise
    except ImportError as error:
        extra = _EXTRAS[path.suffix.lower()]
        raise DataError(f"{path}: reading it needs {error.name}: pip install 'faiss-knn[{extra}]'") from error
    except Exception as error:  # each library has its own exceptions, zip and pickle ones among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: cannot be read as {path.suffix}: {reason}") from error


def _open_npy(path: Path) -> Arrays:
    return {"": np.lib.format.open_memmap(path, mode="r")}  # refuses pickles and checks the length


def _open_npz(path: Path) -> Arrays:
    with path.open("rb") as file:  # np.load leaves its own open when the archive is damaged
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise TypeError("it is a single array: name it .npy")
        return {name: archive[name] for name in archive.files}


def _open_torch(path: Path) -> Arrays:
    import torch  # slow to import, and numpy's formats do not need it

    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        held = torch.load(path, map_location="cpu", weights_only=True)  # the format before the zip one cannot be mapped
    if isinstance(held, (tuple, list)) and len(held) == 2:
        held = {"features": held[0], "labels": held[1]}
    if isinstance(held, torch.Tensor):
        held = {"": held}
    if not isinstance(held, dict):
        raise TypeError(f"it holds a {type(held).__name__}: save a tensor, a (features, labels) pair or a dict of them")
    return {str(name): _from_torch(value) for name, value in held.items() if _is_array_like(value)}


def _is_array_like(value: Any) -> bool:
    return hasattr(value, "detach") or (isinstance(value, (list, tuple)) and all(isinstance(x, str) for x in value))


def _from_torch(value: Any) -> npt.NDArray[Any]:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach()
    return np.asarray((value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy())


def _open_safetensors(path: Path) -> Arrays:
    from safetensors import safe_open  # an extra

    with safe_open(path, framework="pt") as tensors:  # "np" has no bfloat16
        return {name: _from_torch(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118


def _open_parquet(path: Path) -> Arrays:
    from pyarrow import parquet, types  # an extra

    table = parquet.read_table(path)
    arrays: dict[str, Any] = {}
    scalars: list[str] = []  # float columns are the features where no column holds vectors
    for name, column in zip(table.column_names, table.columns, strict=True):
        column = column.combine_chunks()
        if column.null_count:
            raise ValueError(f"column {name!r} has {column.null_count} nulls")
        if types.is_list(column.type) or types.is_fixed_size_list(column.type) or types.is_large_list(column.type):
            arrays[name] = _stacked(name, column)
        else:
            arrays[name] = column.to_numpy(zero_copy_only=False)
            scalars += [name] if types.is_floating(column.type) else []
    if scalars and all(np.ndim(array) == 1 for array in arrays.values()):
        arrays[""] = np.stack([arrays.pop(name) for name in scalars], axis=1)
    return arrays


def _stacked(name: str, column: Any) -> npt.NDArray[Any]:
    values = column.flatten().to_numpy(zero_copy_only=False)
    if len(column) == 0 or len(values) % len(column):
        raise ValueError(f"column {name!r} holds vectors of different lengths")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if (lengths != lengths[0]).any():
        raise ValueError(f"column {name!r} holds vectors of different lengths")
    return np.asarray(values).reshape(len(column), -1)


def _open_hdf5(path: Path) -> Arrays:
    import h5py  # an extra

    file = h5py.File(path, "r")
    return {
        name: _strings(item) if item.dtype.kind in "OS" else item
        for name, item in file.items()
        if isinstance(item, h5py.Dataset) and item.ndim
    }


def _strings(dataset: Any) -> npt.NDArray[Any]:
    return np.asarray(dataset.asstr()[...], dtype=str)


def _open_vecs(path: Path, dtype: type[np.generic]) -> Arrays:
    """Rows of an int32 dimension followed by that many numbers (the layout of the TEXMEX sets)."""
    size = path.stat().st_size
    dim = int(np.fromfile(path, "<i4", 1)[0]) if size >= 4 else 0
    width = 4 + dim * np.dtype(dtype).itemsize
    if dim <= 0 or size % width:
        raise ValueError(f"{size} bytes are not rows of {width} bytes (dimension {dim}): truncated, or another format")
    raw = np.memmap(path, np.uint8, mode="r").reshape(-1, width)
    heads = np.ascontiguousarray(raw[:: max(1, len(raw) // 1000), :4]).view("<i4")
    if (heads != dim).any():
        raise ValueError(f"its rows have different dimensions, {dim} and {int(heads[heads != dim][0])}")
    return {"": raw[:, 4:].view(np.dtype(dtype).newbyteorder("<"))}


def _open_bin(path: Path, dtype: type[np.generic]) -> Arrays:
    """A header of uint32 rows and dimension, then the rows (the layout of the Big-ANN sets)."""
    size = path.stat().st_size
    rows, dim = (int(x) for x in np.fromfile(path, "<u4", 2)) if size >= 8 else (0, 0)
    needed = 8 + rows * dim * np.dtype(dtype).itemsize
    if size != needed:
        raise ValueError(f"its header tells of {rows} x {dim} numbers, {needed} bytes, but it has {size}")
    return {"": np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r", offset=8, shape=(rows, dim))}


def _open_text(path: Path) -> Arrays:
    lines = path.read_text().splitlines()
    try:
        return {"": np.asarray([int(line) for line in lines])}
    except ValueError:
        return {"": np.asarray(lines, dtype=str)}


def _open_json(path: Path) -> Arrays:
    held = json.loads(path.read_text())
    return {"": np.asarray(held if isinstance(held, list) else [held[key] for key in sorted(held, key=int)])}


OPENERS: dict[str, Callable[[Path], Arrays]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".fvecs": lambda path: _open_vecs(path, np.float32),
    ".bvecs": lambda path: _open_vecs(path, np.uint8),
    ".fbin": lambda path: _open_bin(path, np.float32),
    ".u8bin": lambda path: _open_bin(path, np.uint8),
    ".txt": _open_text,
    ".json": _open_json,
}
_EXTRAS = {".safetensors": "safetensors", ".parquet": "parquet", ".h5": "hdf5", ".hdf5": "hdf5"}
