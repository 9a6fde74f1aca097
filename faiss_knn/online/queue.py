"""OnlineQueue: the most recent rows of a training run, one ring buffer per key and trainer."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from loguru import logger
from torch import Tensor

from faiss_knn.online.failures import kept, settle, settle_first_step, start, tell
from faiss_knn.online.lookup import find_tensor, was_skipped
from faiss_knn.online.resume import rows_of_rank, rows_of_stable_pretraining, total_of_rank
from faiss_knn.online.state import trainer_state
from faiss_knn.online.weights import AVERAGED, remember
from faiss_knn.search.inputs import as_integer, as_key, as_positive, shown
from faiss_knn.search.ranks import agreed, gather_rows, gather_to, share, world

Dim = int | Sequence[int] | None


class RingBuffer:
    """The last `length` rows appended, in one preallocated tensor.

    Position and fill are Python integers, so an append is one slice copy (two where it wraps): no sort, no copy of the
    buffer, no device synchronisation. What is not given is taken from the first rows.

    Args:
        length: Rows kept.
        dim: Trailing shape of a row: d, or a shape. None: that of the first rows.
        dtype: None: that of the first rows.
        device: None: that of the first rows.
        pin_memory: Whether a CPU buffer is page-locked, so that rows from a GPU are copied without waiting for them.

    Raises:
        ValueError: If `length` is not positive.

    Example:
        >>> ring = RingBuffer(3)
        >>> ring.append(torch.tensor([1, 2]))
        >>> ring.append(torch.tensor([3, 4]))
        >>> ring.latest(), ring.latest(2), len(ring)
        (tensor([2, 3, 4]), tensor([3, 4]), 3)
    """

    def __init__(
        self,
        length: int,
        dim: Dim = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.length = as_positive(length, "`length`")
        self.shape = _row_shape(dim)
        self.dtype = _checked_dtype(dtype)
        self.device = _checked_device(device)
        self.pin_memory = pin_memory
        self._widens = dtype is None
        self._rows: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        # Where the next row goes, how many are filled, how many there ever were, and how many of the oldest an append
        # under way overwrites: replaced as one, so that an interrupt finds either the old rows or the new ones.
        self._state = 0, 0, 0, 0
        if self.shape is not None and dtype is not None and device is not None:
            self._rows = self._empty(self.shape)

    def __len__(self) -> int:
        _, filled, _, torn = self._state
        return min(filled, self.length - torn)

    @property
    def total(self) -> int:
        """How many rows were ever appended: the number of the next one. Rings of one step compare theirs."""
        return self._state[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the filled rows take."""
        return 0 if self._rows is None else self._rows[: len(self)].nbytes

    def append(self, rows: Tensor) -> None:
        """Copy rows in, the oldest making room; of more than `length` rows the last are kept.

        Args:
            rows: (n, *shape); detached, and cast to the buffer's dtype and device by the copy.

        Raises:
            ValueError: If they are no dense tensor of rows, their trailing shape is not the buffer's, or its dtype was
                given and cannot hold theirs.
        """
        _check_rows(rows)
        if self._rows is None or rows.shape[1:] != self.shape:
            self._allocate_for(rows)
        if rows.dtype != self.dtype:
            self._hold(rows.dtype)
        assert self._rows is not None
        rows = rows.detach()
        given = rows.shape[0]
        rows = rows[-self.length :] if given > self.length else rows
        n, start, filled, total = len(rows), self._state[0], len(self), self._state[2]
        self._state = start, filled, total, n
        fits = min(n, self.length - start)
        self._rows[start : start + fits].copy_(rows[:fits], non_blocking=self.pin_memory)
        if fits < n:
            self._rows[: n - fits].copy_(rows[fits:], non_blocking=self.pin_memory)
        if self.pin_memory and rows.is_cuda:
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        self._state = (start + n) % self.length, min(self.length, filled + n), total + given, 0

    def latest(self, n: int | None = None, *, until: int | None = None) -> Tensor:
        """Copy out the `n` most recent rows, oldest first; all of them for None.

        Args:
            n: Rows wanted.
            until: Number of the first row that is too new; None: none is.

        Returns:
            (min(n, len), *shape); (0,) as long as nothing told the shape.
        """
        if self._rows is None:
            return torch.empty(0, *(self.shape or ()), dtype=self.dtype, device=self.device)
        if self._copied is not None:
            self._copied.synchronize()
        newer = 0 if until is None else min(max(0, self.total - until), len(self))
        n = len(self) - newer if n is None else min(as_integer(n, "`n`"), len(self) - newer)
        start = (self._state[0] - newer - n) % self.length
        if start + n <= self.length:
            return self._rows[start : start + n].clone()
        return torch.cat([self._rows[start:], self._rows[: start + n - self.length]])

    def resize(self, length: int) -> None:
        """Change the length and keep the most recent rows that fit."""
        if length != self.length:
            self.replace(self.latest(length), length, self.total)

    def replace(self, rows: Tensor | None, length: int | None = None, total: int | None = None) -> None:
        """Forget every row, then append `rows`; None leaves it empty.

        Args:
            rows: (n, *shape).
            length: The new length; None: as it is.
            total: How many rows there ever were; None: these.
        """
        length = length or self.length
        if self._rows is not None and length != self.length:
            self._rows = None
        given = 0 if rows is None else len(rows)
        self.length, self._state = length, (0, 0, 0 if total is None else total - given, 0)
        if rows is not None and given:
            self.append(rows)

    def count_from(self, total: int) -> None:
        """Let `total` be so many, and the next row's number with it."""
        start, filled, _, torn = self._state
        self._state = start, filled, total, torn

    @property
    def is_torn(self) -> bool:
        """Whether an append was interrupted, which took the oldest rows' places and is not to be read."""
        return self._state[3] > 0

    def drop_newest(self, n: int) -> None:
        """Forget the `n` most recent rows, as if they had not come; at most all."""
        start, kept, total = self._state[0], len(self), self.total
        forgotten = min(n, kept)
        self._state = (start - forgotten) % self.length, kept - forgotten, total - n, 0

    def drop_older(self, number: int) -> None:
        """Forget the rows before row `number`."""
        self._state = self._state[0], min(len(self), max(0, self.total - number)), self.total, 0

    def _hold(self, dtype: torch.dtype) -> None:
        """Make sure that rows of another dtype lose nothing but the precision that was asked for."""
        assert self.dtype is not None
        wider = _common_dtype(dtype, self.dtype)
        if wider == self.dtype or (not self._widens and self.dtype.is_floating_point and not dtype.is_complex):
            return
        if not self._widens:
            raise ValueError(
                f"`rows` must fit into the buffer's {self.dtype}, got {dtype}: cast them, or give no dtype"
            )
        rows, self._rows, self.dtype = self._rows, None, wider
        if rows is not None:
            widened = self._empty(tuple(rows.shape[1:]))
            widened.copy_(rows)
            self._rows = widened

    def _allocate_for(self, rows: Tensor) -> None:
        shape = tuple(rows.shape[1:])
        if self.shape is not None and shape != self.shape:
            raise ValueError(f"`rows` must have shape (n, {', '.join(map(str, self.shape))}), got {tuple(rows.shape)}")
        self.shape = shape
        self.dtype = self.dtype or rows.dtype
        self.device = self.device or rows.device
        self._rows = self._empty(shape)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        with torch.inference_mode(False):  # an inference tensor could not be written to in training
            return torch.empty(self.length, *shape, dtype=self.dtype, device=self.device, pin_memory=self.pin_memory)


class QueueStorage:
    """The rows of one key in one trainer, and what was read of them for the validation run under way."""

    def __init__(self, ring: RingBuffer) -> None:
        self.ring = ring
        self._validating = False
        self._local: Tensor | None = None
        self._gathered: tuple[Tensor, list[int]] | None = None

    def start_validation(self) -> None:
        """From here to `end_validation` the rows stay as they are, and are read and gathered once."""
        self.end_validation()  # a run that an exception ended left its snapshot behind
        self._validating = True

    def end_validation(self) -> None:
        """Free the snapshot."""
        self._validating = False
        self._local = self._gathered = None

    def snapshot(self, length: int, gathered: bool, until: int | None = None) -> Tensor:
        """Copy of the last `length` rows, oldest first; `gathered`: of every rank, rank after rank.

        With several ranks and `gathered`, all must ask together. `until`: as in `RingBuffer.latest`.
        """
        if not gathered or world()[1] == 1:
            return self._own(until)[-length:]
        with agreed():
            return self._of_all_ranks(length, until)

    def _own(self, until: int | None) -> Tensor:
        local = self.ring.latest(until=until) if self._local is None else self._local
        if self._validating:
            self._local = local
        return local

    def _of_all_ranks(self, length: int, until: int | None) -> Tensor:
        rows, counts = self._gathered or gather_rows(self._own(until))
        if self._validating:
            self._gathered = rows, counts
            self._local = torch.split(rows, counts)[world()[0]]  # not a second copy
        if max(counts) <= length:
            return rows
        return torch.cat([part[-length:] for part in torch.split(rows, counts)])


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
        self.dtype = _checked_dtype(dtype)
        self.gather_distributed = gather_distributed
        self.verbose = verbose
        self.persistent = persistent
        self.device = _checked_device(device)
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
        """The storage of this key in `trainer`, made or grown to `queue_length` as needed."""
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
        with agreed():
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
        ring.append(as_rows(find_tensor(self.key, outputs, batch, "OnlineQueue"), self.dim))
        if self.verbose:
            pl_module.log(f"queue/{self.key}_fill_pct", 100.0 * len(ring) / ring.length)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._is_first(trainer):
            settle(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._evaluating = trainer
        if self._is_first(trainer):
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
        """What a checkpoint holds, one tensor per rank, on rank zero, which writes it; and how many there ever were."""
        ring, end = self.storage(trainer).ring, _common_end(trainer, self.key)
        total = ring.total if end is None else min(ring.total, end)
        if world()[1] > 1 and trainer.interrupted:
            # Not every rank need have failed, and one alone would wait for the others for ever.
            logger.warning(f"OnlineQueue[{self.key}]: saved after an exception, with the rows of one rank only")
            return [ring.latest(until=total).cpu()], [total]
        with agreed():
            settle(trainer)
            return gather_to(ring.latest(until=total)), share(total)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        with agreed():
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
        saved, ring = state["rows"], self.storage(trainer).ring
        rank, size = world()
        rows = rows_of_rank(saved, rank, size)
        averaged = "averaging_state" in checkpoint and trainer.state.fn != TrainerFn.FITTING
        remember(trainer, AVERAGED if averaged else None)
        ring.replace(rows if len(rows) else None, total=total_of_rank(state.get("totals", []), rank, size))
        if len(rows) > ring.length and len(saved) != size and rank == 0:
            logger.warning(
                f"OnlineQueue[{self.key}]: the checkpoint of {len(saved)} ranks has {len(rows):,} rows for each of "
                f"{size}, of which the last {ring.length:,} fit: raise queue_length to keep them"
            )
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
    same_key = _queues(trainer, key)
    for queue in same_key:
        _check_same(key, "dim", _row_shape(queue.dim), _row_shape(dim))
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
    """Where a queue must stand for a checkpoint at the end of a step to hold that step's rows."""
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
        if (dropped := align(_rings(trainer, group))) and world()[0] == 0:
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


def align(rings: Sequence[RingBuffer]) -> int:
    """Let rings that are appended to together end with the same row, also after an interrupt in between.

    A ring without rows begins where the others are. Rings of one length also begin with the same row, where the
    interrupted step took the place of others.

    Returns:
        How many rows were dropped of the ring that was furthest ahead.

    Example:
        >>> features, labels = RingBuffer(4), RingBuffer(4)
        >>> features.append(torch.tensor([1, 2, 3]))
        >>> labels.append(torch.tensor([1, 2]))
        >>> align([features, labels]), features.latest()
        (1, tensor([1, 2]))
    """
    end = min((ring.total for ring in rings if len(ring)), default=0)
    ahead = [ring.total - end if len(ring) else 0 for ring in rings]
    cut = [ring for ring, rows in zip(rings, ahead, strict=True) if rows or ring.is_torn]
    for ring, rows in zip(rings, ahead, strict=True):
        if rows:
            ring.drop_newest(rows)
        elif ring.total != end:
            ring.count_from(end)
    for ring in rings:
        if begins := [other.total - len(other) for other in cut if other.length == ring.length]:
            ring.drop_older(max(begins))
    return max(ahead, default=0)


def as_rows(values: Tensor, dim: Dim) -> Tensor:
    """Give values the trailing shape that an int `dim` asks for: flattened, or with a column added."""
    if isinstance(dim, int) and values.ndim != 2:
        return values.unsqueeze(1) if values.ndim == 1 else values.flatten(1)
    return values


def _check_rows(rows: Any) -> None:
    if not isinstance(rows, Tensor) or rows.layout != torch.strided or rows.is_nested or rows.ndim == 0:
        raise ValueError(f"`rows` must be a dense tensor with one row per sample, got {_described(rows)}")


def _described(rows: Any) -> str:
    return f"a {rows.layout} one" if isinstance(rows, Tensor) and rows.layout != torch.strided else shown(rows)


def _checked_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"`dtype` must be a torch dtype, such as torch.float32, or None, got {shown(dtype)}")
    return dtype


def _checked_device(device: Any) -> torch.device | None:
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`device` must be a torch device or its name, got {shown(device)}") from error


def _checked_dim(dim: Any) -> Dim:
    shape = _row_shape(dim)
    return shape if shape is None or isinstance(dim, Sequence) else shape[0]


def _row_shape(dim: Any) -> tuple[int, ...] | None:
    if dim is None:
        return None
    sizes = tuple(dim) if isinstance(dim, Sequence) and not isinstance(dim, str) else (dim,)
    return tuple(as_positive(size, "`dim`") for size in sizes)


def _common_dtype(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """Return a dtype that holds every value of both; where none does (int64 beside float32), float64."""
    wider = [one, other, torch.int16, torch.int32, torch.int64, torch.float32]
    return next((dtype for dtype in wider if _holds(dtype, one) and _holds(dtype, other)), torch.float64)


def _holds(wide: torch.dtype, dtype: torch.dtype) -> bool:
    """Tell whether each value of `dtype` is one of `wide` too."""
    if wide == dtype or wide.is_complex or dtype.is_complex:
        return wide == dtype or (wide.is_complex and torch.promote_types(wide, dtype) == wide)
    if dtype.is_floating_point:
        few, many = torch.finfo(dtype), torch.finfo(wide) if wide.is_floating_point else None
        return many is not None and many.eps <= few.eps and many.max >= few.max and many.tiny <= few.tiny
    low, high = _range(dtype)
    if wide.is_floating_point:
        return high <= 2 / torch.finfo(wide).eps
    return _range(wide)[0] <= low and high <= _range(wide)[1]


def _range(dtype: torch.dtype) -> tuple[int, int]:
    return (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _queues(trainer: Any, key: str) -> list[OnlineQueue]:
    return [c for c in trainer.callbacks if isinstance(c, OnlineQueue) and c.key == key]


def _check_same(key: str, what: str, has: object, wanted: object) -> None:
    if has is not None and wanted is not None and has != wanted:
        raise ValueError(
            f"the OnlineQueue of key '{key}' has {what}={has}, {what}={wanted} was asked for: "
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
