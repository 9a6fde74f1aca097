"""What a comparison of runs says: its table, its verdicts in words, and its files."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from faiss_knn.offline.report.content import Section, Table
from faiss_knn.offline.report.html import page
from faiss_knn.offline.report.markdown import markdown
from faiss_knn.offline.report.tables import csv_lines, percent, text_table

_CLASSES = 30  # shown on the page; the file has them all

Rows = Sequence[Mapping[str, Any]]


def verdict(row: Mapping[str, Any], n_queries: int) -> str:
    """Say of one difference what it is worth.

    Example:
        >>> row = {"a": "old", "b": "new", "difference": -0.004, "separable": False, "needed": 19034}
        >>> verdict(row, 5000)
        'not separable with 5,000 queries: about 19,000 would be needed'
    """
    if row["separable"]:
        better, other = (row["a"], row["b"]) if row["difference"] > 0 else (row["b"], row["a"])
        return f"{better} is better than {other}, by {100 * abs(row['difference']):.2f} points"
    if row["needed"] is None:
        return f"equally often right on {n_queries:,} queries"
    return f"not separable with {n_queries:,} queries: about {_needed(row, n_queries)} would be needed"


def _needed(row: Mapping[str, Any], n_queries: int) -> str:
    """Say how many queries would do, to two digits, for it is an estimate."""
    needed = round(row["needed"], 2 - len(str(row["needed"])))
    return f"{needed if needed > n_queries else row['needed']:,}"


def _better(row: Mapping[str, Any], n_queries: int) -> str:
    """Say a verdict in a narrow column: which run is better, or how many queries would tell."""
    if row["separable"]:
        return str(row["a"] if row["difference"] > 0 else row["b"])
    return "equal" if row["needed"] is None else f"not separable, needs {_needed(row, n_queries)} queries"


def _result(rows: Rows, n_queries: int) -> str:
    """Say what the most accurate run is better than, and what it cannot be told from."""
    if len(rows) == 1:
        said = verdict(rows[0], n_queries)
        return f"{said}." if rows[0]["separable"] else f"{rows[0]['a']} and {rows[0]['b']}: {said}."
    tops = {row[side]: row[f"top1_{side}"] for row in rows for side in ("a", "b")}
    best = max(tops, key=lambda name: tops[name])
    others = [(row["b"] if row["a"] == best else row["a"], row) for row in rows if best in (row["a"], row["b"])]
    beaten = [f"{name} by {100 * abs(row['difference']):.2f} points" for name, row in others if row["separable"]]
    level = [f"{name} ({_level(row, n_queries)})" for name, row in others if not row["separable"]]
    kinds = (("better than ", beaten), ("not separable from ", level))
    return f"{best} is {'; '.join(how + ', '.join(names) for how, names in kinds if names)}."


def _level(row: Mapping[str, Any], n_queries: int) -> str:
    needed = row["needed"]
    return "equally often right" if needed is None else f"about {_needed(row, n_queries)} queries would be needed"


def comparison_table(rows: Rows, n_queries: int) -> str:
    """Lay out one line per setting and pair of runs, for a terminal."""
    headings, *cells = _cells(rows, n_queries)
    return text_table(headings, cells)


def _cells(rows: Rows, n_queries: int) -> list[list[str]]:
    """Make the headings, and the cells of each row."""
    headings = ["setting", "a", "b", "top1 a", "top1 b", "a − b", "interval", "p", "p Holm", "verdict"]
    cells = [
        [
            row["setting"], row["a"], row["b"], percent(row["top1_a"]), percent(row["top1_b"]),
            _points(row["difference"]), f"{_points(row['low'])} to {_points(row['high'])}", f"{row['p']:.2g}",
            f"{row['p_holm']:.2g}", verdict(row, n_queries),
        ]
        for row in rows
    ]  # fmt: skip
    return [headings, *cells]


def _points(difference: float) -> str:
    return "0" if difference == 0 else f"{100 * difference:+.2f}"


def comparison_files(
    names: Sequence[str],
    n_queries: int,
    confidence: float,
    rows: Rows,
    accuracies: Rows,
    by_class: Rows,
    overlaps: Rows,
    changed: Rows,
    notes: Sequence[str],
) -> dict[str, str | bytes]:
    """Make all files of a comparison, as contents by name; the plot where matplotlib is installed."""
    title = f"faiss-knn: {' and '.join(names) if len(names) == 2 else f'{len(names)} runs'} compared"
    shown = _sections(n_queries, confidence, rows, accuracies, by_class) + _overlap_sections(overlaps, changed, notes)
    pictures = _plot(names, accuracies)
    files: dict[str, str | bytes] = {
        "compare.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "compare.csv": _csv(rows),
        "compare_classes.csv": _csv(by_class),
        "compare.md": markdown(title, shown, {"runs": "compare.png"} if pictures else {}),
        "compare.html": page(title, shown, {"runs": pictures[1]} if pictures else {}),
    }
    if overlaps:
        files |= {"compare_neighbors.csv": _csv(overlaps), "compare_changed.csv": _csv(changed)}
    return files | ({"compare.png": pictures[0]} if pictures else {})


def _csv(rows: Rows) -> str:
    return csv_lines([list(rows[0]), *(row.values() for row in rows)] if rows else [])


def _sections(n_queries: int, confidence: float, rows: Rows, accuracies: Rows, by_class: Rows) -> list[Section]:
    separable = sum(row["separable"] for row in rows)
    best = [row for row in rows if row["setting"] == rows[0]["setting"]]
    tops = dict.fromkeys(f"{row[side]} {percent(row[f'top1_{side}'])} %" for row in best for side in ("a", "b"))
    result = (
        f"Most accurate setting, {rows[0]['setting']}: {', '.join(tops)}.",
        _result(best, n_queries),
        f"{separable} of {len(rows)} differences are separable on {n_queries:,} queries.",
    )
    how = (
        f"A difference is separable if McNemar's exact p, corrected by Holm's method over the {len(rows)} rows, is at "
        f"most {1 - confidence:.3g}; over few-shot draws or groups of queries p is the sign-flip test's, of which "
        f"McNemar's is a case. The interval is the paired bootstrap's at {100 * confidence:g} %, in points, of this "
        "row alone. The queries needed would find the difference, if it is as large as it seems here, in four of five "
        "samples.",
    )
    headings, *cells = _cells(rows, n_queries)
    headings = [*headings[:3], "better", *headings[3:-1]]  # the verdict in sight
    cells = [[*cell[:3], _better(row, n_queries), *cell[3:-1]] for row, cell in zip(rows, cells, strict=True)]
    bounds = [f"{percent(row['top1_low'])}–{percent(row['top1_high'])}" for row in accuracies]
    accuracy = Table(
        ["setting", "run", "top-1", "95 % interval"],
        [[row["setting"], row["run"], percent(row["top1"]), x] for row, x in zip(accuracies, bounds, strict=True)],
        2,
    )
    return [
        Section("Result", result),
        Section("Every difference", how, (), Table(headings, cells, 4)),
        Section("Accuracy of each run", (), (), accuracy, "runs"),
        *_class_section(by_class),
    ]


def _class_section(by_class: Rows) -> list[Section]:
    """Show the classes in which the runs differ most, those that are separable first."""
    if not by_class:
        return []
    ordered = sorted(by_class, key=lambda row: (row["p_holm"], -abs(row["difference"])))
    ordered = [row for row in ordered if row["difference"]][:_CLASSES]
    separable = sum(row["separable"] for row in by_class)
    text = (
        f"With {by_class[0]['setting']}: {separable} of {len(by_class):,} differences are separable, corrected over "
        f"all of them. compare_classes.csv has every class.",
    )
    headings = ["class", "a", "b", "queries", "top-1 a", "top-1 b", "a − b", "p Holm", "better"]
    cells = [
        [
            row["class"], row["a"], row["b"], f"{row['n_queries']:,}", percent(row["top1_a"]), percent(row["top1_b"]),
            _points(row["difference"]), f"{row['p_holm']:.2g}",
            (row["a"] if row["difference"] > 0 else row["b"]) if row["separable"] else "not separable",
        ]
        for row in ordered
    ]  # fmt: skip
    return [Section("By class", text, (), Table(headings, cells, 3))]


def _overlap_sections(overlaps: Rows, changed: Rows, notes: Sequence[str]) -> list[Section]:
    """Say whether the runs see the same neighbours, and where they differ most."""
    title = "Do they see the same neighbours?"
    warnings = tuple(f"{note}." for note in notes)
    if not overlaps:
        return [Section(title, (), warnings)] if notes else []
    text = (
        "The share of a query's k nearest bank rows that both runs have, on average over the queries, in percent; by "
        "chance, with the queries of one paired with those of the other at random; z, how many deviations of such "
        "pairings it lies above chance.",
    )
    headings = ["index", "a", "b", "k", "in common", "by chance", "±", "z"]
    cells = [
        [
            row["index"], row["a"], row["b"], str(row["k"]), percent(row["mean"]), percent(row["null_mean"]),
            percent(row["null_std"]), "–" if row["z"] is None else f"{row['z']:.1f}",
        ]
        for row in overlaps
    ]  # fmt: skip
    least = [
        [row["index"], row["a"], row["b"], str(row["k"]), str(row["row"]), percent(row["overlap"])] for row in changed
    ]
    return [
        Section(title, text, warnings, Table(headings, cells, 3)),
        Section(
            "Queries whose neighbours changed most",
            ("By row number; neighbours in common in percent, at the largest k.",),
            (),
            Table(["index", "a", "b", "k", "row", "in common"], least, 3),
        ),
    ]


def _plot(names: Sequence[str], accuracies: Rows) -> tuple[bytes, tuple[str, str]] | None:
    """Draw accuracy along the runs, as PNG and as SVG for light and dark paper."""
    try:
        from faiss_knn.offline.report.plots import draw_runs, png, svgs
    except ImportError:
        return None
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in accuracies:
        lines.setdefault(row["setting"], []).append(row)
    figure = draw_runs(names, lines)
    return png(figure), svgs(figure)
