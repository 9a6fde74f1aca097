"""OnlineKNN: a k-NN vote over the queue at every validation, logged as torchmetrics."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from torch import Tensor

from faiss_knn.distributed import all_or_none
from faiss_knn.online.batch import was_skipped
from faiss_knn.online.dataloaders import check_bank_loader, cut_of_bank, plan_of
from faiss_knn.online.failures import kept, start, tell
from faiss_knn.online.gallery import hand_to_loggers
from faiss_knn.online.options import OnlineOptions
from faiss_knn.online.queue import OnlineQueue, align_all, belong_together, find_or_create_queue
from faiss_knn.online.ring import QueueStorage
from faiss_knn.online.scorer import Scorer
from faiss_knn.online.trainer_state import trainer_state
from faiss_knn.online.weights_watch import WeightsWatch, drop_rows_of_others, remember, remembered, weights_fingerprint


@dataclass
class _Run:
    """What one callback holds for one call of fit, validate or test.

    Attributes:
        scorer: Scores; its memory is kept from run to run.
        watch: Whose weights made the rows.
        validations: How many there were.
        logged: What was logged last.
    """

    scorer: Scorer
    watch: WeightsWatch = field(default_factory=WeightsWatch)
    validations: int = 0
    logged: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False, repr=False)  # for an __init__ that errors call OnlineKNN's
class OnlineKNN(OnlineOptions, Callback):
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
        input: Key of the features in the step's outputs, or else in the batch. Several, such as ("student", "teacher"):
            each is scored by itself, as `eval/{name}_{input}_{metric}` and `batch["{name}_{input}_preds"]`.
        target: Key of the labels, found likewise: class ids, -1 where unlabelled, or (B, C) multi-hot; or numbers, (B,)
            or (B, D) of a float dtype, NaN where there is none. Several: a mapping from each to metrics of its own, in
            place of `metrics`; logged as `eval/{name}_{target}_{metric}` (after the input, where both are several).
        queue_length: Rows in the bank, per rank.
        metrics: A torchmetric, a list or dict of them, {"train": …, "val": …} of which "val" counts, or None. They
            decide what the labels are: numbers, of which neighbours' weighted means are judged and handed out, if one
            is of `torchmetrics.regression`, none of classes, and num_classes is None.
        input_dim: Width of the features; a list or tuple stands for its product, to which features are flattened.
            The queue is float32 then, unless `bank_dtype` says otherwise; None: as the first batch.
        target_dim: Width of the labels; None: as the first batch.
        num_classes: Width of the scores. None: what the metrics were made for, else the bank's largest label + 1.
        k: Neighbours that vote; None: the protocol's, or 5. Several: one search, keys `eval/{name}_k{K}_{metric}`,
            predictions of the largest.
        temperature: T of the weights; None: the protocol's, or 0.07.
        chunk_size: Queries per search block; -1: chosen so that memory stays bounded.
        distance_metric: "euclidean", "squared_euclidean", "cosine", "manhattan" or "dot" (minus the inner product; with
            the weighting "softmax" or "uniform"); None: the protocol's, or "euclidean".
        verbose: Whether to report each bank, and the queues' fill.
        index: "flat", "ivf", "fast", "auto" or a FAISS factory string, see `KNNIndex`.
        nprobe: Lists that an IVF index visits.
        target_recall: What an approximate index is tuned to; `eval/{name}_index_recall` is what it reached.
        weighting: "inverse" 1/(d+T), "softmax" of -d/T, or "uniform"; None: the protocol's, or "inverse".
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
        protocol: Name of one of `protocols`, for k, temperature, distance_metric and weighting that are not given;
            afterwards also names what differs from it, such as "dino, k=5".
        diagnostics: What else to log of the bank, from a sample of it: any of "effective_rank", "alignment",
            "uniformity", "hubness", "neighbor_churn" (needs `id`) and "duplicate_share"; of two inputs together
            "view_alignment". `docs/diagnostics.md` says what each tells.
        gallery: Key of the images in the outputs or batch, or {"key": "image", "rows": 8}: the few queries of each
            validation that the vote got most wrong are handed to the trainer's loggers that take pictures (W&B,
            TensorBoard), captioned with label, vote and neighbours, as `eval/{name}_gallery`. Rank zero's; the bank's
            images are not kept.
        strict: Whether to refuse a module that did not make the queue's rows, instead of warning.
        search: "batch": each validation batch is searched when it comes. "epoch": the epoch's features are kept, and
            searched at its end in wide batches: the same numbers, but no predictions in the batches.
        seconds: Whether to log what the scoring of a validation cost, `eval/{name}_seconds` of wall time, and of it
            `eval/{name}_build_seconds`, `…_search_seconds` and `…_vote_seconds` (with the metrics), of the slowest
            rank. A GPU is waited for between these parts.
        standard_errors: Whether to log `eval/{name}_{metric}_se` beside each metric that is a mean over queries:
            MulticlassAccuracy, MulticlassRecall and BinaryAccuracy, by the binomial formula; of numbers
            MeanAbsoluteError and MeanSquaredError, by the deviation. The others are named in one warning.

    Attributes:
        results: What metrics computed in the last run that is no number (matrices, curves), by log key.

    Raises:
        ValueError: For each bad argument, naming it.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> knn = OnlineKNN("knn", "embedding", "label", 4096, {"top1": MulticlassAccuracy(10)}, k=(1, 20))
        >>> "knn_k20_top1" in knn.log_keys  # Trainer(callbacks=[knn]) logs eval/knn_k20_top1 at each validation
        True
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.results: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Name of this callback in checkpoints; its rows are in the queues' states."""
        return f"OnlineKNN[name={self.name}]"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        with all_or_none():
            start(trainer)
            self._check_name(trainer)
            earlier = trainer_state(trainer).get(self)
            stored = None if self.bank_dataloader_idx is not None else self._stored(trainer)
            memories = [memory.of_next_run() for memory in earlier.scorer.memories] if earlier else None
            trainer_state(trainer)[self] = _Run(Scorer(self, stored, memories))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            if self.bank_dataloader_idx is not None and trainer.val_dataloaders is not None:
                check_bank_loader(trainer, self.name, self.bank_dataloader_idx)
            align_all(trainer)
            if complaint := drop_rows_of_others(trainer, pl_module):
                self._run(trainer).scorer.memory.warn_once("dropped", f"{self.title}: {complaint}")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bank_dataloader_idx is None and not was_skipped(pl_module, outputs):
            with kept(trainer):
                self._run(trainer).scorer.check_step(outputs, batch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            remember(trainer, weights_fingerprint(pl_module))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            align_all(trainer)
            run, is_fitting = self._run(trainer), trainer.state.fn == TrainerFn.FITTING
            if run.scorer.has_rows:
                self._object(run, run.watch.start_validation(trainer, pl_module, is_fitting=is_fitting))

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            run = self._run(trainer)
            run.scorer.drop()
            if self._is_due(trainer, run):
                self._start(trainer, pl_module, run.scorer)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say where weights were swapped between the start of validation and its first batch."""
        if batch_idx == dataloader_idx == 0:  # not on a rank without batches: the ranks cannot meet here
            run = self._run(trainer)
            with run.scorer.defer_error() if run.scorer.is_scoring else kept(trainer):
                self._object(run, run.watch.check_swapped(pl_module))

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._run(trainer).scorer.add(outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with all_or_none():
            values = self._finish(trainer)
        for key, value in values.items():
            # Every rank has the same value; the largest of them is that value, and says so to Lightning.
            pl_module.log(key, value, add_dataloader_idx=False, sync_dist=True, reduce_fx="max")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Say where weights that were swapped before validation started are put back at its end."""
        with all_or_none():
            run = self._run(trainer)
            self._object(run, run.watch.end_validation(pl_module))

    on_test_start = on_validation_start
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        tell(trainer, exception)
        align_all(trainer)
        if run := trainer_state(trainer).get(self):
            run.scorer.drop()
        if trainer.state.fn == TrainerFn.FITTING and remembered(trainer) is None:  # training had begun
            with suppress(RuntimeError):  # a GPU that failed answers no more; the error itself is what matters
                remember(trainer, weights_fingerprint(pl_module))

    def _run(self, trainer: Any) -> _Run:
        run: _Run = trainer_state(trainer)[self]
        return run

    def _check_name(self, trainer: Any) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, OnlineKNN) and c is not self]
        same = [c for c in others if c.name == self.name]
        if same:
            raise ValueError(
                f"{len(same) + 1} OnlineKNN callbacks are named '{self.name}': give each a name of its own"
            )
        for other in others:
            if shared := self.log_keys & other.log_keys:
                raise ValueError(
                    f"OnlineKNN callbacks '{self.name}' and '{other.name}' would both log {', '.join(sorted(shared))}: "
                    "rename one of them"
                )

    def _stored(self, trainer: Any) -> dict[str, QueueStorage]:
        """Find or make the queues, and return where they keep their rows, by key."""
        queues = {key: self._queue(trainer, key) for key in self.keys}
        belong_together(trainer, list(queues))
        return {key: queue.storage(trainer) for key, queue in queues.items()}

    def _queue(self, trainer: Any, key: str) -> OnlineQueue:
        queue = find_or_create_queue(
            trainer, key, self.queue_length, *self.queue_form(key), gather_distributed=True, device=self.bank_device
        )
        if queue.verbose is None:
            queue.verbose = self.verbose
        return queue

    def _start(self, trainer: Any, pl_module: Any, scorer: Scorer) -> None:
        plan = plan_of(trainer)
        if self.bank_dataloader_idx is not None:
            check_bank_loader(trainer, self.name, self.bank_dataloader_idx)
            if cut := cut_of_bank(trainer, plan, self.bank_dataloader_idx):
                scorer.memory.warn_once("cut", f"{self.title}: {cut}")
        scorer.start(plan, pl_module.device)

    def _is_due(self, trainer: Any, run: _Run) -> bool:
        """Tell whether to score: where the score is monitored also the first time, so that there always is one."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return True
        run.validations += 1
        endless = trainer.num_training_batches == float("inf")  # its one epoch has many validations
        number = run.validations if endless else trainer.current_epoch + 1
        return number % self.every_n_epochs == 0 or (not run.logged and self._is_monitored(trainer))

    def _is_monitored(self, trainer: Any) -> bool:
        """Tell whether a callback or learning rate schedule is to find a score at every validation."""
        monitors = [getattr(callback, "monitor", None) for callback in trainer.callbacks]
        monitors += [schedule.monitor for schedule in trainer.lr_scheduler_configs]
        return any(isinstance(key, str) and key.startswith(f"eval/{self.name}_") for key in monitors)

    def _finish(self, trainer: Any) -> dict[str, Tensor]:
        """Compute what is logged; where no score is due, the last one, so that monitors find it."""
        run = self._run(trainer)
        if not run.scorer.is_scoring:
            return run.logged
        stage = "test" if trainer.state.stage == RunningStage.TESTING else "eval"
        values, self.results = run.scorer.finish(stage)
        for key in [f"{stage}/{part.name}_gallery" for part in self.parts]:
            if pictures := self.results.get(key):
                hand_to_loggers(trainer.loggers, key, pictures, trainer.global_step)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            run.logged = values
        return values

    def _object(self, run: _Run, complaint: str | None) -> None:
        if complaint is None:
            return
        if self.strict:
            raise ValueError(f"{self.title}: {complaint} (strict=True)")
        run.scorer.memory.warn_once("weights", f"{self.title}: {complaint}")
