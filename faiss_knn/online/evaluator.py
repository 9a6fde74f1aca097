"""OnlineEvaluator: the score of `OnlineKNN` in any training loop, without Lightning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from loguru import logger
from torch import Tensor

from faiss_knn.distributed import all_or_none, rank_and_size
from faiss_knn.online.checkpoint_rows import put_back, rows_of_all_ranks
from faiss_knn.online.evaluation import Plan
from faiss_knn.online.failures import kept, settle
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.ring import QueueStorage, RingBuffer, align, shaped_rows
from faiss_knn.online.scorer import Scorer
from faiss_knn.search.inputs import as_integer, shown


@dataclass(eq=False, repr=False)  # for an __init__ that errors call OnlineEvaluator's
class OnlineEvaluator(OnlineOptions):
    """Score features by their nearest neighbours while a model trains, in a training loop of one's own.

    `observe` each training step; for a validation `start`, `score` each of its batches, `finish`. It keeps what
    `OnlineKNN` keeps and computes the same numbers from the same rows, to the last bit, and needs no Lightning.

    Several ranks (`torch.distributed`): all of them make the same `start`, `finish`, `state_dict` calls; `observe` and
    `score` as often as each has batches (under gather="shard" `score` searches with all ranks, as often as `start` was
    told). What goes wrong on one rank while training is logged there at once and raised on all at the next of those
    calls, so that none waits for ever. Samples that a sampler repeats to even out the ranks count once: known by the
    `DistributedSampler` of a dataloader that `start` is given, or by `id`.

    Args:
        *options: Those of `OnlineKNN`, described there, in the same order.
        **named_options: Those of `OnlineKNN` that are given by name. Other than there:
            bank_device: None: the device of the first features that are observed.
            bank_dataloader_idx: 0: the batches that are scored under that number fill the bank, before the others;
                `observe` then keeps nothing.
            every_n_epochs: Every so many calls of `start` a validation is scored; in between `score` hands out zeros
                and `finish` the last values.
            gallery: The pictures are in `results`, as a list of `faiss_knn.online.gallery.Picture` by
                "eval/{name}_gallery": there is no logger to hand them to. `score` is then given the images too.
            strict: Must be False: whose weights made the rows is not known here.

    Attributes:
        results: What metrics computed in the last validation that is no number (matrices, curves), by key.

    Raises:
        ValueError: For each bad argument, naming it.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> knn = OnlineEvaluator("knn", "embedding", "label", 100, MulticlassAccuracy(2), k=1)
        >>> knn.observe(embedding=torch.tensor([[0.0], [5.0]]), label=torch.tensor([0, 1]))
        >>> knn.start()
        >>> knn.score(embedding=torch.tensor([[4.5]]), label=torch.tensor([1])).argmax(1)
        tensor([1])
        >>> knn.finish()
        {'eval/knn_MulticlassAccuracy': 1.0}
    """

    kind: ClassVar[str] = "OnlineEvaluator"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strict:
            raise ValueError(
                "strict=True needs the module whose weights made the rows, which OnlineEvaluator is not given: leave "
                "it out, or use OnlineKNN"
            )
        self.results: dict[str, Any] = {}
        self._stored = None if self.bank_dataloader_idx is not None else self._new_queues()
        self._scorer = Scorer(self, self._stored)
        self._batches: list[int] | None = None  # how many were scored of each dataloader; None outside of validation
        self._starts = 0
        self._last: dict[str, float] = {}

    def observe(self, /, **tensors: Tensor) -> None:
        """Keep the rows of a training step; the oldest make room. No rank waits for another.

        Args:
            **tensors: Those that `input`, `target` and `id` name, a row of each per sample; others are passed over. In
                any dtype and on any device: rows are detached, and kept on the device of the features.

        Raises:
            ValueError: For tensors that are missing or do not fit together or to earlier ones. Of several ranks, one
                that fails keeps it for the next `start`, `finish` or `state_dict`.
        """
        if self._stored is None:
            return
        with kept(self):
            rows = self._scorer.check_step(None, self._on_one_device(tensors, "observe"))
            self._take_in(self._stored, rows)

    def start(self, dataloaders: Any = None) -> None:
        """Begin a validation: build the index over the rows observed so far. All ranks must call it together.

        A validation that was begun before and not finished is dropped, with a warning.

        Args:
            dataloaders: The one that will be scored, or a list or tuple of several, whose number `score` is then told.
                From them the length of the search is known (needed by gather="shard") and what a `DistributedSampler`
                repeats. None: one, or the bank's and one, of which nothing is known.

        Raises:
            ValueError: For dataloaders that do not go with the options; or what went wrong in training, on any rank.
        """
        with all_or_none():
            settle(self)
            plan = self._plan(dataloaders)
            if self._batches is not None:
                logger.warning(f"{self.title}: start() without finish(): the validation begun before is dropped")
            self._scorer.drop()
            for rows in self._align().values():
                rows.start_validation()
            self._starts += 1
            if self._starts % self.every_n_epochs == 0:
                self._scorer.start(plan, self._device())
            self._batches = [0] * len(plan.batches)

    def score(self, dataloader_idx: int = 0, /, **tensors: Tensor) -> Tensor | dict[str, Tensor] | None:
        """Score a validation batch, and count it in the metrics.

        Args:
            dataloader_idx: Number of the dataloader it came from, where `start` was given several. One that fills the
                bank comes before the others.
            **tensors: As in `observe`.

        Returns:
            (B, C) float32 raw scores, zeros where nothing voted: rows without a distance, and every row as long as the
            bank is empty (C is 0 then, if neither num_classes nor the metrics say it). None under search="epoch".
            Of several inputs or targets a dict, by "{input}", "{target}" or "{input}_{target}". Under metrics of
            regression the neighbours' means, like the targets in shape, NaN where there are none.

        Raises:
            ValueError: For tensors that are missing or do not fit together or to the bank. Of several ranks, one that
                fails keeps it for `finish`, and hands out zeros.
            RuntimeError: Outside of a validation.
        """
        number, batches = as_integer(dataloader_idx, "`dataloader_idx`"), self._validation("score")
        if not 0 <= number < len(batches):
            raise ValueError(
                f"`dataloader_idx` must be one of the {len(batches)} dataloaders that start() was told of, got "
                f"{number}: give start() a list of them"
            )
        batch: Mapping[str, Tensor] = {}
        if self._scorer.is_scoring:
            with self._scorer.defer_error():
                batch = self._on_one_device(tensors, "score")
        by_part = self._scorer.add(None, MappingProxyType(batch), batches[number], number)
        batches[number] += 1
        if self.search == "epoch":
            return None
        scores = {
            part.label: self._without_votes(tensors, place) if predictions is None else predictions
            for place, (part, predictions) in enumerate(zip_longest(self.parts, by_part))
        }
        return scores if self.has_several else scores[""]

    def finish(self, stage: str = "eval") -> dict[str, float]:
        """End the validation, and return the scores. All ranks must call it together, and get the same.

        Args:
            stage: What the keys begin with.

        Returns:
            Value by key, as `OnlineKNN` logs it: "{stage}/{name}_{metric}", for several k
            "{stage}/{name}_k{K}_{metric}", for several scored dataloaders with the suffix "/dataloader_idx_{i}". Empty
            as long as the bank is.

        Raises:
            ValueError: What went wrong on any rank.
            RuntimeError: Outside of a validation.
        """
        with all_or_none():
            self._validation("finish")
            self._batches = None
            if self._scorer.is_scoring:
                values, self.results = self._scorer.finish(stage)
                self._last = {key: float(value) for key, value in values.items()}
            for rows in (self._stored or {}).values():
                rows.end_validation()
        return dict(self._last)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold: the rows of the queues, on the CPU. All ranks must call it together.

        Returns:
            On rank 0, which is to save it, the rows of all ranks; on the others their own alone.

        Raises:
            ValueError: What went wrong in training, on any rank.
        """
        with all_or_none():
            settle(self)
            saved = {key: rows_of_all_ranks(stored.ring) for key, stored in self._align().items()}
        rank, size = rank_and_size()
        queues = {
            key: {"rows": [self._own(key)] if rows is None else rows, "totals": totals}
            for key, (rows, totals) in saved.items()
        }
        return {"queues": queues, "rank": rank, "ranks": size}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the rows of a checkpoint, of whatever queue_length and number of ranks.

        As many ranks as before get their own rows back; other numbers get all rows dealt out evenly. Of more rows than
        queue_length the newest are kept.

        Args:
            state_dict: What `state_dict` returned on rank 0; or, on as many ranks, on this one.

        Raises:
            ValueError: If it is something else, holds other keys, or is of another rank alone.
        """
        saved = self._checked_state(state_dict)
        rank, size = rank_and_size()
        for key, stored in (self._stored or {}).items():
            rows, totals = saved[key]["rows"], saved[key]["totals"]
            if len(rows) < len(totals):  # of one rank alone, which is this one
                rows = [rows[0] if number == rank else rows[0][:0] for number in range(size)]
            put_back(stored.ring, rows, totals, self.title)
        self._align()

    def _new_queues(self) -> dict[str, QueueStorage]:
        forms = {key: self.queue_form(key) for key in self.keys}
        return {
            key: QueueStorage(RingBuffer(self.queue_length, *form, self.bank_device)) for key, form in forms.items()
        }

    def _on_one_device(self, tensors: Mapping[str, Any], call: str) -> dict[str, Any]:
        """Return the tensors that count, on the device of the features."""
        keys = self.keys
        if missing := [key for key in keys if key not in tensors]:
            raise ValueError(
                f"{self.title}: {call}() needs the tensors {', '.join(keys)} by name, got "
                f"{', '.join(tensors) or 'none'}: give {', '.join(f'{key}=…' for key in missing)} too"
            )
        device = getattr(tensors[self.feature_key], "device", None)
        if self.gallery is not None and self.gallery.key in tensors:
            keys = [*keys, self.gallery.key]
        named = {key: tensors[key] for key in keys}
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in named.items()}

    def _take_in(self, stored: Mapping[str, QueueStorage], rows: Mapping[str, Tensor]) -> None:
        try:
            for key, values in rows.items():
                ring = stored[key].ring
                device = values.device if self.bank_device is None else torch.device(self.bank_device)
                ring.move_to(device, pin_memory=values.is_cuda and device.type == "cpu")
                ring.append(shaped_rows(values, self.queue_form(key)[0]))
        except ValueError as error:
            self._align()
            raise ValueError(f"{self.title}: '{key}': {error}") from error

    def _align(self) -> dict[str, QueueStorage]:
        """Let the queues end with the same sample, wherever a step was interrupted."""
        stored = self._stored or {}
        align([rows.ring for rows in stored.values()])
        return stored

    def _own(self, key: str) -> Tensor:
        assert self._stored is not None
        return self._stored[key].ring.latest().cpu()

    def _device(self) -> torch.device:
        stored = self._stored or {}
        device = stored[self.feature_key].ring.device if stored else self.bank_device
        return torch.device(device or "cpu")

    def _plan(self, dataloaders: Any) -> Plan:
        least = 1 if self.bank_dataloader_idx is None else self.bank_dataloader_idx + 2
        loaders = list(dataloaders) if isinstance(dataloaders, Sequence) else [dataloaders]
        if dataloaders is None:
            loaders = [None] * least
        if len(loaders) < least:
            raise ValueError(
                f"`dataloaders` must be the bank's and those that are scored after it, got {len(loaders)} under "
                f"bank_dataloader_idx={self.bank_dataloader_idx}: give start([bank_loader, scored_loader])"
            )
        return Plan(loaders, [_length(loader) for loader in loaders])

    def _validation(self, call: str) -> list[int]:
        """Return how many batches of each dataloader the validation under way has had."""
        if self._batches is None:
            raise RuntimeError(f"{self.title}: {call}() outside of a validation: call start() first")
        return self._batches

    def _without_votes(self, tensors: Mapping[str, Any], place: int) -> Tensor:
        """Return zeros for the part at a place."""
        part = self.parts[place]
        features, target = tensors.get(part.feature_key), tensors.get(part.label_key)
        if part.is_regression and isinstance(target, Tensor):
            return torch.full_like(target, torch.nan, dtype=torch.float32)
        rows = len(features) if isinstance(features, Tensor) and features.ndim else 0
        width = max(part.known_width or 0, self._scorer.memories[place].width)
        return torch.zeros(rows, width, dtype=torch.float32, device=getattr(features, "device", "cpu"))

    def _checked_state(self, state_dict: Any) -> Mapping[str, Any]:
        if not isinstance(state_dict, Mapping) or not {"queues", "rank", "ranks"} <= set(state_dict):
            raise ValueError(f"`state_dict` must be what state_dict() returned, got {shown(state_dict)}")
        saved: Mapping[str, Any] = state_dict["queues"]
        if missing := [key for key in self._stored or {} if key not in saved]:
            raise ValueError(
                f"`state_dict` must hold the rows of {', '.join(self.keys)}, got {', '.join(saved) or 'none'}: "
                f"{', '.join(missing)} is missing, so name the tensors as they were when it was saved"
            )
        writer, size = state_dict["rank"], state_dict["ranks"]
        if writer not in (0, rank_and_size()[0]) or (writer and size != rank_and_size()[1]):
            raise ValueError(
                f"`state_dict` must be that of rank 0, which holds the rows of all {size} ranks, got that of rank "
                f"{writer}: save and load what rank 0 returned"
            )
        return saved


def _length(loader: Any) -> float:
    """Count the batches of a dataloader; inf where it does not say."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return float("inf")
