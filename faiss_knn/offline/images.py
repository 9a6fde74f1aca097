"""Pictures of rows from files: a column or a file of paths, or an array of pictures."""

from pathlib import Path

import numpy as np

from faiss_knn.offline.formats import DataError, open_arrays, read_array
from faiss_knn.offline.report.thumbnails import Album


def read_album(source: str, features: Path, count: int) -> Album:
    """Open the pictures of the rows of a file.

    Args:
        source: A file, or the name of an array or column in the features' file: (N,) paths, which begin at the folder
            of the file that lists them, or (N, H, W), (N, H, W, C) or (N, C, H, W) pictures.
        features: The file of the features.
        count: How many rows it has.

    Raises:
        DataError: If there are no such pictures, or not as many as rows.
    """
    path = Path(source)
    is_own = path.is_file()
    path = path if is_own else features
    if not path.is_file():
        raise DataError(f"{source}: no such file, and {features} is a folder, which has no arrays by name")
    arrays = open_arrays(path)
    if not is_own and source not in arrays:
        raise DataError(f"{features}: no array {source!r} for the pictures, and no file of that name")
    if is_own and len(arrays) != 1:
        raise DataError(f"{path}: one array of pictures or paths was expected, it holds {', '.join(arrays) or 'none'}")
    held = read_array(path, next(iter(arrays.values())) if is_own else arrays[source])
    if len(held) != count:
        raise DataError(f"{path}: {len(held)} pictures for the {count} rows of {features}")
    try:
        return Album(held if len(held.shape) >= 3 else np.asarray(held).tolist(), path.parent)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
