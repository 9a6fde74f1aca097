"""What one validation of a run leaves to the next."""

from dataclasses import dataclass, field
from typing import NamedTuple

from loguru import logger
from torch import Tensor

from faiss_knn.distributed import rank_and_size
from faiss_knn.search.index import KNNIndex


class LabelledFeatures(NamedTuple):
    """Rows of a bank: all that a rank indexes, or a sample of those of all ranks.

    Attributes:
        features: (n, d).
        labels: (n,) class ids or (n, C).
        ids: (n,) int64 sample ids on the CPU; None where they do not count or nobody asks for them.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor | None = None


@dataclass
class RunMemory:
    """What the validations of one run have in common.

    Attributes:
        index: Kept from one to the next, with what it learned.
        width: The most classes that one of them has had.
        warned: What was warned of.
        last_sample: Of the bank of the validation before, where its neighbours will be compared.
    """

    index: KNNIndex
    width: int = 0
    warned: set[str] = field(default_factory=set)
    last_sample: LabelledFeatures | None = None

    def of_next_run(self) -> "RunMemory":
        """Return what the next run gets: it warns anew."""
        return RunMemory(self.index, self.width)

    def warn_once(self, what: str, message: str) -> None:
        """Log a warning on rank zero, once for each `what`."""
        if what not in self.warned and rank_and_size()[0] == 0:
            logger.warning(message)
        self.warned.add(what)
