"""OnlineKNN: a k-NN vote over the queue at every validation, logged as torchmetrics."""

from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from loguru import logger
from torch import Tensor
from torch.nn.functional import pad

from faiss_knn.classify.bank import FeatureBank
from faiss_knn.classify.labels import as_class_count, as_labels, is_soft, most_likely, one_hot_ids
from faiss_knn.classify.sharded import ShardedBank
from faiss_knn.classify.vote import check_vote_options, neighbor_weights, normalize_scores
from faiss_knn.distributed import (
    all_gather_object,
    all_or_none,
    broadcast_object,
    gather_rows,
    raise_together,
    rank_and_size,
)
from faiss_knn.online.asked import Asked, choose
from faiss_knn.online.epoch import (
    Epoch,
    Run,
    batch_counts,
    dataloaders,
    held_back,
    length_of,
    query_count,
    reads_at_once,
)
from faiss_knn.online.failures import kept, start, tell
from faiss_knn.online.lookup import find_tensor, was_skipped
from faiss_knn.online.metrics import MetricTable, class_count, is_multiclass, named_metrics, rehearse
from faiss_knn.online.queue import (
    OnlineQueue,
    QueueStorage,
    RingBuffer,
    align_all,
    belong_together,
    find_or_create_queue,
)
from faiss_knn.online.ring import as_device_or_none
from faiss_knn.online.rows import flat_rows, labelled, searchable
from faiss_knn.online.state import trainer_state
from faiss_knn.online.unique_samples import UniqueSamples, check_sample_ids, newest_per_id, sample_ids, unpadded_rows
from faiss_knn.online.weights import fingerprint, remember, remembered
from faiss_knn.search.distance import get_distance
from faiss_knn.search.engines.faiss_engine import TooFewRowsError
from faiss_knn.search.engines.tuning import recall_by_query
from faiss_knn.search.index import KNNIndex, Neighbors
from faiss_knn.search.inputs import as_integer, as_key, as_positive, as_switch
from faiss_knn.search.sharded import ShardedIndex

_OURS = "_faiss_knn_predictions"  # marks predictions: a batch that is handed out again still holds them
_EXPECTED_BATCHES = 8  # over which queries are drawn where their number is not known
_TUNED_RECALL, _PLAIN_RECALL, _RECALL_LEEWAY = 0.99, 0.9, 0.02  # below which a recall is warned of


class OnlineKNN(Callback):
    """Score a network's features by their nearest neighbours at every validation.

    During training two `OnlineQueue` collect the features and labels of the last `queue_length` samples (per rank).
    When a validation epoch starts, one index is built over them; each validation batch is classified by the vote of
    its k nearest rows; when the epoch ends, `eval/{name}_{metric}` is logged (`test/…` under `trainer.test`).
    The callback takes the place of stable-pretraining's of the same name; works with any LightningModule whose steps
    return a dict or whose batch is one, and leaves the module and its state_dict alone.

    Scores: `batch["{name}_preds"]` holds (B, C) raw sums of the neighbours' weights (in the outputs where the batch is
    no dict). The metrics receive them divided by the row's sum of weights: shares in [0, 1] per row, so that
    probability metrics do not depend on the batch size.

    Rows that are not finite (or zero, under cosine) and labels -1 are left out, counted as `eval/{name}_skipped`, and
    warned of once per run. As long as the queue is empty nothing is logged: a `ModelCheckpoint` that monitors a key
    then finds none, and raises or warns as its own options say.

    Args:
        name: Names the logged keys and the predictions.
        input: Key of the features in the step's outputs, or else in the batch.
        target: Key of the labels, found likewise: class ids, -1 where unlabelled, or (B, C) multi-hot.
        queue_length: Rows in the bank, per rank.
        metrics: A torchmetric, a list or dict of them, {"train": …, "val": …} of which "val" counts, or None.
        input_dim: Width of the features; a list or tuple stands for its product, to which features are flattened.
            The queue is float32 then, unless `bank_dtype` says otherwise; None: as the first batch.
        target_dim: Width of the labels; None: as the first batch.
        num_classes: Width of the scores. None: what the metrics were made for, else the bank's largest label + 1.
        k: Neighbours that vote. Several: one search, keys `eval/{name}_k{K}_{metric}`, predictions of the largest.
        temperature: T of the weights.
        chunk_size: Queries per search block; -1: chosen so that memory stays bounded.
        distance_metric: "euclidean", "squared_euclidean", "cosine" or "manhattan".
        verbose: Whether to report each bank, and the queues' fill.
        index: "flat", "ivf", "fast", "auto" or a FAISS factory string, see `KNNIndex`.
        nprobe: Lists that an IVF index visits.
        target_recall: What an approximate index is tuned to; `eval/{name}_index_recall` is what it reached.
        weighting: "inverse" 1/(d+T), "softmax" of -d/T, or "uniform".
        gather: "replicate": every rank holds the bank of all; "shard": every rank searches its own rows for all.
        bank_dtype: dtype of the queue and the index, torch.float16 or bfloat16 for half the memory.
        bank_device: Where the bank is kept and searched; None: the module's device.
        bank_dataloader_idx: Fill the bank from this validation dataloader instead of the queue.
        id: Key of the sample ids: the newest row of each id counts.
        every_n_epochs: Score only every so many epochs of a fit (validations, where the training data has no end). In
            between, the last values are logged again, so that monitors such as ModelCheckpoint find them (to
            EarlyStopping they are no improvement); where the score is monitored, the first validation is scored too.
        recall_queries: How many of an epoch's own queries are searched exactly too, for the recall of an approximate
            index; 0: none.
        ignore_index: A label that means "unlabelled", beside -1.
        strict: Whether to refuse a module that did not make the queue's rows, instead of warning.

    Attributes:
        results: What metrics computed in the last run that is no number (matrices, curves), by log key.

    Raises:
        ValueError: For each bad argument, naming it.
    """

    def __init__(
        self,
        name: str,
        input: str,  # noqa: A002
        target: str,
        queue_length: int,
        metrics: Any = None,
        input_dim: int | Sequence[int] | None = None,
        target_dim: int | None = None,
        num_classes: int | None = None,
        k: int | Sequence[int] = 5,
        temperature: float = 0.07,
        chunk_size: int = -1,
        distance_metric: str = "euclidean",
        verbose: bool | None = None,
        *,
        index: str = "flat",
        nprobe: int | None = None,
        target_recall: float | None = None,
        weighting: str = "inverse",
        gather: str = "replicate",
        bank_dtype: torch.dtype | None = None,
        bank_device: torch.device | str | None = None,
        bank_dataloader_idx: int | None = None,
        id: str | None = None,  # noqa: A002
        every_n_epochs: int = 1,
        recall_queries: int = 256,
        ignore_index: int | None = None,
        strict: bool = False,
    ) -> None:
        k = _listed(k)
        self.ks = _checked_ks(k)
        check_vote_options(temperature, weighting)
        chunk_size = as_integer(chunk_size, "chunk_size")
        if chunk_size == 0 or chunk_size < -1:
            raise ValueError(f"chunk_size must be positive or -1, got {chunk_size}")
        if isinstance(input_dim, Sequence):
            input_dim = int(np.prod([as_positive(size, "input_dim") for size in input_dim or [0]]))
        if recall_queries != 0:
            recall_queries = as_positive(recall_queries, "recall_queries")
        if gather not in ("replicate", "shard"):
            raise ValueError(f"`gather` must be 'replicate' or 'shard', got {gather!r}")
        get_distance(distance_metric)
        self.name = as_key(name, "name")
        self.input = as_key(input, "input")
        self.target = as_key(target, "target")
        self.queue_length = as_positive(queue_length, "queue_length")
        self.metrics = named_metrics(metrics)
        self.input_dim = None if input_dim is None else as_positive(input_dim, "input_dim")
        self.target_dim = None if target_dim is None else as_positive(target_dim, "target_dim")
        self.num_classes = None if num_classes is None else as_class_count(as_positive(num_classes, "num_classes"))
        self.k = k
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.distance_metric = distance_metric
        self.verbose = None if verbose is None else as_switch(verbose, "verbose")
        self.index = index
        self.nprobe = nprobe
        self.target_recall = target_recall
        self.weighting = weighting
        self.gather = gather
        self.bank_dtype = bank_dtype
        self.bank_device = as_device_or_none(bank_device, "bank_device")
        self.bank_dataloader_idx = (
            None if bank_dataloader_idx is None else as_integer(bank_dataloader_idx, "bank_dataloader_idx")
        )
        self.id = None if id is None else as_key(id, "id")
        self.every_n_epochs = as_positive(every_n_epochs, "every_n_epochs")
        self.recall_queries = recall_queries
        self.ignore_index = None if ignore_index is None else as_integer(ignore_index, "ignore_index")
        self.strict = as_switch(strict, "strict")
        self.results: dict[str, Any] = {}
        self._warned_inferred_num_classes = False
        self._metrics_class_count = class_count(self.metrics)
        self._multiclass = is_multiclass(self.metrics)
        rehearse(self.metrics, self.num_classes)
        self._new_index()  # a bad index option is an error here, not at the first validation

    @property
    def state_key(self) -> str:
        """Name of this callback in checkpoints; its rows are in the queues' states."""
        return f"OnlineKNN[name={self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        with all_or_none():
            self._set_up(trainer)

    def _set_up(self, trainer: Any) -> None:
        start(trainer)
        twins = [c for c in trainer.callbacks if isinstance(c, OnlineKNN) and c.name == self.name]
        if len(twins) > 1:
            raise ValueError(f"{len(twins)} OnlineKNN callbacks are named '{self.name}': give each a name of its own")
        previous = trainer_state(trainer).get(self)
        queues = {} if self.bank_dataloader_idx is not None else self._queues(trainer)
        run = Run(queues, previous.index if previous else self._new_index())
        run.width = previous.width if previous else 0
        trainer_state(trainer)[self] = run

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            align_all(trainer)
            self._drop_rows_of_others(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            remember(trainer, fingerprint(pl_module))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            align_all(trainer)
            self._check_weights(trainer, pl_module)

    on_test_start = on_validation_start

    def _check_weights(self, trainer: Any, pl_module: Any) -> None:
        """Say where the queue's rows are another module's, or that module's with other weights."""
        run = self._run(trainer)
        if not any(len(queue.storage(trainer).ring) for queue in run.queues.values()):
            return
        run.weights = fingerprint(pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            return
        if remembered(trainer) not in (None, run.weights):
            self._object(
                trainer,
                run,
                "the queue's rows were made by another module, or by other weights, than are scored now: the score "
                "says little. Give `ckpt_path=` of a checkpoint of that training, which holds its rows, or fill the "
                "bank from a dataloader with bank_dataloader_idx",
            )
        elif remembered(trainer) is None:
            remember(trainer, run.weights)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say where weights were swapped between the start of validation and its first batch."""
        if batch_idx == dataloader_idx == 0:  # not on a rank without batches: the ranks cannot meet here
            epoch = self._run(trainer).epoch
            with kept(trainer) if epoch is None else held_back(epoch):
                self._check_swapped(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Say where weights that were swapped before validation started are put back at its end."""
        with all_or_none():
            self._check_swapped(trainer, pl_module)
            self._run(trainer).weights = None

    on_test_batch_start = on_validation_batch_start
    on_test_end = on_validation_end

    def _check_swapped(self, trainer: Any, pl_module: Any) -> None:
        run = self._run(trainer)
        if run.weights is None or run.weights == fingerprint(pl_module):
            return
        run.weights = None
        self._object(
            trainer,
            run,
            "validation runs with averaged weights (EMA, SWA), and the queue's rows were made by the raw ones: the "
            "score says little. Fill the bank with the same weights, from a dataloader, with bank_dataloader_idx",
        )

    def _object(self, trainer: Any, run: Run, what: str) -> None:
        if self.strict:
            raise ValueError(f"OnlineKNN[{self.name}]: {what} (strict=True)")
        self._warn_once(trainer, run, "weights", f"OnlineKNN[{self.name}]: {what}")

    def _drop_rows_of_others(self, trainer: Any, pl_module: Any) -> None:
        """Begin with empty queues where they hold what an earlier fit of another module left."""
        run = self._run(trainer)
        rings = [storage.ring for storage in trainer_state(trainer).get("queues", {}).values()]
        if remembered(trainer) not in (None, fingerprint(pl_module)) and any(map(len, rings)):
            for ring in rings:
                ring.replace(None)
            self._warn_once(
                trainer,
                run,
                "dropped",
                f"OnlineKNN[{self.name}]: the queue's rows were made by another module, or by other weights, than are "
                "trained from here on, and are dropped",
            )
        remember(trainer, None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bank_dataloader_idx is not None or was_skipped(pl_module, outputs):
            return
        with kept(trainer):
            rows = {key: find_tensor(key, outputs, batch, self.name) for key in self._keys()}
            self._check_aligned(rows)
            if self.id is not None:
                check_sample_ids(rows[self.id], f"'{self.id}'")
            run = self._run(trainer)
            if not run.tried:  # now, not after an epoch of training
                run.index.check_spec(flat_rows(rows[self.input]).shape[1])
                run.tried = True

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        tell(trainer, exception)
        align_all(trainer)
        if run := trainer_state(trainer).get(self):
            run.epoch = None
        if trainer.state.fn == TrainerFn.FITTING and remembered(trainer) is None:  # training had begun
            with suppress(RuntimeError):  # a GPU that failed answers no more; the error itself is what matters
                remember(trainer, fingerprint(pl_module))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            self._start_epoch(trainer, pl_module)

    def _start_epoch(self, trainer: Any, pl_module: Any) -> None:
        run = self._run(trainer)
        run.epoch = None
        if not self._is_due(trainer, run):
            return
        batches = batch_counts(trainer)
        self._check_bank_loader(trainer, len(batches))
        scored = [i for i in range(len(batches)) if i != self.bank_dataloader_idx]
        loaders = dataloaders(trainer, len(batches))
        self._warn_if_cut(trainer, run, loaders, batches)
        run.epoch = Epoch(
            run.index,
            MetricTable(self.metrics, self.ks, scored, pl_module.device),
            loaders,
            self._most_searches({i: batches[i] for i in scored}),
            query_count([loaders[i] for i in scored], [batches[i] for i in scored]),
            {key: QueueStorage(self._ring(key, pl_module.device)) for key in self._keys()},
            {i: UniqueSamples() for i in scored},
        )
        if self.bank_dataloader_idx is None:
            self._build_bank(trainer, run, run.epoch)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        run = self._run(trainer)
        epoch = run.epoch
        if epoch is None:
            return
        if dataloader_idx == self.bank_dataloader_idx:
            with held_back(epoch):
                self._fill(trainer, run, epoch, outputs, batch, batch_idx)
            return
        if not epoch.built:
            self._build_bank(trainer, run, epoch)
        if epoch.bank is None:
            return
        asked: Asked | None = None
        with held_back(epoch):
            asked = self._read(trainer, run, epoch, outputs, batch, batch_idx, dataloader_idx)
        with held_back(epoch):
            if asked is not None:
                self._draw(epoch, asked.queries)
            found = self._search(epoch, asked)
            if asked is not None and found is not None and epoch.error is None:
                self._score(epoch, asked, *found)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            values = self._end_epoch(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._run(trainer).last = values
        for key, value in values.items():
            # Every rank has the same value; the largest of them is that value, and says so to Lightning.
            pl_module.log(key, value, add_dataloader_idx=False, sync_dist=True, reduce_fx="max")

    def _end_epoch(self, trainer: Any, pl_module: Any) -> dict[str, Tensor]:
        run = self._run(trainer)
        epoch, run.epoch = run.epoch, None
        if epoch is None:
            return run.last  # monitors find the last score where none is due
        if not epoch.built:
            self._build_bank(trainer, run, epoch)
        if epoch.bank is None:
            return {}
        self._serve(epoch)
        raise_together(epoch.error)
        for once in epoch.once.values() if self.id is not None else ():
            once.finish()
        stage = "test" if trainer.state.stage == RunningStage.TESTING else "eval"
        several = isinstance(self.k, Sequence)
        values, self.results = epoch.table.values(f"{stage}/{self.name}", several_k=several)
        values |= self._about_the_search(trainer, run, epoch, f"{stage}/{self.name}")
        epoch.index.release()
        run.width = max(run.width, epoch.width)
        return {key: value.to(pl_module.device, torch.float32) for key, value in values.items()}

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def _keys(self) -> list[str]:
        return [self.input, self.target, *([] if self.id is None else [self.id])]

    def _queues(self, trainer: Any) -> dict[str, OnlineQueue]:
        dtype = self.bank_dtype or (torch.float32 if self.input_dim else None)
        queues = {
            self.input: self._queue(trainer, self.input, self.input_dim, dtype),
            self.target: self._queue(trainer, self.target, self.target_dim, None),
        }
        if self.id is not None:
            queues[self.id] = self._queue(trainer, self.id, None, None)
        belong_together(trainer, list(queues))
        return queues

    def _queue(self, trainer: Any, key: str, dim: int | None, dtype: torch.dtype | None) -> OnlineQueue:
        queue = find_or_create_queue(
            trainer, key, self.queue_length, dim, dtype, gather_distributed=True, device=self.bank_device
        )
        if queue.verbose is None:
            queue.verbose = self.verbose
        return queue

    def _ring(self, key: str, device: torch.device) -> RingBuffer:
        """Room for the rows of the bank's dataloader: as many as a queue would hold."""
        dtype = self.bank_dtype if key == self.input else None
        return RingBuffer(self.queue_length, None, dtype, self.bank_device or device)

    def _run(self, trainer: Any) -> Run:
        run: Run = trainer_state(trainer)[self]
        return run

    def _new_index(self, spec: str | None = None, nprobe: int | None = None) -> KNNIndex:
        """An index as the options say, or of a spec (and nprobe) already chosen, which is not tuned again."""
        return KNNIndex(
            spec or self.index,
            distance_metric=self.distance_metric,
            device=self.bank_device,
            nprobe=nprobe if spec else self.nprobe,
            target_recall=None if spec else self.target_recall,
            storage_dtype=self.bank_dtype,
            chunk_size=self.chunk_size,
        )

    def _check_aligned(self, rows: Mapping[str, Tensor]) -> None:
        shapes = {key: tuple(values.shape) for key, values in rows.items()}
        if len({shape[0] for shape in shapes.values()}) > 1:
            described = " and ".join(f"'{key}' of shape {shape}" for key, shape in shapes.items())
            raise ValueError(
                f"OnlineKNN[{self.name}]: one step must give as many features as labels, got {described}: "
                "repeat the labels once per view, or keep one view's features"
            )

    def _check_bank_loader(self, trainer: Any, loaders: int) -> None:
        if self.bank_dataloader_idx is None:
            return
        if reads_at_once(trainer):
            raise ValueError(
                f"OnlineKNN[{self.name}]: bank_dataloader_idx={self.bank_dataloader_idx} needs dataloaders that run "
                "one after the other, got a CombinedLoader that reads them at once: give a list, or mode='sequential'"
            )
        if self.bank_dataloader_idx != 0 or loaders < 2:
            raise ValueError(
                f"OnlineKNN[{self.name}]: the bank's dataloader must come first and others after it, got "
                f"bank_dataloader_idx={self.bank_dataloader_idx} of {loaders} validation dataloaders: they run in "
                "order, so return [bank_loader, *scored_loaders] and set bank_dataloader_idx=0"
            )

    def _warn_if_cut(self, trainer: Any, run: Run, loaders: Sequence[Any], batches: Sequence[float]) -> None:
        """Say once that the bank is smaller than its dataloader, because Lightning was told to read a part of it."""
        if self.bank_dataloader_idx is None or trainer.sanity_checking:
            return
        whole, read = length_of(loaders[self.bank_dataloader_idx]), batches[self.bank_dataloader_idx]
        if whole is not None and read < whole:
            self._warn_once(
                trainer,
                run,
                "cut",
                f"OnlineKNN[{self.name}]: the bank holds {read:g} of the {whole} batches of dataloader "
                f"{self.bank_dataloader_idx}, because limit_val_batches cuts every dataloader: raise it, and shorten "
                "the others themselves, for the score of the whole bank",
            )

    def _is_due(self, trainer: Any, run: Run) -> bool:
        """Tell whether to score: where the score is monitored also the first time, so that there always is one."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return True
        run.validations += 1
        endless = trainer.num_training_batches == float("inf")  # its one epoch has many validations
        number = run.validations if endless else trainer.current_epoch + 1
        return number % self.every_n_epochs == 0 or (not run.last and self._is_monitored(trainer))

    def _is_monitored(self, trainer: Any) -> bool:
        """Tell whether a callback, such as ModelCheckpoint, is to find a score at every validation."""
        monitors = (getattr(callback, "monitor", None) for callback in trainer.callbacks)
        return any(isinstance(key, str) and key.startswith(f"eval/{self.name}_") for key in monitors)

    def _warn_once(self, trainer: Any, run: Run, what: str, message: str) -> None:
        if what not in run.warned and trainer.is_global_zero:
            logger.warning(message)
        run.warned.add(what)

    def _shards(self) -> bool:
        return self.gather == "shard" and rank_and_size()[1] > 1

    def _most_searches(self, batches: Mapping[int, float]) -> int:
        """How many batches the rank with the most of them scores: sharded ranks all search as often as that."""
        if not self._shards():
            return 0
        most = max(all_gather_object(sum(batches.values())))
        if most == float("inf"):
            raise ValueError(
                f"OnlineKNN[{self.name}]: gather='shard' needs validation dataloaders with a length, got "
                f"{batches} batches by dataloader: ranks that cannot know how often the others search would hang; "
                "use gather='replicate'"
            )
        return int(most)

    def _fill(self, trainer: Any, run: Run, epoch: Epoch, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take a batch of the bank's dataloader in."""
        rows = {key: find_tensor(key, outputs, batch, self.name) for key in self._keys()}
        self._check_aligned(rows)
        assert self.bank_dataloader_idx is not None
        loader = epoch.loaders[self.bank_dataloader_idx]
        own = unpadded_rows(loader, batch_idx, len(rows[self.input]))
        if len(epoch.rows[self.input].ring) + own > self.queue_length:
            self._warn_once(
                trainer,
                run,
                "full",
                f"OnlineKNN[{self.name}]: dataloader {self.bank_dataloader_idx} has more than queue_length="
                f"{self.queue_length} rows for the bank on each rank: only the last are kept. Raise queue_length",
            )
        for key, values in rows.items():
            epoch.rows[key].ring.append(values[:own])

    def _build_bank(self, trainer: Any, run: Run, epoch: Epoch) -> None:
        """Make the bank of this epoch from every rank's rows; every rank must call it at the same point."""
        epoch.built = True
        with all_or_none():
            raise_together(epoch.error)
            self._index_rows(trainer, run, epoch)

    def _index_rows(self, trainer: Any, run: Run, epoch: Epoch) -> None:
        features, labels = self._bank_rows(trainer, run, epoch)
        rows = sum(all_gather_object(len(labels))) if self._shards() else len(labels)
        if rows == 0:
            if not trainer.sanity_checking:
                self._warn_once(trainer, run, "empty", f"! {self.name}: queue data is empty, skipping KNN computation")
            return
        classes = self._class_count(trainer, run, labels)
        options: dict[str, Any] = {"num_classes": classes, "index": run.index, "expected_k": max(self.ks)}
        epoch.features, epoch.index = features, run.index
        if self._shards():
            epoch.bank = self._sharded_bank(trainer, run, epoch, labels, options)
        else:
            epoch.bank = self._bank(trainer, run, epoch, labels, options | {"expected_queries": epoch.queries})
        if self.verbose and trainer.is_global_zero and len(epoch.index):
            logger.info(f"OnlineKNN[{self.name}]: bank of {rows:,} rows, {epoch.index.stats}")

    def _bank(self, trainer: Any, run: Run, epoch: Epoch, labels: Tensor, options: dict[str, Any]) -> FeatureBank:
        """Index the rows of all ranks, as rank zero chooses to."""
        assert epoch.features is not None
        with all_or_none():
            try:
                bank = FeatureBank(epoch.features, labels, **options)
            except TooFewRowsError as error:
                epoch.index = self._exact_for_now(trainer, run, error)
                bank = FeatureBank(epoch.features, labels, **options | {"index": epoch.index})
        choice = _choice(epoch.index)
        of_rank_zero = broadcast_object(choice)
        with all_or_none():
            if of_rank_zero != choice:
                run.index = epoch.index = self._new_index(*of_rank_zero)
                bank = FeatureBank(epoch.features, labels, **options | {"index": run.index})
        return bank

    def _sharded_bank(
        self, trainer: Any, run: Run, epoch: Epoch, labels: Tensor, options: dict[str, Any]
    ) -> ShardedBank:
        """Index this rank's rows; exactly on all ranks, where one of them has too few for the index asked for."""
        assert epoch.features is not None
        failure: TooFewRowsError | None = None
        with all_or_none():
            try:
                if len(epoch.features):
                    run.index.build(epoch.features, expected_k=options["expected_k"])
            except TooFewRowsError as error:
                failure = error
        if any(all_gather_object(failure is not None)):
            epoch.index = self._exact_for_now(trainer, run, failure)
        return ShardedBank(epoch.features, labels, **options | {"index": epoch.index})

    def _exact_for_now(self, trainer: Any, run: Run, why: Exception | None) -> KNNIndex:
        """Return an exact index, which any number of rows is enough for."""
        self._warn_once(
            trainer,
            run,
            "few",
            f"OnlineKNN[{self.name}]: searches exactly until there are rows enough for index={self.index!r} ({why})",
        )
        return self._new_index("flat")

    def _bank_rows(self, trainer: Any, run: Run, epoch: Epoch) -> tuple[Tensor, Tensor]:
        """The features and labels that this rank indexes: its own, or gathered from all ranks."""
        gathered = not self._shards()
        lengths = self._lengths(trainer, run, epoch)
        rows = {key: self._snapshot(trainer, run, epoch, key, lengths, gathered) for key in self._keys()[:2]}
        newest = None if self.id is None else self._newest(trainer, run, epoch, lengths)
        if newest is not None and gathered:
            newest = gather_rows(newest)[0]
        with all_or_none():
            features, labels, usable = self._usable(rows)
            self._count_skipped(trainer, run, epoch, len(usable) - int(usable.sum()), len(usable), "bank")
            chosen = usable if newest is None else usable & newest.to(usable.device)
            return (features, labels) if chosen.all() else (features[chosen], labels[chosen])

    def _usable(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (n, d), labels (n,) or (n, C), and (n,) bool: which of them can be searched and vote."""
        self._check_aligned({key: rows[key] for key in self._keys() if key in rows})
        features, labels = flat_rows(rows[self.input]), self._labels(rows[self.target])
        return features, labels, searchable(features, self._normalized) & labelled(labels)

    def _newest(self, trainer: Any, run: Run, epoch: Epoch, lengths: list[list[int]]) -> Tensor:
        """Tell which of this rank's rows are the newest usable ones of their sample over all ranks."""
        with all_or_none():
            rows = {key: self._snapshot(trainer, run, epoch, key, lengths, gathered=False) for key in self._keys()}
            usable = self._usable(rows)[2].cpu()
            ids = sample_ids(rows[str(self.id)], f"'{self.id}'")
        newest = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        newest[usable] = newest_per_id(ids[usable])
        return newest

    def _lengths(self, trainer: Any, run: Run, epoch: Epoch) -> list[list[int]]:
        """Tell how many rows each rank has of each key: a key that is younger than the others has fewer."""
        if self.bank_dataloader_idx is not None:
            rings = [epoch.rows[key].ring for key in self._keys()]
        else:
            rings = [run.queues[key].storage(trainer).ring for key in self._keys()]
        lengths = all_gather_object([min(len(ring), self.queue_length) for ring in rings])
        if any(len(set(own)) > 1 for own in lengths):
            self._warn_once(
                trainer,
                run,
                "lengths",
                f"OnlineKNN[{self.name}]: {', '.join(self._keys())} have {lengths} rows (by rank): the last that all "
                "of them have are used, until the queues have filled again",
            )
        return lengths

    def _snapshot(
        self, trainer: Any, run: Run, epoch: Epoch, key: str, lengths: list[list[int]], gathered: bool
    ) -> Tensor:
        """Return the rows of a key that have counterparts under all the others."""
        if self.bank_dataloader_idx is None:
            rows = run.queues[key].snapshot(trainer, gathered)
        else:
            rows = epoch.rows[key].snapshot(self.queue_length, gathered)
        ranks = lengths if gathered else [lengths[rank_and_size()[0]]]
        counts = [own[self._keys().index(key)] for own in ranks]
        together = [min(own) for own in ranks]
        if counts == together:
            return rows
        parts = zip(torch.split(rows, counts), counts, together, strict=True)
        return torch.cat([part[count - most :] for part, count, most in parts])

    def _labels(self, values: Tensor) -> Tensor:
        """Read labels; one-hot ones as the class ids they are, where the metrics are made for one class a row."""
        labels = as_labels(values, f"'{self.target}'", float_ids=True, ignore_index=self.ignore_index)
        if labels.ndim == 1 or not self._multiclass:
            return labels
        ids = one_hot_ids(labels)
        if ids is None and not is_soft(labels) and len(labels):
            raise ValueError(
                f"OnlineKNN[{self.name}]: '{self.target}' has rows with several or no labels, and the metrics are "
                "made for one class a row: give Multilabel metrics, or class ids"
            )
        return labels if ids is None else ids

    @property
    def _normalized(self) -> bool:
        return self.distance_metric == "cosine"

    def _count_skipped(self, trainer: Any, run: Run, epoch: Epoch, skipped: int, rows: int, where: str) -> None:
        """Count the rows that are left out, and warn of them once per run."""
        if (
            where == "query" or self._shards() or rank_and_size()[0] == 0
        ):  # of a gathered bank, one rank counts the rows
            epoch.skipped += skipped
        if skipped:
            self._warn_once(
                trainer,
                run,
                "skipped",
                f"OnlineKNN[{self.name}]: left out {skipped} of {rows} {where} rows: '{self.input}' not finite "
                f"(or zero, under cosine) or '{self.target}' -1. All are counted in {self.name}_skipped; "
                "this is said once per run",
            )

    def _class_count(self, trainer: Any, run: Run, labels: Tensor) -> int:
        seen = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1 if len(labels) else 0
        if self._shards():
            seen = max(all_gather_object(seen))
        classes = self.num_classes or self._metrics_class_count
        if classes is None:
            if not self._warned_inferred_num_classes and trainer.is_global_zero:
                logger.warning(
                    f"OnlineKNN[{self.name}]: inferring num_classes={seen} from the labels in the bank. "
                    "Give num_classes to keep the width of the scores the same in every run."
                )
            self._warned_inferred_num_classes = True
            return max(seen, run.width)  # labels that earlier validations had, so that the width stays
        self._check_label(seen - 1)
        return classes

    def _check_label(self, highest: int) -> None:
        """Refuse a label beyond the width that was asked for; where none was, the width grows."""
        num_classes = self.num_classes or self._metrics_class_count
        if num_classes is not None and highest >= num_classes:
            raise ValueError(
                f"OnlineKNN[{self.name}]: configured num_classes={num_classes} but observed label {highest} >= "
                f"num_classes. Increase num_classes to at least {highest + 1}."
            )

    def _read(
        self, trainer: Any, run: Run, epoch: Epoch, outputs: Any, batch: Any, batch_idx: int, loader: int
    ) -> Asked:
        assert epoch.bank is not None
        place = _first_mapping(batch, outputs)
        if place is not None and f"{self.name}_preds" in place and not _is_ours(place[f"{self.name}_preds"]):
            raise ValueError(f"Key '{self.name}_preds' already exists in batch")
        rows = {key: find_tensor(key, outputs, batch, self.name) for key in self._keys()}
        self._check_aligned(rows)
        queries, labels = flat_rows(rows[self.input]), self._labels(rows[self.target])
        if is_soft(labels):
            labels = most_likely(labels)  # what a metric can judge; neighbours vote by their shares
        own = len(labels) if self.id is not None else unpadded_rows(epoch.loaders[loader], batch_idx, len(labels))
        chosen = choose(queries, labels, own, normalized=self._normalized)
        self._check_label(chosen.highest)
        epoch.width = max(epoch.width, epoch.bank.num_classes, chosen.highest + 1)
        self._count_skipped(trainer, run, epoch, chosen.skipped, own, "query")
        ids = None if self.id is None else sample_ids(rows[self.id], f"'{self.id}'")
        return Asked(queries[chosen.searched], labels, chosen.searched, chosen.counted, ids, place, loader)

    def _search(self, epoch: Epoch, asked: Asked | None) -> tuple[Neighbors, Tensor | None] | None:
        """Find the neighbours of a batch; sharded, with their labels, and together with all ranks, asked or not."""
        queries = None if asked is None or epoch.error is not None else asked.queries
        if isinstance(epoch.bank, ShardedBank):
            if epoch.error is not None:
                raise_together(epoch.error)  # here the other ranks meet for their search
            epoch.searches += 1
            return epoch.bank.neighbors(queries, max(self.ks))
        if queries is None or epoch.bank is None:
            return None
        return epoch.bank.neighbors(queries, max(self.ks), checked=True), None

    def _draw(self, epoch: Epoch, queries: Tensor) -> None:
        """Keep every so many of the queries, spread over the epoch where its length is known."""
        wanted = -(-self.recall_queries // rank_and_size()[1])
        if wanted == 0 or len(epoch.index) == 0 or epoch.index.stats.exact:
            return
        step = max(1, (epoch.queries or wanted * _EXPECTED_BATCHES) // wanted)
        first = -epoch.seen % step
        epoch.seen += len(queries)
        drawn = queries[first::step][: wanted - sum(map(len, epoch.sample))]
        if len(drawn):
            epoch.sample.append(drawn.clone())

    def _serve(self, epoch: Epoch) -> None:
        """Search along for the ranks that have more batches."""
        while epoch.searches < epoch.most_searches:
            self._search(epoch, None)

    def _score(self, epoch: Epoch, asked: Asked, found: Neighbors, labels: Tensor | None) -> None:
        """Update the loader's metrics, and hand out (B, C) raw scores, 0 for rows without a distance."""
        assert epoch.bank is not None
        options: dict[str, Any] = {"temperature": self.temperature, "weighting": self.weighting}
        predictions = asked.queries.new_zeros(len(asked.labels), epoch.bank.num_classes, dtype=torch.float32)
        shares = {}
        for k in sorted(self.ks):
            nearest = Neighbors(found.distances[:, :k], found.indices[:, :k])
            if isinstance(epoch.bank, ShardedBank):
                assert labels is not None
                scores = epoch.bank.score(nearest, labels[:, :k], **options)
            else:
                scores = epoch.bank.score(nearest, **options)
            shares[k] = _widened(normalize_scores(scores, neighbor_weights(nearest.distances, **options)), epoch.width)
            predictions[asked.searched] = scores

        def count(rows: Tensor | slice) -> None:
            for k, share_per_class in shares.items():
                epoch.table.update(asked.loader, k, share_per_class[asked.among_searched(rows)], asked.labels[rows])

        if asked.ids is None:
            count(asked.counted)
        else:
            epoch.once[asked.loader].add(asked.ids, lambda new: count(asked.counted_of(new)))
        if asked.place is not None:
            asked.place[f"{self.name}_preds"] = predictions
            vars(predictions)[_OURS] = True

    def _about_the_search(self, trainer: Any, run: Run, epoch: Epoch, prefix: str) -> dict[str, Tensor]:
        """What approximation the index makes, and how many rows were left out, over all ranks."""
        values = {}
        recall = self._recall_of_bank(epoch) if self.recall_queries == 0 else self._recall_of_queries(epoch)
        if recall is not None:
            values[f"{prefix}_index_recall"] = torch.tensor(recall, dtype=torch.float32, device="cpu")
            self._warn_of_recall(trainer, run, recall)
        if skipped := sum(all_gather_object(epoch.skipped)):
            values[f"{prefix}_skipped"] = torch.tensor(float(skipped))
        return values

    def _recall_of_bank(self, epoch: Epoch) -> float | None:
        """Return the recall that ranks measured when they built their index, over all ranks."""
        stats = epoch.index.stats if len(epoch.index) else None
        recall = None if stats is None or stats.exact else stats.recall
        return _weighted_mean(all_gather_object((len(epoch.index), recall)))

    def _recall_of_queries(self, epoch: Epoch) -> float | None:
        """Return the recall of a sample of the epoch's own queries over all ranks; None for an exact index."""
        exact = epoch.index.stats.exact if len(epoch.index) else True
        if all(all_gather_object(exact)):
            return None
        asked = torch.cat(epoch.sample) if epoch.sample else None
        if not self._shards():
            with all_or_none():
                recall = None if asked is None else epoch.index.measure_recall(asked, max(self.ks))
            return _weighted_mean(all_gather_object((0 if asked is None else len(asked), recall)))
        assert isinstance(epoch.bank, ShardedBank)
        found = epoch.bank.neighbors(asked, max(self.ks))[0].indices
        truth = ShardedIndex(self._new_index("flat")).build(epoch.features).search(asked, max(self.ks)).indices
        shares = recall_by_query(found, truth)
        return _weighted_mean(all_gather_object((len(shares), float(shares.mean()) if len(shares) else None)))

    def _warn_of_recall(self, trainer: Any, run: Run, recall: float) -> None:
        tuned = self.target_recall is not None or self.index in ("fast", "ivf", "auto")
        wanted = self.target_recall or (_TUNED_RECALL if tuned else _PLAIN_RECALL)
        if recall < wanted - _RECALL_LEEWAY:
            self._warn_once(
                trainer,
                run,
                "recall",
                f"OnlineKNN[{self.name}]: index={self.index!r} found {recall:.3f} of the exact neighbours: the score "
                + ("may be too low: its next build is tuned on the queries asked" if tuned else "may be too low")
                + "; index='flat' finds all",
            )


def _weighted_mean(reports: Sequence[tuple[int, float | None]]) -> float | None:
    """Return the mean of what ranks measured, each by its count; None if none did."""
    measured = [(count, value) for count, value in reports if value is not None and count]
    total = sum(count for count, _ in measured)
    return sum(count * value for count, value in measured) / total if total else None


def _choice(index: KNNIndex) -> tuple[str, int | None]:
    """What an index chose by itself: other processors or thread counts may choose otherwise for the same bank."""
    return index.stats.spec, index.stats.nprobe


def _listed(k: Any) -> Any:
    """Return an array or tensor of several numbers as a list, and all else as it is."""
    return k.tolist() if isinstance(k, np.ndarray | Tensor) and k.ndim == 1 else k


def _checked_ks(k: Any) -> tuple[int, ...]:
    ks = (k,) if isinstance(k, str) or not isinstance(k, Sequence) else tuple(k)
    if not ks or any(one == other for one, other in combinations(ks, 2)):
        raise ValueError(f"k must be one number or several different ones, got {k}")
    for one in ks:
        if isinstance(one, str | float):
            raise ValueError(f"k must be positive, got {one}: give a whole number")  # noqa: TRY004
    return tuple(as_positive(one, "k") for one in ks)


def _widened(scores: Tensor, width: int) -> Tensor:
    """Add classes without a vote to scores (B, C), up to `width`."""
    return pad(scores, (0, width - scores.shape[1])) if width > scores.shape[1] else scores


def _is_ours(value: object) -> bool:
    """Tell whether what a batch holds are predictions of an earlier run, also of another trainer's."""
    return isinstance(value, Tensor) and _OURS in vars(value)


def _first_mapping(*places: Any) -> MutableMapping[str, Any] | None:
    return next((place for place in places if isinstance(place, MutableMapping)), None)
