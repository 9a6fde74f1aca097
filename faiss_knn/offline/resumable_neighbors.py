"""A long search for neighbours that is resumed where it was stopped: what is found is on disk while it runs."""

import json
import os
import shutil
import zipfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from faiss_knn.distributed import all_or_none, rank_and_size
from faiss_knn.offline.lazy_rows import RowSource
from faiss_knn.offline.neighbors import as_reported, as_sides, is_tied
from faiss_knn.offline.search import SearchResult, merge_ranks, own_part
from faiss_knn.offline.streaming import Bank, find_nearest
from faiss_knn.search.engines.rerank import Neighbors, drop_self

_PLAN = "plan.json"
_SAMPLE = 3  # rows that tell data apart


class SearchedPieces:
    """A folder of pieces: of some queries each what was found so far, replaced at once after every block of the bank.

    Args:
        folder: Made if it is not there. Pieces in it of another search, as `plan` tells, are removed.
        plan: What the search is of.

    Attributes:
        is_begun: Whether it holds pieces of the same search.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        noted = json.dumps(plan, sort_keys=True)
        plan_file = folder / _PLAN
        if plan_file.is_file() and plan_file.read_text("utf-8", "replace") != noted:
            for path in folder.glob("queries-*.npz"):
                path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        plan_file.write_text(noted, encoding="utf-8")
        self.is_begun = any(folder.glob("queries-*.npz"))

    def load(self, first: int) -> tuple[int, Neighbors] | None:
        """Return up to which row the bank was searched for the queries from `first` on, and what was found there."""
        path = self._path(first)
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file) as piece:  # which leaves open what it opened and cannot read
                neighbors = Neighbors(torch.from_numpy(piece["distances"]), torch.from_numpy(piece["indices"]))
                return int(piece["searched"]), neighbors
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None  # a disk that was full, or a machine that fell over: it is searched again

    def save(self, first: int, searched: int, neighbors: Neighbors) -> None:
        """Keep what was found for the queries from `first` on, in the bank's rows up to `searched`."""
        path = self._path(first)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            distances, indices = (part.cpu().numpy() for part in neighbors)
            np.savez(file, searched=np.int64(searched), distances=distances, indices=indices)
        os.replace(partial, path)

    def _path(self, first: int) -> Path:
        return self.folder / f"queries-{first:010d}.npz"


def rows_fingerprint(rows: RowSource) -> str:
    """Tell data apart by its shape, its dtype and three of its rows."""
    digest = blake2b(str((tuple(rows.shape), str(rows.dtype))).encode(), digest_size=8)
    for row in np.unique(np.linspace(0, len(rows) - 1, _SAMPLE).astype(np.int64)).tolist():
        block = rows[row : row + 1]
        block = block.cpu().float().numpy() if isinstance(block, Tensor) else np.ascontiguousarray(block)
        digest.update(block.tobytes())
    return digest.hexdigest()


def search_resumably(
    bank: RowSource,
    queries: RowSource | None,
    k: int,
    *,
    distance_metric: str,
    exclude_self: bool,
    folder: Path,
    device: str | None = None,
    progress: bool | None = None,
) -> tuple[Neighbors, Tensor]:
    """Find neighbours as `exact_neighbors` does, in a way that outlives the process; all ranks call it together.

    Each rank searches its part of the bank, and all get the merged lists. Pieces stay in the folder until
    `forget_pieces`.

    Args:
        bank: (N, d).
        queries: (Q, d); None: the bank's own rows.
        k: At most as many as there are rows are found.
        distance_metric: As in `exact_neighbors`.
        exclude_self: Whether row i is left out of the list of query i.
        folder: Where what was found is kept.
        device: Where to search; None: where the bank is.
        progress: Show a bar; None: if stderr is a terminal.

    Returns:
        The neighbours, float32 distances, and (Q,) bool: whether a row after the last is as far as it.

    Raises:
        ValueError: On every rank, as `exact_neighbors`.
        OSError: On every rank, if the folder cannot be written.
    """
    rank, size = rank_and_size()
    neighbors: Neighbors | None = None
    with all_or_none():
        sides = as_sides(bank, queries, exclude_self)
        k = min(k, len(bank) - exclude_self)
        depth = min(k + 1 + exclude_self, len(bank))
        span = own_part(len(bank))
        plan = {
            "bank": rows_fingerprint(bank),
            "queries": None if queries is None else rows_fingerprint(queries),
            "distance_metric": distance_metric,
            "depth": depth,
            "rows": span,
        }
        keeper = SearchedPieces(folder if size == 1 else folder / f"rank-{rank}-of-{size}", plan)
        if keeper.is_begun and rank == 0:
            logger.info(f"{folder}: holds what an earlier run found: going on from there")
        if span[0] < span[1]:
            argument = "features" if queries is None else "queries"
            part = Bank(sides[0], distance_metric, span=span, device=device)
            neighbors = find_nearest(part, sides[1], depth, argument=argument, keeper=keeper, progress=progress)
    if size > 1 or neighbors is None:
        neighbors = Neighbors(*merge_ranks(_result(neighbors, len(sides[1])), depth))
    if exclude_self:
        neighbors = Neighbors(*drop_self(*neighbors, torch.arange(len(sides[1]), device=neighbors.indices.device)))
    neighbors = as_reported(neighbors, distance_metric)
    return neighbors.first(k), is_tied(neighbors, k)


def _result(neighbors: Neighbors | None, queries: int) -> SearchResult:
    """Return this rank's lists for merging; empty ones where it had no row."""
    nothing = torch.empty(queries, 0, dtype=torch.float64, device="cpu")
    return SearchResult(nothing, nothing.long(), {}) if neighbors is None else SearchResult(*neighbors, {})


def forget_pieces(folder: Path) -> None:
    """Remove the pieces, of all ranks, once the lists are written elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)
