"""`faiss-knn eval`: read features, evaluate them, write and show what came out."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faiss_knn.offline.commands.arguments import device_named
from faiss_knn.offline.commands.names_and_images import read_looks, unread_pictures

if TYPE_CHECKING:
    from faiss_knn.offline.feature_folders import Role
    from faiss_knn.offline.features import Features
    from faiss_knn.offline.options import EvalOptions
    from faiss_knn.offline.report.report import EvalReport
    from faiss_knn.offline.report.results import Record
    from faiss_knn.offline.report.results_folder import ResultsFolder
    from faiss_knn.offline.task import EvalTask, Limits

# torch and the readers are imported when there is something to evaluate, so that --help and bad usage answer at once.


def run(given: argparse.Namespace, *, first: bool) -> int:
    """Evaluate the files, or do what --relevance, --explain or --dry-run asks for instead."""
    from faiss_knn.distributed import all_or_none, broadcast_object
    from faiss_knn.offline.evaluate import evaluate_with, task_for
    from faiss_knn.offline.report.results_folder import ResultsFolder

    if given.relevance is not None:
        return _relevance(given) if first else 0
    if given.explain is not None:
        return _explain(given, first)
    results_folder = None
    with all_or_none():
        bank, queries = _read(given)
        limits = _limits(given)
        looks = read_looks(given, len(bank.rows), None if queries is None else len(queries.rows))
        if given.out is not None and not given.dry_run and first:
            results_folder = ResultsFolder(given.out, given.resume, overwrite=given.overwrite)
    if given.dry_run:
        if first:
            print(_dry_run(given, bank, queries))
        return 0
    options = _options(given, bank.class_names, progress=None if first else False)
    with _index_as_option():
        report = evaluate_with(
            options,
            task_for(options, *_sides(bank, queries), limits),
            _files(given),
            done=broadcast_object(results_folder.done if results_folder is not None else []),
            on_record=None if results_folder is None else results_folder.add,
        )
    if results_folder is not None:
        report.save(given.out, **({} if report.mistakes is None else looks))
    if first:
        _show(report, given.out, _notes(report, results_folder, looks))
    return 0


def evaluate_files(given: argparse.Namespace, *, first: bool) -> "EvalReport":
    """Evaluate the files of these arguments, which write and print nothing.

    Args:
        given: As `run` takes them.
        first: Whether this process shows progress.

    Raises:
        ValueError: If the data cannot be used.
        OSError: If a file cannot be read.
    """
    from faiss_knn.distributed import all_or_none
    from faiss_knn.offline.evaluate import evaluate_with, task_for

    with all_or_none():
        bank, queries = _read(given)
    options = _options(given, bank.class_names, progress=None if first else False)
    with _index_as_option():
        return evaluate_with(options, task_for(options, *_sides(bank, queries)), _files(given))


@contextmanager
def _index_as_option() -> Iterator[None]:
    """Call what is wrong with the argument `index` by the option that it came from."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("`index`"):
            raise
        raise ValueError(str(error).replace("`index`", "--index", 1)) from error


def _files(given: argparse.Namespace) -> dict[str, str | None]:
    return {name: path and str(path) for name, path in (("bank_file", given.bank), ("query_file", given.queries))}


def _relevance(given: argparse.Namespace) -> int:
    """Judge by lists of what is relevant, without labels; --out gets relevance.json."""
    from faiss_knn.offline.features import read_features
    from faiss_knn.offline.relevance import evaluate_relevance, read_relevance
    from faiss_knn.offline.report.results_folder import write_into

    keys = {"features_key": given.features_key, "allow_partial": given.allow_partial}
    bank, queries = read_features(given.bank, "bank", **keys), read_features(given.queries, "queries", **keys)
    scores = evaluate_relevance(
        bank.rows,
        queries.rows,
        read_relevance(given.relevance),
        distance_metric=given.distance or "cosine",
        ks=given.k or (1, 5, 10),
        depth=given.depth,
    )
    width = max(map(len, scores))
    print("\n".join(f"{name.ljust(width)}  {value:.6g}" for name, value in scores.items()))
    if given.out is not None:
        write_into(given.out, {"relevance.json": json.dumps(scores, indent=2) + "\n"})
    return 0


def _explain(given: argparse.Namespace, first: bool) -> int:
    """Say under which settings the number comes out; --out gets explain.json."""
    from faiss_knn.distributed import all_or_none
    from faiss_knn.offline.explain import explain_task, given_settings

    with all_or_none():
        settings = given_settings(given.protocol, **_asked(given))
        task = _task(given, *_read(given))
    explanation = explain_task(
        given.explain,
        task,
        settings,
        skip_bad_rows=given.skip_bad_rows,
        device=device_named(given.device),
        progress=None if first else False,
    )
    if first:
        print(explanation.table())
        if given.out is not None:
            print(f"\nwritten to {explanation.save(given.out)}")
    return 0


def _options(given: argparse.Namespace, class_names: list[str] | None, progress: bool | None) -> "EvalOptions":
    import torch

    from faiss_knn.offline.options import EvalOptions

    return EvalOptions(
        **_vote_settings(given),
        index=tuple(given.index),
        num_classes=given.num_classes,
        class_names=class_names,
        leave_one_out=given.leave_one_out,
        per_class=given.per_class,
        tries=given.tries,
        seed=given.seed,
        metrics=tuple(given.metric),
        depth=given.depth,
        sweep=dict(given.sweep),
        nprobe=given.nprobe,
        target_recall=given.target_recall,
        latency=given.latency,
        device=device_named(given.device),
        storage_dtype=None if given.storage_dtype is None else getattr(torch, given.storage_dtype),
        dims=tuple(given.dims),
        storage=tuple(given.storage),
        ignore_index=given.ignore_index,
        skip_bad_rows=given.skip_bad_rows,
        keep_neighbors=given.save_neighbors,
        progress=progress,
    )


def _vote_settings(given: argparse.Namespace) -> dict[str, Any]:
    from faiss_knn.offline.options import vote_settings

    return vote_settings(
        given.protocol, **_asked(given), pca=given.pca, whiten=given.whiten, with_quirks=given.with_quirks
    )


def _asked(given: argparse.Namespace) -> dict[str, Any]:
    """Return what a protocol decides, as far as it was given."""
    return {
        "k": given.k,
        "temperature": given.temperature,
        "weighting": given.weighting,
        "distance_metric": given.distance,
        "center": given.center,
    }


def _read(given: argparse.Namespace) -> "tuple[Features, Features | None]":
    """Open bank and queries; the bank's class names are those of --class-names, or of its file."""
    from faiss_knn.offline.features import read_class_names

    bank, queries = _open_sides(given)
    if given.class_names is not None:
        bank = replace(bank, class_names=read_class_names(given.class_names))
    return bank, queries


def _open_sides(given: argparse.Namespace) -> "tuple[Features, Features | None]":
    from faiss_knn.offline.features import arrays_in, digits, read_features
    from faiss_knn.offline.formats import DataError

    keys = {"features_key": given.features_key, "labels_key": given.labels_key, "allow_partial": given.allow_partial}
    if given.bank is None:
        bank, queries = digits()
        return bank, None if given.leave_one_out else queries
    read = [(given.bank, read_features(given.bank, "bank", labels=given.labels, **keys), "--labels")]
    if not given.leave_one_out:
        queries = read_features(given.queries, "queries", labels=given.query_labels, **keys)
        read.append((given.queries, queries, "--query-labels"))
    for path, features, option in read:
        if features.labels is None:
            raise DataError(
                f"{features.source}: holds no labels: give them with {option}, or name them with --labels-key"
                f"{arrays_in(path)}"
            )
    return read[0][1], None if given.leave_one_out else read[1][1]


def _limits(given: argparse.Namespace) -> "Limits":
    from faiss_knn.offline.features import read_column
    from faiss_knn.offline.task import Limits

    def column(role: "Role", key: str | None) -> Any:
        return None if key is None else read_column(given.bank if role == "bank" else given.queries, role, key)

    groups = column("bank" if given.leave_one_out else "queries", given.groups)
    if given.exclude_same_group and not given.leave_one_out:
        groups = (column("bank", given.groups), groups)
    own, ignored = column("queries", given.own_rows), column("queries", given.ignored_rows)
    return Limits(groups, given.exclude_same_group, own, ignored)


def _dry_run(given: argparse.Namespace, bank: "Features", queries: "Features | None") -> str:
    from faiss_knn.offline.dry_run import estimate

    depth = max(*_vote_settings(given)["k"], given.depth or 1)
    return estimate(_task(given, bank, queries), depth, given.index)


def _task(given: argparse.Namespace, bank: "Features", queries: "Features | None") -> "EvalTask":
    from faiss_knn.offline.task import make_task

    return make_task(
        *_sides(bank, queries),
        num_classes=given.num_classes,
        class_names=bank.class_names,
        leave_one_out=given.leave_one_out,
        ignore_index=given.ignore_index,
    )


def _sides(bank: "Features", queries: "Features | None") -> tuple[Any, Any, Any, Any]:
    """Return features and labels of the bank and of the queries, None without queries."""
    return bank.rows, bank.labels, *((queries.rows, queries.labels) if queries else (None, None))


def _notes(report: "EvalReport", results_folder: "ResultsFolder | None", looks: dict[str, Any]) -> list[str]:
    """Say what --out lacks, in words; after the page was written."""
    from faiss_knn.offline.report.mistakes_page import NOTHING_SHOWN

    notes = [] if results_folder is None or results_folder.warning is None else [results_folder.warning]
    notes += unread_pictures(looks)
    return notes if not looks or report.mistakes is not None else [*notes, NOTHING_SHOWN]


def _sizes(record: "Record") -> str:
    """Say what was compared: rows and widths, in which a wrong choice of columns shows."""
    bank, queries, dim = record["n_bank"], record["n_queries"], record["dim"]
    return f"bank {bank:,} x {dim:,}, queries {queries:,} x {dim:,}"


def _show(report: "EvalReport", out: Path | None, notes: list[str]) -> None:
    if out is not None and find_spec("matplotlib") is None:
        notes = [*notes, "the report is without plots, which need matplotlib: pip install 'faiss-knn-eval[plot]'"]
    for note in (*report.warnings, *notes):
        print(f"faiss-knn: warning: {note}", file=sys.stderr)
    print(_sizes(report.records[0]))
    print(report.table())
    if out is not None:
        print(f"\nwritten to {out}: report.html")
