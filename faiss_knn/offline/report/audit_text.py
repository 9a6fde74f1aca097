"""An audit in words: a summary for a terminal, what makes the data suspect, and a line per finding for programs."""

from collections.abc import Iterator, Sequence
from typing import Any

from faiss_knn.offline.report.findings import Findings
from faiss_knn.offline.report.tables import counted, percent

_NOVEL = 100  # rows that are listed as findings; all of them are in audit_novelty.csv

Names = Sequence[str] | None


def audit_summary(report: Findings) -> str:
    """Say in a few lines what was found."""
    lines = {
        "audited": _audited(report),
        "near-duplicates": _duplicates(report),
        "leaks": _leaks(report),
        "label suspects": _suspects(report),
        "novelty": _novelty(report),
        "hubness": _hubness(report),
        "confusions": _confusions(report),
        "generative": _generative(report),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items() if text)


def _audited(report: Findings) -> str:
    facts = report.facts
    queries = f", {facts['queries']:,} queries" if facts["queries"] is not None else ""
    drawn = f" ({facts['sample']:,} of them looked at)" if facts["sample"] is not None else ""
    distance = f"{facts['distance_metric']} distance, k = {facts['k']}"
    return f"{facts['rows']:,} rows x {facts['dim']:,}{drawn}{queries}; {distance}"


def _duplicates(report: Findings) -> str:
    apart = f"at most {report.duplicate_distance:.3g} apart"
    rule = {
        "given": f"those {apart} count, as given",
        "gap": f"those {apart} count, where a gap in the distances parts copies from other rows",
        "copies": f"copies alone count ({apart}), as no gap in the distances parts changed ones from other rows",
    }[report.duplicate_rule]
    rows = sum(map(len, report.duplicates))
    differ = f", {report.facts['conflicts']:,} with labels that differ" if report.facts["conflicts"] else ""
    groups = f"{counted(len(report.duplicates), 'group')} of {rows:,} rows{differ}" if rows else "none"
    return f"{groups}; {rule}"


def _leaks(report: Findings) -> str:
    if report.facts["queries"] is None:
        return ""
    if not report.leaks:
        return "no query is in the bank" + (
            f"; top-1 {percent(report.accuracy['with_leaks'])} %" if report.accuracy else ""
        )
    exact = sum(leak.exact for leak in report.leaks)
    text = (
        f"{len(report.leaks):,} of {report.facts['queries']:,} queries are in the bank, {exact:,} number by number, "
        f"{len(report.leaks) - exact:,} nearly"
    )
    if not report.accuracy:
        return text
    without = percent(report.accuracy["without_leaks"])
    return f"{text}; top-1 {percent(report.accuracy['with_leaks'])} % with them, {without} % without"


def _suspects(report: Findings) -> str:
    noise = report.label_noise
    if noise is None:
        return ""
    text = f"about {percent(noise['noise'])} % of all labels are wrong"
    if not report.label_suspects:
        return f"none; {text}"
    expected, suspects = round(noise["expected_wrong"]), counted(len(report.label_suspects), "row")
    return f"{suspects}, of which about {expected:,} are expected to be wrong; {text}"


def _novelty(report: Findings) -> str:
    worst = report.most_novel(1)
    if not worst:
        return ""
    text = f"farthest from everything known: {report.facts['side']} {worst[0]}, {report.novelty[worst[0]]:.3g}"
    if report.detection is None:
        return text
    scores = report.detection
    return f"{text}; outliers told by it with AUROC {scores['auroc']:.4f}, FPR95 {percent(scores['fpr95'])} %"


def _hubness(report: Findings) -> str:
    hubs = report.hubness
    worst = f"; row {hubs['hubs'][0]} is in {counted(hubs['hub_counts'][0], 'list')}" if hubs["hubs"] else ""
    return f"skewness {hubs['skewness']:.2f}; {percent(hubs['antihub_share'])} % of the rows are in no list{worst}"


def _confusions(report: Findings) -> str:
    shown = [
        f"{report.class_name(pair.label)} for {report.class_name(pair.predicted)} ({pair.count:,})"
        for pair in report.confusions[:3]
    ]
    if not shown:
        return ""
    return ", ".join(shown) + (f", … ({len(report.confusions):,} pairs)" if len(report.confusions) > 3 else "")


def _generative(report: Findings) -> str:
    scores = report.generative
    if scores is None:
        return ""
    return (
        f"precision {scores['precision']:.3f}, recall {scores['recall']:.3f}, density {scores['density']:.3f}, "
        f"coverage {scores['coverage']:.3f} of the queries against the bank (balls to neighbour {scores['k']:.0f})"
    )


def audit_warnings(report: Findings) -> list[str]:
    """Say what makes a number from these data suspect, a sentence each."""
    facts, sentences = report.facts, []
    if report.leaks:
        sentences.append(
            f"{len(report.leaks):,} of {facts['queries']:,} queries are in the bank: accuracy on them measures nothing."
        )
    if report.duplicates:
        rows = sum(map(len, report.duplicates))
        sentences.append(f"{rows:,} of {facts['rows']:,} rows are near-duplicates of another.")
    if facts["conflicts"]:
        sentences.append(
            f"{counted(facts['conflicts'], 'group')} of near-duplicates with labels that differ: one of them is wrong."
        )
    if report.label_suspects and report.label_noise:
        share = percent(report.label_noise["noise"])
        sentences.append(f"About {share} % of the labels are wrong: {len(report.label_suspects):,} rows are suspects.")
    for side, name in (("bad_rows", "row"), ("bad_queries", "query")):
        if facts[side]:
            shown = ", ".join(map(str, facts[side][:5])) + (", …" if len(facts[side]) > 5 else "")
            sentences.append(f"Left out as zero or not finite: {counted(len(facts[side]), name)} ({shown}).")
    return sentences


def audit_lines(report: Findings, names: Names = None, query_names: Names = None) -> Iterator[dict[str, Any]]:
    """Yield a dict per finding: `kind`, the values of the finding, and names of rows where they are given."""

    def named(side: str, numbers: Sequence[int]) -> dict[str, Any]:
        known = names if side == "row" else query_names
        return {} if known is None else {f"{side}_names": [known[i] for i in numbers]}

    for group in report.duplicates:
        labels = [report.labels.get(("row", row)) for row in group]
        known = {} if set(labels) == {None} else {"labels": labels}
        yield {"kind": "duplicates", "rows": group, **known, **named("row", group)}
    for leak in report.leaks:
        yield {"kind": "leak", **leak.as_dict(), **named("query", [leak.query]), **named("row", [leak.row])}
    for suspect in report.label_suspects:
        yield {"kind": "label", **suspect.as_dict(), **named("row", [suspect.row])}
    side = report.facts["side"]
    for number in report.most_novel(_NOVEL):
        yield {"kind": "novelty", side: number, "score": float(report.novelty[number]), **named(side, [number])}
    for row, count in zip(report.hubness["hubs"], report.hubness["hub_counts"], strict=True):
        yield {"kind": "hub", "row": row, "count": count, **named("row", [row])}
    for pair in report.confusions:
        rows = {f"{side}s" if side == "row" else "queries": list(pair.rows)}
        values = {name: value for name, value in pair.as_dict().items() if name != "rows"}
        yield {"kind": "confusion", **values, **rows, **named(side, pair.rows)}
    scores = {"generative": report.generative, "accuracy": report.accuracy, "detection": report.detection}
    for kind, measures in {**scores, "label_noise": report.label_noise}.items():
        if measures is not None:
            yield {"kind": kind, **measures}
