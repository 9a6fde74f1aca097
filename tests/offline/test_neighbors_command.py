"""`faiss-knn neighbors` and `faiss-knn verify` as their user meets them."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from faiss_knn import exact_neighbors
from faiss_knn.offline import resumable_neighbors, streaming
from faiss_knn.offline.cli import main

DIGITS = load_digits().data[:500]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("bank.npy", DIGITS[:400])
    np.savez("queries.npz", features=DIGITS[400:], labels=np.full(100, 0.5))  # labels that eval would refuse
    return tmp_path


def test_lists_are_written_and_certified(files, capsys):
    assert main(["neighbors", "bank.npy", "queries.npz", "--k", "5", "--distance", "euclidean", "--out", "gt.npz"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "100 lists of 5 neighbours among 400 rows of 64 numbers, euclidean"
    assert out.splitlines()[2] == "written to gt.npz"
    assert err == ""
    expected = exact_neighbors(DIGITS[:400], DIGITS[400:], 5, distance_metric="euclidean")
    with np.load("gt.npz") as held:
        np.testing.assert_array_equal(held["indices"], expected.indices)
        np.testing.assert_array_equal(held["distances"], expected.distances)
    assert sorted(path.name for path in files.iterdir()) == ["bank.npy", "gt.npz", "queries.npz"]
    assert main(["verify", "gt.npz", "bank.npy", "queries.npz", "--distance", "euclidean", "--at-least", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "100 lists, 5 neighbours each of 400 rows, euclidean"
    assert lines[1].split()[-1] == lines[2].split()[-1] == "1.000000"
    assert not any(line.startswith("worst") for line in lines)


def test_a_bank_alone_is_searched_without_each_row_itself(files, capsys):
    assert main(["neighbors", "bank.npy", "--k", "3", "--out", "own.parquet"]) == 0
    assert main(["neighbors", "bank.npy", "--k", "3", "--include-self", "--out", "self.ibin"]) == 0
    assert "written to self.ibin and self.fbin" in capsys.readouterr().out
    for name, excluded in (("own.parquet", True), ("self.ibin", False)):
        assert main(["verify", name, "bank.npy", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["excludes_self"], report["recall_ids"], report["wrong_distances"]) == (excluded, 1.0, 0)


def test_wrong_lists_are_told_and_can_fail_a_check(files, capsys):
    indices = exact_neighbors(DIGITS[:400], DIGITS[400:], 5, distance_metric="cosine").indices.numpy()
    indices[3] = -1
    np.save("found.npy", indices)
    command = ["verify", "found.npy", "bank.npy", "queries.npz"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "recall by distance  0.990000" in out
    assert "wrong distances     none given" in out
    assert "worst queries       3 (0.000)" in out
    assert main([*command, "--at-least", "0.99"]) == 0
    assert main([*command, "--at-least", "0.995"]) == 3


def test_a_stopped_run_says_what_goes_on(files, capsys, monkeypatch):
    save = resumable_neighbors.SearchedPieces.save

    def stopped(self, *found):
        save(self, *found)
        raise KeyboardInterrupt

    command = ["neighbors", "bank.npy", "queries.npz", "--out", "gt.npz"]
    monkeypatch.setattr(resumable_neighbors.SearchedPieces, "save", stopped)
    assert main(command) == 130
    assert capsys.readouterr().err == "faiss-knn: stopped: gt.npz.parts has what was found, the same command goes on\n"
    monkeypatch.setattr(resumable_neighbors.SearchedPieces, "save", save)
    assert main(command) == 0
    assert not (files / "gt.npz.parts").exists()


KILLED = """
import os, signal, sys
from faiss_knn.offline import resumable_neighbors, streaming
from faiss_knn.offline.cli import main
streaming.BANK_BLOCK_BYTES = 4 * 64 * 100
save = resumable_neighbors.SearchedPieces.save
def killed(self, first, searched, found):
    save(self, first, searched, found)
    if searched == 200:
        os.kill(os.getpid(), signal.SIGKILL)
resumable_neighbors.SearchedPieces.save = killed
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(files, monkeypatch):
    rows = np.lib.format.open_memmap("mapped.npy", "w+", np.float32, (400, 64))
    rows[:] = DIGITS[:400]
    rows.flush()
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 100)
    command = ["neighbors", "mapped.npy", "queries.npz", "--k", "5", "--out"]
    done = subprocess.run([sys.executable, "-c", KILLED, *command, "gt.npz"], cwd=files, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (files / "gt.npz").exists()
    with np.load("gt.npz.parts/queries-0000000000.npz") as held:
        assert held["searched"] == 200
    assert main([*command, "gt.npz"]) == 0
    assert main([*command, "whole.npz"]) == 0
    assert (files / "gt.npz").read_bytes() == (files / "whole.npz").read_bytes()
    assert not (files / "gt.npz.parts").exists()


@pytest.mark.parametrize("name", ["gt.npz", "gt.h5", "gt.parquet", "graph.npz", "cosine.h5", "gt.ibin"])
def test_the_distance_that_a_file_says_is_taken(files, capsys, name):
    metric = "cosine" if name in ("cosine.h5", "gt.ibin") else "manhattan"
    graph = ["--graph", "distances"] if name == "graph.npz" else []
    assert main(["neighbors", "bank.npy", "queries.npz", "--distance", metric, "--out", name, *graph]) == 0
    assert main(["verify", name, "bank.npy", "queries.npz", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["distance_metric"], report["recall_ids"], report["wrong_distances"]) == (metric, 1.0, 0)


def test_another_distance_than_that_of_the_lists_is_suspected(files, capsys):
    assert main(["neighbors", "bank.npy", "queries.npz", "--k", "3", "--distance", "euclidean", "--out", "gt.h5"]) == 0
    for distance, err in (("euclidean", ""), ("cosine", "most distances are not those of --distance cosine")):
        assert main(["verify", "gt.h5", "bank.npy", "queries.npz", "--distance", distance]) == 0
        assert err in (said := capsys.readouterr().err)
        assert bool(said) is bool(err)


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("neighbors bank.npy", 2, "the following arguments are required: --out"),
        ("neighbors bank.npy --out a.npz --k 0", 2, "must be a positive whole number"),
        ("neighbors bank.npy --out a.npz --symmetric", 2, "--symmetric is of a --graph"),
        ("neighbors bank.npy queries.npz --out a.npz --graph distances --symmetric", 2, "leave QUERIES out"),
        ("neighbors bank.npy queries.npz --out a.npz --include-self", 2, "leave QUERIES out"),
        ("neighbors bank.npy --out a.txt", 1, "a.txt: neighbours are not written as '.txt'"),
        ("neighbors bank.npy --out bank.npy/a.npz", 1, "a.npz: bank.npy is a file, not a folder"),
        ("neighbors none.npy --out a.npz", 1, "none.npy: no such file"),
        ("verify bank.npy bank.npy", 1, "`indices` must be a (Q, K) array of row numbers"),
        ("verify none.bin bank.npy", 1, "none.bin: no such file"),
        ("verify bank.npy bank.npy --at-least 2", 2, "must be in (0, 1]"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(files, capsys, command, status, message):
    with pytest.raises(SystemExit) as end:
        sys.exit(main(command.split()))
    assert end.value.code == status
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
