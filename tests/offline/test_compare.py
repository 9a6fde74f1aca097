"""Comparing runs: differences are those of the queries, chance is not taken for one, and unlike runs are refused."""

import csv
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits

from faiss_knn import Comparison, compare, evaluate
from faiss_knn.offline.cli import main
from faiss_knn.offline.report.results import record_key

RNG = np.random.default_rng(0)
LABELS, TRUTH = RNG.integers(0, 4, 300), RNG.integers(0, 4, 120)


def features(noise, seed=0):
    rng = np.random.default_rng(seed)
    return [(np.eye(4, 8)[y] + noise * rng.standard_normal((len(y), 8))).astype(np.float32) for y in (LABELS, TRUTH)]


def run_of(noise, seed=0, truth=TRUTH, labels=LABELS, **options):
    bank, queries = features(noise, seed)
    return evaluate(bank, labels, queries[: len(truth)], truth, **{"k": (1, 5), **options})


@pytest.fixture(scope="module")
def runs():
    return [run_of(0.4), run_of(0.9, seed=1), run_of(0.42, seed=2)]


@pytest.fixture
def folders(runs, tmp_path):
    return [str(run.save(tmp_path / name)) for run, name in zip(runs, ("good", "poor", "alike"), strict=True)]


def test_the_rows_are_of_every_setting_and_pair_and_say_what_the_outcomes_say(runs):
    comparison = compare(*runs, names=["good", "poor", "alike"])
    rows = comparison.table()
    assert isinstance(comparison, Comparison)
    assert [(row["a"], row["b"]) for row in rows] == 2 * [("good", "poor"), ("good", "alike"), ("poor", "alike")]
    assert len({row["setting"] for row in rows}) == 2
    by_name = dict(zip(("good", "poor", "alike"), runs, strict=True))
    for row in rows:
        k = 5 if "k = 5" in row["setting"] else 1
        right = []
        for name in (row["a"], row["b"]):
            (record,) = [record for record in by_name[name].records if record["k"] == k]
            right.append(by_name[name].outcomes[record_key(record)]["correct"])
        a, b = right
        assert row["difference"] == pytest.approx(a.mean() - b.mean())
        assert row["p"] == pytest.approx(stats.binomtest(int((a & ~b).sum()), int((a ^ b).sum())).pvalue)
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["separable"] == (row["p_holm"] <= 0.05)
        assert row["needed"] is None if row["separable"] or not row["difference"] else row["needed"] > 120
    expected = np.sort([row["p"] for row in rows]) * np.arange(6, 0, -1)
    assert sorted(row["p_holm"] for row in rows) == pytest.approx(np.maximum.accumulate(expected).clip(max=1))


def test_settings_stand_by_their_accuracy_and_say_who_won(runs):
    comparison = compare(*runs[:2], names=["good", "poor"])
    tops = [row["top1_a"] + row["top1_b"] for row in comparison.table()]
    assert tops == sorted(tops, reverse=True)
    assert "good is better than poor, by" in str(comparison)
    assert "not separable with 120 queries: about" in str(compare(runs[0], runs[2]))
    assert "equally often right on 120 queries" in str(compare(runs[0], runs[0]))


def with_outcomes(run, correct):
    return replace(run, outcomes={key: one | {"correct": correct} for key, one in run.outcomes.items()})


def test_what_is_no_chance_alone_may_be_one_among_several():
    alone = np.arange(120) < 6  # right where the other is wrong: p = 2 / 2^6
    none = np.zeros(120, dtype=bool)
    (row,) = compare(*(with_outcomes(run_of(0.4, k=5), correct) for correct in (alone, none))).table()
    assert (row["p"], row["separable"]) == (pytest.approx(0.03125), True)
    rows = compare(*(with_outcomes(run_of(0.4, k=(1, 5)), correct) for correct in (alone, none))).table()
    assert [(row["p_holm"], row["separable"]) for row in rows] == 2 * [(pytest.approx(0.0625), False)]


def test_more_queries_are_needed_than_did_not_do():
    runs = [with_outcomes(run_of(0.4, k=5, truth=TRUTH[:5]), np.full(5, right)) for right in (True, False)]
    (row,) = compare(*runs).table()
    assert (row["p"], row["separable"], row["needed"]) == (pytest.approx(0.0625), False, 6)


def test_a_model_compared_with_itself_is_not_called_another_in_95_of_100_cases():
    """Each case is 250 digits in two random noises, which the same model and bank answer: truly no difference."""
    digits, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    bank, others = order[:500], order[500:]
    asked = np.stack([np.random.default_rng(seed).choice(others, 250, replace=False) for seed in range(100)])
    rows = np.repeat(asked[:, None], 2, axis=1).ravel()  # case, twin, query
    noise = 9 * np.random.default_rng(1).standard_normal((len(rows), 64))
    report = evaluate(digits[bank], classes[bank], digits[rows] + noise, classes[rows], k=5)
    (key,) = report.outcomes
    answers = report.outcomes[key]["correct"].reshape(100, 2, 250)
    assert 0.7 < answers.mean() < 0.8
    shared = {"row": np.arange(250), "label": classes[rows[:250]]}
    called = missed = 0
    for seed, twins in enumerate(answers):
        runs = [replace(report, outcomes={key: {"correct": correct, **shared}}) for correct in twins]
        (row,) = compare(*runs, seed=seed).table()
        called += row["separable"]
        missed += not row["low"] <= 0 <= row["high"]
    assert called <= 5
    assert 1 <= missed <= 7  # about 5 of 100; an interval at 88 % instead of 95 misses 8 of these


def test_classes_are_compared_where_the_settings_do_best(runs):
    comparison = compare(*runs[:2], names=["good", "poor"])
    best = comparison.table()[0]
    assert {row["setting"] for row in comparison.by_class} == {best["setting"]}
    assert [row["class"] for row in comparison.by_class] == ["0", "1", "2", "3"]
    assert sum(row["n_queries"] for row in comparison.by_class) == 120
    mean = sum(row["difference"] * row["n_queries"] for row in comparison.by_class) / 120
    assert mean == pytest.approx(best["difference"])


def test_folders_and_reports_compare_alike(runs, folders):
    from_folders = compare(*folders)
    assert from_folders.names == ["good", "poor", "alike"]
    assert from_folders == compare(*runs, names=from_folders.names)
    assert compare(*folders, seed=1).table() != from_folders.table()
    assert compare(folders[0], folders[0]).names == ["good (1)", "good (2)"]


def test_only_settings_that_all_have_are_compared(runs):
    more = run_of(0.4, k=(5, 20), weighting=("inverse", "softmax"), depth=30)
    assert {row["setting"] for row in compare(runs[0], more).table()} == {"flat, k = 5, T = 0.07, inverse weights"}


def test_centred_features_are_another_setting(runs):
    with pytest.raises(ValueError, match="no setting in common"):
        compare(runs[0], run_of(0.4, center=True))
    both = [run_of(noise, center=True) for noise in (0.4, 0.9)]
    assert len(compare(*both).table()) == 2


def test_runs_need_not_share_bank_or_dimension():
    bank, queries = features(0.4)
    half = evaluate(bank[:150, :6], LABELS[:150], queries[:, :6], TRUTH, k=(1, 5))
    assert len(compare(run_of(0.4), half).table()) == 2


def test_files_hold_the_table(runs, folders, tmp_path):
    out = compare(*runs, names=["good", "<b>poor</b>", "alike"]).save(tmp_path / "comparison")
    rows = [json.loads(line) for line in (out / "compare.jsonl").read_text().splitlines()]
    assert rows == compare(*runs, names=["good", "<b>poor</b>", "alike"]).table()
    table = list(csv.DictReader((out / "compare.csv").read_text().splitlines()))
    assert [float(row["difference"]) for row in table] == [row["difference"] for row in rows]
    assert len(list(csv.DictReader((out / "compare_classes.csv").read_text().splitlines()))) == 3 * 4
    page = (out / "compare.html").read_text()
    assert "&lt;b&gt;poor&lt;/b&gt;" in page
    assert "<b>" not in page
    assert page.count("<picture>") == 1
    result = (
        "alike is better than &lt;b&gt;poor&lt;/b&gt; by 34.17 points; not separable from good (about 3,400 queries"
    )
    assert result in page
    for words in ("3 runs compared", "not separable, needs ", "Holm", "By class"):
        assert words in page
        assert words in (out / "compare.md").read_text()
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_table_and_writes_the_files(folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *folders[:2], "--names", "A", "B", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{compare(*folders[:2], names=['A', 'B'])}\n\nwritten to {out}: compare.html\n"
    assert {path.suffix for path in out.iterdir()} == {".jsonl", ".csv", ".md", ".html", ".png"}


def test_multi_hot_runs_are_compared_without_classes():
    truth = np.eye(4, dtype=int)[TRUTH] | np.eye(4, dtype=int)[(TRUTH + 1) % 4]
    labels = np.eye(4, dtype=int)[LABELS] | np.eye(4, dtype=int)[(LABELS + 1) % 4]
    runs = [run_of(noise, truth=truth, labels=labels) for noise in (0.4, 0.9)]
    comparison = compare(*runs)
    assert comparison.table()
    assert comparison.by_class == []


def enumerated_p(sums):
    """The share of all signs under which the sum is as far from 0 as it is."""
    signs = np.array(list(product((-1, 1), repeat=len(sums))))
    return float((np.abs(signs @ sums) >= abs(sums.sum())).mean())


def test_few_shot_runs_are_compared_over_all_their_draws(tmp_path):
    truth = TRUTH[:14]
    runs = [run_of(noise, k=1, truth=truth, per_class=4, tries=3) for noise in (0.5, 0.9)]
    folders = [run.save(tmp_path / name) for run, name in zip(runs, "ab", strict=True)]
    comparison = compare(*folders)
    (row,) = comparison.table()
    first, second = (next(iter(run.outcomes.values()))["correct"] for run in runs)
    more = first.sum(0).astype(int) - second.sum(0)
    assert comparison.n_queries == 14
    assert len(set(abs(more))) > 2
    assert row["difference"] == pytest.approx(runs[0].records[0]["top1"] - runs[1].records[0]["top1"])
    assert row["p"] == pytest.approx(enumerated_p(more))
    drawn = np.random.default_rng(0).integers(0, 14, (20_000, 14))
    assert (row["low"], row["high"]) == pytest.approx(np.quantile(more[drawn].mean(1) / 3, [0.025, 0.975]), abs=0.01)
    assert sum(row["difference"] * row["n_queries"] for row in comparison.by_class) / 14 == pytest.approx(
        row["difference"]
    )
    assert comparison.notes == []
    other = run_of(0.5, k=1, truth=truth, per_class=4, tries=3, labels=np.where(np.arange(300) < 9, -1, LABELS))
    assert compare(runs[0], other).notes[0].startswith("the few-shot banks of the runs hold other rows")


def test_groups_of_queries_are_compared_as_wholes():
    groups = np.repeat(np.arange(12), 10)
    runs = [run_of(noise, k=5, groups=groups) for noise in (0.4, 0.9)]
    (row,) = compare(*runs).table()
    first, second = (next(iter(run.outcomes.values()))["correct"].astype(int) for run in runs)
    assert row["p"] == pytest.approx(enumerated_p((first - second).reshape(12, 10).sum(1)))
    assert compare(*runs).notes == []
    for other in (None, np.roll(groups, 3)):
        comparison = compare(runs[0], run_of(0.9, k=5, groups=other))
        assert comparison.table()[0]["p"] == compare(run_of(0.4, k=5), run_of(0.9, k=5)).table()[0]["p"]
        assert comparison.notes == ["not all runs have the same groups of queries: differences are taken as of single "
                                    "queries"]  # fmt: skip


def changed(truth, place, label):
    truth = truth.copy()
    truth[place] = label
    return truth


NAMES = np.array(["ant", "bee", "cat", "dog"])
REFUSED = {
    "one run": (lambda a: [a], r"`runs` must be two or more, reports or folders, got 1"),
    "no report": (lambda a: [a, 3], r"`runs\[1\]` must be an EvalReport or a folder of results, got 3"),
    "no folder": (lambda a: [a, "nowhere"], "nowhere: is no folder of results"),
    "no outcomes": (lambda a: [a, run_of(0.4, keep_outcomes=False)], "run 'run 2' has kept no outcomes"),
    "few-shot": (lambda a: [a, run_of(0.4, per_class=5)], "no setting in common"),
    "other draws": (lambda a: [run_of(0.4, per_class=5), run_of(0.4, per_class=5, tries=4)], "no setting in common"),
    "other settings": (
        lambda a: [a, run_of(0.4, k=3, distance_metric="euclidean")],
        "no setting in common, such as 'run 1' has flat, cosine distance, k = 1.*'run 2' has flat, euclidean",
    ),
    "fewer queries": (lambda a: [a, run_of(0.4, truth=TRUTH[:100])], "not of the same queries: 120 and 100 of them"),
    "other rows": (
        lambda a: [run_of(0.4, truth=changed(TRUTH, 3, -1)), run_of(0.4, truth=changed(TRUTH, 7, -1))],
        "not of the same queries: query number 3 is row 4 and 3 of what was given",
    ),
    "other labels": (
        lambda a: [a, run_of(0.4, truth=changed(TRUTH, 5, (TRUTH[5] + 1) % 4))],
        f"not of the same queries: row 5 has the label '{TRUTH[5]}' in one, '{(TRUTH[5] + 1) % 4}' in the other",
    ),
    "other names": (
        lambda a: [a, run_of(0.4, truth=NAMES[TRUTH], labels=NAMES[LABELS])],
        f"row 0 has the label '{TRUTH[0]}' in one, '{NAMES[TRUTH[0]]}' in the other",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unlike_runs_are_refused_and_it_is_said_in_what(runs, case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        compare(*make(runs[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 95}, r"`confidence` must be in \(0, 1\), such as 0.95, got 95"),
        ({"seed": -1}, "`seed` must be 0 or a positive integer, got -1"),
        ({"names": ["a"]}, r"`names` must be 2 different names, one for each run, got \['a'\]"),
        ({"names": ["a", "a"]}, "`names` must be 2 different names"),
        ({"names": "ab"}, "`names` must be 2 different names"),
    ],
)
def test_bad_options_are_named(runs, options, message):
    with pytest.raises(ValueError, match=message):
        compare(*runs[:2], **options)


def test_two_evaluations_under_one_setting_in_a_folder_are_refused(runs, tmp_path):
    runs[0].save(tmp_path / "both")
    runs[1].save(tmp_path / "both")
    with pytest.raises(ValueError, match=r"run 'both' holds two evaluations of flat, k = 1.*a folder of its own"):
        compare(tmp_path / "both", runs[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "compare needs two runs or more"),
        (["one", "two", "--names", "a"], "--names must name each of the 2 runs, got 1"),
        (["one", "two", "--confidence", "1"], "must be in (0, 1), got '1'"),
    ],
)
def test_bad_usage_ends_with_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_runs_that_cannot_be_read_end_with_one_line(folders, tmp_path, capsys):
    assert main(["compare", folders[0], str(tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().err
    assert "nowhere: is no folder of results" in said
    assert said.count("\n") == 1


def test_runs_that_kept_their_neighbours_are_compared_by_them(runs, tmp_path):
    kept = [run_of(0.4, keep_neighbors=True), run_of(0.9, seed=1, keep_neighbors=True)]
    comparison = compare(*kept, names=["good", "poor"])
    lists = [run.neighbors["flat"][1] for run in kept]
    assert set(comparison.neighbor_overlap) == {1, 5}
    for k, found in comparison.neighbor_overlap.items():
        common = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(*(x.tolist() for x in lists), strict=True)]
        assert found["mean"] == pytest.approx(np.mean(common))
        assert set(found) == {"mean", "null_mean", "null_std", "z"}
    itself = compare(kept[0], kept[0]).neighbor_overlap[5]
    assert itself["mean"] == 1.0 > comparison.neighbor_overlap[5]["mean"]
    assert itself["z"] > 20
    assert [row["row"] for row in comparison.changed] == np.argsort(common, kind="stable")[:20].tolist()
    folders = [run.save(tmp_path / name) for run, name in zip(kept, ("good", "poor"), strict=True)]
    assert compare(*folders) == comparison
    out = comparison.save(tmp_path / "out")
    assert "Do they see the same neighbours?" in (out / "compare.html").read_text()
    table = list(csv.DictReader((out / "compare_neighbors.csv").read_text().splitlines()))
    assert [float(row["mean"]) for row in table] == [row["mean"] for row in comparison.overlaps]
    table = list(csv.DictReader((out / "compare_changed.csv").read_text().splitlines()))
    assert [int(row["row"]) for row in table] == [row["row"] for row in comparison.changed]


def test_neighbours_of_another_bank_or_of_none_are_not_compared(runs):
    bank, queries = features(0.4)
    half = evaluate(bank[:150], LABELS[:150], queries, TRUTH, k=(1, 5), keep_neighbors=True)
    whole = run_of(0.4, keep_neighbors=True)
    comparison = compare(whole, half)
    assert comparison.neighbor_overlap == {}
    assert [note.rpartition(": ")[2] for note in comparison.notes] == ["300 and 150 rows"]
    assert (compare(whole, runs[0]).overlaps, compare(whole, runs[0]).notes) == ([], [])
    reordered = compare(whole, run_of(0.4, labels=LABELS[::-1], keep_neighbors=True))
    assert reordered.overlaps == []
    assert "run 1 and run 2: their neighbours are not compared" in reordered.notes[0]
    assert reordered.notes[0].endswith("other rows have labels, or other labels")


def test_the_same_rows_under_another_model_are_the_same_bank():
    bank, queries = features(0.4)
    wide = evaluate(np.hstack([bank, bank]) * 3, LABELS, np.hstack([queries, queries]), TRUTH, k=1, keep_neighbors=True)
    comparison = compare(run_of(0.4, k=1, keep_neighbors=True), wide)
    assert comparison.neighbor_overlap[1]["mean"] == 1.0
    assert comparison.notes == []


def test_records_that_do_not_say_which_rows_are_compared_by_their_number_with_a_note(tmp_path, capsys):
    kept = [run_of(noise, keep_neighbors=True) for noise in (0.4, 0.9)]
    folders = [str(run.save(tmp_path / name)) for run, name in zip(kept, ("old", "new"), strict=True)]
    path = tmp_path / "old" / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps({x: y for x, y in line.items() if x != "bank_fingerprint"}) + "\n" for line in lines)
    )
    comparison = compare(*folders)
    assert comparison.overlaps == compare(*kept, names=["old", "new"]).overlaps
    assert [note.partition(":")[0] for note in comparison.notes] == ["old and new"]
    assert "equally many rows, and are taken to hold the same" in comparison.notes[0]
    assert main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == f"faiss-knn: warning: {comparison.notes[0]}\n"
    assert comparison.notes[0] in (tmp_path / "out" / "compare.html").read_text()


@pytest.fixture
def files(tmp_path):
    for name, noise in (("old", 0.4), ("new", 0.9)):
        bank, queries = features(noise)
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "bank.npz", features=bank, labels=LABELS)
        np.savez(tmp_path / name / "queries.npz", features=queries, labels=TRUTH)
    return [f"{tmp_path / name / 'bank.npz'}:{tmp_path / name / 'queries.npz'}" for name in ("old", "new")]


def test_features_are_evaluated_on_the_spot_as_eval_does(files, tmp_path, capsys):
    expected = [run_of(noise, k=(3, 9), weighting="uniform", keep_neighbors=True) for noise in (0.4, 0.9)]
    assert main(["compare", *files, "--k", "3", "9", "--weighting", "uniform", "--out", str(tmp_path / "out")]) == 0
    names = ["old/bank.npz", "new/bank.npz"]
    assert capsys.readouterr().out.startswith(f"{compare(*expected, names=names)}\n")
    assert (tmp_path / "out" / "compare_neighbors.csv").exists()
    folder = str(expected[1].save(tmp_path / "results"))
    assert main(["compare", files[0], folder, "--k", "9", "--weighting", "uniform"]) == 0
    nine = [run_of(noise, k=9, weighting="uniform") for noise in (0.4, 0.9)]
    assert capsys.readouterr().out == f"{compare(*nine, names=['bank.npz', 'results'])}\n"


def test_with_leave_one_out_a_run_is_a_bank(files, tmp_path, capsys):
    banks = []
    for name, noise in (("a:b", 0.4), ("c", 0.9)):
        banks.append(str(tmp_path / f"{name}.npy"))
        np.save(banks[-1], features(noise)[0])
    np.save(tmp_path / "y.npy", LABELS)
    assert main(["compare", *banks, "--leave-one-out", "--labels", str(tmp_path / "y.npy"), "--distance", "dot",
                 "--weighting", "softmax"]) == 0  # fmt: skip
    options = {"leave_one_out": True, "distance_metric": "dot", "weighting": "softmax"}
    runs = [evaluate(features(noise)[0], LABELS, **options) for noise in (0.4, 0.9)]
    assert capsys.readouterr().out == f"{compare(*runs, names=['a:b.npy', 'c.npy'])}\n"
    assert main(["compare", *files, "--leave-one-out"]) == 1
    assert "--leave-one-out takes BANK alone: leave out " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bank}", "name one that `eval --out` has written, or features as BANK:QUERIES, or with --leave-one-out as"),
        ("{bank}:nowhere.npz", "is no folder of results, nor BANK:QUERIES: there is no nowhere.npz"),
        ("{folder}", "is no folder of results: name one"),
        ("{folder}/y.npy:{folder}/y.npy", "y.npy: features must be (N, d), got shape (300,)"),
    ],
)
def test_what_is_no_run_ends_with_one_line(text, message, files, tmp_path, capsys):
    np.save(tmp_path / "y.npy", LABELS)
    text = text.format(bank=files[0].split(":")[0], folder=tmp_path)
    assert main(["compare", files[0], text]) == 1
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert all(line.startswith("faiss-knn: ") for line in said)


def test_options_of_features_are_refused_where_there_are_none(folders, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *folders, "--k", "3"])
    assert stopped.value.code == 2
    assert "--k is for features, but every RUN is a folder of results" in capsys.readouterr().err


def test_classes_are_matched_by_name_whatever_their_numbers():
    more = np.where(np.arange(300) < 5, "aardvark", NAMES[LABELS])  # in one bank alone: all numbers shift
    comparison = compare(
        run_of(0.4, truth=NAMES[TRUTH], labels=NAMES[LABELS]), run_of(0.4, truth=NAMES[TRUTH], labels=more)
    )
    assert [row["class"] for row in comparison.by_class] == list(NAMES)
    with pytest.raises(ValueError, match="only one has class names, give both the same"):
        compare(run_of(0.4), run_of(0.4, class_names=list(NAMES)))
