"""An audit as sections of a page: what was found of each kind, with the rows themselves beside it."""

from collections.abc import Callable, Iterable, Sequence

from faiss_knn.offline.report.audit_text import audit_summary, audit_warnings
from faiss_knn.offline.report.content import Section, Strip, Table
from faiss_knn.offline.report.findings import Findings
from faiss_knn.offline.report.shown_rows import MEMBERS, STRIPS, Rows, confused_section
from faiss_knn.offline.report.tables import counted, percent

_ROWS = 200  # of a table; the files have all


def audit_title(report: Findings) -> str:
    """Say the audit in one line."""
    return f"faiss-knn: audit of {report.facts['rows']:,} rows"


def audit_sections(report: Findings, rows: Rows) -> list[Section]:
    """Write the sections of an audit, those that have findings, the summary first."""
    makers: list[Callable[[Findings, Rows], Section | None]] = [
        _duplicates, _leaks, _suspects, _confusions, _novelty, _hubs, _sets,
    ]  # fmt: skip
    sections = [_summary(report), *(section for make in makers if (section := make(report, rows)) is not None)]
    return rows.with_broken(sections)


def _summary(report: Findings) -> Section:
    lines = tuple(": ".join(line.split("  ", 1)).replace(":  ", ": ") for line in audit_summary(report).splitlines())
    lines = tuple(f"{name.strip().capitalize()}: {text.strip()}." for name, text in (x.split(": ", 1) for x in lines))
    return Section("What was found", lines, tuple(audit_warnings(report)))


def _duplicates(report: Findings, rows: Rows) -> Section | None:
    if not report.duplicates:
        return None
    text = (
        f"Rows that are at most {report.duplicate_distance:.3g} apart, directly or by way of others: "
        f"{counted(len(report.duplicates), 'group')}, the largest first.",
    )
    cells = [
        [_listed(rows.name("row", row) for row in group), str(len(group)), _labels(report, group)]
        for group in report.duplicates[:_ROWS]
    ]
    strips = rows.strips(
        Strip(f"{counted(len(group), 'row')}", tuple(rows.tile("row", row) for row in group[:MEMBERS]))
        for group in report.duplicates[:STRIPS]
    )
    return Section("Near-duplicates", text, (), Table(["rows", "how many", "labels"], cells), None, strips)


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:8]) + (f", … ({len(shown):,} of them)" if len(shown) > 8 else "")


def _labels(report: Findings, group: Sequence[int]) -> str:
    known = [label for row in group if (label := report.labels.get(("row", row))) is not None]
    return ", ".join(report.class_name(label) for label in dict.fromkeys(known)) or "–"


def _leaks(report: Findings, rows: Rows) -> Section | None:
    if not report.leaks:
        return None
    text = ["Queries that are in the bank, number by number or nearly: accuracy on them measures nothing."]
    if report.accuracy:
        with_leaks, without = (percent(report.accuracy[name]) for name in ("with_leaks", "without_leaks"))
        text.append(f"Top-1 accuracy of all labelled queries {with_leaks} %, without these {without} %.")
    cells = [
        [
            rows.name("query", leak.query),
            rows.name("row", leak.row),
            f"{leak.distance:.3g}",
            "yes" if leak.exact else "no",
        ]
        for leak in report.leaks[:_ROWS]
    ]
    strips = rows.strips(
        Strip(
            "equal" if leak.exact else f"{leak.distance:.3g} apart",
            (rows.tile("query", leak.query, is_first=True), rows.tile("row", leak.row)),
        )
        for leak in report.leaks[-STRIPS:][::-1]
    )
    table = Table(["query", "row", "distance", "equal"], cells, 2)
    return Section("Queries that are in the bank", tuple(text), (), table, None, strips)


def _suspects(report: Findings, rows: Rows) -> Section | None:
    if not report.label_suspects or not report.label_noise:
        return None
    expected = round(report.label_noise["expected_wrong"])
    text = (
        f"Rows whose neighbours contradict their label, the most probable errors first. About {expected:,} of the "
        f"{len(report.label_suspects):,} are expected to be wrong. The probability is calibrated on how often clear "
        "and unclear votes agree with the labels.",
    )
    cells = [
        [
            rows.name("row", one.row), report.class_name(one.label), report.class_name(one.suggested),
            percent(one.confidence), percent(one.share),
        ]
        for one in report.label_suspects[:_ROWS]
    ]  # fmt: skip
    strips = rows.strips(
        rows.beside(
            f"labelled {report.class_name(one.label)}, neighbours say {report.class_name(one.suggested)}: wrong with "
            f"{percent(one.confidence)} %",
            "row", one.row,
        )
        for one in report.label_suspects[:STRIPS]
    )  # fmt: skip
    table = Table(["row", "label", "suggested", "wrong with %", "of the votes %"], cells, 3)
    return Section("Labels that may be wrong", text, (), table, None, strips)


def _confusions(report: Findings, rows: Rows) -> Section | None:
    side = report.facts["confused_side"]
    whose = "of the queries" if side == "query" else "of the rows, each by its own neighbours"
    return confused_section(report.confusions[:_ROWS], len(report.confusions), rows, side, whose)


def _novelty(report: Findings, rows: Rows) -> Section | None:
    side = report.facts["side"]
    novel = report.most_novel(24)
    if not novel:
        return None
    text = ["The distance to the k-th neighbour: what is farthest from everything known stands first."]
    if report.detection:
        auroc, passed = report.detection["auroc"], percent(report.detection["fpr95"])
        text.append(
            f"Known outliers are told by it with AUROC {auroc:.4f}; where 95 % of the others pass, {passed} % do."
        )
    cells = [[rows.name(side, one), f"{report.novelty[one]:.4g}"] for one in novel]
    strips = rows.strips(rows.beside(f"{report.novelty[one]:.4g}", side, one) for one in novel[:STRIPS])
    return Section("Farthest from everything known", tuple(text), (), Table([side, "novelty"], cells), None, strips)


def _hubs(report: Findings, rows: Rows) -> Section | None:
    hubs = report.hubness
    if not hubs["hubs"]:
        return None
    text = (
        f"In how many lists of {report.facts['k']} neighbours a row stands: skewness {hubs['skewness']:.2f} (above 1 a "
        f"few rows crowd out the others), {percent(hubs['antihub_share'])} % of the rows stand in none.",
    )
    counts = list(zip(hubs["hubs"], hubs["hub_counts"], strict=True))
    cells = [[rows.name("row", row), f"{count:,}"] for row, count in counts]
    strips = rows.strips(
        [Strip("the rows that are in the most lists", tuple(rows.tile("row", row) for row, _ in counts[:MEMBERS]))]
    )
    return Section("Hubs", text, (), Table(["row", "lists"], cells), None, strips)


def _sets(report: Findings, rows: Rows) -> Section | None:
    del rows
    scores = report.generative
    if scores is None:
        return None
    text = (
        f"The queries as a generated set against the bank as the real one, by balls to neighbour {scores['k']:.0f}: "
        "precision and recall of Kynkäänniemi et al. 2019, density and coverage of Naeem et al. 2020.",
    )
    names = ["precision", "recall", "density", "coverage"]
    return Section(
        "How the two sets cover each other", text, (), Table(names, [[f"{scores[x]:.4f}" for x in names]], 0)
    )
