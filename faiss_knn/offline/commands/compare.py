"""`faiss-knn compare`: tell differences between runs from chance."""

import argparse
import sys
from pathlib import Path

from faiss_knn.offline.commands.arguments import count, inner_share

EPILOG = """\
Runs are folders that `faiss-knn eval --out` has written, of the same queries with the same labels; models, banks and
features may differ. Every setting (index, k, temperature, weighting, ...) that all runs have is compared.

example:
  faiss-knn eval old/bank.npz old/queries.npz --out old/results
  faiss-knn eval new/bank.npz new/queries.npz --out new/results
  faiss-knn compare old/results new/results --out comparison

A difference is separable if McNemar's exact p, Holm-corrected over the table, is at most 1 - confidence. The interval
is that of a paired bootstrap over the queries, in points. Where a difference is not separable, it is said about how
many queries would do. Runs over the same bank rows that were made with --save-neighbors are also compared by how many
neighbours they have in common, against chance.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of results, two or more")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="what to call the runs (default: their folders)")
    parser.add_argument(
        "--confidence", type=inner_share, default=0.95, metavar="P", help="of tests and intervals (default 0.95)"
    )
    parser.add_argument("--seed", type=count, default=0, help="of the bootstrap (default 0)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write compare.jsonl, .csv, .md, .html, by class, and a plot"
    )


def check_combination(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End the program where the arguments do not go together."""
    if len(given.runs) < 2:
        parser.error("compare needs two runs or more: RUN_A RUN_B")
    if given.names is not None and len(given.names) != len(given.runs):
        parser.error(f"--names must name each of the {len(given.runs)} runs, got {len(given.names)}")


def run(given: argparse.Namespace, *, first: bool) -> int:
    """Run the command.

    Args:
        given: Its arguments.
        first: Whether this process does it: one of each group does.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If the runs cannot be compared.
    """
    from faiss_knn.offline.compare import compare

    if not first:
        return 0
    comparison = compare(*given.runs, names=given.names, confidence=given.confidence, seed=given.seed)
    for note in comparison.notes:
        print(f"faiss-knn: warning: {note}", file=sys.stderr)
    print(comparison)
    if given.out is not None:
        comparison.save(given.out)
        print(f"\nwritten to {given.out}: compare.html")
    return 0
