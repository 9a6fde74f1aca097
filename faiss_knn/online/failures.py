"""What becomes of an error on one rank that the others do not share: raised on all, or at least told to all.

Errors between two meetings of a validation are agreed on (`faiss_knn.distributed`). A training step has no meeting,
for it is to cost nothing: what goes wrong there is kept until the ranks meet anyway. What comes from elsewhere (the
user's own step, a signal) ends one rank alone, and the others when their collective breaks or the process group's
timeout has passed; the first leaves word in the group's store, where the others read why.
"""

import json
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from loguru import logger

from faiss_knn.distributed import is_raised_together, raise_together, rank_and_size
from faiss_knn.online.trainer_state import trainer_state

_KEY = "faiss_knn/stopped"
_PATIENCE = 3.0  # seconds in which ranks that lost the others wait for each other's word


@contextmanager
def kept(trainer: Any) -> Iterator[None]:
    """Keep an error of one of several ranks until all of them meet and raise it (`settle`).

    Raised at once it would leave the others waiting in the backward pass of their next step. One rank alone raises.
    """
    try:
        yield
    except Exception as error:
        if rank_and_size()[1] == 1:
            raise
        state = trainer_state(trainer)
        if "failure" not in state:
            state["failure"] = error
            logger.error(
                f"rank {rank_and_size()[0]} takes in no more rows, and all ranks stop where they meet next (the end of "
                f"the epoch, a validation or a checkpoint): {type(error).__name__}: {error}"
            )


def settle(trainer: Any) -> None:
    """Raise on all ranks what one of them kept; all must call it.

    Raises:
        Exception: As `raise_together`.
    """
    raise_together(trainer_state(trainer).pop("failure", None))


def settle_first_step(trainer: Any, callback: Any) -> None:
    """Settle after a fit's first training step, where most mistakes show; at the later steps do nothing."""
    met = trainer_state(trainer).setdefault("met", set())
    if callback not in met:
        met.add(callback)
        settle(trainer)


def start(trainer: Any) -> None:
    """Forget what earlier runs left: at the beginning of one, where all ranks are about to meet."""
    state = trainer_state(trainer)
    state.pop("failure", None)
    state.pop("met", None)
    if rank_and_size()[1] > 1 and "words" not in state:
        state["words"] = _count(_store())


def tell(trainer: Any, error: BaseException) -> None:
    """Leave word of why this rank stops, or find out which rank stopped before it and why: the error gets a note.

    Several callbacks may be told of one error, of which the first does it.
    """
    said = trainer_state(trainer).pop("words", None)
    if said is None or is_raised_together(error):
        return
    rank, signalled = rank_and_size()[0], _signal_behind(error)
    lost = signalled is None and _lost_contact(error)
    what = f"{type(error).__name__}: {error}" if signalled is None else signalled
    try:
        store = _store()
        _leave_word(store, {"rank": rank, "error": what, "lost": lost})
        reason = _reason(store, said) if lost else "the other ranks stop in their next collective"
    except Exception as unreachable:  # the store ends with the process of rank 0
        reason = f"the process group's store does not answer ({unreachable}): rank 0 may have stopped first"
    if lost:
        error.add_note(reason)
    logger.error(f"rank {rank} stopped with {what}: {reason}")


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _count(store: Any) -> int:
    count: int = store.add(_KEY, 0)
    return count


def _leave_word(store: Any, word: dict[str, Any]) -> None:
    store.set(f"{_KEY}/{store.add(_KEY, 1)}", json.dumps(word))


def _signal_behind(error: BaseException) -> str | None:
    """Name the signal in whose handler an error arose: Lightning's one for SIGTERM waits for the other ranks."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        number = frame.f_locals.get("signum")
        if isinstance(number, int):
            return signal.Signals(number).name
    return None


def _lost_contact(error: BaseException) -> bool:
    """Tell whether a collective failed, which is another rank's doing or the network's."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _reason(store: Any, before: int) -> str:
    """Collect what other ranks said since they had said `before` words; those that can still speak are waited for."""
    _, size = rank_and_size()
    deadline = time.monotonic() + _PATIENCE
    while True:
        words = _words(store, before)
        first = next((word for word in words if not word["lost"]), None)
        if first is not None:
            return f"rank {first['rank']} failed before, with {first['error']}"
        silent = sorted(set(range(size)) - {word["rank"] for word in words})
        if not silent:
            return "every rank lost contact with another, and none had failed before: look at the network"
        if time.monotonic() > deadline:
            return f"nothing is heard from rank {', '.join(map(str, silent))}: killed, hanging or still waiting itself"
        time.sleep(0.05)


def _words(store: Any, before: int) -> list[dict[str, Any]]:
    keys = [f"{_KEY}/{number}" for number in range(before + 1, _count(store) + 1)]
    return [json.loads(store.get(key)) for key in keys if store.check([key])]
