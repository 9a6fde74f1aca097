"""Labelled features from files: which array of a file is which, and what makes a file unusable."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from faiss_knn.offline.extract import extract
from faiss_knn.offline.formats import OPENERS, DataError, open_arrays, readable
from faiss_knn.offline.rows import Rows, Shards

__all__ = ["Features", "digits", "extract", "read_class_names", "read_features"]

Role = Literal["bank", "queries"]

_SIDES = {"bank": ("train", "bank"), "queries": ("test", "queries")}
_FEATURES = ("features", "embeddings", "embedding", "feats", "x", "X", "data")
_LABELS = ("labels", "label", "targets", "target", "y", "classes")


@dataclass(frozen=True)
class Features:
    """Rows of one side of an evaluation.

    Attributes:
        rows: (N, d) numbers, still on disk where the format can be memory-mapped.
        labels: (N,) int64 class ids or strings, (N, C) int64 multi-hot, or None.
        class_names: Names of the classes by id, or None.
        source: Where they came from, for messages.
    """

    rows: Rows
    labels: npt.NDArray[Any] | None
    class_names: list[str] | None
    source: str


def read_features(
    path: str | Path,
    role: Role = "bank",
    *,
    labels: str | Path | None = None,
    features_key: str | None = None,
    labels_key: str | None = None,
) -> Features:
    """Open labelled features.

    Arrays are taken by `features_key` and `labels_key`, else by the usual names: `train` or `test` (as in the HDF5
    files of ann-benchmarks) according to the role, then `features`, `embeddings`, `x`; and `labels`, `targets`, `y`.
    A file with a single array of vectors needs no names.

    Args:
        path: A file (.npy .npz .pt .pth .safetensors .parquet .h5 .hdf5 .fvecs .bvecs .fbin .u8bin), or a folder of
            such files, joined in the order of their names; in a folder, files whose names begin with "label" or
            "target" hold the labels.
        role: Which side of an evaluation this is.
        labels: A file with the labels alone; it goes before labels found in `path`. Also .txt, one label a line.
        features_key: Name of the array of vectors.
        labels_key: Name of the array of labels.

    Returns:
        The rows, the labels if there are any, and the class names that the file has under `class_names`.

    Raises:
        DataError: If a file is missing, damaged, truncated, pickled, or holds no numbers of the right shape; or labels
            are no class ids, or not as many as the rows. The message begins with the file's name.
    """
    path = Path(path)
    parts = [_read_file(file, role, features_key, labels_key) for file in _feature_files(path)]
    rows = _joined(path, [part.rows for part in parts])
    if labels is not None:
        found: npt.NDArray[Any] | None = read_labels(labels, role, labels_key)
        labels_source = str(labels)
    else:
        found, labels_source = _folder_labels(path, parts), str(path)
    if found is not None and len(found) != len(rows):
        raise DataError(f"{labels_source}: {len(found)} labels for the {len(rows)} rows of {path}")
    return Features(rows, found, parts[0].class_names, str(path))


def read_labels(path: str | Path, role: Role = "bank", key: str | None = None) -> npt.NDArray[Any]:
    """Read labels alone: (N,) int64 ids or strings, or (N, C) int64 multi-hot.

    Raises:
        DataError: As `read_features`.
    """
    path = Path(path)
    arrays = open_arrays(path)
    name = _chosen(path, arrays, key, _names(role, _LABELS), "labels") if key or "" not in arrays else ""
    if name is None:
        raise DataError(f"{path}: no labels among its arrays {_listed(arrays)}: name them with --labels-key")
    return _as_labels(path, arrays[name])


def read_class_names(path: str | Path) -> list[str]:
    """Read class names in the order of the class ids: one a line, a JSON list, or JSON {id: name}.

    Raises:
        DataError: If the file cannot be read as that.
    """
    path = Path(path)
    with readable(path):
        return [str(name) for name in _only(open_arrays(path))]


def digits(seed: int = 0) -> tuple[Features, Features]:
    """The handwritten digits that ship with scikit-learn, pixels as features: 1,347 bank rows and 450 queries.

    Raises:
        DataError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # an extra
    except ImportError as error:
        raise DataError(
            "the digits data need scikit-learn: pip install 'faiss-knn[demo]', or name two files"
        ) from error
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    names = [str(name) for name in data.target_names]
    rows, labels = data.data.astype(np.float32), data.target.astype(np.int64)
    bank, queries = order[450:], order[:450]
    return (
        Features(rows[bank], labels[bank], names, "digits (bank)"),
        Features(rows[queries], labels[queries], names, "digits (queries)"),
    )


def _feature_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [file for file in _data_files(path) if not _is_label_file(file)]
    if not files:
        raise DataError(f"{path}: the folder holds no feature files: {' '.join(OPENERS)}")
    return files


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in OPENERS and not file.name.startswith("."))


def _is_label_file(file: Path) -> bool:
    return file.name.lower().startswith(("label", "target")) or file.suffix in (".txt", ".json")


def _folder_labels(path: Path, parts: list[Features]) -> npt.NDArray[Any] | None:
    files = (
        [file for file in _data_files(path) if _is_label_file(file) and file.suffix != ".json"] if path.is_dir() else []
    )
    found = [read_labels(file) for file in files] or [part.labels for part in parts if part.labels is not None]
    if not found:
        return None
    if not files and len(found) != len(parts):
        unlabelled = next(part.source for part in parts if part.labels is None)
        raise DataError(f"{unlabelled}: has no labels, but other files of the folder have")
    if len({(labels.shape[1:], labels.dtype.kind) for labels in found}) > 1:
        raise DataError(f"{path}: its files hold labels of different kinds")
    return np.concatenate(found)


def _joined(path: Path, parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    dims = sorted({part.shape[1] for part in parts})
    if len(dims) > 1:
        raise DataError(f"{path}: its files have different dimensions, {dims[0]} and {dims[1]}")
    return Shards(parts)


def _read_file(path: Path, role: Role, features_key: str | None, labels_key: str | None) -> Features:
    arrays = open_arrays(path)
    name = _chosen(path, arrays, features_key, _names(role, _FEATURES), "features")
    if name is None:
        name = _only_vectors(path, arrays)
    label_name = _chosen(path, arrays, labels_key, _names(role, _LABELS), "labels")
    names = arrays.get("class_names")
    return Features(
        _as_rows(path, arrays[name]),
        None if label_name is None else _as_labels(path, arrays[label_name]),
        None if names is None else [str(x) for x in np.asarray(names)],
        str(path),
    )


def _names(role: Role, plain: Iterable[str]) -> list[str]:
    plain = list(plain)
    sides = _SIDES[role]
    return [f"{side}_{name}" for side in sides for name in plain] + (list(sides) if "features" in plain else []) + plain


def _chosen(path: Path, arrays: Mapping[str, Any], key: str | None, names: list[str], what: str) -> str | None:
    if key is not None:
        if key not in arrays:
            raise DataError(f"{path}: no array {key!r} for the {what}: it holds {_listed(arrays)}")
        return key
    return next((name for name in names if name in arrays), None)


def _only_vectors(path: Path, arrays: Mapping[str, Any]) -> str:
    """The one array of vectors, where no name says which it is."""
    if len(arrays) == 1:
        return next(iter(arrays))
    vectors = [name for name, array in arrays.items() if len(array.shape) == 2 and array.dtype.kind == "f"]
    if len(vectors) != 1:
        raise DataError(
            f"{path}: cannot tell which of {_listed(arrays)} holds the features: name it with --features-key"
        )
    return vectors[0]


def _only(arrays: Mapping[str, Any]) -> npt.NDArray[Any]:
    if len(arrays) != 1:
        raise ValueError(f"one array was expected, it holds {_listed(arrays)}")
    return np.asarray(next(iter(arrays.values())))


def _listed(arrays: Mapping[str, Any]) -> str:
    return ", ".join(f"{name or 'one array'} {tuple(array.shape)}" for name, array in arrays.items()) or "nothing"


def _as_rows(path: Path, array: Any) -> Rows:
    if array.dtype.kind not in "fiu":
        raise DataError(f"{path}: features must be numbers, got {array.dtype}")
    if len(array.shape) != 2:
        raise DataError(f"{path}: features must be (N, d), got shape {tuple(array.shape)}: flatten or pool each row")
    if 0 in array.shape:
        raise DataError(f"{path}: features are empty, shape {tuple(array.shape)}")
    rows: Rows = array
    return rows


def _as_labels(path: Path, array: Any) -> npt.NDArray[Any]:
    with readable(path):
        labels = np.asarray(array)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2):
        raise DataError(f"{path}: labels must be (N,) or multi-hot (N, C), got shape {labels.shape}")
    if labels.dtype.kind == "O" and all(isinstance(x, str) for x in labels.flat):
        labels = labels.astype(str)
    if labels.dtype.kind == "U" and labels.ndim == 1:
        return labels
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all()))
    if not whole:
        raise DataError(f"{path}: labels must be class ids (whole numbers) or names, got {labels.dtype}")
    return labels.astype(np.int64)
