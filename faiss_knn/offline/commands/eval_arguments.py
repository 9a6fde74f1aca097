"""The arguments of `faiss-knn eval`: what there are, and which go together."""

import argparse
from pathlib import Path
from typing import Any

from faiss_knn.names import WEIGHTINGS
from faiss_knn.offline.commands.arguments import (
    DISTANCES,
    accuracy,
    count,
    dims,
    location,
    positive,
    share,
    spec,
    storage,
    sweep,
    temperature,
    whole,
)
from faiss_knn.offline.commands.names_and_images import LOOKS, add_looks, check_looks
from faiss_knn.protocol import protocols

EPILOG = """\
Files: .npy .npz .pt .pth .safetensors .parquet .arrow .feather .csv .tsv .jsonl .ndjson .h5 .hdf5 .fvecs .bvecs .fbin
.u8bin, or a folder of such files in the order of their numbers (of extract, of save_to_disk of the datasets library, of
DINO or VISSL). Labels are in the file (labels, targets, y; test_labels, ...) or in --labels and --query-labels (also
.txt and .json); -1 means unlabelled. Without files, the handwritten digits of scikit-learn are evaluated.

examples:
  faiss-knn eval bank.npz queries.npz --k 1 5 20 --index flat ivf --sweep nprobe=1,4,16 --out results
  faiss-knn eval features.npy --labels labels.npy --leave-one-out

What makes a number suspect (queries that are in the bank, classes that it lacks, ...) is said on stderr. A folder given
to --out only grows: a second command adds to it, and what it has of the same data and settings gives way to the new.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments, in groups."""
    _add_data(parser.add_argument_group("data"))
    votes = parser.add_argument_group("vote and metrics")
    add_vote(votes)
    _add_metrics(votes)
    _add_search(parser.add_argument_group("search"))
    _add_output(parser.add_argument_group("output"))


def _add_data(group: Any) -> None:
    group.add_argument("bank", nargs="?", type=location, metavar="BANK", help="features that are searched")
    group.add_argument("queries", nargs="?", type=location, metavar="QUERIES", help="features that are classified")
    add_names(group)
    group.add_argument(
        "--allow-partial", action=argparse.BooleanOptionalAction, default=False,
        help="read what an extraction that was cut off has saved so far",
    )  # fmt: skip
    group.add_argument("--class-names", type=Path, metavar="FILE", help="class names, one a line or JSON")
    group.add_argument("--ignore-index", type=whole, metavar="ID", help="a class id that means unlabelled, beside -1")
    group.add_argument(
        "--skip-bad-rows", action=argparse.BooleanOptionalAction, default=False,
        help="leave out and count rows that are not finite, or zero under cosine, instead of refusing them",
    )  # fmt: skip
    group.add_argument("--num-classes", type=positive, metavar="C", help="default: what the labels need")
    add_looks(group, "BANK")
    group.add_argument(
        "--leave-one-out", action=argparse.BooleanOptionalAction, default=False,
        help="BANK alone: its rows are the queries, none is its own neighbour",
    )  # fmt: skip
    _add_limits(group)
    group.add_argument(
        "--relevance", type=Path, metavar="FILE",
        help="retrieval by lists instead of labels: JSON, for each query {positives, junk} or {easy, hard, junk}, rows "
        "of BANK; mAP as revisited Oxford and Paris count it, micro-AP; with --k, --depth, --distance alone",
    )  # fmt: skip
    group.add_argument(
        "--explain", type=accuracy, metavar="NUMBER",
        help="which settings give this top-1 (0.7843 or 78.43): score those of all protocols, list the nearest, and "
        "those that are given by --protocol, --k, --temperature, --weighting, --distance, --center",
    )  # fmt: skip
    group.add_argument("--per-class", type=positive, metavar="N", help="few-shot: banks of N rows per class")
    group.add_argument("--tries", type=positive, metavar="T", help="few-shot banks to draw (default 5)")
    group.add_argument("--seed", type=count, default=0, help="of the draws, which no two seeds share (default 0)")


def add_names(group: Any) -> None:
    """Add the arguments that say where features and labels are."""
    group.add_argument("--labels", type=location, metavar="FILE", help="the bank's labels, if not in BANK")
    group.add_argument("--query-labels", type=location, metavar="FILE", help="the queries' labels, if not in QUERIES")
    group.add_argument(
        "--features-key", metavar="NAME", help="array or column of the features; emb_ for emb_0, emb_1, ...; a,b,c"
    )
    group.add_argument("--labels-key", metavar="NAME", help="array or column that holds the labels")


def _add_limits(group: Any) -> None:
    """Add the arrays that say which rows belong together, and which of the bank a query may not find."""
    group.add_argument(
        "--groups", metavar="KEY",
        help="array of groups (scene, patient): intervals are over the queries' groups; -1: a group of its own",
    )  # fmt: skip
    group.add_argument(
        "--exclude-same-group", action=argparse.BooleanOptionalAction, default=False,
        help="no query finds rows of its own group: --groups is in BANK too",
    )  # fmt: skip
    group.add_argument(
        "--own-rows", metavar="KEY",
        help="array in QUERIES: the row of BANK that each query is itself, and does not find; -1: none",
    )  # fmt: skip
    group.add_argument(
        "--ignored-rows",
        metavar="KEY",
        help="array (Q, m) in QUERIES: rows of BANK that each query may not find, or -1",
    )


def add_vote(group: Any) -> None:
    """Add the arguments that say how neighbours are found and vote."""
    group.add_argument(
        "--protocol", choices=list(protocols()), metavar="NAME",
        help="k, temperature, weighting and distance of another library, unless given (faiss-knn protocols lists them)",
    )  # fmt: skip
    group.add_argument(
        "--with-quirks", action=argparse.BooleanOptionalAction, default=False,
        help="vote by the protocol's own float32 code, with its quirks: to reproduce a number made with them",
    )  # fmt: skip
    group.add_argument("--k", type=positive, nargs="+", help="default 1 5 10 20")
    group.add_argument("--temperature", type=temperature, nargs="+", metavar="T", help="default 0.07")
    group.add_argument("--weighting", nargs="+", choices=WEIGHTINGS, help="default inverse")
    group.add_argument(
        "--center", action=argparse.BooleanOptionalAction, default=False,
        help="subtract the bank's mean from all features",
    )  # fmt: skip
    group.add_argument(
        "--distance", choices=DISTANCES,
        help="default cosine; dot: minus the inner product, with softmax or uniform weighting",
    )  # fmt: skip


def _add_metrics(group: Any) -> None:
    group.add_argument("--pca", type=positive, metavar="D", help="turn all features to D principal axes of the bank")
    group.add_argument(
        "--whiten", action=argparse.BooleanOptionalAction, default=False,
        help="divide features by the bank's deviation along its principal axes",
    )  # fmt: skip
    group.add_argument(
        "--metric", nargs="+", default=[], metavar="NAME",
        help="further torchmetrics.classification metrics, such as MulticlassF1Score or MulticlassAUROC",
    )  # fmt: skip
    group.add_argument(
        "--depth", type=positive, metavar="K", help="neighbours for retrieval metrics (default: largest k)"
    )


def _add_search(group: Any) -> None:
    group.add_argument(
        "--index",
        nargs="+",
        type=spec,
        default=["flat"],
        metavar="SPEC",
        help="flat, ivf, fast, auto or FAISS factory strings",
    )
    group.add_argument("--nprobe", type=positive, help="inverted lists that IVF indexes visit")
    group.add_argument("--target-recall", type=share, metavar="R", help="recall that approximate indexes are tuned to")
    group.add_argument(
        "--sweep",
        nargs="+",
        type=sweep,
        default=[],
        metavar="NAME=V,V",
        help="search parameters to try: nprobe=1,4,16 k_factor=1,5",
    )
    group.add_argument(
        "--storage-dtype", choices=["float16", "bfloat16", "float32", "float64"],
        help="dtype of the bank's rows in the index (default: what the features need)",
    )  # fmt: skip
    group.add_argument(
        "--dims", nargs="+", type=dims, default=[], metavar="D",
        help="what fewer dimensions cost: 64 (the first), 64:unit (divided by their lengths when cut), 64:whole "
        "(before), pca64",
    )  # fmt: skip
    group.add_argument(
        "--storage", nargs="+", type=storage, default=[], metavar="KIND",
        help="what fewer bits cost, alone and with each of --dims: float16 bfloat16 int8 binary binary:4 (4 k "
        "candidates are scored again)",
    )  # fmt: skip
    group.add_argument(
        "--latency", type=count, default=0, metavar="N", help="time N queries one at a time, for p50 and p95"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto (default): cuda if there is one")


def _add_output(group: Any) -> None:
    group.add_argument(
        "--out", type=Path, metavar="DIR",
        help="add to results.jsonl, and write .csv, report.md, .html and plots of all that is in it",
    )  # fmt: skip
    group.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=False,
        help="leave out what --out has of the same data (its whole content) and settings",
    )  # fmt: skip
    group.add_argument(
        "--overwrite", action=argparse.BooleanOptionalAction, default=False, help="forget what --out has"
    )
    group.add_argument(
        "--save-neighbors", action=argparse.BooleanOptionalAction, default=False, help="write neighbors.npz to --out"
    )
    group.add_argument("--config", type=Path, metavar="YAML", help="options by their long names; the command line wins")
    group.add_argument(
        "--dry-run", action=argparse.BooleanOptionalAction, default=False, help="print sizes and an estimate, and stop"
    )


def check_combination(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Exit with status 2 and one line on stderr if arguments do not go together."""
    if given.leave_one_out and given.queries is not None:
        parser.error("--leave-one-out takes BANK alone: leave out QUERIES")
    if given.bank is not None and given.queries is None and not given.leave_one_out:
        parser.error("QUERIES is missing: name the queries' file, or add --leave-one-out")
    if given.leave_one_out and given.per_class is not None:
        parser.error("--per-class does not go with --leave-one-out")
    _check_files(parser, given)
    if given.relevance is not None:
        _check_relevance(parser, given)
    if given.explain is not None:
        _check_explain(parser, given)
    for name in ("own_rows", "ignored_rows"):
        if getattr(given, name) is not None and given.queries is None:
            parser.error(f"--{name.replace('_', '-')} is an array in QUERIES: name the file")
    if given.groups is not None and given.bank is None:
        parser.error("--groups is an array in BANK or QUERIES: name the files")
    if given.exclude_same_group and given.groups is None:
        parser.error("--exclude-same-group needs --groups")
    if given.tries is not None and given.per_class is None:
        parser.error("--tries needs --per-class")
    if all(spec == "flat" for spec in given.index):
        for name in ("sweep", "nprobe", "target_recall"):
            if getattr(given, name):
                option = f"--{name.replace('_', '-')}"
                parser.error(f"{option} is for other indexes than flat: name one with --index, such as ivf")
    if given.nprobe is not None and set(given.index) <= {"flat", "fast", "auto"}:
        parser.error("--nprobe is for indexes with inverted lists: name one with --index, such as ivf")
    check_looks(parser, given)
    if given.bank is None and given.images is not None:
        parser.error("--images are of the rows of BANK: name the file")
    if given.resume and given.overwrite:
        parser.error("--resume goes on with what --out has, --overwrite forgets it: leave out one of them")
    for name in ("resume", "overwrite", "save_neighbors"):
        if getattr(given, name) and given.out is None:
            parser.error(f"--{name.replace('_', '-')} needs --out")


def _check_files(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse what says where features and labels are, of files that are not read."""
    if given.bank is None:
        for name in ("labels", "query_labels", "features_key", "labels_key", "allow_partial"):
            if getattr(given, name):
                parser.error(f"--{name.replace('_', '-')} is of files, and none is named: name BANK and QUERIES")
    if given.leave_one_out and given.query_labels is not None:
        parser.error("--query-labels needs QUERIES, which --leave-one-out does without: leave it out")


def _check_relevance(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse what needs a vote: lists of rows leave nothing to vote for."""
    if given.queries is None:
        parser.error("--relevance is of the rows of QUERIES: name the file")
    names = ("temperature", "weighting", "protocol", "center", "pca", "whiten", "dims", "storage", "metric", "sweep",
             "with_quirks", "nprobe", "target_recall", "groups", "own_rows", "ignored_rows", "per_class", "latency",
             "storage_dtype", "labels", "query_labels", "labels_key", "class_names", "ignore_index", "num_classes",
             "skip_bad_rows", "resume", "overwrite", "save_neighbors", "dry_run", *LOOKS)  # fmt: skip
    for name in names:
        if getattr(given, name):
            parser.error(f"--{name.replace('_', '-')} does not go with --relevance, which ranks without a vote")
    if given.index != ["flat"]:
        parser.error("--index does not go with --relevance, which ranks exactly")
    if given.device != "auto":
        parser.error("--device does not go with --relevance, which searches where the features are")


def _check_explain(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Refuse other options: settings of a vote are what is looked for, and nothing else is tried."""
    names = ("metric", "depth", "storage_dtype", "pca", "whiten", "dims", "storage", "groups", "own_rows",
             "with_quirks", "ignored_rows", "relevance", "per_class", "nprobe", "target_recall", "sweep", "latency",
             "resume", "overwrite", "save_neighbors", "dry_run", *LOOKS)  # fmt: skip
    for name in names:
        if getattr(given, name):
            parser.error(
                f"--{name.replace('_', '-')} does not go with --explain, which tries k, weightings and distances"
            )
    if given.index != ["flat"]:
        parser.error("--index does not go with --explain, which searches exactly")
