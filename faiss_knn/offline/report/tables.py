"""Records as text: cells for a reader, columns for a terminal, CSV for a program."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from faiss_knn.offline.report.results import (
    Record,
    index_name,
    newest_of_each,
    pareto_front,
    searches,
    task_key,
    value_of,
)

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets take the beginning of a formula for
_LATENCY = {"latency_p50_ms": "p50 ms", "latency_p95_ms": "p95 ms"}


def rows_of(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Make the headings and cells of the table that has one row per record."""
    on_front = pareto_front(records) if len(searches(records)) > 1 else set()
    score = "map" if records and records[0]["map"] is not None else "macro_top1"
    headings = [
        "index",
        "k",
        "T",
        "vote",
        "top1",
        "±",
        "95 %",
        "top5",
        score,
        "lost",
        "recall",
        "build s",
        "search s",
        "q/s",
        "size",
    ]
    measured = extra_fields(records)
    headings += [_LATENCY.get(name, name) for name in measured]
    rows = []
    for r in records:
        name = index_name(r)
        spread = r["top1_std"] if r["top1_std"] is not None else r["top1_se"]
        rows.append(
            [
                name + (" *" if name in on_front else ""),
                str(r["k"]), f"{r['temperature']:g}", r["weighting"],
                percent(r["top1"]), percent(spread), interval(r), percent(r["top5"]), percent(value_of(r, score)),
                points_lost(r), percent(r["recall"]), f"{r['build_s']:.3g}", f"{r['search_s']:.3g}",
                f"{r['qps']:,.0f}", format_bytes(r["bytes"]), *(_measured(r, name) for name in measured),
            ]
        )  # fmt: skip
    return headings, rows


def extra_fields(records: Sequence[Record]) -> list[str]:
    """List what was measured on request: torchmetrics metrics, and the times of single queries."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if name[:1].isupper() or name in _LATENCY]


def _measured(record: Record, name: str) -> str:
    value = value_of(record, name)
    return "–" if value is None else f"{value:.2f}" if name in _LATENCY else f"{value:.4f}"


def percent(value: float | None) -> str:
    """Write a share in percent, with two decimals."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def interval(record: Record) -> str:
    """Write the 95 % interval of a record's top-1, in percent; a dash for records that were made without it."""
    if record.get("top1_low") is None:
        return "–"
    return f"{percent(record['top1_low'])}–{percent(record['top1_high'])}"


def points_lost(record: Record) -> str:
    """Write the accuracy lost against exact neighbours, in points, with its sign."""
    value = 100 * record["accuracy_loss"]
    return "0" if value == 0 else f"{value:+.2f}"


def format_bytes(count: float) -> str:
    """Write a number of bytes in the unit that suits its size.

    Example:
        >>> format_bytes(1536), format_bytes(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def text_table(headings: list[str], rows: list[list[str]]) -> str:
    """Lay out a table for a terminal: columns of even width, numbers to the right."""
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
    """Write the records as CSV, one column per field, nested fields as JSON."""
    names = list(dict.fromkeys(name for record in records for name in record))
    tasks = [task_key(record) for record in records]
    by_task: dict[str, list[Record]] = {}
    for record, task in zip(records, tasks, strict=True):
        by_task.setdefault(task, []).append(record)
    fronts = {task: pareto_front(newest_of_each(alike)) for task, alike in by_task.items()}
    rows = (
        [*(_flat(record.get(name)) for name in names), index_name(record) in fronts[task]]
        for record, task in zip(records, tasks, strict=True)
    )
    return csv_lines([[*names, "pareto"], *rows])


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def csv_lines(rows: Iterable[Iterable[Any]]) -> str:
    """Write rows as CSV. Text that a spreadsheet would run as a formula is quoted with an apostrophe; numbers stay."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_harmless(cell) for cell in row] for row in rows)
    return out.getvalue()


def _harmless(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    is_formula = cell.startswith(_FORMULA)
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")  # csv leaves a bare \r unquoted, where it begins a row
    if not is_formula:
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def counted(count: int, word: str) -> str:
    """Write a number with its word in the singular or plural.

    Example:
        >>> counted(1, "group"), counted(1200, "group"), counted(2, "query")
        ('1 group', '1,200 groups', '2 queries')
    """
    if count == 1:
        return f"1 {word}"
    return f"{count:,} {word[:-1]}ies" if word.endswith("ry") else f"{count:,} {word}s"
