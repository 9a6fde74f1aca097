"""What an evaluation got wrong, as sections of its page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from faiss_knn.offline.report.content import Section, Table
from faiss_knn.offline.report.findings import Mistakes, Side
from faiss_knn.offline.report.results import Results
from faiss_knn.offline.report.shown_rows import PLAIN, STRIPS, Looks, Rows, confused_section
from faiss_knn.offline.report.tables import counted, percent

NOTHING_SHOWN = (
    "no query is shown by its name or picture: of few-shot draws, multi-hot labels and outcomes that are not kept "
    "nothing is known of single queries"
)


@dataclass(frozen=True)
class _Shown:
    labels: Mapping[tuple[Side, int], Any]
    neighbors: Mapping[tuple[Side, int], list[int]]
    class_name: Callable[[Any], str]


def mistake_sections(results: Results, looks: Looks = PLAIN) -> list[Section]:
    """Write the sections, those that have something to say; `looks` tell what rows are called, and their pictures."""
    mistakes = results.mistakes
    if mistakes is None:
        return []
    rows = Rows(_shown(results, mistakes), looks)
    made = [
        _surest(mistakes, rows),
        confused_section(mistakes.pairs, mistakes.pair_count, rows, mistakes.side, f"with {mistakes.setting}"),
    ]
    return rows.with_broken([section for section in made if section is not None])


def _shown(results: Results, mistakes: Mistakes) -> _Shown:
    side = mistakes.side
    labels: dict[tuple[Side, int], Any] = {("row", row): label for near in mistakes.near for row, label in near}
    labels |= {(side, one.row): one.label for one in mistakes.surest}
    labels |= {(side, row): pair.label for pair in mistakes.pairs for row in pair.rows}
    neighbors = {
        (side, one.row): [row for row, _ in near] for one, near in zip(mistakes.surest, mistakes.near, strict=False)
    }
    return _Shown(labels, neighbors, lambda number: results.class_name(number) if number >= 0 else "–")


def _surest(mistakes: Mistakes, rows: Rows) -> Section | None:
    if not mistakes.surest:
        return None
    names, side = rows.report.class_name, mistakes.side
    text = (
        f"{counted(mistakes.wrong, 'query')} of {mistakes.queries:,} taken for another class, with {mistakes.setting}; "
        "those that were wrong by the largest share of the votes stand first.",
    )
    cells = [
        [rows.name(side, one.row), names(one.label), names(one.answer), percent(one.share)] for one in mistakes.surest
    ]
    strips = rows.strips(
        rows.beside(
            f"{names(one.label)} taken for {names(one.answer)} by {percent(one.share)} % of the votes", side, one.row
        )
        for one in mistakes.surest[:STRIPS]
    )
    table = Table([side, "class", "taken for", "of the votes %"], cells, 3)
    return Section("The surest wrong answers", text, (), table, None, strips)
