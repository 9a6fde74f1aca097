"""The result of an evaluation: its records, and the files they are kept in."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Record = dict[str, Any]

_IDENTITY = (
    "spec", "settings", "k", "temperature", "weighting", "distance_metric", "leave_one_out", "per_class", "tries",
    "seed", "options", "data", "num_classes",
)  # fmt: skip
_LEDGER = "results.jsonl"
_BY_CLASS = "per_class.jsonl"


@dataclass
class EvalReport:
    """What evaluate() found.

    Attributes:
        class_names: Names by class id, or None.
        checks: What makes the numbers suspect; see `faiss_knn.offline.problem.suspicions`.
        records: One per index × k × temperature × weighting.
        per_class: The scores of each class by `record_key`: top-1, or average precision for multi-hot labels.
        neighbors: (Q, K) distances and indices by index name, if they were kept.
    """

    class_names: list[str] | None
    checks: Record
    records: list[Record] = field(default_factory=list)
    per_class: dict[str, list[float]] = field(default_factory=dict)
    neighbors: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=dict)
    class_ids: list[int] | None = None

    def best(self, by: str = "top1") -> Record:
        """The record with the highest value of a field; of equal ones the first.

        Raises:
            ValueError: If no record has that field.
        """
        scored = [record for record in self.records if record.get(by) is not None]
        if not scored:
            raise ValueError(f"`by` must be a field of the records with a value, got {by!r}")
        return max(scored, key=lambda record: float(record[by]))

    def to_frame(self) -> Any:
        """The records as a pandas DataFrame.

        Raises:
            ImportError: If pandas is not installed.
        """
        import pandas  # optional

        return pandas.DataFrame(self.records)

    def table(self) -> str:
        """One line per record, for a terminal."""
        return text_table(*rows_of(self.records))

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        from faiss_knn.offline.document import Table  # it and the page import this module
        from faiss_knn.offline.html import html_table

        return html_table(Table(*rows_of(self.records)))

    def save(self, folder: str | Path) -> Path:
        """Write results.jsonl, results.csv, per_class.csv, report.md, report.html and the plots.

        Plots need matplotlib and are left out without it; neighbors.npz is written if they were kept.

        Args:
            folder: Made if it is not there.

        Returns:
            The folder.
        """
        from faiss_knn.offline.publish import publish  # it and the plots import this module

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / _LEDGER, "".join(_line(record) for record in self.records))
        publish(self, folder)
        return folder


class Ledger:
    """results.jsonl of a run that may be cut off: every record is on disk as soon as it is there.

    Args:
        folder: Made if it is not there.
        resume: Go on with the records that are there; else they are moved to results.previous.jsonl.
    """

    def __init__(self, folder: str | Path, resume: bool = False) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume and (self.folder / _LEDGER).exists():
            os.replace(self.folder / _LEDGER, self.folder / "results.previous.jsonl")
        if not resume:
            (self.folder / _BY_CLASS).unlink(missing_ok=True)
        self.records: list[Record] = _whole_lines(self.folder / _LEDGER)
        self.per_class = {line["record"]: line["scores"] for line in _whole_lines(self.folder / _BY_CLASS)}

    def add(self, record: Record, per_class: list[float]) -> None:
        """Append one record; the classes first, so that a record that is there has them."""
        with open(self.folder / _BY_CLASS, "a") as file:
            file.write(_line({"record": record_key(record), "scores": per_class}))
        with open(self.folder / _LEDGER, "a") as file:
            file.write(_line(record))


def record_key(record: Record) -> str:
    """What a record is of, without what came out; equal for a record read back from a file."""
    return json.dumps([record.get(name) for name in _IDENTITY], sort_keys=True)


def mean_values(records: Sequence[Record]) -> Record:
    """The mean of each number over the records; what is no number is taken from the first."""
    if len(records) == 1:
        return dict(records[0])
    return {name: _mean([record[name] for record in records]) for name in records[0]}


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], (bool, str, dict)) or any(value is None for value in values):
        return values[0]
    mean = float(np.mean(values))
    return round(mean) if all(isinstance(value, int) for value in values) else mean


def index_name(record: Record) -> str:
    """A record's index with its point of a sweep, as tables and plots call it."""
    return " ".join([record["spec"], *(f"{name}={value}" for name, value in record["settings"].items())])


def searches(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each index, in order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(index_name(record), []).append(record)
    return found


def pareto(points: dict[str, tuple[float, float]]) -> set[str]:
    """The names of points that no other one beats in both coordinates, higher being better.

    Example:
        >>> sorted(pareto({"a": (1.0, 2.0), "b": (2.0, 1.0), "c": (0.5, 1.0)}))
        ['a', 'b']
    """
    return {
        name
        for name, (x, y) in points.items()
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())
    }


def deepest(records: Iterable[Record]) -> dict[str, Record]:
    """A record of the largest k for each index: where its recall is hardest to keep."""
    return {name: max(found, key=lambda r: int(r["k"])) for name, found in searches(records).items()}


def front(records: Iterable[Record]) -> set[str]:
    """Index names on the Pareto front of recall at the largest k against queries per second."""
    return pareto({name: (record["recall"], record["qps"]) for name, record in deepest(records).items()})


def rows_of(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the compact table."""
    on_front = front(records) if len(searches(records)) > 1 else set()
    score = "map" if records and records[0]["map"] is not None else "macro_top1"
    headings = [
        "index",
        "k",
        "T",
        "vote",
        "top1",
        "±",
        "top5",
        score,
        "lost",
        "recall",
        "build s",
        "search s",
        "q/s",
        "size",
    ]
    rows = []
    for r in records:
        name = index_name(r)
        spread = r["top1_std"] if r["top1_std"] is not None else r["top1_se"]
        rows.append(
            [
                name + (" *" if name in on_front else ""),
                str(r["k"]), f"{r['temperature']:g}", r["weighting"],
                share(r["top1"]), share(spread), share(r["top5"]), share(r[score]),
                lost(r), share(r["recall"]), f"{r['build_s']:.3g}", f"{r['search_s']:.3g}",
                f"{r['qps']:,.0f}", size(r["bytes"]),
            ]
        )  # fmt: skip
    return headings, rows


def share(value: float | None) -> str:
    """A share as a percentage with two decimals."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def lost(record: Record) -> str:
    """Accuracy lost against exact neighbours, in points, with its sign."""
    value = 100 * record["accuracy_loss"]
    return "0" if value == 0 else f"{value:+.2f}"


def size(count: float) -> str:
    """Bytes for a reader.

    Example:
        >>> size(1536), size(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def text_table(headings: list[str], rows: list[list[str]]) -> str:
    """Columns of even width, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    left = [not _is_number(row) for row in (rows[0] if rows else headings)]
    lines = (
        "  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left, strict=True))
        for row in [headings, *rows]
    )
    return "\n".join(line.rstrip() for line in lines)


def _is_number(cell: str) -> bool:
    return cell[:1] in "0123456789+-–"


def csv_text(records: Sequence[Record]) -> str:
    """The records as CSV, one column per field; nested fields as JSON."""
    names = list(dict.fromkeys(name for record in records for name in record))
    out = io.StringIO()
    writer = csv.DictWriter(out, [*names, "pareto"], lineterminator="\n")
    writer.writeheader()
    on_front = front(records) if records else set()
    for record in records:
        flat = {name: json.dumps(v) if isinstance(v, (dict, list)) else v for name, v in record.items()}
        writer.writerow(flat | {"pareto": index_name(record) in on_front})
    return out.getvalue()


def _line(record: Record) -> str:
    return json.dumps({name: _plain(value) for name, value in record.items()}) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_lines(path: Path) -> list[Record]:
    """The lines of a file that was perhaps cut off in the last one, which is then removed from the file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if whole != lines:
        _write(path, "".join(whole))
    try:
        return [json.loads(line) for line in whole]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a results file ({error}): choose another folder") from error


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
