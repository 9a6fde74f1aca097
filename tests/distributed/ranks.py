"""Real processes for the tests of many ranks: forked once, joined anew into a gloo group for each job."""

import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
GRACE = 5.0  # seconds the other ranks get once one has failed
IMPORTS = 100.0  # seconds that a process may take until it knows the function: the first waits for Lightning's import
# Before the first import, for threads survive no fork. The resolver knows no name for a machine without a network.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT),  # for what is imported before pytest's own path is known
}


class RankFailed(Exception):
    """A job raised on some rank, died, or did not end in time; the message holds every rank's traceback."""


class Ranks:
    """A pool of up to `size` processes that run one function per job, each as one rank of a fresh gloo group.

    They are forks of one process that has imported what they need and done nothing with it.
    A job has a hard time limit: what has not ended by then is killed, and the test fails instead of hanging. Its time
    begins when all ranks have imported what they run.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("forkserver")
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int = 2,
        timeout: float = 60.0,
        group_timeout: float | None = None,
    ) -> list[Any]:
        """Run `function(*args)` (importable by name) on `ranks` ranks; its return values in rank order.

        `group_timeout`: seconds after which a collective fails; None: as long as the job may take.
        """
        self._start()
        workers = self._workers[:ranks]
        with tempfile.TemporaryDirectory() as folder:
            job = {"store": str(Path(folder) / "store"), "ranks": ranks, "port": _free_port()}
            job["timeout"] = group_timeout or timeout
            for rank, (_, pipe) in enumerate(workers):
                pipe.send((function, args, {**job, "rank": rank}))
            pipes = [pipe for _, pipe in workers]
            results = self._collect(pipes, IMPORTS)
            if all(good for good, _ in results):
                results = self._collect(pipes, timeout)
        failures = [f"rank {rank}: {value}" for rank, (good, value) in enumerate(results) if not good]
        if failures:
            raise RankFailed("\n".join(failures))
        return [value for _, value in results]

    def close(self) -> None:
        """End every process."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        _start_server()
        while len(self._workers) < self.size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, pipes: list[Connection], timeout: float) -> list[tuple[bool, Any]]:
        results: list[tuple[bool, Any]] = [(False, f"no answer within {timeout:g} s")] * len(pipes)
        waiting, deadline = list(pipes), time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(waiting, left):
                assert isinstance(pipe, Connection)
                waiting.remove(pipe)
                try:
                    results[pipes.index(pipe)] = pipe.recv()
                except EOFError:
                    results[pipes.index(pipe)] = (False, "the process died")
                if not results[pipes.index(pipe)][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if not all(good for good, _ in results):
            self.close()  # a rank may still stand in a collective; the next job starts afresh
        return results


def _start_server() -> None:
    """Start the process that the others are forks of, unless it runs."""
    forkserver.set_forkserver_preload(["pytest", "tests.distributed.runs"])
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()


def _serve(pipe: Connection) -> None:
    """What each process does: jobs, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests behind itself has it ignored
    while True:
        try:
            function, args, job = pipe.recv()  # imports the function's module
        except EOFError:
            return
        pipe.send((True, "ready"))
        try:
            pipe.send((True, _as_rank(function, args, job)))
        except BaseException:  # the test must see whatever it was
            pipe.send((False, traceback.format_exc()))


def _as_rank(function: Callable[..., Any], args: tuple[Any, ...], job: dict[str, Any]) -> Any:
    import torch  # which the process that forks has, and pytest need not
    import torch.distributed as dist

    torch.set_num_threads(1)
    # What torchrun sets: Lightning's ddp strategy takes its ranks from here.
    os.environ.update(
        {
            "RANK": str(job["rank"]),
            "LOCAL_RANK": str(job["rank"]),
            "WORLD_SIZE": str(job["ranks"]),
            "LOCAL_WORLD_SIZE": str(job["ranks"]),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(job["port"]),
            "TORCHELASTIC_RUN_ID": "tests",
        }
    )
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job['store']}",
        rank=job["rank"],
        world_size=job["ranks"],
        timeout=timedelta(seconds=job["timeout"]),
    )
    try:
        result = function(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
