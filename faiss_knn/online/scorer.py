"""Scorer: a k-NN score through training steps and validations, whatever loop drives it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from faiss_knn.online.batch import find_rows, flat_rows
from faiss_knn.online.evaluation import Evaluation, Plan
from faiss_knn.online.memory import Memory
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.ring import QueueStorage
from faiss_knn.online.unique_samples import check_sample_ids


class Scorer:
    """Check what training steps give, and score one validation after another.

    Args:
        options: What is scored, and how.
        stored: Where the rows of training are kept, by key; None where a dataloader fills the bank.
        memory: What earlier validations left; None: nothing yet.

    Attributes:
        memory: What validations leave to each other.
        stored: As given.
    """

    def __init__(
        self, options: OnlineOptions, stored: Mapping[str, QueueStorage] | None, memory: Memory | None = None
    ) -> None:
        self.memory, self.stored = memory or Memory(options.new_index()), stored
        self._options = options
        self._evaluation: Evaluation | None = None
        self._is_tried = False

    @property
    def has_rows(self) -> bool:
        """Whether any row of training is kept."""
        return any(len(rows.ring) for rows in (self.stored or {}).values())

    @property
    def is_scoring(self) -> bool:
        """Whether a validation is under way."""
        return self._evaluation is not None

    def check_step(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """Find what is wrong with a training step now, not after an epoch of training.

        Returns:
            The rows that the step gives, by key.

        Raises:
            ValueError: For tensors that are missing, do not fit together, or that no validation could score.
        """
        options = self._options
        rows = find_rows(options, outputs, batch)
        if options.id is not None:
            check_sample_ids(rows[options.id], f"'{options.id}'")
        if not self._is_tried:
            self.memory.index.check_spec(flat_rows(rows[options.input]).shape[1])
            options.check_first_step(rows[options.target])
            self._is_tried = True
        return rows

    def start(self, plan: Plan, device: torch.device) -> None:
        """Begin a validation; all ranks must call it together.

        Args:
            plan: What it will read.
            device: Where metrics keep their states.
        """
        self._evaluation = Evaluation(self._options, self.memory, plan, device, self.stored)

    def drop(self) -> None:
        """Forget the validation under way."""
        self._evaluation = None

    @contextmanager
    def defer_error(self) -> Iterator[None]:
        """Keep an error of one of several ranks for the end of the validation under way."""
        assert self._evaluation is not None
        with self._evaluation.defer_error():
            yield

    def add(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor | None:
        """Score a validation batch, where a validation is under way: see `Evaluation.add`."""
        if self._evaluation is None:
            return None
        return self._evaluation.add(outputs, batch, batch_idx, dataloader_idx)

    def finish(self, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """End the validation under way; all ranks must call it together: see `Evaluation.finish`."""
        evaluation, self._evaluation = self._evaluation, None
        assert evaluation is not None
        return evaluation.finish(prefix)
