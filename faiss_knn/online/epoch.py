"""What OnlineKNN holds for a run, and for a validation epoch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from loguru import logger
from torch import Tensor

from faiss_knn.classify.bank import FeatureBank
from faiss_knn.classify.sharded import ShardedBank
from faiss_knn.distributed import is_final, rank_and_size
from faiss_knn.online.metrics import MetricTable
from faiss_knn.online.queue import OnlineQueue, QueueStorage
from faiss_knn.online.unique_samples import UniqueSamples
from faiss_knn.search.index import KNNIndex


@dataclass
class Run:
    """What one callback holds for one call of fit, validate or test.

    Attributes:
        queues: By key.
        index: Kept from epoch to epoch.
        epoch: The validation epoch under way.
        warned: What was warned of.
        tried: Whether the index is known to work for rows of this width.
        weights: Some of the weights when a validation began, until they are found to be swapped.
        width: The most classes that a validation has had.
        validations: How many there were in this fit.
        last: What was logged last.
    """

    queues: dict[str, OnlineQueue]
    index: KNNIndex
    epoch: "Epoch | None" = None
    warned: set[str] = field(default_factory=set)
    tried: bool = False
    weights: bytes | None = None
    width: int = 0
    validations: int = 0
    last: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Epoch:
    """What it holds for one validation epoch; all ranks go through the same steps of it.

    Attributes:
        index: What searches: the run's, or an exact one while there are too few rows for that.
        table: The metrics of the loaders that are scored.
        loaders: The dataloaders, in order.
        most_searches: How many batches the rank with the most of them scores; 0 unless they are searched together.
        queries: About how many rows will be scored; None if the dataloaders do not say.
        rows: What the bank's dataloader gave so far, by key, where one fills the bank.
        once: Lets each sample id through once, by loader.
        bank: None until it is built, and after that if there are no rows.
        built: Whether that was tried.
        searches: How many batches this rank has searched together with the others.
        skipped: Rows left out on this rank.
        error: What went wrong on this rank and waits for the end of the epoch.
        features: The rows that this rank has indexed.
        sample: Queries drawn for measuring the recall.
        seen: How many queries they were drawn from.
        width: Of the scores that the metrics get: the largest label so far, of bank or batches, + 1.
    """

    index: KNNIndex
    table: MetricTable
    loaders: list[Any]
    most_searches: int
    queries: int | None
    rows: dict[str, QueueStorage]
    once: dict[int, UniqueSamples]
    bank: FeatureBank | ShardedBank | None = None
    built: bool = False
    searches: int = 0
    skipped: int = 0
    error: Exception | None = None
    width: int = 0
    features: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list)
    seen: int = 0


@contextmanager
def held_back(epoch: Epoch) -> Iterator[None]:
    """Keep an error of one of several ranks for the end of the epoch, where all ranks raise it.

    Raised at once it would leave the others waiting in their next collective. Until then this rank goes along. What
    all ranks have heard of already, in a search that they make together, or what parted them, ends the epoch at once.
    """
    try:
        yield
    except Exception as error:
        if rank_and_size()[1] == 1 or is_final(error):
            raise
        logger.error(f"rank {rank_and_size()[0]} stops scoring, and all ranks stop when they meet next: {error}")
        epoch.error = epoch.error or error


def batch_counts(trainer: Any) -> list[float]:
    """How many batches of each dataloader this rank will see; of those read at once, one number."""
    if trainer.sanity_checking:
        counts = list(trainer.num_sanity_val_batches)
    else:
        counts = list(trainer.num_test_batches if trainer.testing else trainer.num_val_batches)
    return counts[:1] if reads_at_once(trainer) else counts


def reads_at_once(trainer: Any) -> bool:
    """Tell whether several dataloaders give their batches together, all under number 0."""
    loop = trainer.test_loop if trainer.testing else trainer.validate_loop
    if trainer.state.fn == TrainerFn.FITTING:
        loop = trainer.fit_loop.epoch_loop.val_loop
    combined = getattr(loop, "_combined_loader", None)
    return getattr(combined, "_mode", "sequential") != "sequential"


def length_of(loader: Any) -> int | None:
    """How many batches a dataloader has; None where it does not say."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def dataloaders(trainer: Any, count: int) -> list[Any]:
    """The dataloaders by number; None where several are read at once under one number."""
    found = CombinedLoader(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders).flattened
    return found if len(found) == count else [None] * count


def query_count(loaders: Sequence[Any], batches: Sequence[float]) -> int | None:
    """How many rows the scored `loaders` will give in so many batches each; None where that is not known."""
    rows = 0.0
    for loader, count in zip(loaders, batches, strict=True):
        size = getattr(loader, "batch_size", None)
        rows += size * count if isinstance(size, int) else float("inf")
    return None if rows == float("inf") else int(rows)
