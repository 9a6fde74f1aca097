"""compare(): do two evaluations of the same queries differ by more than chance?"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from faiss_knn.measures.overlap import neighbor_overlap, overlap_by_query
from faiss_knn.measures.paired import GroupedPairs, pair_outcomes
from faiss_knn.measures.significance import Pairs, holm
from faiss_knn.offline.report.comparison import comparison_files, comparison_table
from faiss_knn.offline.report.content import setting
from faiss_knn.offline.report.publish import read_kept_neighbors
from faiss_knn.offline.report.report import EvalReport
from faiss_knn.offline.report.results import Outcome, Record, index_name, record_key, value_of
from faiss_knn.offline.report.results_folder import write_into
from faiss_knn.search.inputs import as_integer, shown

__all__ = ["Comparison", "compare"]

Row = dict[str, Any]

_CHANGED = 20  # queries whose neighbours agree least that are listed

# What a record is of, but for the features: in which records of two runs must agree to be compared.
_SETTING = (
    "spec", "settings", "k", "temperature", "weighting", "distance_metric", "leave_one_out", "per_class", "center",
    "normalize", "pca", "whiten", "exclude_same_group",
)  # fmt: skip
_DRAWN = ("tries", "seed")  # of few-shot banks: draws are compared one by one
_WORDS = {"distance_metric": "{} distance", "leave_one_out": "leave-one-out {}", "center": "centred {}",
          "normalize": "normalised {}"}  # fmt: skip
_NO_MATTER = ("depth", "metrics", "latency")  # options that change no prediction


@dataclass(frozen=True)
class Comparison:
    """Which differences between runs are more than chance.

    Attributes:
        names: Of the runs, in the order given.
        n_queries: How many queries they share.
        confidence: 1 − α of the tests and the intervals.
        accuracies: A dict per setting and run: `setting`, `run`, `top1`, and its interval `top1_low`, `top1_high`.
        by_class: For the setting of highest mean accuracy a dict per pair of runs and class: `setting`, `a`, `b`,
            `class`, `n_queries`, `top1_a`, `top1_b`, `difference`, `p`, `p_holm` (corrected over all of these) and
            `separable`; none for multi-hot labels.
        overlaps: For runs over the same bank that have kept their neighbours a dict per pair of runs, index and k: `a`,
            `b`, `index`, `k`, and `mean`, `null_mean`, `null_std`, `z` as in `faiss_knn.measures.overlap.Overlap`.
        changed: The queries whose neighbours agree least, at the largest k of each of these: `a`, `b`, `index`, `k`,
            `row`, as it was given, and `overlap`.
        notes: What neighbours were not compared though they were kept, or compared without knowing enough, and why.

    Example:
        >>> from faiss_knn import evaluate
        >>> labels = np.arange(200) % 2
        >>> good, poor = (labels[:, None] + noise * np.random.default_rng(0).random((200, 4)) for noise in (0.5, 5))
        >>> comparison = compare(
        ...     *(evaluate(x, labels, leave_one_out=True, k=5, distance_metric="euclidean") for x in (good, poor)),
        ...     names=["good", "poor"],
        ... )
        >>> [(row["a"], row["b"], row["separable"]) for row in comparison.table()]
        [('good', 'poor', True)]
    """

    names: list[str]
    n_queries: int
    confidence: float
    rows: list[Row]
    accuracies: list[Row]
    by_class: list[Row]
    overlaps: list[Row]
    changed: list[Row]
    notes: list[str]

    @property
    def neighbor_overlap(self) -> dict[int, Row]:
        """Whether the first two runs see the same neighbours: `mean`, `null_mean`, `null_std` and `z` by k.

        Of the first index that both have; empty where one has kept no neighbours. `overlaps` has every pair and index.
        """
        first = [row for row in self.overlaps if (row["a"], row["b"]) == (self.names[0], self.names[1])]
        values = ("mean", "null_mean", "null_std", "z")
        return {row["k"]: {x: row[x] for x in values} for row in first if row["index"] == first[0]["index"]}

    def table(self) -> list[Row]:
        """Return one row per setting and pair of runs, most accurate settings first.

        Returns:
            Dicts of `setting`, in words; `a` and `b`, the runs' names; `top1_a` and `top1_b`; `difference`, a less b;
            `low` and `high`, its paired bootstrap interval; `p` of McNemar's exact test; `p_holm`, corrected over the
            table; `separable`, whether that is at most 1 − confidence; `needed`, about how many queries would separate
            them with a power of 80 %, or None where they are separable, or equally often right.
        """
        return [dict(row) for row in self.rows]

    def __str__(self) -> str:
        return comparison_table(self.rows, self.n_queries)

    def save(self, folder: str | Path) -> Path:
        """Write compare.jsonl, .csv, .md and .html, compare_classes.csv, and with matplotlib compare.png.

        Where neighbours were kept there are compare_neighbors.csv and compare_changed.csv too.

        Args:
            folder: Made if it is not there; what an earlier comparison wrote is replaced.

        Returns:
            The folder.

        Raises:
            ValueError: If the folder cannot be written.
        """
        return write_into(folder, comparison_files(**vars(self)))


@dataclass(frozen=True)
class _Run:
    """One of the runs that are compared: its newest record of each setting that has outcomes."""

    name: str
    report: EvalReport
    records: dict[str, Record]
    outcomes: dict[str, Outcome]
    folder: Path | None

    def neighbors(self, key: str) -> npt.NDArray[Any] | None:
        """Return (Q, K) rows that were found nearest, if they were kept."""
        record = self.records[key]
        name = " ".join([record["spec"], *(f"{x}={value}" for x, value in record["settings"].items())])
        if name in self.report.neighbors:
            return self.report.neighbors[name][1]
        return None if self.folder is None else read_kept_neighbors(self.folder, record, name)


def compare(
    *runs: EvalReport | str | Path, names: Sequence[str] | None = None, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Tell differences between runs from chance: for every pair and every setting that all of them have.

    Runs are of the same queries with the same labels; features, bank and model may differ. A difference is separable if
    McNemar's exact p, Holm-corrected over the whole table, is at most 1 − confidence; see
    `faiss_knn.measures.significance`. Few-shot runs are of the same draws; where all runs have the same groups of
    queries, whole groups are drawn and swapped: see `faiss_knn.measures.paired`, whose test McNemar's is a case of.

    Args:
        runs: Two or more: reports of `evaluate`, or folders that `save` or `faiss-knn eval --out` have written.
        names: What to call them; None: by their folders, or by number.
        confidence: Of the tests and the intervals of differences, in (0, 1).
        seed: Of the bootstrap.

    Raises:
        ValueError: If a run has no outcomes, no setting is common to all, or their queries or labels differ: it is said
            in what.
    """
    if not isinstance(confidence, (int, float)) or not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), such as 0.95, got {shown(confidence)}")
    seed = as_integer(seed, "`seed`")
    if seed < 0:
        raise ValueError(f"`seed` must be 0 or a positive integer, got {seed}")
    if len(runs) < 2:
        raise ValueError(f"`runs` must be two or more, reports or folders, got {len(runs)}")
    read = [_read(run, i, name) for i, (run, name) in enumerate(zip(runs, run_names(runs, names), strict=True))]
    keys = _common_settings(read)
    for other in read[1:]:
        for key in keys:
            _check_same_queries(read[0], other, key)
    words = _in_words(read[0], keys)
    keys.sort(key=lambda key: -_mean_top1(read, key))
    groups, notes = _groups(read, keys[0])
    rows = list(_differences(read, keys, words, groups, confidence, seed))
    n_queries = len(read[0].outcomes[keys[0]]["row"])
    accuracies = [_accuracy(run, key, words[key]) for key in keys for run in read]
    by_class = list(_by_class(read, keys[0], words[keys[0]], groups, confidence))
    overlaps, changed, more = _overlaps(read, keys, seed)
    notes += _other_draws(read, keys) + more
    return Comparison(
        [run.name for run in read], n_queries, float(confidence), rows, accuracies, by_class, overlaps, changed, notes
    )


def _accuracy(run: _Run, key: str, words: str) -> Row:
    record = run.records[key]
    top1 = {"top1": record["top1"], "top1_low": record["top1_low"], "top1_high": record["top1_high"]}
    return {"setting": words, "run": run.name, **top1}


def run_names(runs: Sequence[Any], names: Sequence[str] | None = None) -> list[str]:
    """Name the runs: as asked for, or by the shortest end of their paths that tells them apart.

    Example:
        >>> run_names(["old/results", "new/results"])
        ['old/results', 'new/results']

    Raises:
        ValueError: If the names asked for are not one different name for each run.
    """
    if names is not None:
        named = [str(name) for name in names]
        if isinstance(names, str) or len(named) != len(runs) or len(set(named)) < len(named):
            raise ValueError(f"`names` must be {len(runs)} different names, one for each run, got {names!r}")
        return named
    paths = [
        Path(run).resolve().parts if isinstance(run, (str, Path)) else (f"run {i}",) for i, run in enumerate(runs, 1)
    ]
    for length in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(parts[-length:]) for parts in paths]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{parts[-1]} ({i})" for i, parts in enumerate(paths, 1)]


def _read(run: Any, number: int, name: str) -> _Run:
    if isinstance(run, EvalReport):
        report = run
    elif isinstance(run, (str, Path)):
        if not Path(run).is_dir():
            raise ValueError(f"{run}: is no folder of results: name one that `save` or `eval --out` has written")
        report = EvalReport.load(run)
    else:
        need = "an EvalReport or a folder of results"
        raise ValueError(f"`runs[{number}]` must be {need}, got {shown(run)}")  # noqa: TRY004
    read = [(record, report.outcomes.get(record_key(record))) for record in report.records]
    if all(outcome is None for _, outcome in read):
        raise ValueError(
            f"run {name!r} has kept no outcomes: evaluate it again, with keep_outcomes=True if they take more than 1 "
            "GiB"
        )
    records: dict[str, Record] = {}
    outcomes: dict[str, Outcome] = {}
    for record, outcome in read:
        if outcome is None:
            continue
        key = _setting_key(record)
        if key in records and records[key]["data"] != record["data"]:
            raise ValueError(
                f"run {name!r} holds two evaluations of {index_name(record)}, {setting(record)} (data "
                f"{records[key]['data'][:6]} and {record['data'][:6]}): write each to a folder of its own"
            )
        records[key], outcomes[key] = record, outcome
    return _Run(name, report, records, outcomes, None if isinstance(run, EvalReport) else Path(run))


def _setting_key(record: Record) -> str:
    options = {name: value for name, value in (record.get("options") or {}).items() if name not in _NO_MATTER}
    names = _SETTING + (_DRAWN if record["per_class"] else ())
    return json.dumps([*(value_of(record, name) or None for name in names), options], sort_keys=True)


def _common_settings(runs: Sequence[_Run]) -> list[str]:
    """List the settings that all runs have, in the order of the first."""
    keys = [key for key in runs[0].records if all(key in run.records for run in runs)]
    if not keys:
        firsts = [next(iter(run.records.values())) for run in runs]
        have = "; ".join(
            f"{run.name!r} has {index_name(r)}, {r['distance_metric']} distance, {setting(r)}"
            for run, r in zip(runs, firsts, strict=True)
        )
        raise ValueError(f"`runs` have no setting in common, such as {have}: evaluate them alike")
    return keys


def _check_same_queries(one: _Run, other: _Run, key: str) -> None:
    """Raise ValueError if two runs are of other queries or labels, naming what differs first."""
    a, b = one.records[key], other.records[key]
    if a.get("query_fingerprint") == b.get("query_fingerprint"):
        return
    first, second = one.outcomes[key], other.outcomes[key]
    where = f"runs {one.name!r} and {other.name!r} are not of the same queries: "
    if len(first["row"]) != len(second["row"]):
        raise ValueError(f"{where}{len(first['row']):,} and {len(second['row']):,} of them")
    moved = np.flatnonzero(first["row"] != second["row"])
    if len(moved):
        rows = f"{first['row'][moved[0]]} and {second['row'][moved[0]]}"
        raise ValueError(f"{where}query number {moved[0]} is row {rows} of what was given")
    if "label" not in first or "label" not in second:
        raise ValueError(f"{where}their labels differ")
    for row, x, y in zip(first["row"], first["label"], second["label"], strict=True):
        names = one.report.class_name(int(x)), other.report.class_name(int(y))
        if names[0] != names[1]:
            named = bool(one.report.class_names), bool(other.report.class_names)
            hint = ": only one has class names, give both the same" if named[0] != named[1] else ""
            raise ValueError(f"{where}row {row} has the label {names[0]!r} in one, {names[1]!r} in the other{hint}")
    raise ValueError(f"{where}their labels differ")


def _groups(runs: Sequence[_Run], key: str) -> tuple[npt.NDArray[Any] | None, list[str]]:
    """Return the groups of the queries, if all runs know the same ones; and a note if only some do, or others."""
    by_run = [run.outcomes[key].get("group") for run in runs]
    known = [groups for groups in by_run if groups is not None]
    if not known:
        return None, []
    if len(known) == len(by_run) and all(_as_partition(groups) == _as_partition(known[0]) for groups in known):
        return known[0], []
    return None, ["not all runs have the same groups of queries: differences are taken as of single queries"]


def _as_partition(groups: npt.NDArray[Any]) -> list[int]:
    """Find for each query the first one of its group."""
    _, firsts, numbers = np.unique(groups, return_index=True, return_inverse=True)
    first_of_group: list[int] = firsts[numbers].tolist()
    return first_of_group


def _other_draws(runs: Sequence[_Run], keys: Sequence[str]) -> list[str]:
    """Return a note where few-shot banks are not of the same rows, so that their draws are a part of the difference."""
    drawn = [[run.records[key] for run in runs] for key in keys if runs[0].records[key]["per_class"]]
    if all(len({record.get("bank_fingerprint") for record in records}) == 1 for records in drawn):
        return []
    return ["the few-shot banks of the runs hold other rows: what their draws do by chance is a part of the difference"]


def _in_words(run: _Run, keys: Sequence[str]) -> dict[str, str]:
    """Say what tells the settings apart: always index and vote, and distance or storage where several occur."""
    records = [run.records[key] for key in keys]
    words = [f"{index_name(record)}, {setting(record)}" for record in records]
    for field, form in _WORDS.items():
        values = [value_of(record, field) for record in records]
        if len(set(map(str, values))) > 1:
            words = [f"{word}, {form.format(value)}" for word, value in zip(words, values, strict=True)]
    if len(set(words)) < len(words):
        words = [f"{word}, {json.dumps(record['options'])}" for word, record in zip(words, records, strict=True)]
    return dict(zip(keys, words, strict=True))


def _mean_top1(runs: Sequence[_Run], key: str) -> float:
    return float(np.mean([run.records[key]["top1"] for run in runs]))


def _differences(
    runs: Sequence[_Run],
    keys: Sequence[str],
    words: dict[str, str],
    groups: npt.NDArray[Any] | None,
    confidence: float,
    seed: int,
) -> Iterator[Row]:
    """Make the rows of the table, corrected for how many they are."""
    compared = [(key, a, b) for key in keys for a, b in combinations(runs, 2)]
    pairs = [pair_outcomes(a.outcomes[key]["correct"], b.outcomes[key]["correct"], groups) for key, a, b in compared]
    p_values = [pair.p() for pair in pairs]
    for (key, a, b), pair, p, p_holm in zip(compared, pairs, p_values, holm(p_values), strict=True):
        low, high = pair.interval(confidence, seed=seed)
        separable = p_holm <= 1 - confidence
        yield {
            "setting": words[key], "a": a.name, "b": b.name,
            "top1_a": a.records[key]["top1"], "top1_b": b.records[key]["top1"],
            "difference": pair.difference, "low": low, "high": high, "p": p, "p_holm": p_holm, "separable": separable,
            "needed": None if separable else _needed(pair, confidence, len(pairs)),
        }  # fmt: skip


def _needed(pair: Pairs | GroupedPairs, confidence: float, comparisons: int) -> int | None:
    """Ask for more queries than there are: the estimate is one for many, and those there are did not do."""
    needed = pair.needed(confidence, comparisons=comparisons)
    return None if needed is None else max(needed, pair.total + 1)


def _by_class(
    runs: Sequence[_Run], key: str, words: str, groups: npt.NDArray[Any] | None, confidence: float
) -> Iterator[Row]:
    """Find where one run is better than another, class by class."""
    outcomes = [run.outcomes[key] for run in runs]
    if "label" not in outcomes[0]:
        return
    order = np.argsort(outcomes[0]["label"], kind="stable")
    classes, firsts = np.unique(outcomes[0]["label"][order], return_index=True)
    table: list[Row] = []
    for i, j in combinations(range(len(runs)), 2):
        for number, rows in zip(classes.tolist(), np.split(order, firsts[1:]), strict=True):
            one, other = (outcomes[run]["correct"][..., rows] for run in (i, j))
            pair = pair_outcomes(one, other, None if groups is None else groups[rows])
            about = {"setting": words, "a": runs[i].name, "b": runs[j].name, "class": runs[0].report.class_name(number)}
            tops = {"top1_a": float(one.mean()), "top1_b": float(other.mean()), "difference": pair.difference}
            table.append(about | {"n_queries": len(rows)} | tops | {"p": pair.p()})
    for row, p_holm in zip(table, holm([row["p"] for row in table]), strict=True):
        yield row | {"p_holm": p_holm, "separable": p_holm <= 1 - confidence}


def _overlaps(runs: Sequence[_Run], keys: Sequence[str], seed: int) -> tuple[list[Row], list[Row], list[str]]:
    """Tell whether runs see the same neighbours, for each pair, index and k, and which queries' differ most.

    The third are notes: on which banks are not of the same rows, or may not be.
    """
    by_index: dict[str, list[str]] = {}
    for key in keys:
        by_index.setdefault(_search_key(runs[0].records[key]), []).append(key)
    overlaps: list[Row] = []
    changed: list[Row] = []
    notes: list[str] = []
    for same in by_index.values():
        for a, b in combinations(runs, 2):
            first, second = a.neighbors(same[0]), b.neighbors(same[0])
            if first is None or second is None:
                continue
            is_same, why = _same_bank(a.records[same[0]], b.records[same[0]])
            notes += [f"{a.name} and {b.name}: {why}"] if why else []
            if not is_same:
                continue
            about = {"a": a.name, "b": b.name, "index": index_name(a.records[same[0]])}
            shortest = min(first.shape[1], second.shape[1])
            ks = sorted({k for key in same if (k := a.records[key]["k"]) <= shortest})
            overlaps += [about | {"k": k} | neighbor_overlap(first, second, k, seed=seed)._asdict() for k in ks]
            if ks:
                shares = overlap_by_query(first, second, ks[-1])
                least = np.argsort(shares, kind="stable")[:_CHANGED]
                rows = a.outcomes[same[0]]["row"]
                changed += [about | {"k": ks[-1], "row": int(rows[i]), "overlap": float(shares[i])} for i in least]
    return overlaps, changed, list(dict.fromkeys(notes))


def _search_key(record: Record) -> str:
    """Return what a record's neighbours depend on, but for the features."""
    names = ("distance_metric", "leave_one_out", "center", "normalize")
    return json.dumps([index_name(record), *(value_of(record, name) or None for name in names)])


def _same_bank(a: Record, b: Record) -> tuple[bool, str]:
    """Tell whether two banks hold the same rows, and what there is to say about it, if anything.

    They do if as many rows have a label, these are the same by number, and have the same classes. Features say nothing:
    those of two models differ for the same samples.
    """
    unlike = "their neighbours are not compared, which needs banks of the same rows in the same order: "
    if a["n_bank"] != b["n_bank"]:
        return False, f"{unlike}{a['n_bank']:,} and {b['n_bank']:,} rows"
    known = [record.get("bank_fingerprint") for record in (a, b)]
    if None in known:
        return True, (
            "their banks have equally many rows, and are taken to hold the same in the same order: records of an "
            "earlier version do not say which rows they are"
        )
    return known[0] == known[1], "" if known[0] == known[1] else f"{unlike}other rows have labels, or other labels"
