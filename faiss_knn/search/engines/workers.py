"""Threads that each compute by themselves, where PyTorch's own would wait for each other at every step.

PyTorch divides each operation among its threads and ends it with a barrier, and so does numpy's BLAS. Where another
process has one of the cores (data loaders, other trainings), every barrier waits for the thread that has lost its core:
a scan of many small blocks then takes ten times as long. And where nobody has it, the threads of the one library, which
go on spinning for some milliseconds, are in the way of the other's. Here one thread goes through a whole search, in
which both libraries compute on the thread that asks; what is worth dividing is taken in parts by all, who meet once.

In a virtual machine Linux cannot tell a CPU that sleeps from one that its host has taken away. It wakes threads on the
CPU of the one that wakes them, where they wait for some milliseconds, and Python's lock wakes them at every turn. So
where nothing else runs, and there are as many threads as CPUs, each stays on one of its own through a search.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple, TypeVar

import torch
from numpy.linalg import _umath_linalg

from faiss_knn.search.precision import SharedSetting

T = TypeVar("T")


class _Here(threading.local):
    count = 0  # of our threads that may share its work, on one of them


_here = _Here()


def threads_for(work: int, least: int) -> int:
    """Return how many threads to divide work among: on one of ours all of them, from `least` work on; else 1."""
    return max(1, _here.count) if work >= least else 1


def run_alone(task: Callable[[], T]) -> T:
    """Run a task on one of our threads and return what it returns.

    PyTorch and numpy compute on that thread alone, and `run_together` divides what it is given among all of them.

    Raises:
        Exception: The task's own.
    """
    if _here.count:
        return task()
    pool, is_quiet = _pool(os.getpid(), torch.get_num_threads()), _runnable() == 1

    def run() -> T:
        with _each_on_a_cpu(pool.threads) if is_quiet else nullcontext():
            return task()

    return _submitted(run, pool).result()


def run_together(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks at once, each on one of our threads, where there are several; return what they return.

    Raises:
        Exception: One of the tasks' own.
    """
    if len(tasks) < 2:
        return [task() for task in tasks]
    pool = _pool(os.getpid(), _here.count or torch.get_num_threads())
    if not _here.count:
        return [future.result() for future in [_submitted(task, pool) for task in tasks]]
    futures = [_submitted(task, pool) for task in tasks]
    # What no other thread has begun is done by this one, which they may be waiting for in turn. The last come first.
    waiting = reversed(list(zip(tasks, futures, strict=True)))
    return [task() if future.cancel() else future.result() for task, future in waiting][::-1]


def run_apart(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks at once as `run_together` does, but divide nothing of theirs: each is one thread's own.

    Raises:
        Exception: One of the tasks' own.
    """

    def undivided(task: Callable[[], T]) -> T:
        count, _here.count = _here.count, 1
        try:
            return task()
        finally:
            _here.count = count

    return run_together([partial(undivided, task) for task in tasks])


class _Pool(NamedTuple):
    executor: ThreadPoolExecutor
    threads: list[int]  # as Linux numbers them


def _submitted(task: Callable[[], T], pool: _Pool) -> Future[T]:
    is_inference = torch.is_inference_mode_enabled()

    def run() -> T:
        # The first two are a thread's own.
        with torch.inference_mode(is_inference), torch.no_grad(), one_thread_of_numpy():
            return task()

    return pool.executor.submit(run)


@cache
def _pool(process: int, count: int) -> _Pool:  # noqa: ARG001
    """Return `count` threads on each of which PyTorch computes alone; a forked process has none of its parent's."""
    executor, barrier = ThreadPoolExecutor(count, "faiss-knn"), Barrier(count)

    def alone() -> int:
        _here.count = count
        torch.get_num_threads()  # a thread takes over the process's number when it is first asked, and not after that
        torch.set_num_threads(1)  # of this thread, and of those that begin until it is put back below
        barrier.wait()
        return threading.get_native_id()

    threads = [started.result() for started in [executor.submit(alone) for _ in range(count)]]
    torch.set_num_threads(count)
    return _Pool(executor, threads)


def _runnable() -> int:
    """Return how many threads of this machine have or wait for a CPU, this one included; 0 where that is not known."""
    try:
        return int(Path("/proc/loadavg").read_bytes().split()[3].split(b"/")[0])
    except (OSError, LookupError, ValueError):
        return 0


@contextmanager
def _each_on_a_cpu(threads: Sequence[int]) -> Iterator[None]:
    """Keep threads, of which this is one, each on a CPU of its own, where there are as many."""
    cpus = os.sched_getaffinity(0) if sys.platform == "linux" else set()
    cpu = _libc().sched_getcpu() if len(cpus) == len(threads) else -1
    if cpu not in cpus:  # -1 also where the system does not say
        yield
        return
    here = threading.get_native_id()
    others = iter(cpus - {cpu})
    _place({thread: {cpu} if thread == here else {next(others)} for thread in threads})
    try:
        yield
    finally:
        _place(dict.fromkeys(threads, cpus))


def _place(places: dict[int, set[int]]) -> None:
    for thread, cpus in places.items():
        with suppress(OSError):  # it may be forbidden, or a CPU be gone: then it stays where it is
            os.sched_setaffinity(thread, cpus)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def one_thread_of_numpy() -> AbstractContextManager[None]:
    """Have numpy's BLAS multiply on the thread that asks, as PyTorch does on a thread of ours."""
    setting = numpy_threads()
    return nullcontext() if setting is None else setting.held_at(1)


@cache
def numpy_threads() -> SharedSetting | None:
    """Find on how many threads numpy's bundled OpenBLAS runs; None for another BLAS."""
    try:
        library = ctypes.CDLL(_umath_linalg.__file__)  # it is linked to it
    except OSError:
        return None
    for name in ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}"):
        read, write = (getattr(library, name.format(f"{verb}_num_threads"), None) for verb in ("get", "set"))
        if read is not None and write is not None:
            return _setting(read, write)
    return None


def _setting(read: Any, write: Any) -> SharedSetting:
    read.argtypes, read.restype = (), ctypes.c_int
    write.argtypes, write.restype = (ctypes.c_int,), None
    return SharedSetting(read, write)
