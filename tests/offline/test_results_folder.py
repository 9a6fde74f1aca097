"""A folder of results: it only grows, tells data apart by all of their content, and shows what it holds, no more."""

import csv
import json

import numpy as np
import pytest

from faiss_knn import EvalReport, evaluate
from faiss_knn.offline.cli import main
from faiss_knn.offline.report.results import Classes, record_key
from faiss_knn.offline.report.results_folder import ResultsFolder

RNG = np.random.default_rng(0)
LABELS, TRUTH = RNG.integers(0, 4, 400), RNG.integers(0, 4, 60)
BANK = (np.eye(4, 8)[LABELS] + 0.3 * RNG.standard_normal((400, 8))).astype(np.float32)
QUERIES = (np.eye(4, 8)[TRUTH] + 0.3 * RNG.standard_normal((60, 8))).astype(np.float32)


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "bank.npz", features=BANK, labels=LABELS)
    np.savez(tmp_path / "queries.npz", features=QUERIES, labels=TRUTH)
    return str(tmp_path / "bank.npz"), str(tmp_path / "queries.npz")


def run(files, out, options, code=0):
    assert main(["eval", *files, *options.split(), "--out", str(out)]) == code


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def points(folder):
    return sorted((record["spec"], record["k"]) for record in records(folder))


@pytest.mark.parametrize("resume", ["", " --resume"])
def test_a_second_command_adds(files, tmp_path, resume):
    out = tmp_path / "out"
    run(files, out, "--k 1 --index flat IVF4,Flat")
    first = records(out)
    run(files, out, "--k 1 --index HNSW8" + resume)
    run(files, out, "--k 1 --index flat --distance euclidean" + resume)
    run([files[0], files[0]], out, "--k 1" + resume)
    run(files[:1], out, "--k 1 --leave-one-out" + resume)
    run(files, out, "--k 1 --per-class 3" + resume)
    found = records(out)
    assert found[:2] == first
    assert len(found) == 2 + 5
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(row["spec"], float(row["top1"])) for row in rows] == [(r["spec"], r["top1"]) for r in found]
    assert {row["query_file"] for row in rows} == {*files, ""}
    page = (out / "report.html").read_text()
    assert "5 evaluations" in page
    assert "queries bank.npz" in page
    assert "HNSW8" in page
    assert len(list(out.glob("per_class*.png"))) == 5
    by_class = list(csv.DictReader((out / "per_class.csv").read_text().splitlines()))
    assert len(by_class) == 7 * 4
    assert len({row["evaluation"] for row in by_class}) == 5


def test_what_is_there_of_the_same_content_is_not_done_again(files, tmp_path, monkeypatch):
    from faiss_knn.search.index import KNNIndex

    out = tmp_path / "out"
    run(files, out, "--k 1 5 --index flat IVF4,Flat")
    before = records(out)
    again = [str(tmp_path / f"other_{i}.npz") for i in range(2)]  # other names, other format of the file: same content
    for path, features, labels in zip(again, (BANK, QUERIES), (LABELS, TRUTH), strict=True):
        np.savez_compressed(path, features=features, labels=labels)
    monkeypatch.setattr(KNNIndex, "build", None)
    run(again, out, "--k 1 5 --index flat IVF4,Flat --resume")
    assert records(out) == before


@pytest.mark.parametrize("change", ["most rows", "one number of the bank", "one number of the queries", "a label"])
def test_other_content_under_the_same_name_is_other_data(files, tmp_path, capsys, change):
    out = tmp_path / "out"
    run(files, out, "--k 1")
    bank, queries, labels = BANK.copy(), QUERIES.copy(), LABELS.copy()
    if change == "most rows":  # all but those that a sample of 1,000 rows would have in the same places
        bank = RNG.standard_normal(bank.shape).astype(np.float32)
        bank[::20] = BANK[::20]
    elif change == "one number of the bank":
        bank[123, 4] += 1
    elif change == "one number of the queries":
        queries[7, 1] += 1
    else:
        labels[200] = (labels[200] + 1) % 4
    np.savez(files[0], features=bank, labels=labels)
    np.savez(files[1], features=queries, labels=TRUTH)
    capsys.readouterr()
    run(files, out, "--k 1 --resume")
    assert len(records(out)) == 2
    want = evaluate(bank, labels, queries, TRUTH, k=1).records[0]["top1"]
    assert records(out)[1]["top1"] == want
    assert f"{100 * want:.2f}" in capsys.readouterr().out
    assert len({record["data"] for record in records(out)}) == 2
    assert "data " in (out / "report.md").read_text()


def rows_of_costs(out):
    """The cells of the report's table of costs, by index."""
    lines = (out / "report.md").read_text().split("## What each index costs")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0].split()[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_indexes_are_compared_at_one_depth(files, tmp_path):
    out = tmp_path / "out"
    near = " --weighting softmax --temperature 0.0001"  # the nearest decides: k = 1 is as good as 20, and the first
    run(files, out, "--k 1 --index HNSW4" + near)
    run(files, out, "--k 1 20 --index flat IVF32,Flat" + near)
    found = rows_of_costs(out)
    assert found["HNSW4"]["recall@20"] == found["HNSW4"]["queries/s"] == found["HNSW4"]["lost at worst"] == "–"
    by_key = {(record["spec"], record["k"]): record for record in records(out)}
    assert found["IVF32,Flat"]["recall@20"] == f"{100 * by_key['IVF32,Flat', 20]['recall']:.2f}"
    assert "not searched for 20 neighbours at k = 20" in (out / "report.md").read_text()
    on_front = {
        row["spec"] for row in csv.DictReader((out / "results.csv").read_text().splitlines()) if row["pareto"] == "True"
    }
    assert "flat" in on_front
    assert "HNSW4" not in on_front
    run(files, out, "--k 20 --index HNSW4" + near)
    found = rows_of_costs(out)
    alone = next(r for r in records(out) if (r["spec"], r["k"]) == ("HNSW4", 20))
    assert found["HNSW4"]["recall@20"] == f"{100 * alone['recall']:.2f}"


def test_indexes_that_share_no_depth_have_a_report(files, tmp_path):
    run(files, tmp_path / "out", "--k 1 --index flat")
    run(files, tmp_path / "out", "--k 20 --index HNSW4 IVF4,Flat")
    assert rows_of_costs(tmp_path / "out")["flat"]["recall@20"] == "–"
    assert not (tmp_path / "out" / "cost.png").exists()


def test_made_again_it_replaces_the_old_record(files, tmp_path):
    out = tmp_path / "out"
    run(files, out, "--k 1 --index flat IVF4,Flat")
    old = records(out)
    run(files, out, "--k 1")
    new = records(out)
    assert [record["spec"] for record in new] == ["flat", "IVF4,Flat"]
    assert new[0]["search_s"] != old[0]["search_s"]
    assert new[1] == old[1]


def test_another_depth_is_another_record_but_no_second_row_of_the_page(files, tmp_path):
    out = tmp_path / "out"
    run(files, out, "--k 1")
    run(files, out, "--k 1 5")
    assert points(out) == [("flat", 1), ("flat", 1), ("flat", 5)]
    assert "evaluations" not in (out / "report.html").read_text()
    assert (out / "report.md").read_text().count("| flat | 1 | 0.07 |") == 1


def test_overwrite_forgets_but_not_before_there_is_something_new(files, tmp_path):
    out = tmp_path / "out"
    run(files, out, "--k 1 5 --index flat IVF4,Flat --save-neighbors")
    (out / "notes.txt").write_text("mine")
    before = records(out)
    run(files, out, "--overwrite --index IVF4096,Flat", code=1)
    assert records(out) == before
    run(files, out, "--k 3 --overwrite")
    assert points(out) == [("flat", 3)]
    assert sorted(path.name for path in out.iterdir()) == [
        "notes.txt", "outcomes.npz", "per_class.csv", "per_class.jsonl", "per_class.png", "report.html", "report.md",
        "results.csv", "results.jsonl",
    ]  # fmt: skip
    assert "IVF4" not in (out / "report.html").read_text()


def test_neighbours_of_each_evaluation_are_kept(files, tmp_path):
    out = tmp_path / "out"
    run(files, out, "--k 2 --save-neighbors")
    run(files, out, "--k 2 --index IVF4,Flat --save-neighbors")
    run(files, out, "--k 3 --distance euclidean --save-neighbors")
    first, second = sorted(out.glob("neighbors*.npz"))
    held = {path.name: np.load(path) for path in (first, second)}
    assert held["neighbors.npz"]["indices/flat"].shape == held["neighbors.npz"]["indices/IVF4,Flat"].shape == (60, 2)
    (other,) = (arrays for name, arrays in held.items() if name != "neighbors.npz")
    assert other["indices/flat"].shape == (60, 3)


def report(**options):
    return evaluate(BANK, LABELS, QUERIES, TRUTH, **options)


def test_from_python_a_folder_grows_too_and_is_read_back(tmp_path):
    one, two = report(k=(1, 5)), report(k=1, distance_metric="euclidean")
    one.save(tmp_path)
    assert EvalReport.load(tmp_path).records == one.records
    two.save(tmp_path)
    both = EvalReport.load(tmp_path)
    assert both.records == one.records + two.records
    assert both.per_class.keys() == one.per_class.keys() | two.per_class.keys()
    assert both.checks == two.checks
    two.save(tmp_path, overwrite=True)
    assert EvalReport.load(tmp_path).records == two.records
    with pytest.raises(ValueError, match="holds no records"):
        EvalReport.load(tmp_path / "nothing")


FIELDS = [f"retrieval_{x}" for x in ("precision", "hit_rate", "recall", "map", "ndcg", "mrr", "r_precision", "map_r")]


def test_retrieval_metrics_of_each_class_are_in_the_files(tmp_path, files):
    truth = np.where(TRUTH == 3, 2, TRUTH)  # no query has the last class
    found = evaluate(BANK, LABELS, QUERIES, truth, k=(1, 5), depth=300)
    assert EvalReport.load(found.save(tmp_path)).retrieval_by_class.keys() == found.per_class.keys()
    run(files, tmp_path, "--k 1 --per-class 3 --depth 5")
    rows = list(csv.DictReader((tmp_path / "per_class.csv").read_text().splitlines()))
    for record in found.records:
        of_record = [row for row in rows if row["k"] == str(record["k"]) and row["evaluation"].startswith("1.")]
        assert list(of_record[0])[7:-1] == FIELDS
        assert [of_record[3][name] for name in ("score", *FIELDS)] == 9 * [""]
        for name in FIELDS:
            values = [float(row[name]) for row in of_record[:3]]
            assert values == found.retrieval_by_class[record_key(record)][name][:3]
            macro = record[name.replace("retrieval_", "retrieval_macro_")]
            assert np.mean(values) == pytest.approx(macro)
            assert np.average(values, weights=np.bincount(truth)) == pytest.approx(record[name])
    (few,) = [record for record in records(tmp_path) if record["per_class"]]
    of_few = [float(row["retrieval_recall"]) for row in rows if row["evaluation"].startswith("2.")]
    assert np.mean(of_few) == pytest.approx(few["retrieval_macro_recall"])


def test_a_results_folder_survives_a_cut(tmp_path):
    made = report(k=(1, 2, 3, 4)).records
    results_folder = ResultsFolder(tmp_path)
    for record in made[:3]:
        results_folder.add(record, Classes([0.5, float("nan")], {"retrieval_map": [0.25, float("nan")]}))
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"spec": "fl')
    again = ResultsFolder(tmp_path, resume=True)
    assert again.done == made[:3]
    assert "1 lines are no whole records" in again.warning
    again.add(made[3], Classes([], {}))
    assert ResultsFolder(tmp_path, resume=True).done == made
    assert EvalReport.load(tmp_path).retrieval_by_class[record_key(made[2])] == {"retrieval_map": [0.25, None]}
    assert ResultsFolder(tmp_path, resume=True).warning is None
    assert ResultsFolder(tmp_path).done == []
    assert records(tmp_path) == made


@pytest.mark.parametrize("odd", ["null", "[1]", "3", '"text"', "{}", "without recall", "recall in words", '{"spec"'])
def test_odd_lines_are_passed_over_with_one_warning(files, tmp_path, capsys, odd):
    out = tmp_path / "out"
    run(files, out, "--k 1")
    before = records(out)
    if odd == "without recall":
        odd = json.dumps({name: value for name, value in before[0].items() if name != "recall"})
    elif odd == "recall in words":
        odd = json.dumps(before[0] | {"recall": "high"})
    (out / "results.jsonl").write_text("\n" + odd + "\n" + json.dumps(before[0]) + "\n" + odd + "\n")
    with pytest.warns(UserWarning, match="2 lines are no whole records"):
        assert EvalReport.load(out).records == before
    capsys.readouterr()
    run(files, out, "--k 1 5 --resume")
    err = capsys.readouterr().err
    assert err.count("2 lines are no whole records: moved to results.odd.jsonl") == 1
    assert points(out) == [("flat", 1), ("flat", 1), ("flat", 5)]  # the first of another depth
    assert (out / "results.odd.jsonl").read_text().splitlines() == [odd, odd]


def test_a_file_that_is_something_else_is_left_alone(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="not a results file"):
        ResultsFolder(tmp_path / "out")
    run(files, tmp_path / "out", "--overwrite", code=1)
    assert (tmp_path / "out" / "results.jsonl").read_text() == "hello\n"


def test_pictures_of_what_is_no_longer_there_are_removed(files, tmp_path):
    out = tmp_path / "out"
    run(files, out, "--k 1 5 --index flat IVF4,Flat")
    assert {path.name for path in out.glob("*.png")} == {"cost.png", "accuracy_over_k.png", "per_class.png"}
    (out / "mine.png").write_bytes(b"")
    run(files, out, "--k 1 --overwrite")
    assert {path.name for path in out.glob("*.png")} == {"per_class.png", "mine.png"}


@pytest.mark.parametrize("name", ["=1+1", "+a", "-a", "@SUM(A1)", "\tx", "\r=1", "-1", "+1.5e3"])
def test_names_are_no_formulas_in_a_spreadsheet(tmp_path, name):
    names = [name, "plain", "x", "y"]
    evaluate(BANK, LABELS, QUERIES, TRUTH, k=1, class_names=names).save(tmp_path)
    with open(tmp_path / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    is_number = name in ("-1", "+1.5e3")
    assert rows[0]["name"] == (name if is_number else "'" + name.replace("\r", "\n"))
    assert [float(row["score"]) for row in rows]


def test_numbers_below_zero_stay_numbers(tmp_path):
    found = evaluate(BANK, LABELS, QUERIES, TRUTH, k=1)
    found.records[0]["accuracy_loss"] = -0.25
    found.save(tmp_path)
    (row,) = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert row["accuracy_loss"] == "-0.25"


def test_names_without_a_font_are_numbers_in_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    odd = "\ue000\ue001"  # of private use: no font has them
    found = evaluate(BANK, LABELS, QUERIES, TRUTH, k=1, class_names=[odd, "cat", "two\nlines", "猫"])
    found.save(tmp_path)  # a missing glyph would be a warning, and that an error here
    assert odd in (tmp_path / "report.html").read_text(encoding="utf-8")
