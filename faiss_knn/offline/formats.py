"""Feature files: one opener per format, each giving the arrays by name; memory-mapped where the format allows."""

import json
import math
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import numpy.typing as npt

from faiss_knn.offline.column_files import UNKNOWN, Member, open_arrow, open_csv, open_json_lines, parsed
from faiss_knn.offline.parquet_rows import ParquetRows, open_parquet
from faiss_knn.offline.remote import FilePath, RemotePath, RemoteRows, on_this_machine

_SAFE_TORCH = "2.10"
_MOST_EXPANDED = {ZIP_STORED: 1, ZIP_DEFLATED: 1032}  # bytes that one byte of an archive can become
_SAFETENSORS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "f4", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
    "U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?", "C64": "c8",
}  # fmt: skip


class DataError(ValueError):
    """A file that cannot be used: the message is one line and begins with the file's name."""


Arrays = Mapping[str, Member]


def open_arrays(path: FilePath) -> dict[str, Member]:
    """Open a file and read its head: arrays are read when they are asked for, and no others.

    Args:
        path: A file whose suffix is in `OPENERS`.

    Returns:
        Its arrays by name; formats that hold a single unnamed array give it as "".

    Raises:
        DataError: If the format is unknown, its reader is not installed, the file is none (a pipe, a device), or is
            damaged, truncated or pickled.
    """
    opener = OPENERS.get(path.suffix.lower())
    with readable(path):
        if not path.exists():
            raise DataError(f"{path}: no such file")
        if opener is None:
            raise DataError(f"{path}: unknown format {path.suffix!r}: one of {' '.join(OPENERS)} is read")
        if not path.is_file():
            raise DataError(f"{path}: is no regular file: pipes, devices and folders of that name are not read")
        if isinstance(path, RemotePath) and path.suffix.lower() in _REMOTE_OPENERS:
            return dict(_REMOTE_OPENERS[path.suffix.lower()](path))
        return dict(opener(on_this_machine(path)))


def read_array(path: FilePath, member: Member) -> Any:
    """Read an array of a file.

    Raises:
        DataError: If that part of the file is damaged.
    """
    with readable(path):
        return member.read()


def check_memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Refuse what cannot fit before it is allocated.

    Raises:
        ValueError: If an array needs more memory than the machine has.
    """
    needed, present = math.prod(shape) * dtype.itemsize, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise ValueError(
            f"an array of shape {shape}, {dtype}, needs {needed / 2**30:.0f} GiB of memory, this machine has "
            f"{present / 2**30:.0f}: save it as .npy, which is read a slice at a time"
        )


def _member(array: Any) -> Member:
    return Member(tuple(array.shape), np.dtype(array.dtype), lambda: array)


@contextmanager
def readable(path: FilePath, done: str = "read") -> Iterator[None]:
    """Turn whatever a reader raises on a bad file, or a writer, into a `DataError` of one line."""
    try:
        yield
    except (DataError, KeyboardInterrupt):
        raise
    except ImportError as error:
        extra = _EXTRAS[path.suffix.lower()]
        doing = {"read": "reading", "written": "writing"}[done]
        raise DataError(f"{path}: {doing} it needs {error.name}: pip install 'faiss-knn-eval[{extra}]'") from error
    except Exception as error:  # each library has its own exceptions, zip and pickle ones among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: cannot be {done} as {path.suffix}: {reason}") from error


def _open_npy(path: Path) -> Arrays:
    rows = np.lib.format.open_memmap(path, mode="r")  # refuses pickles and lengths beyond the file's end
    extra = path.stat().st_size - rows.offset - rows.nbytes
    if extra:
        raise ValueError(f"{extra} bytes follow its array: several arrays in one file are not read")
    return {"": _member(rows)}


def _open_npz(path: Path) -> Arrays:
    with path.open("rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise TypeError("it is a single array: name it .npy")
    with ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist()]
        return {name.removesuffix(".npy"): _npz_member(path, archive, name) for name in names}


def _npz_member(path: Path, archive: ZipFile, name: str) -> Member:
    with archive.open(name) as stream:
        shape, dtype = _npy_head(stream)

    def read() -> Any:
        with ZipFile(path) as archive, archive.open(name) as stream:
            info = archive.getinfo(name)
            held = min(info.file_size, info.compress_size * _MOST_EXPANDED.get(info.compress_type, info.file_size))
            if math.prod(shape) * dtype.itemsize > held and not dtype.hasobject:
                raise ValueError(f"the head of {name} tells of shape {shape}, {dtype}, which {held} bytes do not hold")
            check_memory(shape, dtype)
            return np.lib.format.read_array(stream, allow_pickle=False)

    return Member(shape, dtype, read)


def _npy_head(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = head(stream)
    return shape, dtype


def _open_torch(path: Path) -> Arrays:
    import torch  # slow to import, and numpy's formats do not need it

    if torch.__version__ < _SAFE_TORCH:
        raise ValueError(
            f"torch {torch.__version__} may run code that a file holds (CVE-2025-32434, CVE-2026-24747): "
            f"install torch {_SAFE_TORCH} or later, or save the features as .npz or .safetensors"
        )
    with torch.serialization.safe_globals(_numpy_globals()):
        try:
            try:
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                held = torch.load(path, map_location="cpu", weights_only=True)  # the older format cannot be mapped
        except UnpicklingError as error:  # torch's own words advise to run what the file holds
            raise TypeError("it holds objects that are no arrays, numbers or names, or is damaged") from error
    arrays = dict(_flattened("", _paired(held)))
    if not arrays:
        raise TypeError(f"it holds a {type(held).__name__}: save a tensor, a (features, labels) pair or a dict of them")
    return arrays


def _numpy_globals() -> list[Any]:
    """List what a pickled array of numbers needs, under the names of numpy 1 and 2; none of it runs code."""
    makers: list[Any] = [np.empty(0).__reduce__()[0], np.float32(0).__reduce__()[0]]
    named = [(maker, f"numpy.{core}.multiarray.{maker.__name__}") for maker in makers for core in ("core", "_core")]
    return [*named, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in np.typecodes["All"]}]


def _paired(held: Any) -> Any:
    """Take a (features, labels) pair, or a list of such pairs, for a dict of them."""
    if not isinstance(held, (tuple, list)):
        return held
    if held and all(isinstance(pair, (tuple, list)) and len(pair) == 2 and _looks_paired(*pair) for pair in held):
        return {"features": [pair[0] for pair in held], "labels": [pair[1] for pair in held]}
    if len(held) == 2 and _looks_paired(*held):
        return {"features": held[0], "labels": held[1]}
    return held


def _looks_paired(first: Any, second: Any) -> bool:
    """Tell whether these are features and labels, and not two batches of features."""
    shapes = [tuple(getattr(part, "shape", ())) for part in (first, second)]
    same = len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][1] == shapes[1][1] > 1
    return not (same and "float" in str(getattr(second, "dtype", "")))


def _flattened(name: str, held: Any) -> Iterator[tuple[str, Member]]:
    """Yield the arrays within dicts, named by their keys with dots between; what is no array is passed over."""
    if isinstance(held, Mapping):
        for key, value in held.items():
            yield from _flattened(f"{name}.{key}" if name else str(key), value)
    elif hasattr(held, "detach") or isinstance(held, np.ndarray):
        yield name, _torch_member(held)
    elif isinstance(held, (list, tuple)) and held:
        if all(isinstance(item, (str, int, float)) for item in held):
            yield name, _member(np.asarray(held))
        elif all((hasattr(item, "detach") or isinstance(item, np.ndarray)) and item.ndim for item in held):
            yield name, _batches(held)


def _batches(parts: Sequence[Any]) -> Member:
    """Join arrays in a list: (n, d) batches and (n,) batches of labels one after another, vectors of floats as rows."""
    heads = [_torch_member(part) for part in parts]
    as_rows = all(len(head.shape) == 1 and head.dtype.kind == "f" for head in heads)
    if len({head.shape[0 if as_rows else 1 :] for head in heads}) > 1:
        raise ValueError(f"it holds a list of arrays of different shapes, {heads[0].shape} among them")
    length = len(heads) if as_rows else sum(head.shape[0] for head in heads)
    shape, dtype = (length, *heads[0].shape[0 if as_rows else 1 :]), np.result_type(*(head.dtype for head in heads))
    join = np.stack if as_rows else np.concatenate
    return Member(shape, dtype, lambda: join([head.read() for head in heads]))


def _torch_member(value: Any) -> Member:
    if isinstance(value, np.ndarray):
        return _member(value)
    return Member(tuple(value.shape), _numpy_dtype(str(value.dtype)), lambda: _from_torch(value))


def _numpy_dtype(name: str) -> np.dtype[Any]:
    """Tell which dtype of numpy holds a dtype of torch: types that it lacks are widened."""
    name = name.removeprefix("torch.")
    if name.startswith(("bfloat", "float8", "float4")):
        return np.dtype(np.float32)
    try:
        return np.dtype(name)
    except TypeError:
        return np.dtype(object)  # quantized and such, not read


def _from_torch(value: Any) -> npt.NDArray[Any]:
    value = value.detach()
    if value.ndim == 1 and str(value.dtype) == "torch.bfloat16" and (value.abs() >= 256).any():
        raise ValueError("one number a row of 256 or more in bfloat16 may have been rounded to another: keep integers")
    widened = str(value.dtype).startswith(("torch.bfloat", "torch.float8"))
    return np.asarray((value.float() if widened else value).resolve_conj().resolve_neg().numpy())


def _open_safetensors(path: Path) -> Arrays:
    from safetensors import safe_open  # an extra

    def read(name: str) -> Any:
        with safe_open(path, framework="pt") as tensors:  # "np" has no bfloat16
            return _from_torch(tensors.get_tensor(name))

    with safe_open(path, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {
            name: Member(
                tuple(part.get_shape()), np.dtype(_SAFETENSORS.get(part.get_dtype(), "f4")), partial(read, name)
            )
            for name, part in slices.items()
        }


def _open_hdf5(path: FilePath) -> Arrays:
    import h5py  # an extra

    file = h5py.File(path if isinstance(path, Path) else path.open(), "r")
    arrays: dict[str, Member] = {}
    links: dict[str, str] = {}
    waiting, met = [("", file)], set()
    while waiting:
        parent, group = waiting.pop()
        for key in group:
            name, link = f"{parent}{key}", group.get(key, getlink=True)
            if not isinstance(link, h5py.HardLink):
                within = isinstance(link, h5py.SoftLink)
                links[name] = posixpath.normpath(posixpath.join("/", parent, link.path)) if within else ""
                continue
            item = group[key]
            if isinstance(item, h5py.Dataset) and item.ndim:
                arrays[name] = _hdf5_member(path, name, item)
            elif isinstance(item, h5py.Group) and h5py.h5o.get_info(item.id).addr not in met:
                met.add(h5py.h5o.get_info(item.id).addr)  # a group may hold itself
                waiting.append((f"{name}/", item))
    return arrays | {name: arrays.get(target[1:]) or _leaves_file(name) for name, target in links.items()}


class _Parts:
    """An array of a file that is read in parts, of which damaged ones are told as such when they are read."""

    def __init__(self, path: FilePath, array: Any) -> None:
        self.path = path
        self.array = array
        self.shape: tuple[int, ...] = array.shape
        self.dtype = array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> npt.NDArray[Any]:
        with readable(self.path):
            return np.asarray(self.array[rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self[...], dtype)


def _hdf5_member(path: FilePath, name: str, dataset: Any) -> Member:
    def read() -> Any:
        if dataset.is_virtual or dataset.external:
            raise ValueError(f"{name!r} is kept in other files (a virtual data set, or external storage): copy it here")
        parts = [-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks or (), strict=False)]
        if dataset.size and (
            not dataset.id.get_storage_size() or (parts and dataset.id.get_num_chunks() < math.prod(parts))
        ):
            raise ValueError(f"{name!r} was not written to its end")
        if dataset.dtype.kind not in "OS":
            return _Parts(path, dataset)
        check_memory(dataset.shape, dataset.dtype)
        return np.asarray(dataset.asstr()[...], dtype=str)

    return Member(tuple(dataset.shape), dataset.dtype, read)


def _open_parquet(path: FilePath) -> Arrays:
    def read(member: Member) -> Any:
        rows = member.read()
        return _Parts(path, rows) if isinstance(rows, ParquetRows) else rows

    return {name: replace(member, read=partial(read, member)) for name, member in open_parquet(path).items()}


def _leaves_file(name: str) -> Member:
    def read() -> Any:
        raise ValueError(f"{name!r} is a link to what is not in this file: copy the data here")

    return Member((UNKNOWN, UNKNOWN), np.dtype(np.float32), read)


def open_vecs(path: Path, dtype: type[np.generic]) -> Arrays:
    """Open rows of an int32 dimension followed by that many numbers (the layout of the TEXMEX sets)."""
    size = path.stat().st_size
    dim = int(np.fromfile(path, "<i4", 1)[0]) if size >= 4 else 0
    width = 4 + dim * np.dtype(dtype).itemsize
    if dim <= 0 or size % width:
        raise ValueError(f"{size} bytes are not rows of {width} bytes (dimension {dim}): truncated, or another format")
    raw = np.memmap(path, np.uint8, mode="r").reshape(-1, width)
    heads = np.ascontiguousarray(raw[:: max(1, len(raw) // 1000), :4]).view("<i4")
    if (heads != dim).any():
        raise ValueError(f"its rows have different dimensions, {dim} and {int(heads[heads != dim][0])}")
    return {"": _member(raw[:, 4:].view(np.dtype(dtype).newbyteorder("<")))}


def open_bin(path: Path, dtype: type[np.generic]) -> Arrays:
    """Open a header of uint32 rows and dimension, then the rows (the layout of the Big-ANN sets)."""
    size = path.stat().st_size
    rows, dim = (int(x) for x in np.fromfile(path, "<u4", 2)) if size >= 8 else (0, 0)
    needed = 8 + rows * dim * np.dtype(dtype).itemsize
    if size != needed:
        raise ValueError(f"its header tells of {rows} x {dim} numbers, {needed} bytes, but it has {size}")
    return {"": _member(np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r", offset=8, shape=(rows, dim)))}


def _open_remote_npy(path: RemotePath) -> Arrays:
    with path.open() as stream:
        version = np.lib.format.read_magic(stream)
        head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = head(stream)
        offset = stream.tell()
    if dtype.hasobject:
        raise ValueError("it holds objects, which are pickled")
    if len(shape) != 2 or in_columns:
        return _open_npy(on_this_machine(path))
    _check_size(path, offset + math.prod(shape) * dtype.itemsize)
    return {"": _member(RemoteRows(path, (shape[0], shape[1]), dtype, offset))}


def _check_size(path: RemotePath, needed: int) -> None:
    if path.size() != needed:
        raise ValueError(f"its head tells of {needed} bytes, but it has {path.size()}")


def _open_remote_vecs(path: RemotePath, dtype: type[np.generic]) -> Arrays:
    head, size = path.ranges([0], [4]), path.size()
    dim, kind = int(np.frombuffer(head[0], "<i4")[0]), np.dtype(dtype).newbyteorder("<")
    width = 4 + dim * kind.itemsize
    if dim <= 0 or size % width:
        raise ValueError(f"{size} bytes are not rows of {width} bytes (dimension {dim}): truncated, or another format")
    return {"": _member(RemoteRows(path, (size // width, dim), kind, 0, skipped=4))}


def _open_remote_bin(path: RemotePath, dtype: type[np.generic]) -> Arrays:
    rows, dim = (int(x) for x in np.frombuffer(path.ranges([0], [8])[0], "<u4"))
    kind = np.dtype(dtype).newbyteorder("<")
    _check_size(path, 8 + rows * dim * kind.itemsize)
    return {"": _member(RemoteRows(path, (rows, dim), kind, 8))}


def _open_text(path: Path) -> Arrays:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return {"": _member(parsed(lines))}


def _open_json(path: Path) -> Arrays:
    held = json.loads(path.read_text(encoding="utf-8-sig"))
    return {"": _member(np.asarray(held if isinstance(held, list) else [held[key] for key in sorted(held, key=int)]))}


OPENERS: dict[str, Callable[[Path], Arrays]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".pt": _open_torch,
    ".pth": _open_torch,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
    ".arrow": open_arrow,
    ".feather": open_arrow,
    ".csv": open_csv,
    ".tsv": open_csv,
    ".jsonl": open_json_lines,
    ".ndjson": open_json_lines,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".fvecs": lambda path: open_vecs(path, np.float32),
    ".bvecs": lambda path: open_vecs(path, np.uint8),
    ".fbin": lambda path: open_bin(path, np.float32),
    ".u8bin": lambda path: open_bin(path, np.uint8),
    ".txt": _open_text,
    ".json": _open_json,
}
# Files elsewhere that are read a slice at a time; of others a copy is made on this machine.
_REMOTE_OPENERS: dict[str, Callable[[RemotePath], Arrays]] = {
    ".npy": _open_remote_npy,
    ".parquet": _open_parquet,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".fvecs": lambda path: _open_remote_vecs(path, np.float32),
    ".bvecs": lambda path: _open_remote_vecs(path, np.uint8),
    ".fbin": lambda path: _open_remote_bin(path, np.float32),
    ".u8bin": lambda path: _open_remote_bin(path, np.uint8),
}
_EXTRAS = {".safetensors": "safetensors", ".h5": "hdf5", ".hdf5": "hdf5"}
_EXTRAS |= dict.fromkeys((".parquet", ".arrow", ".feather", ".csv", ".tsv", ".jsonl", ".ndjson"), "parquet")
