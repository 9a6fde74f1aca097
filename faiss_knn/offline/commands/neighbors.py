"""`faiss-knn neighbors`: the exact lists of neighbours, in a file that other programs read."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from faiss_knn.offline.commands.arguments import DISTANCES, device_named, positive

if TYPE_CHECKING:
    from faiss_knn.offline.lazy_rows import RowSource
    from faiss_knn.offline.neighbor_files import NeighborLists

# torch and the readers are imported when there is something to search, so that --help and bad usage answer at once.

EPILOG = """\
Without QUERIES each row's neighbours among the others are found. The ending of --out says how they are written:
  .npz        indices, distances, tied, distance_metric
  .ibin       ids, with the distances in a .fbin of the same name (x.neighbors.ibin: x.distances.fbin, as cuVS has it)
  .bin        ground truth of the Big-ANN benchmarks: ids, then distances
  .h5 .hdf5   that of ann-benchmarks: train, test, neighbors, distances
  .parquet    query, neighbors, distances, tied
  .npz with --graph: a SciPy sparse matrix (scipy.sparse.load_npz)
`tied` marks queries whose last neighbour is as far as a row that is not in the list. Equal distances are in the order
of the rows.

A run that is stopped goes on, when it is started again, after the last block that it searched: what it found until then
is in FILE.parts. Under torchrun each process searches a part of FEATURES.

examples:
  faiss-knn neighbors bank.npy queries.npy --k 100 --distance euclidean --out gt.ibin
  faiss-knn neighbors features.parquet --k 15 --graph distances --symmetric --out graph.npz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments."""
    add_data(parser, default="cosine")
    parser.add_argument("--k", type=positive, default=10, help="neighbours of each query (default 10)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where they are written; replaced")
    parser.add_argument(
        "--graph", choices=["distances", "connectivities"], help="write a sparse matrix of these (.npz)"
    )
    parser.add_argument("--symmetric", action="store_true", help="of the graph: each neighbour both ways")
    parser.add_argument(
        "--include-self", action="store_true", help="without QUERIES: let each row be a neighbour of itself"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto (default): cuda if there is one")


def add_data(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add what `verify` has too: the features, how they are read, and the distance, `default` if none is given."""
    parser.add_argument(
        "features", metavar="FEATURES", help="file, folder of files, or URL of the rows that are searched"
    )
    parser.add_argument("queries", nargs="?", metavar="QUERIES", help="likewise, of the queries; none: FEATURES itself")
    parser.add_argument(
        "--distance", choices=DISTANCES, default=default,
        help=f"default {default or 'what NEIGHBORS says, or else cosine'}; dot: minus the product",
    )  # fmt: skip
    parser.add_argument(
        "--features-key", metavar="NAME", help="array or column of the features, in FEATURES and QUERIES"
    )
    parser.add_argument(
        "--allow-partial", action="store_true", help="read what an extraction that was cut off has saved so far"
    )


def check_combination(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End the program where the arguments do not go together."""
    if given.include_self and given.queries is not None:
        parser.error("--include-self is for a bank's own rows: leave QUERIES out")
    if given.symmetric and given.graph is None:
        parser.error("--symmetric is of a --graph: say which, distances or connectivities")
    if given.symmetric and given.queries is not None:
        parser.error("--symmetric is of a bank's own rows: leave QUERIES out")


def pieces_folder(out: Path) -> Path:
    """Name the folder that holds what was found so far."""
    return out.with_name(out.name + ".parts")


def run(given: argparse.Namespace, *, first: bool) -> int:
    """Find the lists, by all processes, and write them."""
    from faiss_knn.distributed import all_or_none
    from faiss_knn.offline.neighbor_files import NeighborLists, check_format, write_neighbors
    from faiss_knn.offline.resumable_neighbors import forget_pieces, search_resumably

    kept = pieces_folder(given.out)
    with all_or_none():
        check_format(given.out, given.graph, given.symmetric, given.queries is None)
        bank, queries = read_sides(given)
    (distances, indices), tied = search_resumably(
        bank,
        queries,
        given.k,
        distance_metric=given.distance,
        exclude_self=queries is None and not given.include_self,
        folder=kept,
        device=device_named(given.device),
        progress=None if first else False,
    )
    with all_or_none():
        if first:
            lists = NeighborLists(
                indices.cpu().numpy(),
                distances.cpu().numpy(),
                tied.cpu().numpy(),
                given.distance,
                bank,
                bank if queries is None else queries,
                is_own=queries is None,
            )
            files = write_neighbors(given.out, lists, given.graph, symmetric=given.symmetric)
            forget_pieces(kept)
            _show(lists, files)
    return 0


def read_sides(given: argparse.Namespace) -> "tuple[RowSource, RowSource | None]":
    """Open FEATURES and QUERIES, no labels."""
    from faiss_knn.offline.features import open_features

    options = {"features_key": given.features_key, "allow_partial": given.allow_partial}
    bank = open_features(given.features, "bank", **options)
    return bank, None if given.queries is None else open_features(given.queries, "queries", **options)


def _show(lists: "NeighborLists", files: list[Path]) -> None:
    (queries, k), (rows, dim) = lists.indices.shape, lists.bank.shape
    print(f"{queries:,} lists of {k} neighbours among {rows:,} rows of {dim} numbers, {lists.distance_metric}")
    print(f"{int(lists.tied.sum()):,} of them end in a tie with rows beyond")
    print(f"written to {' and '.join(map(str, files))}")
