"""Labelled features from files: which array of a file is which, and what makes a file unusable."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from faiss_knn.classify.labels import NUMBERS_HINT, as_labels_or_names
from faiss_knn.offline.column_files import LABEL_NAMES, UNKNOWN, Member
from faiss_knn.offline.extract import extract
from faiss_knn.offline.feature_folders import SIDES, Folder, Role, open_folder
from faiss_knn.offline.formats import Arrays, DataError, check_memory, open_arrays, read_array, readable
from faiss_knn.offline.lazy_rows import OneAtATime, RowSource, Shards, Subset
from faiss_knn.offline.manifest import MANIFEST
from faiss_knn.offline.remote import FilePath, as_location
from faiss_knn.search.inputs import as_choice, as_key, as_switch, is_memmap

__all__ = ["Features", "arrays_in", "digits", "extract", "read_class_names", "read_features"]

_FEATURES = (
    *("features", "embeddings", "embedding", "embeds", "embed", "emb", "feats", "feat"),
    *("x", "X", "data", "vectors", "vector"),
)
# Columns of numbers that are no features by what they are called: numbers of rows and samples, folds and splits.
_BOOKKEEPING = re.compile(r"(.*[_. -])?(id|ids|idx|index|row|fold|split)|unnamed: 0|__index_level_\d+__|level_0|", re.I)
_NAMED_FORMATS = (".npz", ".safetensors", ".h5", ".hdf5")
_LISTED = 20
_DOUBTED = 1 << 20  # rows that may make columns doubtful
_HELD_BYTES = 1 << 30  # of a folder, in memory: of formats that are read as a whole, further files are read again
_COLUMNS_HINT = " (columns belong together where their names differ in a number at the end, or list them: a,b,c)"


@dataclass(frozen=True)
class Features:
    """Rows of one side of an evaluation.

    Attributes:
        rows: (N, d) numbers, still on disk where the format can be memory-mapped.
        labels: (N,) int64 class ids or strings, (N, C) integer multi-hot or float shares, or None.
        class_names: Names of the classes by id, or None.
        source: Where they came from, for messages.
    """

    rows: RowSource
    labels: npt.NDArray[Any] | None
    class_names: list[str] | None
    source: str


def read_features(
    path: str | FilePath,
    role: Role = "bank",
    *,
    labels: str | FilePath | None = None,
    features_key: str | None = None,
    labels_key: str | None = None,
    allow_partial: bool = False,
) -> Features:
    """Open labelled features.

    Arrays are taken by `features_key` and `labels_key`, else by the usual names: those of the role's side (`train`,
    `bank`, `gallery`, or `test`, `queries`, `query`, `val`: `train_features`, `X_train`, `train/features`, or `train`
    alone, as in the HDF5 files of ann-benchmarks), then `features`, `embeddings`, `x`; and `labels`, `targets`, `y`.
    A file with a single array of vectors needs no names. In a table, a column of lists is an array, and so are columns
    that differ in a number at the end of their names alone (`emb_0`, `emb_1`: the array `emb_*`). Where other columns
    of numbers stand beside these, but for labels, ids and splits, `features_key` must say which are the features.
    Nothing but the two arrays is read.

    Args:
        path: A file (.npy .npz .pt .pth .safetensors .parquet .arrow .feather .csv .tsv .jsonl .ndjson .h5 .hdf5 .fvecs
            .bvecs .fbin .u8bin), or a folder of such files, joined in the order of their numbers: see `open_folder`.
            Also by URL (memory, s3, gs, hf, …: whatever fsspec knows): .npy, .h5, .fvecs, .bvecs, .fbin and .u8bin are
            read a slice at a time wherever they lie; of a folder of other formats 1 GiB is held, what is beyond it is
            read file by file.
        role: Which side of an evaluation this is.
        labels: A file with the labels alone; it goes before labels found in `path`. Also .txt, one label a line, or
            .json, a list.
        features_key: Name of the array of vectors, with dots or slashes for what is nested; a prefix such as `emb_` for
            numbered columns; or several columns with commas between.
        labels_key: Name of the array of labels: in the file `labels` if that is given.
        allow_partial: Read what a cut-off `extract` has saved so far, instead of refusing it.

    Returns:
        The rows, the labels if there are any, and the class names that the file has under `class_names`.

    Raises:
        DataError: If a file is missing, damaged, truncated, pickled, or holds no numbers of the right shape; or labels
            are no class ids, or not as many as the rows. The message begins with the file's name.
    """
    path = as_location(path, "`path`")
    as_choice(role, tuple(SIDES), "`role`")
    labels = None if labels is None else as_location(labels, "`labels`")
    for name, key in (("features_key", features_key), ("labels_key", labels_key)):
        if key is not None:
            as_key(key, f"`{name}`")
    allow_partial = as_switch(allow_partial, "`allow_partial`")
    files = open_folder(path, role, allow_partial) if path.is_dir() else Folder([path])
    has_own_labels = labels is None and not files.labels
    parts = _read_files(files, role, features_key, labels_key, has_own_labels)
    rows = _joined(path, [part.rows for part in parts])
    row_labels = (
        read_labels(labels, role, labels_key) if labels is not None else _folder_labels(files, parts, labels_key)
    )
    if row_labels is not None and len(row_labels) != len(rows):
        raise DataError(
            f"{path if labels is None else labels}: {len(row_labels)} labels for the {len(rows)} rows of {path}"
        )
    names = parts[0].class_names or _described_names(files, labels_key)
    if files.ids:
        order = _sample_order(files, len(rows))
        rows, row_labels = Subset(rows, order), None if row_labels is None else row_labels[order]
    return Features(rows, row_labels, names, str(path))


def open_features(
    path: str | FilePath, role: Role = "bank", *, features_key: str | None = None, allow_partial: bool = False
) -> RowSource:
    """Open features alone, as `read_features` finds them; labels are not looked at.

    Raises:
        DataError: As `read_features`.
    """
    path = as_location(path, "`path`")
    files = open_folder(path, role, allow_partial) if path.is_dir() else Folder([path])
    parts = _read_files(files, role, features_key, None, with_labels=False)
    rows = _joined(path, [part.rows for part in parts])
    return Subset(rows, _sample_order(files, len(rows))) if files.ids else rows


def read_labels(path: str | FilePath, role: Role = "bank", key: str | None = None) -> npt.NDArray[Any]:
    """Read labels alone: (N,) int64 ids or strings, or (N, C) integer multi-hot or float shares.

    Raises:
        DataError: As `read_features`.
    """
    path = as_location(path, "`path`")
    arrays = open_arrays(path)
    if key is not None:
        return _as_labels(path, _named(path, arrays, key, "labels")[1])
    name = _usual(path, arrays, role, LABEL_NAMES)
    if name is None and len(arrays) == 1 and path.suffix.lower() not in _NAMED_FORMATS:
        name = next(iter(arrays))
    if name is None:
        raise DataError(f"{path}: no labels among its arrays {_listed(arrays)}: name them with --labels-key")
    return _as_labels(path, arrays[name])


def read_column(path: str | FilePath, role: Role, key: str) -> npt.NDArray[Any]:
    """Read an array that stands beside the features, such as the group of each row, in the order of the rows.

    Raises:
        DataError: If it is not there, or no array of integers or names, one entry per row.
    """
    path = as_location(path, "`path`")
    files = open_folder(path, role, allow_partial=False) if path.is_dir() else Folder([path])
    columns = []
    for file in files.features:
        values = np.asarray(read_array(file, _named(file, open_arrays(file), key, "rows")[1]))
        if values.dtype.kind not in "iuUSO":
            raise DataError(f"{file}: {key!r} must hold integers or names, got {values.dtype}")
        columns.append(values)
    column = np.concatenate(columns)
    return column[_sample_order(files, len(column))] if files.ids else column


def read_class_names(path: str | FilePath) -> list[str]:
    """Read class names in the order of the class ids: one a line, a JSON list, or JSON {id: name}.

    Raises:
        DataError: If the file cannot be read as that.
    """
    path = as_location(path, "`path`")
    return [str(name) for name in _only(path, open_arrays(path))]


def digits(seed: int = 0) -> tuple[Features, Features]:
    """Load the handwritten digits that ship with scikit-learn, pixels as features: 1,347 bank rows and 450 queries.

    Raises:
        DataError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # an extra
    except ImportError as error:
        raise DataError(
            "the digits data need scikit-learn: pip install 'faiss-knn-eval[demo]', or name two files"
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


def _folder_labels(files: Folder, parts: list[Features], key: str | None) -> npt.NDArray[Any] | None:
    by_file = [read_labels(file, "bank", key) for file in files.labels]
    if len(by_file) == len(parts):
        _check_lengths(files, parts, by_file)
    if not files.labels:
        by_file = [part.labels for part in parts if part.labels is not None]
    if not by_file:
        return None
    if not files.labels and len(by_file) != len(parts):
        unlabelled = next(part.source for part in parts if part.labels is None)
        raise DataError(f"{unlabelled}: has no labels, but other files of the folder have")
    kinds = {(labels.shape[1:], labels.dtype.kind.replace("O", "U")) for labels in by_file}  # names, some of them None
    if len(kinds) > 1:
        raise DataError(f"{files.features[0].parent}: its files hold labels of different kinds")
    return np.concatenate(by_file)


def _check_lengths(files: Folder, parts: list[Features], by_file: list[npt.NDArray[Any]]) -> None:
    for file, part, labels in zip(files.labels, parts, by_file, strict=True):
        if len(labels) != len(part.rows):
            raise DataError(f"{file}: {len(labels)} labels for the {len(part.rows)} rows of {part.source}")


def _sample_order(files: Folder, length: int) -> npt.NDArray[np.int64]:
    """Put rows in the order of their samples' numbers, each sample once: samplers pad with copies."""
    numbers = np.concatenate([read_labels(file) for file in files.ids])
    if numbers.shape != (length,) or numbers.dtype.kind != "i":
        raise DataError(f"{files.ids[0]}: its kind holds {len(numbers)} numbers of samples for {length} rows")
    return np.unique(numbers, return_index=True)[1].astype(np.int64)


def _described_names(files: Folder, labels_key: str | None) -> list[str] | None:
    names = [labels_key] if labels_key is not None else list(LABEL_NAMES)
    return next((files.class_labels[name] for name in names if name in files.class_labels), None)


def _joined(path: FilePath, parts: list[RowSource]) -> RowSource:
    if len(parts) == 1:
        return parts[0]
    dims = sorted({part.shape[1] for part in parts})
    if len(dims) > 1:
        raise DataError(f"{path}: its files have different dimensions, {dims[0]} and {dims[1]}")
    return Shards(parts)


def _read_files(
    files: Folder, role: Role, features_key: str | None, labels_key: str | None, with_labels: bool
) -> list[Features]:
    parts: list[Features] = []
    held, one_at_a_time = 0, OneAtATime()
    for file in files.features:
        part = _read_file(file, role, features_key, labels_key, with_labels)
        if isinstance(part.rows, np.ndarray) and not is_memmap(part.rows):
            held += part.rows.nbytes
            if held > _HELD_BYTES and len(files.features) > 1:
                read = partial(_rows_of, file, role, features_key)
                part = replace(part, rows=one_at_a_time.rows(read, part.rows.shape, part.rows.dtype))
        parts.append(part)
    for part, expected in zip(parts, files.rows, strict=False):
        if len(part.rows) != expected:
            raise DataError(f"{part.source}: has {len(part.rows)} rows, {MANIFEST} lists {expected}")
    return parts


def _rows_of(file: FilePath, role: Role, features_key: str | None) -> RowSource:
    return _read_file(file, role, features_key, None, with_labels=False).rows


def _read_file(
    path: FilePath, role: Role, features_key: str | None, labels_key: str | None, with_labels: bool
) -> Features:
    arrays = open_arrays(path)
    if features_key is not None and "," in features_key and features_key not in arrays:
        name, rows = "", _columns(path, arrays, features_key.split(","))
    elif features_key is not None:
        name, member = _named(path, arrays, features_key, "features")
        rows = _as_rows(path, member, was_named=True)
    else:
        usual = _usual(path, arrays, role, _FEATURES)
        name = _only_vectors(path, arrays) if usual is None else usual
        rows = _as_rows(path, arrays[name], was_named=False)
    labels = _labels_beside(path, arrays, role, name, labels_key) if with_labels else None
    if features_key is None:
        _check_left_out(path, arrays, name, labels)
    names = labels.class_names if labels is not None else None
    if "class_names" in arrays:
        names = [str(x) for x in np.asarray(read_array(path, arrays["class_names"]))]
    return Features(rows, None if labels is None else _as_labels(path, labels), names, str(path))


def _check_left_out(path: FilePath, arrays: Arrays, features: str, labels: Member | None) -> None:
    """Refuse numbered columns as the features where the table has other columns of numbers, which may be features too.

    Labels and what `_BOOKKEEPING` names may stand beside them.
    """
    if not arrays[features].columns:
        return
    left_out = [
        name
        for name, member in arrays.items()
        if len(member.shape) == 1 and member.dtype.kind in "fiu" and member is not labels
        if not _BOOKKEEPING.fullmatch(name) and re.split(r"[_./]", name.lower())[-1] not in LABEL_NAMES
    ]
    if left_out:
        shown = ", ".join(left_out[:_LISTED]) + (", …" if len(left_out) > _LISTED else "")
        columns = arrays[features].columns
        raise DataError(
            f"{path}: {len(columns)} columns {features} are numbered, but there are {len(left_out)} other columns of "
            f"numbers, {shown}: name the features with --features-key: {features} for the numbered ones alone, or all "
            "of them with commas between (a,b,c)"
        )


def _labels_beside(path: FilePath, arrays: Arrays, role: Role, features: str, key: str | None) -> Member | None:
    if key is not None:
        return _named(path, arrays, key, "labels")[1]
    usual = _usual(path, arrays, role, LABEL_NAMES, beside=features)
    return None if usual is None else arrays[usual]


def _plain(name: str) -> str:
    """Take the marks of nesting and of numbered columns off a name: `a/emb_*` becomes `a.emb`."""
    return name.replace("/", ".").rstrip("*_-. ")


def _named(path: FilePath, arrays: Arrays, key: str, what: str) -> tuple[str, Member]:
    """Find the array that the user asked for, and its name; also one column of numbered ones."""
    single = {name: member for group in arrays.values() for name, member in group.columns.items()}
    alike = [key] if key in arrays else [name for name in arrays if _plain(name) == _plain(key)]
    if key in single:
        return key, single[key]
    if len(alike) != 1:
        raise DataError(f"{path}: no array {key!r} for the {what}: it holds {_listed(arrays)}")
    return alike[0], arrays[alike[0]]


def _usual(path: FilePath, arrays: Arrays, role: Role, plain: Sequence[str], beside: str | None = None) -> str | None:
    """Find the array whose name is usual for a role; labels are of the side and group of the features `beside`."""
    names: dict[str, str] = {}
    for name in arrays:
        names.setdefault(_plain(name), name)
    sides = SIDES[role]
    group = ""
    if beside is not None:
        group = _plain(beside).rpartition(".")[0]
        named = {side for side in sides if side in re.split(r"[._]", _plain(beside))}
        sides = tuple(side for side in sides if side in named) if named else sides
    wanted = [f"{group}.{name}" for name in plain] if group else []
    wanted += [
        pattern.format(side, name) for side in sides for name in plain for pattern in ("{}_{}", "{1}_{0}", "{}.{}")
    ]
    wanted += [*(sides if plain is _FEATURES else ()), *plain]
    exact = next((names[name] for name in wanted if name in names), None)
    if exact is not None or group:
        return exact
    nested = [names[name] for usual in plain for name in names if name.rpartition(".")[2] == usual]
    if len(nested) > 1:
        raise DataError(f"{path}: cannot tell which of {', '.join(nested)} is meant: name it with --features-key")
    return nested[0] if nested else None


def _only_vectors(path: FilePath, arrays: Arrays) -> str:
    """Find the one array of vectors, where no name says which it is."""
    if len(arrays) == 1:
        return next(iter(arrays))
    vectors = [name for name, member in arrays.items() if len(member.shape) == 2 and member.dtype.kind in "fiu"]
    floats = [name for name in vectors if arrays[name].dtype.kind == "f"]
    candidates = floats or [name for name in vectors if _plain(name).rpartition(".")[2] not in LABEL_NAMES]
    if len(candidates) != 1:
        raise DataError(
            f"{path}: cannot tell which of {_listed(arrays)} holds the features: name it with --features-key"
            f"{_COLUMNS_HINT if not vectors else ''}"
        )
    return candidates[0]


def _columns(path: FilePath, arrays: Arrays, names: list[str]) -> RowSource:
    """Stack columns that the user named one by one."""
    columns = [np.asarray(read_array(path, _named(path, arrays, name, "features")[1])) for name in names]
    if any(column.ndim != 1 or column.dtype.kind not in "fiu" for column in columns):
        raise DataError(f"{path}: {', '.join(names)} are not all columns of numbers")
    rows: RowSource = np.stack(columns, axis=1)
    return rows


def _only(path: FilePath, arrays: Arrays) -> npt.NDArray[Any]:
    if len(arrays) != 1:
        raise DataError(f"{path}: one array was expected, it holds {_listed(arrays)}")
    return np.asarray(read_array(path, next(iter(arrays.values()))))


def arrays_in(path: str | FilePath) -> str:
    """List the arrays of a file with their shapes, as the end of a message; nothing of a folder.

    Raises:
        DataError: If the file cannot be read.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> np.savez(folder / "a.npz", x=np.zeros((2, 3)), names=np.zeros(2))
        >>> arrays_in(folder / "a.npz")
        ': it holds x (2, 3), names (2,)'
    """
    place = as_location(path, "`path`")
    return "" if place.is_dir() else f": it holds {_listed(open_arrays(place))}"


def _listed(arrays: Arrays) -> str:
    shown = [f"{name or 'one array'} {_shown(member.shape)}" for name, member in arrays.items()]
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more if shown else "nothing"


def _shown(shape: tuple[int, ...]) -> str:
    lengths = ["?" if length == UNKNOWN else str(length) for length in shape]
    return f"({', '.join(lengths)}{',' if len(shape) == 1 else ''})"


def _as_rows(path: FilePath, member: Member, was_named: bool) -> RowSource:
    rows = read_array(path, member)
    if rows.dtype.kind not in "fiu":
        raise DataError(f"{path}: features must be numbers, got {rows.dtype}")
    if len(rows.shape) != 2:
        raise DataError(f"{path}: features must be (N, d), got shape {tuple(rows.shape)}: flatten or pool each row")
    if 0 in rows.shape:
        raise DataError(f"{path}: features are empty, shape {tuple(rows.shape)}")
    reason = member.doubt(rows[:_DOUBTED]) if member.doubt is not None and not was_named else None
    if reason is not None:
        raise DataError(f"{path}: {reason}: say which columns are the features with --features-key")
    checked: RowSource = rows
    return checked


def _as_labels(path: FilePath, member: Member) -> npt.NDArray[Any]:
    with readable(path):
        stored = (member.read_labels or member.read)()
        check_memory(tuple(stored.shape), np.dtype(stored.dtype))
        values = np.asarray(stored)
    if values.dtype.kind == "f" and values.ndim == 1 and not (values == np.floor(values)).all():
        raise DataError(
            f"{path}: labels must be class ids (whole numbers) or names, got {values.dtype} with fractions: "
            f"{NUMBERS_HINT}"
        )
    try:
        labels = as_labels_or_names(values, "labels", float_ids=True)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return np.asarray(labels)
