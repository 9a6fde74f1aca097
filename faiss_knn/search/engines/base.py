"""The contract between `KNNIndex` and what searches for it: what every engine has, does and promises."""

from typing import Any, Protocol

import torch
from torch import Tensor


class TooFewRowsError(ValueError):
    """A bank has too few rows for an index to be trained on."""


class Engine(Protocol):
    """What finds the nearest rows of one bank.

    An engine is made over rows that were checked, and holds them until it is released. `make_engine` chooses and makes
    one; the one that was released last is handed to it, so that the next may take over what was learned.

    Several threads may search an engine and read its attributes at once. While one retunes or releases it, no other may
    use it. Thread counts of PyTorch and FAISS are left as they were found. The caller switches autocast, gradients and
    low-precision products off (`full_precision`) around everything that computes.
    """

    @property
    def exact(self) -> bool:
        """Whether it finds the neighbours of a float64 brute force, ties by index, without exception."""

    @property
    def spec(self) -> str:
        """What it is: "flat", "fast", or a FAISS factory string."""

    @property
    def backend(self) -> str:
        """Whose code finds the candidates: "torch" or "faiss"."""

    @property
    def device(self) -> torch.device:
        """Where it looks for them; distances are always measured where the rows are."""

    @property
    def nprobe(self) -> int | None:
        """Inverted lists that a search visits; None without them."""

    @property
    def recall(self) -> float | None:
        """Share of the exact neighbours that it finds: 1.0 if exact, None if it was not measured."""

    @property
    def recall_of(self) -> str | None:
        """What the recall was measured on; None where nothing was."""

    @property
    def uncertified(self) -> int:
        """How many queries so far took a second, exhaustive pass to be exact; 0 where there is none."""

    @property
    def bytes(self) -> int:
        """Size of the rows and of what was made of them."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Further choices that `IndexStats` shows, as plain values."""

    @property
    def tuned_k(self) -> int | None:
        """The k that it was tuned for; None if there is nothing to tune."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the k nearest rows of each query.

        Args:
            queries: (B, d) as `as_queries` returns them, on the rows' device.
            k: At most N.

        Returns:
            (B, k) float64 distances of the stored rows, measured from differences, and (B, k) int64 row numbers.
            Distances ascend, equal ones by row number; what was not found is (inf, -1), last, and nothing else is inf.
            A query gets the same bits in any batch if the engine is exact.

        Raises:
            ValueError: If k is more than the engine can do.
            torch.cuda.OutOfMemoryError: If a GPU's memory does not suffice; smaller batches may be tried after that.
        """

    def retune(self, k: int, known_queries: Tensor | None = None) -> None:
        """Meet the recall it was made for at another k; only where `tuned_k` is not None.

        Args:
            k: The k to meet it at.
            known_queries: (n, d) queries to measure on; None: those it was made with, or rows of the bank.
        """

    def release(self) -> None:
        """Drop the rows and their memory, and keep what was learned from them; nothing can be searched after that."""
