"""The command line: `faiss-knn eval`."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from faiss_knn import __version__

if TYPE_CHECKING:
    from faiss_knn.offline.features import Features
    from faiss_knn.offline.report.report import EvalReport, Ledger, Record

# torch and the readers are imported when there is something to evaluate, so that --help and bad usage answer at once.

_EPILOG = """\
Files: .npy .npz .pt .safetensors .parquet .arrow .feather .csv .tsv .jsonl .h5 .fvecs .bvecs .fbin .u8bin, or a folder
of such files in the order of their numbers (of extract, of save_to_disk of the datasets library, of DINO or VISSL).
Labels are in the file (labels, targets, y; test_labels, ...) or in --labels and --query-labels; -1 means
unlabelled. Without files, the handwritten digits of scikit-learn are evaluated.

examples:
  faiss-knn eval bank.npz queries.npz --k 1 5 20 --index flat ivf --sweep nprobe=1,4,16 --out results
  faiss-knn eval features.npy --labels labels.npy --leave-one-out

What makes a number suspect (queries that are in the bank, classes that it lacks, ...) is said on stderr. A folder given
to --out only grows: a second command adds to it, and what it has of the same data and settings gives way to the new.
"""


_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The program's arguments."""
    parser = _Parser(prog="faiss-knn", description="Judge features by their nearest neighbours.")
    parser.add_argument("--version", action="version", version=f"faiss-knn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    evaluate = commands.add_parser(
        "eval",
        help="accuracy, retrieval metrics and the cost of approximate indexes, from saved features",
        description="Find each query's neighbours once per index; report every k, temperature and weighting.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("--version", action="version", version=f"faiss-knn {__version__}")
    _add_data(evaluate.add_argument_group("data"))
    _add_vote(evaluate.add_argument_group("vote and metrics"))
    _add_search(evaluate.add_argument_group("search"))
    _add_output(evaluate.add_argument_group("output"))
    return parser


def _add_data(group: Any) -> None:
    group.add_argument("bank", nargs="?", type=Path, metavar="BANK", help="features that are searched")
    group.add_argument("queries", nargs="?", type=Path, metavar="QUERIES", help="features that are classified")
    group.add_argument("--labels", type=Path, metavar="FILE", help="the bank's labels, if not in BANK")
    group.add_argument("--query-labels", type=Path, metavar="FILE", help="the queries' labels, if not in QUERIES")
    group.add_argument(
        "--features-key", metavar="NAME", help="array or column of the features; emb_ for emb_0, emb_1, ...; a,b,c"
    )
    group.add_argument("--labels-key", metavar="NAME", help="array or column that holds the labels")
    group.add_argument(
        "--allow-partial", action=argparse.BooleanOptionalAction, default=False,
        help="read what an extraction that was cut off has saved so far",
    )  # fmt: skip
    group.add_argument("--class-names", type=Path, metavar="FILE", help="class names, one a line or JSON")
    group.add_argument("--ignore-index", type=_whole, metavar="ID", help="a class id that means unlabelled, beside -1")
    group.add_argument(
        "--skip-bad-rows", action=argparse.BooleanOptionalAction, default=False,
        help="leave out and count rows that are not finite, or zero under cosine, instead of refusing them",
    )  # fmt: skip
    group.add_argument("--num-classes", type=_positive, metavar="C", help="default: what the labels need")
    group.add_argument(
        "--leave-one-out", action=argparse.BooleanOptionalAction, default=False,
        help="BANK alone: its rows are the queries, none is its own neighbour",
    )  # fmt: skip
    group.add_argument("--per-class", type=_positive, metavar="N", help="few-shot: banks of N rows per class")
    group.add_argument("--tries", type=_positive, metavar="T", help="few-shot banks to draw (default 5)")
    group.add_argument("--seed", type=_count, default=0, help="of the draws, which no two seeds share (default 0)")


def _add_vote(group: Any) -> None:
    group.add_argument("--k", type=_positive, nargs="+", default=[1, 5, 10, 20], help="default 1 5 10 20")
    group.add_argument("--temperature", type=_temperature, nargs="+", default=[0.07], metavar="T", help="default 0.07")
    group.add_argument(
        "--weighting", nargs="+", default=["inverse"], choices=["inverse", "softmax", "uniform"], help="default inverse"
    )
    group.add_argument(
        "--metric", nargs="+", default=[], metavar="NAME",
        help="further torchmetrics.classification metrics, such as MulticlassF1Score or MulticlassAUROC",
    )  # fmt: skip
    group.add_argument(
        "--depth", type=_positive, metavar="K", help="neighbours for retrieval metrics (default: largest k)"
    )


def _add_search(group: Any) -> None:
    group.add_argument(
        "--distance", default="cosine", choices=["cosine", "euclidean", "squared_euclidean", "manhattan"],
        help="default cosine",
    )  # fmt: skip
    group.add_argument(
        "--index", nargs="+", default=["flat"], metavar="SPEC", help="flat, ivf, fast, auto or FAISS factory strings"
    )
    group.add_argument("--nprobe", type=_positive, help="inverted lists that IVF indexes visit")
    group.add_argument("--target-recall", type=_share, metavar="R", help="recall that approximate indexes are tuned to")
    group.add_argument(
        "--sweep",
        nargs="+",
        type=_sweep,
        default=[],
        metavar="NAME=V,V",
        help="search parameters to try: nprobe=1,4,16 k_factor=1,5",
    )
    group.add_argument(
        "--storage-dtype", choices=["float16", "bfloat16", "float32", "float64"],
        help="dtype of the bank's rows in the index (default: what the features need)",
    )  # fmt: skip
    group.add_argument(
        "--latency", type=_count, default=0, metavar="N", help="time N queries one at a time, for p50 and p95"
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def _temperature(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    if not _SMALLEST <= value <= _LARGEST:
        raise argparse.ArgumentTypeError(f"must be from {_SMALLEST:g} to {_LARGEST:g}, as float32 is, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def _sweep(text: str) -> tuple[str, list[int]]:
    name, _, values = text.partition("=")
    if name not in ("nprobe", "k_factor") or not values:
        raise argparse.ArgumentTypeError(f"must be nprobe=1,4,16 or k_factor=1,2,5, got {text!r}")
    return name, [_positive(value) for value in values.split(",")]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and before it the options of `--config`, which it overrides.

    Exits with status 2 and one line on stderr if they cannot be used.
    """
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.config is not None:
        options, files = _config(parser, given.config)
        given = parser.parse_args(["eval", *options, *arguments[1:]])
        for name, path in files.items():
            if getattr(given, name) is None:
                setattr(given, name, Path(path))
    _check_combination(parser, given)
    return given


def _config(parser: argparse.ArgumentParser, path: Path) -> tuple[list[str], dict[str, str]]:
    """The options of a YAML file as arguments, checked by the same parser, and its BANK and QUERIES."""
    import yaml  # only if there is a file to read

    if path.exists() and not path.is_file():
        parser.error(f"--config {path}: is no regular file")
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    if not isinstance(held, dict):
        parser.error(f"--config {path}: must hold options by name, got a {type(held).__name__}")
    files = {name: str(held.pop(name)) for name in ("bank", "queries") if name in held}
    options: list[str] = []
    for name, value in held.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            options.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            options += [flag, *(f"{key}={','.join(map(str, _listed(held)))}" for key, held in value.items())]
        elif value is not None:
            options += [flag, *map(str, _listed(value))]
    return options, files


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_combination(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.leave_one_out and given.queries is not None:
        parser.error("--leave-one-out takes BANK alone: leave out QUERIES")
    if given.bank is not None and given.queries is None and not given.leave_one_out:
        parser.error("QUERIES is missing: name the queries' file, or add --leave-one-out")
    if given.leave_one_out and given.per_class is not None:
        parser.error("--per-class does not go with --leave-one-out")
    if given.tries is not None and given.per_class is None:
        parser.error("--tries needs --per-class")
    if given.resume and given.overwrite:
        parser.error("--resume goes on with what --out has, --overwrite forgets it: leave out one of them")
    for name in ("resume", "overwrite", "save_neighbors"):
        if getattr(given, name) and given.out is None:
            parser.error(f"--{name.replace('_', '-')} needs --out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        0, or 1 if the data cannot be used, with one line on stderr; bad usage exits with 2.
    """
    _print_what_can_be_printed()
    given = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with _ranks():
            return _evaluate(given)
    except MemoryError as error:
        return _failed(f"not enough memory: {error}")
    except (ValueError, OSError) as error:
        return _failed(" ".join(str(error).split()))
    except KeyboardInterrupt:
        kept = f": {given.out}/results.jsonl has what was done, --resume goes on" if given.out is not None else ""
        print(f"faiss-knn: stopped{kept}", file=sys.stderr)
        return 130


def _print_what_can_be_printed() -> None:
    """Where a locale has no letter for a character, print a question mark instead of ending."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _failed(reason: str) -> int:
    if _is_first():
        print(f"faiss-knn: error: {reason}", file=sys.stderr)
    return 1


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _ranks() -> Iterator[None]:
    """Under torchrun, take part in the group of its processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")  # also where each process searches on a GPU of its own: little travels
    try:
        yield
    finally:
        dist.destroy_process_group()


def _evaluate(given: argparse.Namespace) -> int:
    import torch

    from faiss_knn.distributed import all_or_none, broadcast_object
    from faiss_knn.offline.evaluate import evaluate
    from faiss_knn.offline.features import read_class_names
    from faiss_knn.offline.report.report import Ledger

    ledger = None
    with all_or_none():
        bank, queries = _read(given)
        names = read_class_names(given.class_names) if given.class_names is not None else bank.class_names
        if given.out is not None and not given.dry_run and _is_first():
            ledger = Ledger(given.out, given.resume, overwrite=given.overwrite)
    if given.dry_run:
        if _is_first():
            print(_dry_run(given, bank, queries, names))
        return 0
    report = evaluate(
        bank.rows,
        bank.labels,
        None if queries is None else queries.rows,
        None if queries is None else queries.labels,
        k=given.k,
        temperature=given.temperature,
        weighting=given.weighting,
        distance_metric=given.distance,
        index=given.index,
        num_classes=given.num_classes,
        class_names=names,
        leave_one_out=given.leave_one_out,
        per_class=given.per_class,
        tries=given.tries,
        seed=given.seed,
        metrics=given.metric,
        depth=given.depth,
        sweep=dict(given.sweep),
        nprobe=given.nprobe,
        target_recall=given.target_recall,
        latency=given.latency,
        device=_device(given.device),
        storage_dtype=None if given.storage_dtype is None else getattr(torch, given.storage_dtype),
        ignore_index=given.ignore_index,
        skip_bad_rows=given.skip_bad_rows,
        keep_neighbors=given.save_neighbors,
        progress=None if _is_first() else False,
        done=broadcast_object(ledger.done if ledger is not None else []),
        on_record=_noting(given, ledger),
    )
    if ledger is not None:
        report.save(given.out)
    if _is_first():
        _show(report, given.out, [] if ledger is None or ledger.warning is None else [ledger.warning])
    return 0


def _noting(given: argparse.Namespace, ledger: "Ledger | None") -> "Callable[[Record, list[float]], None]":
    """Write down each record as soon as it is there, with the files that it is of."""

    def note(record: "Record", per_class: list[float]) -> None:
        for name, path in (("bank_file", given.bank), ("query_file", given.queries)):
            record[name] = None if path is None else str(path)
        if ledger is not None:
            ledger.add(record, per_class)

    return note


def _read(given: argparse.Namespace) -> "tuple[Features, Features | None]":
    from faiss_knn.offline.features import digits, read_features
    from faiss_knn.offline.formats import DataError

    keys = {"features_key": given.features_key, "labels_key": given.labels_key, "allow_partial": given.allow_partial}
    if given.bank is None:
        bank, queries = digits()
        return bank, None if given.leave_one_out else queries
    bank = read_features(given.bank, "bank", labels=given.labels, **keys)
    found = None
    if not given.leave_one_out:
        found = read_features(given.queries, "queries", labels=given.query_labels, **keys)
    for side, option in ((bank, "--labels"), (found, "--query-labels")):
        if side is not None and side.labels is None:
            raise DataError(f"{side.source}: holds no labels: give them with {option}, or name them with --labels-key")
    return bank, found


def _dry_run(given: argparse.Namespace, bank: "Features", queries: "Features | None", names: list[str] | None) -> str:
    from faiss_knn.offline.estimate import estimate
    from faiss_knn.offline.task import make_task

    problem = make_task(
        bank.rows,
        bank.labels,
        None if queries is None else queries.rows,
        None if queries is None else queries.labels,
        num_classes=given.num_classes,
        class_names=names,
        leave_one_out=given.leave_one_out,
        ignore_index=given.ignore_index,
    )
    return estimate(problem, max(*given.k, given.depth or 1), given.index)


def _device(name: str) -> str | None:
    import torch

    if name == "auto":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        return f"cuda:{local_rank % gpus}" if gpus else None
    return name


def _show(report: "EvalReport", out: Path | None, notes: list[str]) -> None:
    if out is not None and find_spec("matplotlib") is None:
        notes = [*notes, "the report is without plots, which need matplotlib: pip install 'faiss-knn[plot]'"]
    for note in (*report.warnings, *notes):
        print(f"faiss-knn: warning: {note}", file=sys.stderr)
    try:
        print(report.table())
        if out is not None:
            print(f"\nwritten to {out}: report.html")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
