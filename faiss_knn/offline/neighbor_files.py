"""Files of neighbours: the layouts that other programs read, written whole or not at all, and read back."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from faiss_knn.names import DISTANCES
from faiss_knn.offline.column_files import Member
from faiss_knn.offline.formats import Arrays, DataError, open_arrays, open_bin, open_vecs, read_array, readable
from faiss_knn.offline.lazy_rows import RowSource, read_rows, spans

Graph = Literal["distances", "connectivities"]

INDEX_NAMES = ("indices", "neighbors", "neighbours", "ids", "knn_indices", "I")
DISTANCE_NAMES = ("distances", "dists", "knn_dists", "D")
_ROWS = 1 << 14  # lists or rows that are written at once
_ANN_BENCHMARKS = {"cosine": "angular"}  # what it calls a distance, where not as here
_OF_ANN_BENCHMARKS = {name: own for own, name in _ANN_BENCHMARKS.items()}
_METRIC = "distance_metric"


@dataclass(frozen=True)
class NeighborLists:
    """Lists of neighbours, and what they are of.

    Attributes:
        indices: (Q, k) int64 rows of the bank, nearest first; -1 where missing.
        distances: (Q, k) float32; inf where missing.
        tied: (Q,) bool: a row after the k-th is as far as it, so that another list would be right too.
        distance_metric: Of the distances.
        bank: (N, d) rows that were searched.
        queries: (Q, d) rows that were searched for.
        is_own: Whether these are the bank's own.
    """

    indices: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    tied: npt.NDArray[np.bool_]
    distance_metric: str
    bank: RowSource
    queries: RowSource
    is_own: bool


def check_format(path: Path, graph: Graph | None, symmetric: bool, is_own: bool) -> None:
    """Check, before anything is searched, that lists can be written as this file.

    Raises:
        DataError: If the ending names no format, the graph asked for is none that it can hold, or a folder of the path
            is a file.
    """
    if path.suffix.lower() not in _WRITERS:
        raise DataError(f"{path}: neighbours are not written as {path.suffix!r}: choose one of {' '.join(_WRITERS)}")
    if graph is not None and path.suffix.lower() != ".npz":
        raise DataError(f"{path}: a sparse graph is written as .npz: name it so, or leave --graph out")
    if symmetric and (graph is None or not is_own):
        raise DataError(f"{path}: only a --graph of the bank's own rows can be symmetric: leave QUERIES out")
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{path}: {folder} is a file, not a folder: choose another place")


def write_neighbors(
    path: Path, lists: NeighborLists, graph: Graph | None = None, *, symmetric: bool = False
) -> list[Path]:
    """Write lists in the layout that the file's ending names, each file at once: a file that is there is whole.

    - `.npz`: `indices`, `distances`, `tied`, `distance_metric`.
    - `.ibin`: the ids, and the distances in a `.fbin` beside it (`x.neighbors.ibin` with `x.distances.fbin`, as cuVS
      calls them): lists and k as uint32, then the numbers, little-endian.
    - `.bin`: ground truth of the Big-ANN benchmarks: lists and k as uint32, all ids as int32, all distances as float32.
    - `.h5`, `.hdf5`: that of ann-benchmarks: `train`, `test`, `neighbors`, `distances`, and attributes.
    - `.parquet`: a row for each query: `query`, `neighbors`, `distances`, `tied`.
    - `.npz` with `graph`: (Q, N) matrix in SciPy's layout of compressed rows, in the lists' order.

    Args:
        path: Where.
        lists: What.
        graph: Write a sparse matrix of the distances, those of 0 kept as entries, or of ones.
        symmetric: Of such a matrix: have each neighbour both ways.

    Returns:
        The files.

    Raises:
        DataError: As `check_format`; if a reader of the format is not installed, or it does not hold such numbers.
        OSError: If a file cannot be written.
    """
    check_format(path, graph, symmetric, lists.is_own)
    path.parent.mkdir(parents=True, exist_ok=True)
    if graph is not None:
        with _replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **_compressed_rows(lists, graph, symmetric))
        return [path]
    with readable(path, "written"):
        return _WRITERS[path.suffix.lower()](path, lists)


def read_neighbors(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Read lists of any program: (Q, K) ids, and their distances if the file has them.

    What `write_neighbors` writes, .npy of ids, .ivecs (TEXMEX), and arrays named `indices`, `neighbors`, `ids` or `I`
    beside `distances`, `dists` or `D`. Lists that are shorter than others end in -1.

    Raises:
        DataError: If there are none.
    """
    if path.suffix.lower() in _OWN_READERS:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        with readable(path):
            return _OWN_READERS[path.suffix.lower()](path)
    arrays = open_arrays(path)
    if {"indptr", "indices", "data", "shape"} <= arrays.keys():
        return _from_compressed_rows(path, arrays)
    ids = next((arrays[name] for name in INDEX_NAMES if name in arrays), None)
    if ids is None and len(arrays) == 1:
        ids = next(iter(arrays.values()))
    if ids is None:
        raise DataError(f"{path}: none of its arrays {', '.join(arrays)} is called {', '.join(INDEX_NAMES)}")
    distances = next((arrays[name] for name in DISTANCE_NAMES if name in arrays), None)
    return _array(path, ids), None if distances is None else _array(path, distances)


def stored_metric(path: Path) -> str | None:
    """Tell which distance a file of lists says that it holds; None where it says nothing that is known here.

    The distances must have been read already, as `read_neighbors` does.
    """
    reader = _METRIC_READERS.get(path.suffix.lower())
    said = None if reader is None else reader(path)
    metric = _OF_ANN_BENCHMARKS.get(str(said), str(said))
    return metric if metric in DISTANCES else None


def _metric_of_npz(path: Path) -> Any:
    arrays = open_arrays(path)
    return np.asarray(read_array(path, arrays[_METRIC])) if _METRIC in arrays else None


def _metric_of_hdf5(path: Path) -> Any:
    import h5py  # an extra

    with h5py.File(path, "r") as file:
        return file.attrs.get("distance")


def _metric_of_parquet(path: Path) -> Any:
    from pyarrow import parquet  # an extra

    return (parquet.read_schema(path).metadata or {}).get(_METRIC.encode(), b"").decode("utf-8", "replace")


def _array(path: Path, member: Member) -> npt.NDArray[Any]:
    return np.asarray(read_array(path, member))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give another name to write to, which becomes the file's once it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_npz(path: Path, lists: NeighborLists) -> list[Path]:
    metric = np.array(lists.distance_metric)
    with _replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, indices=lists.indices, distances=lists.distances, tied=lists.tied, distance_metric=metric)
    return [path]


def _int32(lists: NeighborLists) -> npt.NDArray[np.int32]:
    if len(lists.bank) > np.iinfo(np.int32).max:
        raise ValueError(f"its ids have 32 bits, the bank has {len(lists.bank)} rows: choose .npz or .parquet")
    return lists.indices.astype("<i4")


def _head(lists: NeighborLists, file: IO[bytes]) -> None:
    np.array(lists.indices.shape, "<u4").tofile(file)


def _write_bin(path: Path, lists: NeighborLists) -> list[Path]:
    ids = _int32(lists)
    with _replacing(path) as partial, partial.open("wb") as file:
        _head(lists, file)
        ids.tofile(file)
        lists.distances.astype("<f4", copy=False).tofile(file)
    return [path]


def distances_beside(path: Path) -> Path:
    """Name the file of distances that goes with a file of ids.

    Example:
        >>> distances_beside(Path("gt.ibin")).name, distances_beside(Path("gt.neighbors.ibin")).name
        ('gt.fbin', 'gt.distances.fbin')
    """
    stem = path.stem.removesuffix(".neighbors")
    return path.with_name(f"{stem}.fbin" if stem == path.stem else f"{stem}.distances.fbin")


def _write_pair(path: Path, lists: NeighborLists) -> list[Path]:
    beside = distances_beside(path)
    ids = _int32(lists)
    for target, numbers in ((beside, lists.distances.astype("<f4", copy=False)), (path, ids)):
        with _replacing(target) as partial, partial.open("wb") as file:
            _head(lists, file)
            numbers.tofile(file)
    return [path, beside]


def _write_hdf5(path: Path, lists: NeighborLists) -> list[Path]:
    import h5py  # an extra

    ids = _int32(lists)
    with _replacing(path) as partial, h5py.File(partial, "w") as file:
        for name, rows in (("train", lists.bank), ("test", lists.queries)):
            written = file.create_dataset(name, tuple(rows.shape), "f4")
            for start, stop in spans(len(rows), _ROWS):
                written[start:stop] = read_rows(rows, start, stop)
        file["neighbors"], file["distances"], file["tied"] = ids, lists.distances, lists.tied
        file.attrs["type"], file.attrs["point_type"] = "dense", "float"
        file.attrs["dimension"] = lists.bank.shape[1]
        file.attrs["distance"] = _ANN_BENCHMARKS.get(lists.distance_metric, lists.distance_metric)
    return [path]


def _write_parquet(path: Path, lists: NeighborLists) -> list[Path]:
    import pyarrow as pa  # an extra
    from pyarrow import parquet

    k = lists.indices.shape[1]
    kinds = {"query": pa.int64(), "neighbors": pa.list_(pa.int64(), k), "distances": pa.list_(pa.float32(), k)}
    notes = {_METRIC: lists.distance_metric, "bank_rows": str(len(lists.bank))}
    schema = pa.schema(kinds | {"tied": pa.bool_()}, metadata=notes)
    with _replacing(path) as partial, parquet.ParquetWriter(partial, schema) as writer:
        for start, stop in spans(len(lists.indices), _ROWS):
            columns = [
                pa.array(np.arange(start, stop)),
                pa.FixedSizeListArray.from_arrays(lists.indices[start:stop].ravel(), k),
                pa.FixedSizeListArray.from_arrays(lists.distances[start:stop].ravel(), k),
                pa.array(lists.tied[start:stop]),
            ]
            writer.write_table(pa.table(columns, schema=schema))
    return [path]


def _compressed_rows(lists: NeighborLists, graph: Graph, symmetric: bool) -> dict[str, Any]:
    """Make the arrays of `scipy.sparse.save_npz` for a matrix of compressed rows."""
    is_found = lists.indices >= 0
    rows = np.repeat(np.arange(len(lists.indices)), is_found.sum(1))
    columns, values = lists.indices[is_found], lists.distances[is_found]
    shape = (len(lists.indices), len(lists.bank))
    if symmetric:
        rows, columns, values = _both_ways(rows, columns, values)
    small = max(len(columns), *shape) <= np.iinfo(np.int32).max
    kind = np.int32 if small else np.int64
    return {
        "indices": columns.astype(kind),
        "indptr": np.concatenate([[0], np.bincount(rows, minlength=shape[0]).cumsum()]).astype(kind),
        "format": b"csr",
        "shape": np.array(shape),
        "data": values if graph == "distances" else np.ones_like(values),
        "tied": lists.tied,
        **({_METRIC: np.array(lists.distance_metric)} if graph == "distances" else {}),
    }


def _both_ways(rows: Any, columns: Any, values: Any) -> tuple[Any, Any, Any]:
    """List edges in both directions, each once, those of a row by (distance, column)."""
    rows, columns = np.concatenate([rows, columns]), np.concatenate([columns, rows])
    values = np.concatenate([values, values])
    order = np.lexsort((columns, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    first = np.ones(len(rows), bool)
    first[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
    rows, columns, values = rows[first], columns[first], values[first]
    order = np.lexsort((columns, values, rows))
    return rows[order], columns[order], values[order]


def _from_compressed_rows(path: Path, arrays: Arrays) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    indptr, columns, values = (_array(path, arrays[name]) for name in ("indptr", "indices", "data"))
    lengths = np.diff(indptr)
    if (lengths < 0).any() or indptr[0] != 0 or indptr[-1] != len(columns) or not lengths.any():
        raise DataError(f"{path}: its rows are not those of a sparse matrix with entries")
    places = np.arange(len(columns)) - np.repeat(indptr[:-1], lengths)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    ids = np.full((len(lengths), lengths.max()), -1, np.int64)
    distances = np.full(ids.shape, np.inf, np.float64)
    ids[rows, places], distances[rows, places] = columns, values
    return ids, distances


def _read_pair(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Read ids with their distances: after them in the same file, or in a file beside it."""
    count, k = (int(x) for x in np.fromfile(path, "<u4", 2)) if path.stat().st_size >= 8 else (0, 0)
    if count * k and path.stat().st_size == 8 + 8 * count * k:
        ids = np.fromfile(path, "<i4", count * k, offset=8).reshape(count, k)
        return ids, np.fromfile(path, "<f4", offset=8 + 4 * count * k).reshape(count, k)
    ids = np.array(open_bin(path, np.int32)[""].read())
    beside = distances_beside(path)
    if not beside.is_file():
        return ids, None
    distances = _array(beside, open_arrays(beside)[""])
    return ids, distances if distances.shape == ids.shape else None  # features, perhaps


def _read_ivecs(path: Path) -> tuple[npt.NDArray[Any], None]:
    return np.array(open_vecs(path, np.int32)[""].read()), None


_WRITERS: dict[str, Callable[[Path, NeighborLists], list[Path]]] = {
    ".npz": _write_npz,
    ".ibin": _write_pair,
    ".bin": _write_bin,
    ".h5": _write_hdf5,
    ".hdf5": _write_hdf5,
    ".parquet": _write_parquet,
}
_OWN_READERS: dict[str, Callable[[Path], tuple[npt.NDArray[Any], npt.NDArray[Any] | None]]] = {
    ".ibin": _read_pair,
    ".bin": _read_pair,
    ".ivecs": _read_ivecs,
}
_METRIC_READERS: dict[str, Callable[[Path], Any]] = {
    ".npz": _metric_of_npz,
    ".h5": _metric_of_hdf5,
    ".hdf5": _metric_of_hdf5,
    ".parquet": _metric_of_parquet,
}
