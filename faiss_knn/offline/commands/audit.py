"""`faiss-knn audit`: what the neighbours say about the data."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faiss_knn.offline.commands.arguments import DISTANCES, count, device_named, distance, location, positive, whole
from faiss_knn.offline.commands.names_and_images import add_looks, check_looks, read_looks, unread_pictures

if TYPE_CHECKING:
    from faiss_knn.offline.features import Features

EPILOG = """\
Files are read as by eval, and so are labels. With labels, rows are listed whose neighbours contradict them; with
QUERIES, those that are in the bank, how far each is from everything known, and how well the queries cover the bank.

examples:
  faiss-knn audit train.npz
  faiss-knn audit train.npz test.npz --out audit
  faiss-knn audit features.npy --labels labels.npy --duplicate-distance 0.01 --names paths.txt --out audit

The summary is printed, what makes the data suspect is said on stderr. --out gets audit.jsonl and audit.csv, a line per
finding, audit_novelty.csv, a line per query, and audit.md and audit.html to look at.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments, in groups."""
    _add_data(parser.add_argument_group("data"))
    _add_search(parser.add_argument_group("search"))
    _add_output(parser.add_argument_group("output"))


def _add_data(group: Any) -> None:
    group.add_argument("bank", type=location, metavar="FEATURES", help="features that are audited")
    group.add_argument("queries", nargs="?", type=location, metavar="QUERIES", help="features that are sought in them")
    group.add_argument("--labels", type=location, metavar="FILE", help="the labels of FEATURES, if not in it")
    group.add_argument("--query-labels", type=location, metavar="FILE", help="the queries' labels, if not in QUERIES")
    group.add_argument("--features-key", metavar="NAME", help="array or column of the features")
    group.add_argument("--labels-key", metavar="NAME", help="array or column that holds the labels")
    group.add_argument("--class-names", type=Path, metavar="FILE", help="class names, one a line or JSON")
    group.add_argument("--ignore-index", type=whole, metavar="ID", help="a class id that means unlabelled, beside -1")
    group.add_argument(
        "--outlier-labels", metavar="KEY",
        help="array or column of QUERIES, or a file, that is 1 for known outliers and else 0",
    )  # fmt: skip
    add_looks(group, "FEATURES")


def _add_search(group: Any) -> None:
    group.add_argument("--k", type=positive, default=20, help="neighbours of each row (default 20)")
    group.add_argument(
        "--distance", default="cosine", choices=[name for name in DISTANCES if name != "dot"],
        help="default cosine",
    )  # fmt: skip
    group.add_argument(
        "--duplicate-distance", type=distance, metavar="D",
        help="near-duplicates are at most so far apart; 0: equal rows alone (default: by the gap in the distances)",
    )  # fmt: skip
    group.add_argument(
        "--generative", action=argparse.BooleanOptionalAction,
        help="precision, recall, density and coverage of QUERIES against FEATURES: two more searches (default with "
        "QUERIES, without --sample)",
    )  # fmt: skip
    group.add_argument("--sample", type=positive, metavar="N", help="look at N rows, each among all others")
    group.add_argument("--seed", type=count, help="of the sample (default 0)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto (default): cuda if there is one")


def _add_output(group: Any) -> None:
    group.add_argument("--out", type=Path, metavar="DIR", help="write audit.jsonl, .csv, .md and .html")


def check_combination(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End the program where the arguments do not go together."""
    if given.queries is None and given.query_labels is not None:
        parser.error("--query-labels needs QUERIES")
    if given.generative and given.queries is None:
        parser.error("--generative needs QUERIES, the set that is compared with FEATURES")
    if given.generative and given.sample is not None:
        parser.error("--generative compares all rows: it does not go with --sample")
    if given.seed is not None and given.sample is None:
        parser.error("--seed is of the rows that are drawn: it needs --sample")
    check_looks(parser, given)


def run(given: argparse.Namespace, *, first: bool) -> int:
    """Audit the features, and show and write what was found."""
    from faiss_knn.distributed import all_or_none
    from faiss_knn.offline.audit import audit
    from faiss_knn.offline.features import read_class_names

    with all_or_none():
        bank, queries = _read(given)
        outliers = _outliers(given)
        looks = read_looks(given, len(bank.rows), None if queries is None else len(queries.rows))
        class_names = read_class_names(given.class_names) if given.class_names is not None else bank.class_names
    report = audit(
        bank.rows,
        bank.labels,
        None if queries is None else queries.rows,
        None if queries is None or bank.labels is None else queries.labels,
        k=given.k,
        distance_metric=given.distance,
        duplicate_distance=given.duplicate_distance,
        outlier_labels=outliers,
        class_names=class_names,
        ignore_index=given.ignore_index,
        generative=given.generative is not False,
        sample=given.sample,
        seed=given.seed or 0,
        device=device_named(given.device),
        progress=None if first else False,
    )
    if not first:
        return 0
    for note in report.warnings:
        print(f"faiss-knn: warning: {note}", file=sys.stderr)
    print(report.summary())
    if given.out is not None:
        report.save(given.out, **looks)
        for note in unread_pictures(looks):
            print(f"faiss-knn: warning: {note}", file=sys.stderr)
        print(f"\nwritten to {given.out}: audit.html")
    return 0


def _read(given: argparse.Namespace) -> "tuple[Features, Features | None]":
    from faiss_knn.offline.features import read_features

    keys = {"features_key": given.features_key, "labels_key": given.labels_key}
    bank = read_features(given.bank, "bank", labels=given.labels, **keys)
    if bank.labels is None:
        _check_unlabelled(given, bank.source)
    if given.queries is None:
        return bank, None
    return bank, read_features(given.queries, "queries", labels=given.query_labels, **keys)


def _check_unlabelled(given: argparse.Namespace, source: str) -> None:
    """Refuse what says something of labels that there are none of."""
    from faiss_knn.offline.formats import DataError

    for name in ("query_labels", "class_names", "ignore_index"):
        if getattr(given, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise DataError(
                f"{source}: holds no labels, which {option} needs: give them with --labels, or leave it out"
            )


def _outliers(given: argparse.Namespace) -> Any:
    """Read which rows are known outliers: an array of the file that they are in, or a file of its own."""
    from faiss_knn.offline.features import read_labels

    if given.outlier_labels is None:
        return None
    own = Path(given.outlier_labels)
    if own.is_file():
        return read_labels(own)
    return read_labels(given.bank if given.queries is None else given.queries, key=given.outlier_labels)
