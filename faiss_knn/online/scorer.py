"""Scorer: a k-NN score through training steps and validations, whatever loop drives it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from faiss_knn.online.bank_rows import BankRows
from faiss_knn.online.batch import find_rows, flat_rows
from faiss_knn.online.diagnostics import Diagnostics
from faiss_knn.online.evaluation import Evaluation, Plan
from faiss_knn.online.options import VIEW_ALIGNMENT, OnlineOptions
from faiss_knn.online.ring import QueueStorage
from faiss_knn.online.run_memory import RunMemory
from faiss_knn.online.unique_samples import check_sample_ids
from faiss_knn.search.inputs import named_as_index


class Scorer:
    """Check what training steps give, and score one validation after another, of one or several keys of features.

    Each part of the options (`OnlineOptions.parts`) has an evaluation of its own; they share the rows that are stored.

    Args:
        options: What is scored, and how.
        stored: Where the rows of training are kept, by key; None where a dataloader fills the bank.
        memories: What earlier validations left to each part; None: nothing yet.

    Attributes:
        memories: What validations leave to each other, by part.
        stored: As given.
    """

    def __init__(
        self,
        options: OnlineOptions,
        stored: Mapping[str, QueueStorage] | None,
        memories: Sequence[RunMemory] | None = None,
    ) -> None:
        self._options, self._parts = options, options.parts
        self.memories = list(memories or [RunMemory(part.new_index()) for part in self._parts])
        self.stored = stored
        self._evaluations: list[Evaluation] = []
        self._is_tried = False

    @property
    def memory(self) -> RunMemory:
        """What is warned of once of the score as a whole."""
        return self.memories[0]

    @property
    def has_rows(self) -> bool:
        """Whether any row of training is kept."""
        return any(len(rows.ring) for rows in (self.stored or {}).values())

    @property
    def is_scoring(self) -> bool:
        """Whether a validation is under way."""
        return bool(self._evaluations)

    def check_step(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """Find what is wrong with a training step now, not after an epoch of training.

        Returns:
            The rows that the step gives, by key.

        Raises:
            ValueError: For tensors that are missing, do not fit together, or that no validation could score.
        """
        rows_by_key: dict[str, Tensor] = {}
        for part, memory in zip(self._parts, self.memories, strict=True):
            rows = find_rows(part, outputs, batch)
            if part.id is not None:
                check_sample_ids(rows[part.id], f"'{part.id}'")
            if not self._is_tried:
                with named_as_index():
                    memory.index.check_spec(flat_rows(rows[part.feature_key]).shape[1])
                part.check_first_step(rows[part.label_key])
            rows_by_key |= rows
        if not self._is_tried and self._options.has_views:
            self._check_views(rows_by_key)
        self._is_tried = True
        return rows_by_key

    def _check_views(self, rows: Mapping[str, Tensor]) -> None:
        widths = {part.feature_key: flat_rows(rows[part.feature_key]).shape[1] for part in self._parts}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"{self._options.title}: {VIEW_ALIGNMENT} needs two inputs of one width, got {widths}: leave it out of "
                "`diagnostics`"
            )

    def start(self, plan: Plan, device: torch.device) -> None:
        """Begin a validation; all ranks must call it together.

        Args:
            plan: What it will read.
            device: Where metrics keep their states.
        """
        self._evaluations = [
            Evaluation(part, memory, plan, device, self.stored)
            for part, memory in zip(self._parts, self.memories, strict=True)
        ]

    def drop(self) -> None:
        """Forget the validation under way."""
        self._evaluations = []

    @contextmanager
    def defer_error(self) -> Iterator[None]:
        """Keep an error of one of several ranks for the end of the validation under way."""
        with self._evaluations[0].defer_error():
            yield

    def add(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[Tensor | None]:
        """Score a validation batch, where a validation is under way: by part, see `Evaluation.add`."""
        return [evaluation.add(outputs, batch, batch_idx, dataloader_idx) for evaluation in self._evaluations]

    def finish(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """End the validation under way; all ranks must call it together: see `Evaluation.finish`.

        Args:
            stage: What the keys begin with.
        """
        evaluations, self._evaluations = self._evaluations, []
        # Ranks with more batches take the parts in turn, so those that serve them must too.
        while True in [evaluation.serve_other_ranks() for evaluation in evaluations]:
            pass
        numbers: dict[str, Tensor] = {}
        others: dict[str, Any] = {}
        for part, evaluation in zip(self._parts, evaluations, strict=True):
            values, rest = evaluation.finish(f"{stage}/{part.name}")
            numbers, others = numbers | values, others | rest
        if self._options.has_views:
            numbers |= self._view_alignment(f"{stage}/{self._options.name}", evaluations)
        return numbers, others

    def _view_alignment(self, prefix: str, evaluations: Sequence[Evaluation]) -> dict[str, Tensor]:
        """Compare the two inputs of the bank's rows."""
        stored = {key: rows for evaluation in evaluations for key, rows in evaluation.stored.items()}
        views = BankRows(self._options, self.memory, stored).read_views()
        value = Diagnostics(self._options, self.memory).of_views(views)
        return {} if math.isnan(value) else {f"{prefix}_{VIEW_ALIGNMENT}": torch.tensor(value)}
