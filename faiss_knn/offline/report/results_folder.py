"""The folder of results: every record on disk as soon as it is there, and none ever lost."""

import fcntl
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

from faiss_knn.offline.report.content import Section
from faiss_knn.offline.report.findings import Mistakes
from faiss_knn.offline.report.gallery_file import GALLERY, gallery_text, read_galleries
from faiss_knn.offline.report.outcomes_file import (
    OUTCOMES,
    check_outcomes,
    pack_outcomes,
    part_path,
    part_paths,
    read_outcomes,
)
from faiss_knn.offline.report.results import Checks, Classes, Outcome, Record, Results, record_key, task_key

RECORDS = "results.jsonl"
BY_CLASS = "per_class.jsonl"
_ODD = "results.odd.jsonl"

_WORDS = ("spec", "weighting", "distance_metric", "data", "spec_used", "backend", "device")
_NUMBERS = (
    "k", "temperature", "top1", "recall", "accuracy_loss", "build_s", "search_s", "qps", "bytes", "n_bank", "n_queries",
    "dim", "num_classes",
)  # fmt: skip
_NESTED = ("settings", "options", "parameters", "versions")
_PRESENT = (
    "exact", "leave_one_out", "per_class", "tries", "seed", "top1_se", "top1_std", "top5", "macro_top1", "map",
    "recall_ids", "accuracy_loss_se", "nprobe", "retrieval_precision", "retrieval_r_precision",
)  # fmt: skip


class ResultsFolder:
    """results.jsonl of a folder that only grows, and of a run that may be cut off.

    Args:
        folder: Made if it is not there.
        resume: Whether the records that are there are `done`, so that they need not be made again.
        overwrite: Forget the records that are there, as soon as there is a new one.

    Attributes:
        folder: Where the files are.
        done: The records that need not be made again.
        warning: What was found beside records, in words, or None.

    Raises:
        ValueError: If the folder cannot be written, or its results.jsonl or outcomes.npz holds something else.
    """

    def __init__(self, folder: str | Path, resume: bool = False, *, overwrite: bool = False) -> None:
        self.folder = Path(folder)
        self._overwrite = overwrite
        _check_writable(self.folder)
        if not overwrite:
            check_outcomes(self.folder)
        with self._locked():
            held, self.warning = self._held()
        self.done: list[Record] = list(held.values()) if resume and not overwrite else []

    def add(self, record: Record, classes: Classes, outcome: Outcome | None = None) -> None:
        """Append one record; outcome and classes first, so that a record that is there has them.

        Outcomes are in files of their own until all are merged, so that no cut loses them.
        """
        key = record_key(record)
        with self._locked():
            self._forget()
            if outcome is not None:
                write(part_path(self.folder, key), pack_outcomes({key: outcome}, compress=False))
            _append(self.folder / BY_CLASS, _line({"record": key} | classes._asdict()))
            _append(self.folder / RECORDS, _line(record))

    def merge(self, results: Results) -> list[Results]:
        """Add results, keep the newest record of each key in the file, and return all that the folder holds by task."""
        described = {task_key(record) for record in results.records}
        added = {record_key(record): record for record in results.records}
        with self._locked():
            self._forget()
            held = self._held()[0] | added
            classes, tasks = _by_class(self.folder / BY_CLASS)
            retrieval = results.retrieval_by_class
            classes |= {key: Classes(scores, retrieval.get(key, {})) for key, scores in results.per_class.items()}
            tasks |= {task: _told(results, tasks.get(task, {})) for task in described}
            lines = [_line({"task": task} | told) for task, told in tasks.items()]
            lines += [_line({"record": key} | one._asdict()) for key, one in classes.items() if key in held]
            write(self.folder / BY_CLASS, "".join(lines))
            self._merge_outcomes(results.outcomes, added.keys() & results.per_class.keys(), held)
            write(self.folder / RECORDS, "".join(_line(record) for record in held.values()))
        return _by_task(held, classes, tasks)

    def keep_gallery(self, task: str, shown: Sequence[Section]) -> dict[str, list[Section]]:
        """Keep sections with pictures of an evaluation, if there are any; return those of the folder by `task_key`."""
        with self._locked():
            galleries = read_galleries(self.folder)
            if shown:
                galleries[task] = list(shown)
                write(self.folder / GALLERY, gallery_text(galleries))
        return galleries

    def _merge_outcomes(self, added: dict[str, Outcome], anew: set[str], held: dict[str, Record]) -> None:
        """Add what became of the queries; a record made anew without it has none."""
        parts = part_paths(self.folder)
        if not added and not parts and not (self.folder / OUTCOMES).exists():
            return
        earlier = {key: outcome for key, outcome in read_outcomes(self.folder).items() if key not in anew}
        outcomes = {key: outcome for key, outcome in (earlier | added).items() if key in held}
        write(self.folder / OUTCOMES, pack_outcomes(outcomes))
        for path in parts:
            path.unlink()

    def _held(self) -> tuple[dict[str, Record], str | None]:
        """Read the newest record of each key; what is no record, or half of one, is set aside."""
        path = self.folder / RECORDS
        held, odd = _records(path)
        if not odd:
            return held, None
        _append(self.folder / _ODD, "".join(line.rstrip("\n") + "\n" for line in odd))
        write(path, "".join(_line(record) for record in held.values()))
        return held, f"{path}: {len(odd)} lines are no whole records: moved to {_ODD}"

    def _forget(self) -> None:
        if self._overwrite:
            for name in (RECORDS, BY_CLASS, _ODD, OUTCOMES, GALLERY):
                (self.folder / name).unlink(missing_ok=True)
            for path in (*self.folder.glob("neighbors*.npz"), *part_paths(self.folder)):
                path.unlink()
        self._overwrite = False

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Wait for other programs that write to the folder, and let them wait."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems lock no folders
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def read_folder(folder: Path) -> Results:
    """Read all records of a folder, with the names and checks of what was added last; nothing is written.

    Raises:
        ValueError: If its results.jsonl holds something else.
    """
    held, odd = _records(folder / RECORDS)
    if odd:
        warnings.warn(f"{folder / RECORDS}: {len(odd)} lines are no whole records: left out", stacklevel=3)
    classes, tasks = _by_class(folder / BY_CLASS)
    last = list(tasks.values())[-1] if tasks else {}
    records = list(held.values())
    outcomes = {key: outcome for key, outcome in read_outcomes(folder).items() if key in held}
    return _as_told(last, records, classes, outcomes)


def _told(results: Results, earlier: dict[str, Any]) -> dict[str, Any]:
    """Collect what the records of an evaluation do not say; of mistakes, those that say more, these or earlier ones."""
    about = {"checks": results.checks, "class_names": results.class_names, "class_ids": results.class_ids}
    held = earlier.get("mistakes")
    is_new = results.mistakes is not None and (held is None or list(results.mistakes.rank) >= held["rank"])
    return about | {"mistakes": asdict(results.mistakes) if is_new and results.mistakes else held}


def _as_told(
    told: dict[str, Any],
    records: list[Record],
    classes: dict[str, Classes],
    outcomes: dict[str, Outcome] | None = None,
) -> Results:
    mistakes = told.get("mistakes")
    return Results(
        told.get("class_names"),
        told.get("checks") or Checks(),
        records,
        {key: one.scores for key, one in classes.items()},
        {key: one.retrieval for key, one in classes.items()},
        class_ids=told.get("class_ids"),
        outcomes=outcomes or {},
        mistakes=None if mistakes is None else Mistakes.read(mistakes),
    )


def write(path: Path, content: str | bytes) -> None:
    """Replace a file at once: it holds the old content or the new, whenever this is cut off."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
    os.replace(partial, path)


def write_into(folder: str | Path, files: Mapping[str, str | bytes]) -> Path:
    """Replace files in a folder, which is made if it is not there, by contents by name; return the folder.

    Raises:
        ValueError: If the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write(folder / name, content)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}): choose another folder") from error
    return folder


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (RECORDS, BY_CLASS):
            is_new = not (folder / name).exists()
            with open(folder / name, "ab"):
                pass
            if is_new:
                (folder / name).unlink()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}): choose another folder") from error


def _by_task(held: dict[str, Record], classes: dict[str, Classes], tasks: dict[str, dict[str, Any]]) -> list[Results]:
    groups: dict[str, list[Record]] = {}
    for record in held.values():
        groups.setdefault(task_key(record), []).append(record)
    results = []
    for task, records in groups.items():
        told = tasks.get(task, {})
        results.append(_as_told(told, records, classes))
    return results


def _records(path: Path) -> tuple[dict[str, Record], list[str]]:
    """Read the newest record of each key, and the lines that are no records."""
    whole, odd = _lines(path)
    records = {record_key(one): one for one in whole if _is_record(one)}
    odd += [json.dumps(one) for one in whole if not _is_record(one)]
    if not whole and any(line.endswith("\n") for line in odd):
        raise ValueError(f"{path}: not a results file (line 1: {odd[0].strip()[:40]!r}): choose another folder")
    return records, odd


def _is_record(one: Any) -> TypeGuard[Record]:
    if not isinstance(one, dict) or not one.keys() >= set(_PRESENT):
        return False
    is_number = all(isinstance(one.get(name), (int, float)) for name in _NUMBERS)
    is_word = all(isinstance(one.get(name), str) for name in _WORDS)
    return is_number and is_word and all(isinstance(one.get(name), dict) for name in _NESTED)


def _by_class(path: Path) -> tuple[dict[str, Classes], dict[str, dict[str, Any]]]:
    """Read scores by record, and what is told of each task."""
    lines = [one for one in _lines(path)[0] if isinstance(one, dict)]
    scored = [one for one in lines if isinstance(one.get("scores"), list)]
    classes = {one["record"]: Classes(one["scores"], one.get("retrieval") or {}) for one in scored}
    return classes, {one["task"]: one for one in lines if isinstance(one.get("task"), str)}


def _lines(path: Path) -> tuple[list[Any], list[str]]:
    """Read the JSON values of a file, one a line, and the lines that are none."""
    whole: list[Any] = []
    odd: list[str] = []
    if not path.exists():
        return whole, odd
    for line in path.read_text("utf-8", "replace").splitlines(keepends=True):
        try:
            whole.append(json.loads(line))
        except ValueError:
            odd += [line] if line.strip() else []
    return whole, odd


def _append(path: Path, text: str) -> None:
    """Add lines; where the last one was cut off they begin on a new one."""
    with open(path, "a+b") as file:
        if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write(text.encode())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in record.items()}) + "\n"


def _plain(value: Any) -> Any:
    """Put None for NaN and infinity, which JSON does not have."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
