"""The GPU's part of the benchmark, run small on the CPU: what its rows say is so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from faiss_knn import KNNIndex
from tests.reference import brute_force

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import benchmark
import benchmark_cuda

GPU_REPORT = Path(__file__).parent.parent / "scripts/gpu_report.sh"
CPU = torch.device("cpu")
CASES = [(8, 5), (3, 5), (8, 10)]
PRECISIONS = ("fp32", "TF32", "bf16")
FINDS = [f"mm + topk {p}" for p in PRECISIONS] + ["cdist + topk", "ours flat", "ours fast"]
FINDS_NOTHING = ["read of the bank", *(f"product {p}" for p in PRECISIONS)]


def by_way(records, batch, k):
    return {record["way"]: record for record in records if (record["B"], record["k"]) == (batch, k)}


@pytest.fixture(scope="module")
def records():
    return benchmark_cuda.search_table(5000, 32, CASES, ["clusters"], CPU, 3)


def test_every_way_has_a_row_per_case_with_its_figures(records):
    assert len(records) == len(CASES) * len(FINDS + FINDS_NOTHING)
    for batch, k in CASES:
        rows = by_way(records, batch, k)
        assert set(rows) == set(FINDS + FINDS_NOTHING)
        assert all({"ms", "times_tf32", "times_read", "read_GB_s"} <= row.keys() for row in rows.values())
        assert not any("error" in row for row in rows.values())
        assert all(rows[way]["recall"] is None for way in FINDS_NOTHING)
        assert all(rows[way]["recall"] is not None for way in FINDS)


def test_recall_is_the_share_of_the_float64_neighbours(records):
    rows, queries = (benchmark_cuda.make_rows("clusters", n, 32, seed, CPU) for n, seed in ((5000, 0), (8, 1)))
    _, exact = brute_force(queries.double().numpy(), rows.double().numpy(), 10)
    rounded = (queries.bfloat16() @ rows.bfloat16().T).topk(10, dim=1).indices
    found = sum(len(set(row.tolist()) & set(true.tolist())) for row, true in zip(rounded, exact, strict=True))
    of = by_way(records, 8, 10)
    assert of["mm + topk bf16"]["recall"] == found / 80 < 1
    for way in ("mm + topk fp32", "cdist + topk", "ours flat"):
        assert of[way]["recall"] == 1.0


def test_exact_neighbors_equal_brute_force_over_blocks(monkeypatch):
    monkeypatch.setattr(benchmark_cuda, "_BLOCK", 100)
    rows, queries = torch.randn(250, 8), torch.randn(6, 8)
    _, expected = brute_force(queries.double().numpy(), rows.double().numpy(), 120)
    assert torch.equal(benchmark_cuda.exact_neighbors(rows, queries, 120), torch.from_numpy(expected))


def test_the_projection_is_measured_with_and_without_where_there_is_one():
    table = benchmark_cuda.search_table(1000, 512, [(8, 5)], ["rank 100", "clusters"], CPU, 1)
    dims = {(row["data"], row["way"]): row.get("scan_dims") for row in table}
    assert dims["rank 100", "ours flat"] < 512
    assert dims["rank 100", "ours flat, unprojected"] == dims["clusters", "ours flat"] == 512
    assert ("clusters", "ours flat, unprojected") not in dims
    assert not any("error" in row for row in table)


@pytest.mark.parametrize("kind", benchmark_cuda.KINDS)
def test_the_data_are_unit_vectors_the_same_each_time(kind):
    rows = benchmark_cuda.make_rows(kind, 300, 64, 0, CPU)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(300))
    assert torch.equal(rows, benchmark_cuda.make_rows(kind, 300, 64, 0, CPU))


def test_shares_are_of_the_queries_searched():
    bank = torch.eye(16)
    exact = torch.arange(8)[:, None] * torch.ones(1, 2, dtype=torch.int64) + torch.tensor([0, 1])
    stats = SimpleNamespace(uncertified=5, exact=True, parameters={"scan_dims": 7}, device="cpu")

    def search(queries, k):
        stats.uncertified += 2
        return exact + torch.tensor([0, 100])  # the first is right

    data = benchmark_cuda.Data(bank, bank[:8], exact)
    row = benchmark_cuda.measured(benchmark_cuda.Way(search, SimpleNamespace(stats=stats)), data, 8, 2, 1)
    assert (row["recall"], row["certified"], row["scan_dims"]) == (0.5, 0.75, 7)


def test_a_way_that_fails_leaves_the_others_their_rows(monkeypatch):
    def fills_the_memory(queries, k):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nMore.")

    def cannot_be_made(bank, spec):
        raise RuntimeError("no such\nindex")

    monkeypatch.setattr(benchmark_cuda, "cdist", lambda bank: benchmark_cuda.Way(fills_the_memory))
    monkeypatch.setattr(benchmark_cuda, "ours", cannot_be_made)
    rows = by_way(benchmark_cuda.search_table(500, 16, CASES, ["clusters"], CPU, 1), 8, 10)
    assert {way: row["error"] for way, row in rows.items() if "error" in row} == {
        "cdist + topk": "out of memory",
        "ours flat": "RuntimeError: no such",
        "ours fast": "RuntimeError: no such",
    }
    benchmark.show("failed", list(rows.values()))


def test_ctrl_c_stops_the_table(monkeypatch):
    def interrupted(bank):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_cuda, "cdist", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark_cuda.search_table(500, 16, [(8, 5)], ["clusters"], CPU, 1)


def test_ways_are_timed_in_turns_after_warm_up(monkeypatch):
    called = []
    rounds = benchmark_cuda.in_turns([lambda: called.append("a"), lambda: called.append("b")], 4, CPU)
    assert "".join(called) == "abab" + "ab" * 4
    assert [len(times) for times in rounds] == [2] * 4
    monkeypatch.setattr(benchmark_cuda, "_PATIENCE", 0.0)
    assert len(benchmark_cuda.in_turns([lambda: None], 20, CPU)) == 3


def test_rebuilds_are_measured_beside_the_flat_search():
    flat, ivf = benchmark_cuda.rebuild_table(3000, 32, 600, CPU, 1)
    assert (flat["used"], flat["recall"], flat["device"]) == ("flat", 1.0, "cpu")
    assert (ivf["used"], ivf["backend"]) == ("IVF64,Flat", "faiss")
    rows, queries = (benchmark_cuda.make_rows("clusters", n, 32, seed, CPU) for n, seed in ((3000, 0), (600, 1)))
    found, exact = (KNNIndex(spec).build(rows).search(queries[:64], 20).indices for spec in ("ivf", "flat"))
    assert ivf["recall"] == pytest.approx(benchmark.share_found(found, exact))
    for row in (flat, ivf):
        assert row["rebuild_and_search_s"] == row["rebuild_s"] + row["search_s"]
        assert {"build_s", "flat_search_s", "allocated_MiB", "peak_MiB", "card_MiB"} <= row.keys()


def test_memory_is_told_after_the_first_and_the_last_rebuild(monkeypatch):
    told = iter(range(100))
    monkeypatch.setattr(benchmark_cuda, "memory", lambda device: {"allocated_MiB": next(told)})
    flat, ivf = benchmark_cuda.memory_table(3000, 16, 4, CPU)
    assert (flat["allocated_MiB_after_1"], flat["allocated_MiB_after_4"]) == (1, 2)
    assert (ivf["allocated_MiB_after_1"], ivf["allocated_MiB_after_4"]) == (4, 5)


def test_faiss_never_sees_a_k_that_aborts_the_process():
    way = benchmark_cuda.knn_gpu(torch.zeros(3000, 4), library=None, resources=None, dtype=torch.float32)
    with pytest.raises(ValueError, match="at most 2048"):
        way.search(torch.zeros(1, 4), 2049)


def test_tf32_is_put_back():
    owner = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(owner, "fp32_precision") else "allow_tf32"
    before = getattr(owner, name)
    with benchmark_cuda.tensor_cores(allowed=True):
        assert getattr(owner, name) in ("tf32", True)
    assert getattr(owner, name) == before


def test_without_a_gpu_there_are_no_tables_of_it_and_a_word_about_that(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "installed", lambda name: name == "faiss-gpu-cuvs")
    monkeypatch.setattr(benchmark, "version", lambda name: "1.15.1")
    monkeypatch.setenv("PATH", "")
    assert benchmark_cuda.measurements(quick=True) == {}
    assert capsys.readouterr().out == "no CUDA device, so no GPU tables\n"
    machine = json.loads(json.dumps(benchmark.about_the_machine()))
    assert machine["card"] is machine["driver"] is machine["faiss_on_gpu"] is None
    assert machine["faiss"] == "faiss-gpu-cuvs 1.15.1"


def test_with_a_gpu_its_tables_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("search_table", "rebuild_table", "memory_table"):
        monkeypatch.setattr(benchmark_cuda, name, lambda *given: asked.append(given))
    tables = benchmark_cuda.measurements(quick=False)
    assert list(tables) == ["gpu search", "gpu rebuild", "gpu memory"]
    for measure in tables.values():
        measure()
    assert asked[0][:2] == asked[1][:2] == (1_281_167, 768)
    assert all(torch.device("cuda:0") in given for given in asked)


def test_a_stand_in_makes_all_tables_of_a_gpu():
    tables = {title: measure() for title, measure in benchmark_cuda.measurements(quick=True, stand_in=True).items()}
    assert list(tables) == ["gpu search", "gpu rebuild", "gpu memory"]
    assert all(tables.values())
    assert not any("error" in row for rows in tables.values() for row in rows)


def test_every_product_is_the_product():
    queries, bank = torch.randn(3, 8), torch.randn(2500, 8)
    expected = queries.double() @ bank.double().T
    ways = benchmark.products(queries, bank)
    results = {name: torch.as_tensor(way()) for name, way in ways.items() if "blocks" not in name}
    assert len(results) == len(ways) - 1 == 4
    for result in results.values():
        torch.testing.assert_close(result if len(result) == 3 else result.T, expected.float())


def test_search_is_compared_with_the_fastest_product_and_both_ways_of_faiss():
    records = {row["index"]: row for row in benchmark.search_table([(3000, 16, 8, 5, "random")], 3)}
    assert {"flat", "fast", "auto", "ivf", "naive", "FAISS as it comes", "FAISS, BLAS forced"} == set(records)
    flat = records["flat"]
    assert flat["fastest"] in benchmark.products(torch.zeros(1, 1), torch.zeros(1, 1))
    assert flat["recall"] == 1.0
    assert {"ratio", "to_fastest", "to_fastest_with_rebuild"} <= flat.keys()


def test_company_is_busy_and_leaves():
    with benchmark.company(1):
        pass
    alone, beside = benchmark.busy_table(2000, 16, 8, 1)
    assert alone["other_processes"] == 0
    assert beside["other_processes"] == 2 * os.cpu_count()


def gpu_report(tmp_path, python):
    command = tmp_path / "python"
    command.write_text(f"#!/bin/sh\n{python}\n")
    command.chmod(0o755)
    out = tmp_path / "told.txt"
    environment = os.environ | {"PYTHON": str(command), "STAND_IN": "1", "TABLE_SECONDS": "1"}
    done = subprocess.run(["bash", GPU_REPORT, out], env=environment, capture_output=True, text=True)
    assert done.stdout == out.read_text()
    return done


def test_one_script_tells_all_of_a_gpu_in_one_file(tmp_path):
    done = gpu_report(tmp_path, 'echo "ran $*"')
    assert done.returncode == 0
    assert "tests/gpu" in done.stdout
    assert "benchmarks/benchmark.py --tables gpu" in done.stdout
    assert done.stdout.rstrip().endswith("gpu_report: all parts done")


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path):
    done = gpu_report(tmp_path, 'case "$*" in *"-m pytest"*) exit 3;; *benchmark*) echo begun; sleep 30;; esac')
    assert done.returncode == 1
    assert "-- tests: FAILED with status 3" in done.stdout
    assert "begun" in done.stdout
    assert "-- tables: stopped after 1 s" in done.stdout


def test_the_report_of_a_gpu_takes_no_option_for_its_file():
    done = subprocess.run(["bash", str(GPU_REPORT), "--stand-in"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--stand-in" in done.stderr
