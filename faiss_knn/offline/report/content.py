"""What a report says, in which order, before it is a page or a text file."""

from collections.abc import Sequence
from dataclasses import dataclass

from faiss_knn.offline.report.results import (
    Checks,
    Record,
    Results,
    at_common_k,
    best_of,
    depth_of,
    index_name,
    pareto_front,
    quirks_of,
    record_key,
    searches,
    value_of,
    vote_of,
)
from faiss_knn.offline.report.tables import format_bytes, interval, percent, points_lost, rows_of

_MANY = 30  # rows of a table by class


@dataclass(frozen=True)
class Table:
    """Headings, rows of cells, and how many leading columns are words rather than numbers."""

    headings: list[str]
    rows: list[list[str]]
    words: int = 1


@dataclass(frozen=True)
class Tile:
    """A row of the data: what it is called, its picture as a data URI if there is one, and whether it stands out."""

    caption: str
    picture: str | None = None
    is_first: bool = False


@dataclass(frozen=True)
class Strip:
    """Rows that belong together, such as a query and its neighbours, and what they show."""

    title: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Section:
    """A heading, what it says (warnings are marked), strips of rows, a table and the name of a plot."""

    title: str
    text: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    table: Table | None = None
    plot: str | None = None
    strips: tuple[Strip, ...] = ()


def title_of(report: Results) -> str:
    """Say the report in one line: the best exact result."""
    return _score_in_words(headline(report))


def _score_in_words(record: Record) -> str:
    score = "mAP" if record["map"] is not None else "top-1 accuracy"
    return f"{percent(record['map'] if record['map'] is not None else record['top1'])} % {score}"


def headline(report: Results) -> Record:
    """Choose the best of the exact records, or of all if none is exact."""
    by = "map" if report.records[0]["map"] is not None else "top1"
    return best_of([record for record in report.records if record["exact"]] or report.records, by)


def setting(record: Record) -> str:
    """Say in words how the neighbours of a record vote."""
    return f"k = {record['k']}, T = {record['temperature']:g}, {record['weighting']} weights{_quirks(record)}"


def _quirks(record: Record) -> str:
    name = quirks_of(record)
    return "" if name is None else f", with the quirks of {name}"


def sections(report: Results, mistakes: Sequence[Section] = ()) -> list[Section]:
    """Write the report's sections, the most important first; `mistakes` show what was wrong."""
    best = headline(report)
    parts = [_summary(report, best), _trust(report)]
    if len(searches(report.records)) > 1 or not report.records[0]["exact"]:
        parts.append(_costs(report, best))
    parts += [_all(report), *_over_k(report), *_retrieval(report), *_by_class(report, best), *mistakes]
    return [*parts, _measured(report)]


def overview(names: Sequence[str], parts: Sequence[Results]) -> Section:
    """Say what a folder of several evaluations holds."""
    rows = []
    for name, part in zip(names, parts, strict=True):
        best = headline(part)
        files = [str(value_of(best, side) or "–") for side in ("bank_file", "query_file")]
        score = percent(best["map"] if best["map"] is not None else best["top1"])
        rows.append([name, *files, best["distance_metric"], score, setting(best), index_name(best)])
    headings = ["evaluation", "bank", "queries", "distance", "best", "with", "index"]
    text = ("The best exact result of each, top-1 accuracy or mAP in percent. They differ in what the names say.",)
    return Section("Evaluations in this folder", text, (), Table(headings, rows, 4))


def _summary(report: Results, best: Record) -> Section:
    where = f"{best['n_queries']:,} queries before a bank of {best['n_bank']:,} rows, {best['dim']:,} dimensions"
    drawn = f"; banks of {best['per_class']} rows per class, {best['tries']} draws" if best["per_class"] else ""
    if report.checks.get("classes_short"):
        drawn = drawn.replace("banks of", "banks of up to")
    how = f"{where}, {best['num_classes']:,} classes, {best['distance_metric']} distance{_prepared(best)}{drawn}."
    spread = f" ± {percent(best['top1_se'])} (standard error)"
    if best["top1_std"] is not None:
        spread = f" ± {percent(best['top1_std'])} (deviation over the draws)"
    if best.get("top1_low") is not None:
        spread += f", 95 % interval {interval(best)}"
    if best["map"] is not None:
        spread = ""
    top = f"{_score_in_words(best)}{spread}, with {setting(best)} on index {index_name(best)}."
    left_out = " Each query's own row is left out." if best["leave_one_out"] else ""
    if best.get("exclude_same_group"):
        left_out += " No query finds rows of its own group."
    if best.get("n_groups"):
        left_out += f" Intervals and standard errors are over {best['n_groups']:,} groups of queries, drawn whole."
    return Section("Result", (top, how + left_out))


def _prepared(record: Record) -> str:
    """Say which protocol the settings are of, and what was done to the features first."""
    words = f", protocol {record['protocol']}" if record.get("protocol") else ""
    words += ", the bank's mean subtracted" if record.get("center") else ""
    words += f", turned to {record['pca']} of the bank's principal axes" if record.get("pca") else ""
    words += ", whitened by the bank" if record.get("whiten") else ""
    return words + (", rows divided by their lengths" if record.get("normalize") else "")


def _trust(report: Results) -> Section:
    """Say what makes the numbers suspect, or that nothing was found."""
    checks, text = report.checks, []
    if checks:
        low, middle, high = checks["rows_per_class"]
        text.append(f"Bank rows per class: {low:,} at least, {middle:,.0f} in the middle, {high:,} at most.")
        text.append(
            f"Always answering with the bank's commonest class: {percent(checks['majority_baseline'])} % top-1."
        )
    else:
        text.append("The run was cut off: the classes of its bank and queries were not recorded.")
    return Section("Before you trust it", tuple(text), tuple(warnings_of(report)))


def warnings_of(report: Results) -> list[str]:
    """Say what makes the numbers suspect, a sentence each."""
    if not report.records:
        return []
    first = report.records[-1]
    return [
        *_of_copies(first),
        *(_of_classes(report, first) if report.checks else []),
        *_of_draws(first["per_class"], report.checks),
        *_of_rows(first, report.checks),
        *_of_quirks(first),
    ]


def _of_quirks(first: Record) -> list[str]:
    name = quirks_of(first)
    if name is None:
        return []
    return [
        f"Classes are ranked by {name}'s own float32 rule, with its quirks: top-1 and top-5 reproduce its numbers, and "
        "are not those of this vote."
    ]


def _of_copies(first: Record) -> list[str]:
    rows = "rows have a copy in the bank" if first["leave_one_out"] else "queries are in the bank"
    sentences = []
    if first.get("duplicates"):
        sentences.append(f"{first['duplicates']:,} {rows}, number by number: accuracy on them measures nothing.")
    if first.get("near_duplicates"):
        scaled = "rounded or scaled" if first["distance_metric"] == "cosine" else "rounded"
        sentences.append(
            f"{first['near_duplicates']:,} {rows} but for a difference as small as a {scaled} copy has: accuracy on "
            "them may measure nothing."
        )
    return sentences


def _of_classes(report: Results, first: Record) -> list[str]:
    checks, sentences = report.checks, []
    if checks["classes_unseen"]:
        names = ", ".join(checks["classes_unseen"][:5]) + (", …" if len(checks["classes_unseen"]) > 5 else "")
        sentences.append(
            f"{len(checks['classes_unseen'])} classes of the queries have no bank row ({names}): "
            f"their {checks['queries_unseen']:,} queries cannot be right."
        )
    if checks["classes_in_bank"] == 1:
        sentences.append("The bank holds a single class: whatever the features are, every answer is that class.")
    elif first["map"] is None and (best := headline(report)["top1"]) <= checks["majority_baseline"]:
        sentences.append(
            f"Always answering with the bank's commonest class gives {percent(checks['majority_baseline'])} % top-1, "
            f"no less than the {percent(best)} % found."
        )
    elif first["map"] is None and checks["majority_baseline"] > 0.5:
        sentences.append(
            f"{percent(checks['majority_baseline'])} % of the queries are of the bank's commonest class: always "
            "answering with it gives as much."
        )
    if checks.get("lone_queries"):
        sentences.append(f"{checks['lone_queries']:,} rows are alone in their class: they cannot be right.")
    if checks["k_above_bank"]:
        above = ", ".join(map(str, checks["k_above_bank"]))
        sentences.append(f"k = {above} is more than the bank has rows: all of them vote.")
    return sentences


def _of_draws(per_class: int | None, checks: Checks) -> list[str]:
    """Say what few-shot draws are not, where classes have no more rows than a draw takes."""
    sentences = []
    if checks.get("classes_short"):
        sentences.append(
            f"{checks['classes_short']:,} classes have fewer bank rows than the {per_class:,} that a draw takes "
            f"(the smallest {checks['smallest_class']:,}): each draw has all of theirs."
        )
    if checks.get("draws_alike"):
        sentences.append(
            f"No class has more than {per_class:,} bank rows: every draw is the whole bank, so that it was searched "
            "once and no deviation is given. Draw fewer rows per class."
        )
    return sentences


def _of_rows(first: Record, checks: Checks) -> list[str]:
    sentences = []
    if checks.get("unlabelled_bank") or checks.get("unlabelled_queries"):
        sentences.append(
            f"Left out for want of a label (-1 means unlabelled, it is no class): {checks['unlabelled_bank']:,} bank "
            f"rows, {checks['unlabelled_queries']:,} queries."
        )
    if first.get("skipped_bank") or first.get("skipped_queries"):
        bank, queries = first["skipped_bank"], first["skipped_queries"]
        sentences.append(f"Left out as zero or not finite: {bank:,} bank rows, {queries:,} queries.")
    return sentences


def _costs(report: Results, best: Record) -> Section:
    on_front = pareto_front(report.records)
    compared, by_index = at_common_k(report.records), searches(report.records)
    shared = set.intersection(*({vote_of(r) for r in by_index[name]} for name in compared))
    rows, left_out = [], False
    for name, records in by_index.items():
        under_best = next((record for record in records if vote_of(record) == vote_of(best)), None)
        if under_best is None:
            continue  # of a command that asked for other settings
        at_common = compared.get(name)
        left_out |= at_common is None
        losses = [record for record in records if at_common and vote_of(record) in shared]
        worst = max(losses, key=lambda record: float(record["accuracy_loss"]), default=None)
        rows.append([name + (" ★" if name in on_front else ""), *_cost_cells(under_best, worst, at_common)])
    common = next(iter(compared.values()))
    headings = ["index", "top-1 lost", "±", "lost at worst", "top-1", f"recall@{common['k']}", "by id",
                "queries/s", "build s", "search s", "size", "bytes a row", "built as"]  # fmt: skip
    text = _about_costs(report, best, common if left_out else None)
    return Section("What each index costs", text, (), Table(headings, rows), "cost")


def _cost_cells(record: Record, worst: Record | None, at_common: Record | None) -> list[str]:
    """Write an index's cells from its record under the best vote, the one that lost most, and the one compared."""
    return [
        points_lost(record), percent(record["accuracy_loss_se"]), points_lost(worst) if worst else "–",
        percent(record["top1"]), percent(at_common["recall"] if at_common else None),
        percent(at_common["recall_ids"] if at_common else None), f"{at_common['qps']:,.0f}" if at_common else "–",
        f"{record['build_s']:.3g}", f"{at_common['search_s']:.3g}" if at_common else "–",
        format_bytes(record["bytes"]), _row_bytes(record), built_as(record),
    ]  # fmt: skip


def _about_costs(report: Results, best: Record, common: Record | None) -> tuple[str, ...]:
    """Say what the cells are; `common` is a record of the compared ones, where some index is not among them."""
    text = [
        f"Accuracy lost is top-1 of the exact neighbours less top-1 of this index, in points, on the same queries with "
        f"{setting(best)}; at worst, over all settings here. Recall is the share of the exact neighbours found, where "
        "another row of the same distance is no miss. ★: no other index has more recall at more queries per second."
    ]
    if any("dims" in r["settings"] or "storage" in r["settings"] for r in report.records):
        text.append(
            "Rows of fewer dimensions or bits have other distances: their recall is counted by id. Bytes a row are "
            "those of the rows as stored; the size of an index has what it holds beside them."
        )
    if common is not None:
        depth = depth_of(common)
        text.append(f"–: not searched for {depth} neighbours at k = {common['k']}, as the others: not to be compared.")
    return tuple(text)


def _row_bytes(record: Record) -> str:
    return "–" if record.get("row_bytes") is None else f"{record['row_bytes']:,.4g}"


def built_as(record: Record) -> str:
    """Name the index that a spec came to, with the parameters it searched with."""
    used = {"nprobe": record["nprobe"]} | record["parameters"]
    said = record["settings"]
    more = [f"{name}={value}" for name, value in used.items() if value is not None and name not in said]
    return " ".join([record["spec_used"], *more])


def _all(report: Results) -> Section:
    text = ("Accuracies in percent, accuracy lost in points.",)
    return Section("Every setting", text, (), Table(*rows_of(report.records)))


def _over_k(report: Results) -> list[Section]:
    several = len({record["k"] for record in report.records}) > 1
    return [Section("Accuracy over k", plot="k")] if several else []


def _retrieval(report: Results) -> list[Section]:
    names = ("precision", "hit_rate", "recall", "map", "ndcg", "mrr", "r_precision", "map_r", "macro_map", "micro_ap")
    by_search = {(index_name(r), r["k"]): r for r in report.records if r["retrieval_precision"] is not None}
    if not by_search:
        return []
    rows = [
        [name, str(k), *(percent(value_of(r, f"retrieval_{x}")) for x in names)] for (name, k), r in by_search.items()
    ]
    text = [
        "Neighbours of the query's class are relevant; means over the queries whose class has bank rows, in percent. "
        "MAP over classes weighs all classes alike; µAP takes the pairs of all queries as one list, nearest first."
    ]
    if any(r["retrieval_r_precision"] is None for r in by_search.values()):
        text.append("R-precision and MAP@R need lists as long as the largest class: raise the depth to have them.")
    headings = ["index", "k", "precision", "hit rate", "recall", "MAP", "nDCG", "MRR", "R-precision", "MAP@R",
                "MAP over classes", "µAP"]  # fmt: skip
    return [Section("Retrieval", tuple(text), (), Table(headings, rows))]


def _by_class(report: Results, best: Record) -> list[Section]:
    scores = class_scores(report, best)
    if not scores:
        return []
    what = "average precision" if best["map"] is not None else "top-1"
    names = report.class_names_of([i for i, _ in scores[:_MANY]])
    rows = [[name, percent(score)] for name, (_, score) in zip(names, scores, strict=False)]
    shown = f"The {_MANY} lowest of {len(scores):,} classes" if len(scores) > _MANY else "All classes"
    text = f"{shown}, {what} with {setting(best)}. per_class.csv has every class and setting."
    return [Section("By class", (text,), (), Table(["class", what], rows), "classes")]


def class_scores(report: Results, record: Record) -> list[tuple[int, float]]:
    """List the number and score of each class that a query has, the lowest score first."""
    scores = report.per_class.get(record_key(record), [])
    known = [(i, score) for i, score in enumerate(scores) if score is not None and score == score]  # no NaN
    return sorted(known, key=lambda pair: pair[1])


def _measured(report: Results) -> Section:
    first = report.records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    where = ", ".join(sorted({f"{r['backend']} on {r['device']}" for r in report.records}))
    stored = ", ".join(sorted({r["storage_dtype"] for r in report.records if r.get("storage_dtype")}))
    text = (
        f"Searched with {where}; {versions}; seed {first['seed']}.",
        "Search seconds are for all queries in blocks of up to 2,048; size is what the index holds"
        + (f"; rows are stored as {stored}." if stored else "."),
    )
    return Section("How it was measured", text)
