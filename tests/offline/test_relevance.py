"""evaluate_relevance() and eval --relevance, against scikit-learn's distances and the definitions."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_distances

from faiss_knn.measures.judged import judged_metrics, revisited_metrics
from faiss_knn.offline.cli import main
from faiss_knn.offline.relevance import evaluate_relevance

FEATURES, LABELS = load_digits(return_X_y=True)
BANK, QUERIES = FEATURES[:300], FEATURES[300:320]
RANKED = np.argsort(cosine_distances(QUERIES, BANK), axis=1, kind="stable")


def lists_of(names):
    """Rows of the query's class dealt out by the names, and rows of the next class as junk."""
    rows = np.arange(300)
    told = []
    for label in LABELS[300:320]:
        own = rows[LABELS[:300] == label]
        dealt = {name: own[i :: len(names)].tolist() for i, name in enumerate(names)}
        told.append(dealt | {"junk": rows[LABELS[:300] == (label + 1) % 10].tolist()})
    return told


def test_positives_and_junk():
    told = lists_of(["positives"])
    found = evaluate_relevance(BANK, QUERIES, told)
    expected = judged_metrics(RANKED, [one["positives"] for one in told], [one["junk"] for one in told])
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    kept = np.array([~np.isin(np.arange(300), one["junk"]) for one in told])
    right = np.array([np.isin(np.arange(300), one["positives"]) for one in told])
    by_pair = average_precision_score(right[kept], -cosine_distances(QUERIES, BANK)[kept])
    assert found["micro_ap"] == pytest.approx(by_pair, abs=1e-5)
    short = evaluate_relevance(BANK, QUERIES, told, depth=3)
    assert 0 < short["map"] < 0.2


def test_the_command_line_ranks_without_labels(tmp_path, capsys):
    told = lists_of(["easy", "hard"])
    np.save(tmp_path / "bank.npy", BANK)
    np.save(tmp_path / "queries.npy", QUERIES)
    (tmp_path / "told.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    (tmp_path / "told.json").write_text(json.dumps(told))
    files = [str(tmp_path / "bank.npy"), str(tmp_path / "queries.npy")]
    for name in ("told.jsonl", "told.json"):
        out = tmp_path / name.replace(".", "-")
        assert main(["eval", *files, "--relevance", str(tmp_path / name), "--k", "1", "10", "--out", str(out)]) == 0
        printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
        expected = revisited_metrics(RANKED, *([one[x] for one in told] for x in ("easy", "hard", "junk")), ks=[1, 10])
        assert json.loads((out / "relevance.json").read_text()) == pytest.approx(expected)
        assert float(printed["map_medium"]) == pytest.approx(expected["map_medium"], abs=1e-5)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([{"positives": [1]}], "`relevance` must have an entry for each of 20 queries, got 1"),
        ([{"hard": [1]}] * 20, "must have lists of rows by the names easy, hard, junk, or positives, junk"),
        ([{"easy": [1], "hard": [2]}] * 19 + [{"positives": [1]}], r"`relevance\[19\]` must have lists"),
        ([{"positives": [300]}] * 20, r"positives must be rows of the bank, in \[0, 300\), got 300"),
        ([{"positives": [0.5]}] * 20, "positives must be rows of the bank"),
        ([{"positives": "a"}] * 20, "positives must be rows of the bank"),
        ([5] * 20, r"`relevance\[0\]` must have lists of rows by the names .* got 5"),
    ],
)
def test_bad_lists_are_named(told, message):
    with pytest.raises(ValueError, match=message):
        evaluate_relevance(BANK, QUERIES, told)


def test_bad_usage_and_a_file_that_is_no_json(tmp_path, capsys):
    np.save(tmp_path / "bank.npy", BANK)
    (tmp_path / "told.json").write_text("{positives")
    bank = str(tmp_path / "bank.npy")
    arguments = ["eval", bank, bank, "--relevance", str(tmp_path / "told.json")]
    assert main(arguments) == 1
    assert "told.json: cannot be read as JSON" in capsys.readouterr().err
    for more in (["--index", "ivf"], ["--protocol", "dino"], ["--groups", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, *more])
        assert "does not go with --relevance" in capsys.readouterr().err


def test_what_cannot_be_written_to_is_named(tmp_path, capsys):
    for name, rows in (("bank", BANK), ("queries", QUERIES)):
        np.savez(tmp_path / f"{name}.npz", features=rows, labels=np.arange(len(rows)) % 4)
    (tmp_path / "told.json").write_text(json.dumps([{"positives": [1]}] * 20))
    files = [str(tmp_path / f"{name}.npz") for name in ("bank", "queries")]
    for option in (["--explain", "50"], ["--relevance", str(tmp_path / "told.json")]):
        assert main(["eval", *files, *option, "--out", files[0]]) == 1
        assert capsys.readouterr().err == (
            f"faiss-knn: error: {files[0]}: cannot be written (File exists): choose another folder\n"
        )
