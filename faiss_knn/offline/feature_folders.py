"""Folders of feature files: which of them hold features, labels, or the numbers of samples, and in what order."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from loguru import logger

from faiss_knn.offline.column_files import class_labels
from faiss_knn.offline.formats import OPENERS, DataError, readable
from faiss_knn.offline.manifest import MANIFEST, read_manifest
from faiss_knn.offline.remote import FilePath

Role = Literal["bank", "queries"]

SIDES: dict[Role, tuple[str, ...]] = {
    "bank": ("train", "bank", "gallery", "database"),
    "queries": ("test", "queries", "query", "val", "valid", "validation"),
}
_FEATURE_WORDS = {"features", "feature", "feats", "feat", "embeddings", "embedding", "embeds", "embed", "emb", "x"}
_LABEL_WORDS = {"labels", "label", "targets", "target", "y"}
_NOTES = (".csv", ".tsv", ".jsonl", ".ndjson")  # beside arrays, such a file describes the samples


@dataclass(frozen=True)
class Folder:
    """The files of one side.

    Attributes:
        features: In order.
        labels: In the same order: one for each of `features`, one for all, or none.
        ids: One for each of `features` with the numbers of its samples, or none.
        rows: Rows that each of `features` must have, where a manifest tells.
        class_labels: Names of the classes by column, where the folder describes them.
    """

    features: list[FilePath]
    labels: list[FilePath] = field(default_factory=list)
    ids: list[FilePath] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    class_labels: dict[str, list[str]] = field(default_factory=dict)


def open_folder(folder: FilePath, role: Role, allow_partial: bool = False) -> Folder:
    """Find the files of a side.

    Folders that `extract` wrote are read by their manifest, those of the `datasets` library (`save_to_disk`) by their
    state; of others, files are sorted by the words of their names (`X_train.npy` and `y_train.npy`; `trainfeat.pth` and
    `trainlabels.pth`, as DINO writes; `rank0_chunk0_train_heads_features.npy`, `…_targets.npy` and `…_inds.npy`, as
    VISSL writes) and taken in the order of their numbers.

    Raises:
        DataError: If no file holds features, files do not belong together, or an extraction was cut off and
            `allow_partial` is false.
    """
    manifest = _by_manifest(folder, allow_partial)
    if manifest is not None:
        return manifest
    if (folder / "dataset_dict.json").is_file():
        return _dataset_of(folder, role)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _dataset(folder)
    return _by_names(folder, role)


def _by_manifest(folder: FilePath, allow_partial: bool) -> Folder | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if not manifest.finished and not allow_partial:
        raise DataError(
            f"{folder}: its extraction was cut off after {manifest.rows} rows: run extract again with the same "
            "arguments to go on, or accept a part with allow_partial=True (--allow-partial)"
        )
    if not manifest.shards:
        raise DataError(f"{folder}: its extraction was cut off before the first shard was written")
    names = [manifest.names(number) for number in range(len(manifest.shards))]
    listed = {name for shard in names for name in shard}
    missing = sorted(name for name in listed if not (folder / name).exists())
    others = [file.name for file in _data_files(folder) if file.name not in listed and file.suffix == ".npy"]
    if missing:
        raise DataError(f"{folder}: {missing[0]} is missing, which {MANIFEST} lists")
    if others and manifest.finished:
        raise DataError(f"{folder}: {others[0]} is not listed in {MANIFEST}: move it away, or delete {MANIFEST}")
    columns = [[folder / name for name in kind] for kind in zip(*names, strict=True)]
    return Folder(columns[0], columns[1] if manifest.labelled else [], rows=[shard.rows for shard in manifest.shards])


def _dataset_of(folder: FilePath, role: Role) -> Folder:
    splits = _json(folder / "dataset_dict.json").get("splits", [])
    mine = next((side for side in SIDES[role] if side in splits), splits[0] if len(splits) == 1 else None)
    if mine is None or PurePath(mine).name != mine:
        raise DataError(f"{folder}: none of its splits {splits} is known to hold the {role}: name the folder of one")
    return _dataset(folder / mine)


def _dataset(folder: FilePath) -> Folder:
    names = [str(file.get("filename", "")) for file in _json(folder / "state.json").get("_data_files", [])]
    if not names or any(PurePath(name).name != name for name in names):
        raise DataError(f"{folder}: its state.json names no files of the folder")
    described = class_labels(_json(folder / "dataset_info.json").get("features"))
    return Folder([folder / name for name in names], class_labels=described)


def _json(file: FilePath) -> dict[str, Any]:
    with readable(file):
        held = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise TypeError(f"it holds a {type(held).__name__}, not an object")
        return held


def _by_names(folder: FilePath, role: Role) -> Folder:
    files = [file for file in _data_files(folder) if file.suffix.lower() != ".json"]
    kinds = {file: _kind(file) for file in files}
    if any(kind == "features" and file.suffix.lower() not in _NOTES for file, kind in kinds.items()):
        files = [file for file in files if kinds[file] != "features" or file.suffix.lower() not in _NOTES]
    features, labels, ids = (
        _of_side(folder, [file for file in files if kinds[file] == kind], role)
        for kind in ("features", "labels", "ids")
    )
    if not features:
        raise DataError(f"{folder}: the folder holds no feature files: {' '.join(OPENERS)}")
    layers = sorted({match.group(1) for file in features if (match := _VISSL.fullmatch(file.name))})
    if len(layers) > 1:
        raise DataError(f"{folder}: its files are features of several layers, {layers}: give each a folder of its own")
    _check_pairs(folder, features, labels)
    _check_pairs(folder, features, ids)
    by_name = sorted(features, key=lambda file: file.name)
    if by_name != features:
        at = next(i for i, (first, second) in enumerate(zip(features, by_name, strict=True)) if first != second)
        logger.warning(
            f"{folder}: files are read in the order of their numbers ({features[at].name} before {by_name[at].name}), "
            "which is not the order of their names"
        )
    return Folder(features, labels, ids)


_VISSL = re.compile(r"rank[0-9]+_(?:chunk[0-9]+_)?[a-z]+_(.+)_features\.npy")


def _data_files(folder: FilePath) -> list[FilePath]:
    files = [file for file in folder.iterdir() if file.suffix.lower() in OPENERS and not file.name.startswith(".")]
    return sorted(files, key=_natural)


def _natural(file: FilePath) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", file.name)]


def _words(file: FilePath) -> list[str]:
    """Split a name into its words; DINO writes two in one, as `trainfeat`."""
    words = re.findall(r"[a-z]+", file.stem.lower())
    sides = "|".join(side for names in SIDES.values() for side in names)
    kinds = "|".join(_FEATURE_WORDS | _LABEL_WORDS - {"x", "y"})
    return [part for word in words for part in re.sub(rf"^({sides})({kinds})$", r"\1 \2", word).split()]


def _kind(file: FilePath) -> str:
    words = _words(file)
    if words and words[-1] == "inds":
        return "ids"
    told = [word for word in words if word in _FEATURE_WORDS or word in _LABEL_WORDS]
    is_labels = told[-1] in _LABEL_WORDS if told else file.name.lower().startswith(("label", "target"))
    return "labels" if is_labels or file.suffix.lower() == ".txt" else "features"


def _of_side(folder: FilePath, files: list[FilePath], role: Role) -> list[FilePath]:
    """Choose the files of a side, where names tell sides apart; else those that name none, or all."""
    sides = {
        file: next((word for word in _words(file) if any(word in s for s in SIDES.values())), None) for file in files
    }
    for side in SIDES[role]:
        if side in sides.values():
            return [file for file in files if sides[file] == side]
    unnamed = [file for file in files if sides[file] is None]
    if not unnamed and len(set(sides.values())) > 1:
        raise DataError(f"{folder}: none of {files[0].name}, {files[1].name}, … is named for the {role}: {SIDES[role]}")
    return unnamed or files


def _check_pairs(folder: FilePath, features: Sequence[FilePath], others: Sequence[FilePath]) -> None:
    """Refuse files of labels that are not one for each file of features, by their numbers where both have some."""
    if len(others) < 2:
        return
    if len(others) != len(features):
        raise DataError(f"{folder}: {len(others)} files such as {others[0].name} for {len(features)} files of features")
    numbers = [_varying(files) for files in (features, others)]
    if numbers[0] and numbers[1] and len(numbers[0][0]) == len(numbers[1][0]):
        pairs = zip(features, others, *numbers, strict=True)
        wrong = next(((file, other) for file, other, one, two in pairs if one != two), None)
        if wrong is not None:
            raise DataError(f"{folder}: {wrong[0].name} and {wrong[1].name} have different numbers")


def _varying(files: Sequence[FilePath]) -> list[tuple[int, ...]]:
    """Find the numbers in each name, without those that all names share."""
    numbers = [[int(number) for number in re.findall(r"[0-9]+", file.stem)] for file in files]
    if len({len(own) for own in numbers}) > 1:
        return []
    columns = [column for column in zip(*numbers, strict=True) if len(set(column)) > 1]
    return list(zip(*columns, strict=True))
