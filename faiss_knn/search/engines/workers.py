"""Threads that each compute by themselves, where PyTorch's own would wait for each other at every step.

PyTorch divides each operation among its threads and ends it with a barrier. Where another process has one of the cores
(data loaders, other trainings), every barrier waits for the thread that has lost its core: a scan of many small blocks
then takes ten times as long. Here each thread takes whole blocks, and all meet once.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

T = TypeVar("T")


def threads_for(work: int, least: int) -> int:
    """Return how many threads to run tasks on: below `least` work, to begin and to meet costs more than barriers.

    Then a task runs where it is, and PyTorch divides its operations.
    """
    return torch.get_num_threads() if work >= least else 1


def run_together(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks at once, each on one thread, where there are several; return what they return.

    Raises:
        Exception: The first of the tasks' own.
    """
    if len(tasks) < 2:
        return [task() for task in tasks]
    is_inference = torch.is_inference_mode_enabled()

    def run(task: Callable[[], T]) -> T:
        with torch.inference_mode(is_inference), torch.no_grad():  # both are a thread's own
            return task()

    pool = _pool(os.getpid(), torch.get_num_threads())
    return [future.result() for future in [pool.submit(run, task) for task in tasks]]


@cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """Return `count` threads on each of which PyTorch computes alone; a forked process has none of its parent's."""
    pool, barrier = ThreadPoolExecutor(count, "faiss-knn"), Barrier(count)

    def alone() -> None:
        torch.get_num_threads()  # a thread takes over the process's number when it is first asked, and not after that
        torch.set_num_threads(1)  # of this thread, and of those that begin until it is put back below
        barrier.wait()

    for started in [pool.submit(alone) for _ in range(count)]:
        started.result()
    torch.set_num_threads(count)
    return pool
