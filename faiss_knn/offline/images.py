"""Pictures of rows from files: a column or a file of paths, or an array of pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from faiss_knn.offline.features import read_column
from faiss_knn.offline.formats import Arrays, DataError, open_arrays, read_array
from faiss_knn.offline.remote import FilePath, as_location
from faiss_knn.offline.report.thumbnails import Album


def read_album(source: str, features: FilePath | str, count: int) -> Album:
    """Open the pictures of the rows of a file.

    Args:
        source: A file, or the name of an array or column in the features' file: (N,) paths, which begin at the folder
            of the file that lists them, or (N, H, W), (N, H, W, C) or (N, C, H, W) pictures. Of a folder of features
            a column of paths in its files, which begin there.
        features: The file or folder of the features, or its URL: paths then begin at the working directory.
        count: How many rows it has.

    Raises:
        DataError: If there are no such pictures, or not as many as rows.
    """
    own, path = Path(source), as_location(features, "`features`")
    if own.is_file():
        path, held = own, _only(own, open_arrays(own))
    elif path.is_dir():
        held = read_column(path, "bank", source)
    else:
        held = _named(path, open_arrays(path), source)
    if len(held) != count:
        raise DataError(f"{path}: {len(held)} pictures for the {count} rows of {features}")
    begin = (path if path.is_dir() else path.parent) if isinstance(path, Path) else Path()
    try:
        return Album(held if len(held.shape) >= 3 else np.asarray(held).tolist(), begin)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def names_array(features: FilePath | str, source: str) -> str | None:
    """Return `source` if it names an array of this file, and no file of its own; else None."""
    path = as_location(features, "`features`")
    if Path(source).is_file() or path.is_dir():
        return None
    return source if source in open_arrays(path) else None


def _only(path: Path, arrays: Arrays) -> Any:
    if len(arrays) != 1:
        raise DataError(f"{path}: one array of pictures or paths was expected, it holds {', '.join(arrays) or 'none'}")
    return read_array(path, next(iter(arrays.values())))


def _named(path: FilePath, arrays: Arrays, source: str) -> Any:
    if source not in arrays:
        raise DataError(
            f"{path}: no array {source!r} for the pictures, and no file of that name: it holds {', '.join(arrays)}"
        )
    return read_array(path, arrays[source])
