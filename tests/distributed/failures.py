"""Errors put into one rank, wherever it computes."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.overrides import TorchFunctionMode

from faiss_knn.distributed import all_gather_object, all_or_none, rank_and_size

# While bytes travel, a rank that stops can tell the others nothing: such errors come from outside.
TRAVELLING = {"_exchange", "_broadcast", "_point_to_point"}


KINDS: tuple[type[BaseException], ...] = (MemoryError, ValueError, KeyboardInterrupt)


class FailAt(TorchFunctionMode):
    """Raise `error` at the n-th use of torch, counted from 0; `reached` tells whether there were that many."""

    def __init__(self, n: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error, self.reached = n, error, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (self.reached or _is_transfer(func)):
            self.left -= 1
            if self.left < 0:
                self.reached = True
                raise self.error
        return func(*args, **(kwargs or {}))


def _is_transfer(func: Any) -> bool:
    if (getattr(func, "__module__", None) or "").startswith("torch.distributed"):
        return True
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in TRAVELLING:
            return True
        frame = frame.f_back
    return False


def said_by(step: Callable[[], Any], failing: int, n: int, error: BaseException) -> tuple[bool, str]:
    """Whether a step got as far as the n-th use of torch on the rank `failing`, and what it raised on this rank."""
    fail = FailAt(n if rank_and_size()[0] == failing else sys.maxsize, error)
    try:
        with fail, all_or_none():
            step()
    except BaseException as raised:  # KeyboardInterrupt too
        return fail.reached, f"{type(raised).__name__}: {raised}"
    return fail.reached, "nothing"


def failed_everywhere(step: Callable[[], Any], failing: int, every: int) -> tuple[list[str], list[str]]:
    """Let a step fail at every so many of its uses of torch in turn, with one kind of error after the other.

    Returns:
        What the rank `failing` was to raise each time, and what this rank raised.
    """
    errors: list[str] = []
    heard: list[str] = []
    while True:
        error = KINDS[len(heard) % len(KINDS)](f"use {len(heard) * every}")
        reached, message = said_by(step, failing, len(heard) * every, error)
        if not any(all_gather_object(reached)):
            return errors, heard
        errors.append(f"{type(error).__name__}: {error}")
        heard.append(message)


def in_step(errors: list[str], heard: list[str], rank: int, failing: int) -> bool:
    """Whether this rank heard of each error, as its own or as that of the rank `failing`."""
    if rank == failing:
        return heard == errors
    kinds = ["ValueError" if error.startswith("ValueError") else "RuntimeError" for error in errors]
    told = f"rank {failing} failed, so rank {rank} stops too"
    return heard == [f"{kind}: {told}: {error}" for kind, error in zip(kinds, errors, strict=True)]


def fail_in(callback: Any, hook: str, failing: int, n: int) -> None:
    """Let a callback's hook fail at its n-th use of torch, each time it is called on the rank `failing`."""
    original = getattr(callback, hook)

    def hooked(*args: Any, **options: Any) -> Any:
        with FailAt(n if rank_and_size()[0] == failing else sys.maxsize, MemoryError("no room")):
            return original(*args, **options)

    setattr(callback, hook, hooked)
