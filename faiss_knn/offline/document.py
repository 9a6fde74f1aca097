"""What a report says, in which order, before it is a page or a text file."""

from dataclasses import dataclass

from faiss_knn.offline.report import (
    EvalReport,
    Record,
    deepest,
    front,
    index_name,
    lost,
    record_key,
    rows_of,
    searches,
    share,
    size,
)

_MANY = 30  # rows of a table by class


@dataclass(frozen=True)
class Table:
    """Headings, rows of cells, and how many leading columns are words rather than numbers."""

    headings: list[str]
    rows: list[list[str]]
    words: int = 1


@dataclass(frozen=True)
class Section:
    """A heading, what it says (warnings are marked), a table and the name of a plot."""

    title: str
    text: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    table: Table | None = None
    plot: str | None = None


def title_of(report: EvalReport) -> str:
    """The report in one line: the best exact result."""
    record = headline(report)
    score = "mAP" if record["map"] is not None else "top-1 accuracy"
    return f"{share(record['map'] if record['map'] is not None else record['top1'])} % {score}"


def headline(report: EvalReport) -> Record:
    """The best of the exact records, or of all if none is exact."""
    by = "map" if report.records[0]["map"] is not None else "top1"
    exact = [record for record in report.records if record["exact"]]
    return EvalReport(report.class_names, {}, exact or report.records).best(by)


def setting(record: Record) -> str:
    """The vote of a record in words."""
    return f"k = {record['k']}, T = {record['temperature']:g}, {record['weighting']} weights"


def sections(report: EvalReport) -> list[Section]:
    """The report's sections, most important first."""
    found = [_summary(report), _trust(report)]
    if len(searches(report.records)) > 1 or not report.records[0]["exact"]:
        found.append(_costs(report))
    found += [_all(report), *_over_k(report), *_retrieval(report), *_by_class(report), _measured(report)]
    return found


def _summary(report: EvalReport) -> Section:
    best = headline(report)
    where = f"{best['n_queries']:,} queries before a bank of {best['n_bank']:,} rows, {best['dim']:,} dimensions"
    drawn = f"; banks of {best['per_class']} rows per class, {best['tries']} draws" if best["per_class"] else ""
    how = f"{where}, {best['num_classes']:,} classes, {best['distance_metric']} distance{drawn}."
    spread = f" ± {share(best['top1_se'])} (standard error)"
    if best["top1_std"] is not None:
        spread = f" ± {share(best['top1_std'])} (deviation over the draws)"
    if best["map"] is not None:
        spread = ""
    top = f"{title_of(report)}{spread}, with {setting(best)} on index {index_name(best)}."
    left_out = " Each query's own row is left out." if best["leave_one_out"] else ""
    return Section("Result", (top, how + left_out))


def suspicions(report: EvalReport) -> tuple[str, ...]:
    """What makes the numbers suspect, a sentence each."""
    return _trust(report).warnings


def _trust(report: EvalReport) -> Section:
    """What makes the numbers suspect, or that nothing was found."""
    checks, first = report.checks, report.records[0]
    low, middle, high = checks["rows_per_class"]
    text = [f"Bank rows per class: {low:,} at least, {middle:,.0f} in the middle, {high:,} at most."]
    text.append(f"Always answering with the bank's commonest class: {share(checks['majority_baseline'])} % top-1.")
    warnings = []
    if checks["classes_unseen"]:
        names = ", ".join(checks["classes_unseen"][:5]) + (", …" if len(checks["classes_unseen"]) > 5 else "")
        warnings.append(
            f"{len(checks['classes_unseen'])} classes of the queries have no bank row ({names}): "
            f"their {checks['queries_unseen']:,} queries cannot be right."
        )
    if first["duplicates"]:
        what = (
            "rows have an exact copy in the bank"
            if first["leave_one_out"]
            else "queries are in the bank, number by number"
        )
        warnings.append(f"{first['duplicates']:,} {what}: accuracy on them measures nothing.")
    if first.get("near_duplicates"):
        warnings.append(
            f"{first['near_duplicates']:,} queries are copies of bank rows but for rounding or scale: accuracy on them "
            "measures nothing."
        )
    if checks["unlabelled_bank"] or checks["unlabelled_queries"]:
        warnings.append(
            f"Left out for want of a label: {checks['unlabelled_bank']:,} bank rows, "
            f"{checks['unlabelled_queries']:,} queries."
        )
    if checks.get("lone_queries"):
        warnings.append(f"{checks['lone_queries']:,} rows are alone in their class: they cannot be right.")
    if checks["k_above_bank"]:
        above = ", ".join(map(str, checks["k_above_bank"]))
        warnings.append(f"k = {above} is more than the bank has rows: all of them vote.")
    return Section("Before you trust it", tuple(text), tuple(warnings))


def _costs(report: EvalReport) -> Section:
    best = headline(report)
    at = ("k", "temperature", "weighting")
    on_front = front(report.records)
    deep = deepest(report.records)
    rows = []
    for name, records in searches(report.records).items():
        r = next(record for record in records if all(record[x] == best[x] for x in at))
        worst = max(records, key=lambda record: float(record["accuracy_loss"]))
        rows.append(
            [
                name + (" ★" if name in on_front else ""),
                lost(r), share(r["accuracy_loss_se"]), lost(worst), share(r["top1"]), share(deep[name]["recall"]),
                share(deep[name]["recall_ids"]), f"{r['qps']:,.0f}", f"{r['build_s']:.3g}", f"{r['search_s']:.3g}",
                size(r["bytes"]), *_latency(r), built_as(r),
            ]
        )  # fmt: skip
    depth = max(record["k"] for record in report.records)
    headings = ["index", "top-1 lost", "±", "lost at worst", "top-1", f"recall@{depth}", "by id",
                "queries/s", "build s", "search s", "size"]  # fmt: skip
    headings += ["p50 ms", "p95 ms"] if "latency_p50_ms" in report.records[0] else []
    headings.append("built as")
    text = (
        f"Accuracy lost is top-1 of the exact neighbours less top-1 of this index, in points, on the same queries with "
        f"{setting(best)}; at worst, over all settings here. Recall is the share of the exact neighbours found, where "
        "another row of the same distance is no miss. ★: no other index has more recall at more queries per second.",
    )
    return Section("What each index costs", text, (), Table(headings, rows), "cost")


def built_as(record: Record) -> str:
    """The index that a spec came to, with the parameters it searched with."""
    used = {"nprobe": record["nprobe"]} | record["parameters"]
    said = record["settings"]
    more = [f"{name}={value}" for name, value in used.items() if value is not None and name not in said]
    return " ".join([record["spec_used"], *more])


def _latency(record: Record) -> list[str]:
    return [f"{record[name]:.2f}" for name in ("latency_p50_ms", "latency_p95_ms") if name in record]


def _all(report: EvalReport) -> Section:
    headings, rows = rows_of(report.records)
    extra = [name for name in report.records[0] if name[:1].isupper()]  # torchmetrics names
    rows = [row + [f"{r[name]:.4f}" for name in extra] for row, r in zip(rows, report.records, strict=True)]
    return Section(
        "Every setting", ("Accuracies in percent, accuracy lost in points.",), (), Table(headings + extra, rows)
    )


def _over_k(report: EvalReport) -> list[Section]:
    several = len({record["k"] for record in report.records}) > 1
    return [Section("Accuracy over k", plot="k")] if several else []


def _retrieval(report: EvalReport) -> list[Section]:
    names = ("precision", "hit_rate", "recall", "map", "ndcg", "mrr", "r_precision", "map_r")
    by_search = {(index_name(r), r["k"]): r for r in report.records if r["retrieval_precision"] is not None}
    if not by_search:
        return []
    rows = [[name, str(k), *(share(r[f"retrieval_{x}"]) for x in names)] for (name, k), r in by_search.items()]
    text = [
        "Neighbours of the query's class are relevant; means over the queries whose class has bank rows, in percent."
    ]
    if any(r["retrieval_r_precision"] is None for r in by_search.values()):
        text.append("R-precision and MAP@R need lists as long as the largest class: raise the depth to have them.")
    headings = ["index", "k", "precision", "hit rate", "recall", "MAP", "nDCG", "MRR", "R-precision", "MAP@R"]
    return [Section("Retrieval", tuple(text), (), Table(headings, rows))]


def _by_class(report: EvalReport) -> list[Section]:
    best = headline(report)
    scores = class_scores(report, best)
    if not scores:
        return []
    what = "average precision" if best["map"] is not None else "top-1"
    rows = [[name, share(score)] for name, score in scores[:_MANY]]
    shown = f"The {_MANY} lowest of {len(scores):,} classes" if len(scores) > _MANY else "All classes"
    text = f"{shown}, {what} with {setting(best)}. per_class.csv has every class and setting."
    return [Section("By class", (text,), (), Table(["class", what], rows), "classes")]


def class_scores(report: EvalReport, record: Record) -> list[tuple[str, float]]:
    """Name and score of each class that a query has, lowest first."""
    scores = report.per_class.get(record_key(record), [])
    names = report.class_names or [str(i) for i in range(len(scores))]
    found = [(names[i], score) for i, score in enumerate(scores) if score is not None and score == score]  # no NaN
    return sorted(found, key=lambda pair: pair[1])


def _measured(report: EvalReport) -> Section:
    first = report.records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    where = ", ".join(sorted({f"{r['backend']} on {r['device']}" for r in report.records}))
    text = (
        f"Searched with {where}; {versions}; seed {first['seed']}.",
        "Search seconds are for all queries in blocks of up to 2,048; size is what the index holds.",
    )
    return Section("How it was measured", text)
