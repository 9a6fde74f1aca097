"""OnlineQueue: the most recent rows of a training run, one ring buffer per key and trainer."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from loguru import logger
from torch import Tensor

from faiss_knn.distributed import all_or_none, rank_and_size
from faiss_knn.online.batch import find_tensor, was_skipped
from faiss_knn.online.checkpoint_rows import own_rows, put_back, rows_of_all_ranks, rows_of_stable_pretraining
from faiss_knn.online.failures import kept, settle, settle_first_step, start, tell
from faiss_knn.online.ring import (
    Dim,
    QueueStorage,
    RingBuffer,
    align,
    as_device_or_none,
    as_dtype,
    row_shape,
    shaped_rows,
)
from faiss_knn.online.trainer_state import trainer_state
from faiss_knn.online.weights_watch import AVERAGED, remember
from faiss_knn.search.inputs import as_key, as_positive, as_switch

__all__ = [
    "OnlineQueue",
    "RingBuffer",
    "align_all",
    "belong_together",
    "find_or_create_queue",
    "find_or_create_queue_callback",
]


class OnlineQueue(Callback):
    """Keep the most recent rows that training saw under a key.

    At the end of each training batch `outputs[key]`, or else `batch[key]`, is appended to a `RingBuffer` (its own rows
    on every rank). Queues of one key in one trainer share their storage: the first of them in `trainer.callbacks`
    appends, and each reads its own most recent rows. The storage belongs to the trainer and survives its runs, so that
    `trainer.validate` after `trainer.fit` still has rows. A checkpoint holds it once per key. Queues that one
    `OnlineKNN` reads stay together: a step that an error or interrupt ends leaves all of its rows or none.

    Args:
        key: Name of the tensor in the step's outputs or batch.
        queue_length: Rows kept, per rank.
        dim: Trailing shape of a row; for an int, rows of more dimensions are flattened and 1-D values get a column.
            None: the shape of the first batch.
        dtype: dtype of the storage. None: that of the first batch.
        gather_distributed: Whether `data` holds the rows of every rank, rank after rank.
        verbose: Whether to log `queue/{key}_fill_pct` (percent) at each step.
        persistent: Whether checkpoints hold the rows.
        device: Where the rows are kept; None: the module's device. "cpu" beside a module on a GPU: in page-locked
            memory, into which training copies without waiting.

    Raises:
        ValueError: If `queue_length` is not positive.

    Example:
        >>> queue = OnlineQueue("embedding", queue_length=1000, dim=64)
        >>> queue.key, queue.queue_length, queue.data is None  # outside of a validation
        ('embedding', 1000, True)
    """

    def __init__(
        self,
        key: str,
        queue_length: int,
        dim: Dim = None,
        dtype: torch.dtype | None = None,
        gather_distributed: bool = False,
        verbose: bool | None = None,
        *,
        persistent: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        self.key = as_key(key, "`key`")
        self.queue_length = as_positive(queue_length, "queue_length")
        self.dim = _checked_dim(dim)
        self.dtype = as_dtype(dtype)
        self.gather_distributed = as_switch(gather_distributed, "gather_distributed")
        self.verbose = None if verbose is None else as_switch(verbose, "verbose")
        self.persistent = as_switch(persistent, "persistent")
        self.device = as_device_or_none(device)
        self._evaluating: Any = None
        self._told_checkpoint_cost = False

    @property
    def state_key(self) -> str:
        """Name of the rows in a checkpoint, from the key alone: another length or gather mode finds them too."""
        return f"OnlineQueue[key={self.key}]"

    @property
    def data(self) -> Tensor | None:
        """The snapshot, (n, *shape), oldest row first, during validation (or test); otherwise None with a warning.

        It is read when first asked for: with `gather_distributed` and several ranks, ask on all of them.
        """
        if self._evaluating is None:
            logger.warning("! no queue snapshot available, called outside validation?")
            return None
        return self.snapshot(self._evaluating)

    def snapshot(self, trainer: Any, gathered: bool | None = None) -> Tensor:
        """Copy of this queue's most recent rows in `trainer`, read once per validation run for all that ask.

        Args:
            trainer: Whose rows.
            gathered: Whether of every rank, in which case all ranks must ask; None: as `gather_distributed` says.

        Returns:
            (n, *shape), oldest first; (0,) while the shape is unknown.
        """
        storage, until = self.storage(trainer), _common_end(trainer, self.key)
        return storage.snapshot(self.queue_length, self.gather_distributed if gathered is None else gathered, until)

    def storage(self, trainer: Any) -> QueueStorage:
        """Return the storage of this key in `trainer`, made or grown to `queue_length` as needed."""
        storages = trainer_state(trainer).setdefault("queues", {})
        if self.key not in storages:
            module_device = getattr(trainer.lightning_module, "device", None)
            device = self.device or module_device
            pin_memory = getattr(module_device, "type", "cpu") == "cuda" and device == torch.device("cpu")
            storages[self.key] = QueueStorage(RingBuffer(self.queue_length, self.dim, self.dtype, device, pin_memory))
        storage: QueueStorage = storages[self.key]
        storage.ring.resize(max(storage.ring.length, self.queue_length))
        return storage

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        with all_or_none():
            start(trainer)
            self.storage(trainer)
            _stand_before_checkpoints(trainer.callbacks, self)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._is_first(trainer):
            return
        with kept(trainer):
            self._take_in(trainer, pl_module, outputs, batch)
        settle_first_step(trainer, self)

    def _take_in(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any) -> None:
        if was_skipped(pl_module, outputs):
            return
        ring = self.storage(trainer).ring
        rows = shaped_rows(find_tensor(self.key, outputs, batch, "OnlineQueue"), self.dim)
        try:
            ring.append(rows)
        except ValueError as error:
            raise ValueError(f"OnlineQueue[{self.key}]: {error}") from error
        if self.verbose:
            pl_module.log(f"queue/{self.key}_fill_pct", 100.0 * len(ring) / ring.length)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._is_first(trainer):
            settle(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluating = trainer
        if self._is_first(trainer):
            with all_or_none():
                settle(trainer)
                align_all(trainer)
                self.storage(trainer).start_validation()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluating = trainer

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._evaluating = None
        self.storage(trainer).end_validation()

    on_test_start = on_validation_start
    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if not (self.persistent and self._is_first(trainer)):
            return
        saved, totals = self._rows_of_all_ranks(trainer)
        if saved is None:
            return
        checkpoint.setdefault("callbacks", {})[self.state_key] = {"rows": saved, "totals": totals}
        if not self._told_checkpoint_cost:
            logger.info(f"OnlineQueue[{self.key}] adds {sum(r.nbytes for r in saved):,} bytes to each checkpoint")
            self._told_checkpoint_cost = True

    def _rows_of_all_ranks(self, trainer: Any) -> tuple[list[Tensor] | None, list[int]]:
        """Gather what a checkpoint holds on rank zero, a tensor per rank; and how many rows there ever were."""
        ring, end = self.storage(trainer).ring, _common_end(trainer, self.key)
        if rank_and_size()[1] > 1 and trainer.interrupted:
            # Not every rank need have failed, and one alone would wait for the others for ever.
            logger.warning(f"OnlineQueue[{self.key}]: saved after an exception, with the rows of one rank only")
            rows, total = own_rows(ring, end)
            return [rows.cpu()], [total]
        with all_or_none():
            settle(trainer)
            return rows_of_all_ranks(ring, end)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        with all_or_none():
            self._load(trainer, checkpoint)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        tell(trainer, exception)
        align_all(trainer)
        self._free(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._free(trainer)

    def _free(self, trainer: Any) -> None:
        """Forget the snapshot and the trainer, also where a validation ended early."""
        self._evaluating = None
        self.storage(trainer).end_validation()

    def _load(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("callbacks", {})
        state = states.get(self.state_key) or rows_of_stable_pretraining(checkpoint, self.key)
        if not self._is_first(trainer) or not state:
            return
        averaged = "averaging_state" in checkpoint and trainer.state.fn != TrainerFn.FITTING
        remember(trainer, AVERAGED if averaged else None)
        put_back(self.storage(trainer).ring, state["rows"], state.get("totals", []), f"OnlineQueue[{self.key}]")
        states[self.state_key] = {}  # Lightning would deep-copy the rows once more for load_state_dict

    def _is_first(self, trainer: Any) -> bool:
        return next((q for q in _queues(trainer, self.key)), self) is self


def find_or_create_queue(
    trainer: Any,
    key: str,
    queue_length: int,
    dim: Dim = None,
    dtype: torch.dtype | None = None,
    gather_distributed: bool = False,
    create_if_missing: bool = True,
    *,
    device: torch.device | str | None = None,
) -> OnlineQueue:
    """Find the `OnlineQueue` of a key among `trainer.callbacks`, or append one.

    A queue of that key but another length or gather mode shares its storage with the new one.

    Args:
        trainer: The Lightning trainer.
        key: Name of the tensor in the step's outputs or batch.
        queue_length: Rows wanted, per rank.
        dim: As in `OnlineQueue`; taken over from a queue of that key if not given.
        dtype: As in `OnlineQueue`; taken over likewise.
        gather_distributed: As in `OnlineQueue`.
        create_if_missing: Whether to append a queue. If not, one of another length will do, with a warning.
        device: As in `OnlineQueue`, for a queue that is appended.

    Returns:
        The queue, set up if the trainer has its module already.

    Raises:
        ValueError: If there is none and `create_if_missing` is False, or one has another dim or dtype.
    """
    queue_length, dtype = as_positive(queue_length, "queue_length"), as_dtype(dtype)
    gather_distributed = as_switch(gather_distributed, "gather_distributed")
    same_key = _queues(trainer, key)
    for queue in same_key:
        _check_same(key, "dim", row_shape(queue.dim), row_shape(dim))
        _check_same(key, "dtype", queue.dtype, dtype)
        if (queue.queue_length, queue.gather_distributed) == (queue_length, gather_distributed):
            return queue
    if not create_if_missing:
        return _instead(same_key, trainer, key, queue_length)
    if same_key:
        dim, dtype = dim or same_key[0].dim, dtype or same_key[0].dtype
    queue = OnlineQueue(key, queue_length, dim, dtype, gather_distributed, device=device)
    trainer.callbacks.insert(_before_checkpoints(trainer.callbacks), queue)
    if getattr(trainer, "lightning_module", None) is not None:
        queue.storage(trainer)
    return queue


find_or_create_queue_callback = find_or_create_queue  # the name that stable-pretraining's has


def _stand_before_checkpoints(callbacks: list[Any], queue: OnlineQueue) -> None:
    place = _before_checkpoints(callbacks)
    if queue in callbacks[place:]:
        callbacks.remove(queue)
        callbacks.insert(place, queue)


def _before_checkpoints(callbacks: Sequence[Any]) -> int:
    """Find where a queue must stand for a checkpoint at the end of a step to hold that step's rows."""
    saves = ("Checkpoint" in {base.__name__ for base in type(callback).__mro__} for callback in callbacks)
    return next((place for place, saving in enumerate(saves) if saving), len(callbacks))


def belong_together(trainer: Any, keys: Sequence[str]) -> None:
    """Note that the rows of these keys, and of those that one of them shares a step with, are of the same samples."""
    groups: list[set[str]] = trainer_state(trainer).setdefault("together", [])
    joined = set(keys).union(*(group for group in groups if group & set(keys)))
    groups[:] = [group for group in groups if not group & joined] + [joined]


def align_all(trainer: Any) -> None:
    """Let the queues that belong together end with the same sample, wherever a step was interrupted."""
    for group in trainer_state(trainer).get("together", []):
        if (dropped := align(_rings(trainer, group))) and rank_and_size()[0] == 0:
            logger.warning(
                f"OnlineQueue: the last {dropped} rows of some of {', '.join(sorted(group))} have no counterpart in "
                "the others (a step was interrupted, or they were saved at different times) and are dropped"
            )


def _rings(trainer: Any, keys: Iterable[str]) -> list[RingBuffer]:
    storages = trainer_state(trainer).get("queues", {})
    return [storages[key].ring for key in keys if key in storages]


def _common_end(trainer: Any, key: str) -> int | None:
    """Tell up to which row all keys that belong to this one have come: in the midst of a step, up to that step."""
    group = next((group for group in trainer_state(trainer).get("together", []) if key in group), {key})
    return min((ring.total for ring in _rings(trainer, group) if len(ring)), default=None)


def _checked_dim(dim: Any) -> Dim:
    shape = row_shape(dim)
    return shape if shape is None or isinstance(dim, Sequence) else shape[0]


def _queues(trainer: Any, key: str) -> list[OnlineQueue]:
    return [c for c in trainer.callbacks if isinstance(c, OnlineQueue) and c.key == key]


def _check_same(key: str, what: str, has: object, requested: object) -> None:
    if has is not None and requested is not None and has != requested:
        raise ValueError(
            f"the OnlineQueue of key '{key}' has {what}={has}, {what}={requested} was asked for: "
            "give both the same, or leave one out"
        )


def _instead(same_key: list[OnlineQueue], trainer: Any, key: str, queue_length: int) -> OnlineQueue:
    if not same_key:
        available = sorted({c.key for c in trainer.callbacks if isinstance(c, OnlineQueue)})
        raise ValueError(f"No OnlineQueue found for key '{key}'. Available queues: {available}")
    queue = same_key[0]
    logger.warning(
        f"the OnlineQueue of key '{key}' holds {queue.queue_length} rows, not the {queue_length} asked for; using it"
    )
    return queue
