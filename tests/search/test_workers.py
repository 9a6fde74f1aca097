"""Threads of our own: they change no setting, no result, and no mode of the thread that asks."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from faiss_knn import KNNIndex
from faiss_knn.search.engines import matrix_product, workers
from faiss_knn.search.engines.workers import numpy_threads, run_alone, run_apart, run_together, threads_for


@pytest.mark.usefixtures("two_threads")
class TestRunTogether:
    def test_each_task_computes_alone_and_all_return_in_order(self):
        def task():
            return torch.get_num_threads(), torch.ones(1000, 1000).sum().item()

        assert run_together([task] * 5) == [(1, 1e6)] * 5
        assert torch.get_num_threads() == 2

    def test_modes_are_those_of_the_thread_that_asks(self):
        values = torch.ones(3, requires_grad=True)
        for inference in (True, False):
            with torch.inference_mode(inference):
                made = run_together([lambda: values * 2] * 2)
                assert [part.is_inference() for part in made] == [inference] * 2
                assert not any(part.requires_grad for part in made)

    def test_an_error_is_raised_where_it_was_asked_for(self):
        def fail():
            raise ValueError("this one")

        with pytest.raises(ValueError, match="this one"):
            run_together([fail, lambda: None])
        assert run_together([lambda: 1, lambda: 2]) == [1, 2]

    def test_on_a_thread_of_ours_both_libraries_compute_alone_and_work_is_shared(self):
        setting = numpy_threads()
        before = None if setting is None else setting.read()

        def search():
            assert threads_for(10, least=10) == 2
            assert threads_for(9, least=10) == 1
            return run_alone(torch.get_num_threads), None if setting is None else setting.read()

        assert run_alone(search) == (1, None if setting is None else 1)
        assert (None if setting is None else setting.read()) == before
        assert threads_for(10, least=10) == 1  # here PyTorch divides its operations

    def test_more_searches_than_threads_wait_for_nobody_in_a_circle(self):
        def search(number):
            parts = run_together([lambda part=part: (number, part) for part in range(5)])
            return run_together([lambda part=part: run_together([lambda: part] * 3) for part in parts])

        found = run_together([lambda number=number: search(number) for number in range(8)])
        assert found == [[[(number, part)] * 3 for part in range(5)] for number in range(8)]

    def test_an_error_in_a_part_is_raised_by_the_search(self):
        def fail():
            raise ValueError("this one")

        with pytest.raises(ValueError, match="this one"):
            run_alone(lambda: run_together([fail, fail, fail]))
        assert run_alone(lambda: run_together([lambda: 1, lambda: 2])) == [1, 2]

    def test_what_runs_apart_divides_nothing_further(self):
        def search():
            assert run_apart([lambda: threads_for(10, least=10), lambda: 7]) == [1, 7]
            return threads_for(10, least=10)

        assert run_alone(search) == 2


_PLACES = """
import os, sys, threading, torch
from faiss_knn.search.engines import workers
from faiss_knn.search.engines.workers import run_alone, run_together
assert workers._runnable() >= 1  # at least this one
workers._runnable = lambda: int(sys.argv[2])
cpus = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cpus)
torch.set_num_threads(int(sys.argv[1]))
meet = threading.Barrier(2)
def task():
    meet.wait()  # on two threads
    return os.sched_getaffinity(0)
places = run_alone(lambda: run_together([task, task]))
after = [os.sched_getaffinity(thread) for thread in workers._pool(os.getpid(), torch.get_num_threads()).threads]
print([sorted(cpus.index(cpu) for cpu in place) for place in places], all(place == set(cpus) for place in after))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="asks for two CPUs of a Linux machine"
)
@pytest.mark.parametrize(
    ("threads", "runnable", "places"),
    [(2, 1, [[[0], [1]], [[1], [0]]]), (2, 2, [[[0, 1], [0, 1]]]), (3, 1, [[[0, 1], [0, 1]]])],
    ids=["as many threads as CPUs", "others run too", "more threads"],
)
def test_threads_that_share_work_have_a_cpu_each_on_a_quiet_machine(threads, runnable, places):
    command = [sys.executable, "-c", _PLACES, str(threads), str(runnable)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in [f"{of_tasks} True" for of_tasks in places]


@pytest.mark.usefixtures("two_threads")
def test_where_threads_may_not_be_placed_they_stay_where_they_are(monkeypatch):
    def refuse(thread, cpus):
        raise PermissionError

    monkeypatch.setattr(workers, "_runnable", lambda: 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda thread: {0, 1}, raising=False)
    monkeypatch.setattr("os.sched_setaffinity", refuse, raising=False)
    assert run_alone(lambda: run_together([lambda: 1, lambda: 2])) == [1, 2]


@pytest.mark.usefixtures("two_threads")
def test_where_a_thread_is_not_told_its_cpu_none_is_placed(monkeypatch):
    placed = []
    monkeypatch.setattr(workers, "_runnable", lambda: 1)
    monkeypatch.setattr(workers, "_libc", lambda: SimpleNamespace(sched_getcpu=lambda: -1))
    monkeypatch.setattr("os.sched_getaffinity", lambda thread: {0, 1}, raising=False)
    monkeypatch.setattr("os.sched_setaffinity", lambda thread, cpus: placed.append(cpus), raising=False)
    assert run_alone(lambda: run_together([lambda: 1, lambda: 2])) == [1, 2]
    assert placed == []


@pytest.mark.skipif(sys.platform != "linux", reason="threads are placed on Linux alone")
@pytest.mark.usefixtures("two_threads")
def test_a_thread_that_may_not_be_placed_keeps_no_other_from_being_set_free(monkeypatch):
    placed = {}

    def refuse_the_first(thread, cpus):
        if thread == workers._pool(os.getpid(), 2).threads[0]:
            raise PermissionError
        placed[thread] = cpus

    monkeypatch.setattr(workers, "_runnable", lambda: 1)
    monkeypatch.setattr(workers, "_libc", lambda: SimpleNamespace(sched_getcpu=lambda: 0))
    monkeypatch.setattr("os.sched_getaffinity", lambda thread: {0, 1}, raising=False)
    monkeypatch.setattr("os.sched_setaffinity", refuse_the_first, raising=False)
    run_alone(lambda: None)
    assert list(placed.values()) == [{0, 1}]


@pytest.mark.parametrize("least_part", [0, 1 << 30], ids=["queries divided", "rows divided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype, least_part, monkeypatch):
    monkeypatch.setattr(matrix_product, "has_fast_bfloat16", lambda device: dtype == torch.bfloat16)
    monkeypatch.setattr(matrix_product, "prefers_numpy", lambda: False)
    for name in ("scan._ALONE", "rerank._ALONE", "scan._LEAST_WORK"):
        monkeypatch.setattr(f"faiss_knn.search.engines.{name}", 0)
    monkeypatch.setattr("faiss_knn.search.engines.scan._LEAST_PART", least_part)
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30_000, 16, generator=generator), torch.randn(300, 16, generator=generator)
    bank[5000:5040] = bank[77]  # equal distances are ordered by index, whoever found them
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            index = KNNIndex().build(bank)
            assert index.stats.parameters["scan_dtype"] == str(dtype).removeprefix("torch.")
            found.append(index.search(queries, 20))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.indices, found[0].indices)
        assert torch.equal(other.distances, found[0].distances)


def test_searches_leave_threads_alone_and_a_fresh_process_too():
    code = """
import threading, torch
from faiss_knn import KNNIndex
torch.set_num_threads(2)
said, asked, answered = [], threading.Event(), threading.Event()
def other():
    said.append(torch.get_num_threads()); asked.wait(); said.append(torch.get_num_threads()); answered.set()
threading.Thread(target=other).start()
from faiss_knn.search.engines import rerank, scan
rerank._ALONE = scan._ALONE = scan._LEAST_WORK = scan._LEAST_PART = 0
bank = torch.randn(20000, 16)
KNNIndex().build(bank).search(bank[:256], 5)
asked.set(); answered.wait()
threading.Thread(target=lambda: said.append(torch.get_num_threads())).start()
print(torch.get_num_threads(), *said)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"2"}
