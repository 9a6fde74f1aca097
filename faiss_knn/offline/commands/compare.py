"""`faiss-knn compare`: tell differences between runs from chance."""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from faiss_knn.offline.commands import eval as eval_command
from faiss_knn.offline.commands import eval_arguments
from faiss_knn.offline.commands.arguments import Parser, count, inner_share, location

if TYPE_CHECKING:
    from faiss_knn.offline.report.report import EvalReport

EPILOG = """\
A RUN is a folder that `faiss-knn eval --out` has written, or features that are evaluated here: BANK:QUERIES, or with
--leave-one-out BANK. Runs are of the same queries with the same labels; models, banks and features may differ. Every
setting (index, k, temperature, weighting, ...) that all runs have is compared.

examples:
  faiss-knn eval old/bank.npz old/queries.npz --out old/results
  faiss-knn eval new/bank.npz new/queries.npz --out new/results
  faiss-knn compare old/results new/results --out comparison
  faiss-knn compare old/bank.npz:old/queries.npz new/bank.npz:new/queries.npz --k 5 20
  faiss-knn compare old.npy new.npy --labels labels.npy --leave-one-out

A difference is separable if McNemar's exact p, Holm-corrected over the table, is at most 1 - confidence. The interval
is that of a paired bootstrap over the queries, in points. Where a difference is not separable, it is said about how
many queries would do. Runs over the same bank rows that were made here or with --save-neighbors are also compared by
how many neighbours they have in common, against chance.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="two or more: folders of results, BANK:QUERIES or BANK")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs (default: their paths)")
    parser.add_argument(
        "--confidence", type=inner_share, default=0.95, metavar="P", help="of tests and intervals (default 0.95)"
    )
    parser.add_argument("--seed", type=count, default=0, help="of the bootstrap (default 0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write compare.jsonl, .csv, .md, .html, by class, and a plot"
    )

    files = parser.add_argument_group("runs that are evaluated here")
    files.add_argument(
        "--leave-one-out", action=argparse.BooleanOptionalAction, default=False,
        help="RUN is BANK alone: its rows are the queries, none is its own neighbour",
    )  # fmt: skip
    eval_arguments.add_names(files)
    eval_arguments.add_vote(files)


def check_combination(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End the program where the arguments do not go together."""
    if len(given.runs) < 2:
        parser.error("compare needs two runs or more: RUN_A RUN_B")
    if given.names is not None and len(given.names) != len(given.runs):
        parser.error(f"--names must name each of the {len(given.runs)} runs, got {len(given.names)}")
    if given.leave_one_out and given.query_labels is not None:
        parser.error("--query-labels is of QUERIES, which runs have none of with --leave-one-out: leave it out")
    if all(_is_results(text) for text in given.runs):
        for name in ("leave_one_out", "labels", "query_labels", "features_key", "labels_key", "protocol", "k",
                     "with_quirks", "temperature", "weighting", "center", "distance"):  # fmt: skip
            if getattr(given, name):
                parser.error(f"--{name.replace('_', '-')} is for features, but every RUN is a folder of results")


def run(given: argparse.Namespace, *, first: bool) -> int:
    """Compare the runs; those that are features are evaluated first, by all processes."""
    from faiss_knn.offline.compare import compare, run_names

    sides = [_sides(text, leave_one_out=given.leave_one_out) for text in given.runs]
    names = run_names([text if files is None else files[0] for text, files in zip(given.runs, sides, strict=True)])
    names = given.names or names
    runs: list[EvalReport | str] = []
    for text, files, name in zip(given.runs, sides, names, strict=True):
        runs.append(text if files is None else _evaluated(given, files, name, first=first))
    if not first:
        return 0
    comparison = compare(*runs, names=names, confidence=given.confidence, seed=given.seed)
    for note in comparison.notes:
        _warn(note)
    print(comparison)
    if given.out is not None:
        comparison.save(given.out)
        print(f"\nwritten to {given.out}: compare.html")
    return 0


def _sides(text: str, *, leave_one_out: bool) -> tuple[str, str | None] | None:
    """Find a run's BANK and QUERIES, which is None with leave-one-out; None for a folder of results.

    Raises:
        ValueError: If it is none of these.
    """
    if _is_results(text):
        return None
    if leave_one_out and _is_there(text):
        return text, None
    sides = next((pair for pair in _cuts(text) if all(map(_is_there, pair))), None)
    if sides is not None and not leave_one_out:
        return sides
    if sides is not None:
        raise ValueError(f"{text}: --leave-one-out takes BANK alone: leave out {sides[1]}, or the option")
    missing = [part for pair in list(_cuts(text))[:1] for part in pair if not _is_there(part)]
    if missing and not leave_one_out:
        raise ValueError(f"{text}: is no folder of results, nor BANK:QUERIES: there is no {' and no '.join(missing)}")
    raise ValueError(
        f"{text}: is no folder of results: name one that `eval --out` has written, or features as BANK:QUERIES, or "
        "with --leave-one-out as BANK"
    )


def _is_results(text: str) -> bool:
    return (Path(text) / "results.jsonl").is_file()


def _cuts(text: str) -> Iterator[tuple[str, str]]:
    """Yield all ways to read BANK:QUERIES, for paths and URLs may hold colons too."""
    for colon in re.finditer(":(?!//)", text):
        yield text[: colon.start()], text[colon.end() :]


def _is_there(text: str) -> bool:
    """Tell whether a text can name features: a path that exists, or a URL, which is not asked for."""
    return re.match(r"[a-zA-Z][\w+.-]+://", text) is not None or (text != "" and Path(text).exists())


def _evaluated(given: argparse.Namespace, files: tuple[str, str | None], name: str, *, first: bool) -> "EvalReport":
    """Evaluate a run's features as `eval` would under the same options; its neighbours are kept."""
    parser = Parser()
    eval_arguments.add_arguments(parser)
    options = vars(parser.parse_args([])) | {x: y for x, y in vars(given).items() if x not in ("out", "seed")}
    options |= dict(zip(("bank", "queries"), [file and location(file) for file in files], strict=True))
    report = eval_command.evaluate_files(argparse.Namespace(**options | {"save_neighbors": True}), first=first)
    for warning in report.warnings if first else ():
        _warn(f"{name}: {warning}")
    return report


def _warn(what: str) -> None:
    print(f"faiss-knn: warning: {what}", file=sys.stderr)
