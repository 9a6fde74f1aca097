"""`faiss-knn verify`: how right the neighbours are that any program found."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from faiss_knn.offline.commands.arguments import share
from faiss_knn.offline.commands.neighbors import add_data, read_sides

EPILOG = """\
NEIGHBORS: .npz or .h5 (indices or neighbors; distances), .npy of ids, .ibin with a .fbin beside it, .bin (Big-ANN),
.ivecs, .parquet, or a SciPy sparse matrix (.npz). Lists may be in any order; -1 stands for none.

Recall by distance takes a row that is as near as the last exact neighbour for right, recall by id only the exact ones,
ties in the order of the rows. Distances are of the kind that NEIGHBORS says (.npz, .h5, .parquet) unless --distance
names another. Without QUERIES a row is not expected in its own list, unless most lists hold their own.

example:
  faiss-knn verify found.npy bank.npy queries.npy --distance euclidean --at-least 0.99
"""
_BELOW = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments."""
    parser.add_argument("neighbors", type=Path, metavar="NEIGHBORS", help="file of the lists to be judged")
    add_data(parser, default=None)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument("--at-least", type=share, metavar="R", help="exit with 3 if the recall by distance is less")


def run(given: argparse.Namespace, *, first: bool) -> int:
    """Judge the lists; the exit status is 3 where they are not as right as they were to be."""
    from faiss_knn.offline.neighbor_files import read_neighbors, stored_metric
    from faiss_knn.offline.verify import verify_neighbors

    if not first:
        return 0
    indices, distances = read_neighbors(given.neighbors)
    bank, queries = read_sides(given)
    metric = given.distance or stored_metric(given.neighbors) or "cosine"
    report = verify_neighbors(indices, bank, queries, distances=distances, distance_metric=metric, progress=None)
    if 2 * (report["wrong_distances"] or 0) > indices.size:
        print(f"faiss-knn: most distances are not those of --distance {metric}: is it another?", file=sys.stderr)
    print(json.dumps(report | {"distance_metric": metric}) if given.json else _text(report, metric))
    return _BELOW if given.at_least is not None and report["recall_distances"] < given.at_least else 0


def _text(report: dict[str, Any], distance: str) -> str:
    wrong = report["wrong_distances"]
    lines = [
        f"{report['queries']:,} lists, {report['k']} neighbours each of {report['rows']:,} rows, {distance}"
        + (", without the row itself" if report["excludes_self"] else ""),
        f"recall by distance  {report['recall_distances']:.6f}",
        f"recall by id        {report['recall_ids']:.6f}",
        f"ties at the end     {report['ties']:,} lists, of which more than one is right",
        f"wrong distances     {'none given' if wrong is None else f'{wrong:,}'}",
        f"rows named twice    {report['repeated']:,}",
        f"missing entries     {report['missing']:,}",
    ]
    if report["worst"]:
        worst = zip(report["worst"], report["worst_recalls"], strict=True)
        lines.append("worst queries       " + ", ".join(f"{query} ({recall:.3f})" for query, recall in worst))
    return "\n".join(lines)
