"""Planted faults in real data are found: copies, leaks, wrong labels, outliers; and the command says so."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, roc_auc_score

import faiss_knn
from faiss_knn import KNNIndex, audit, evaluate
from faiss_knn.offline.cli import main

DATA = load_digits()
ORDER = np.random.default_rng(0).permutation(len(DATA.target))
BANK, QUERIES = DATA.data[ORDER[450:]].astype(np.float32), DATA.data[ORDER[:450]].astype(np.float32)
LABELS, TRUTH = DATA.target[ORDER[450:]], DATA.target[ORDER[:450]]


def noise(shape, size, seed=0):
    return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def noisy_labels(share, seed=0, labels=LABELS):
    rng = np.random.default_rng(seed)
    wrong, noisy = rng.random(len(labels)) < share, labels.copy()
    noisy[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    return noisy, wrong


@pytest.mark.parametrize(
    ("metric", "size"),
    [("cosine", 0.0), ("cosine", 0.3), ("euclidean", 0.3), ("squared_euclidean", 0.1), ("manhattan", 0.1)],
)
def test_near_duplicates_with_small_noise_are_grouped(metric, size):
    copies = [BANK[:40] + noise((40, 64), size, seed) for seed in range(2)]
    report = audit(np.concatenate([BANK, *copies]), distance_metric=metric)
    planted = {(i, len(BANK) + i, len(BANK) + 40 + i) for i in range(40)}
    found = {tuple(group) for group in report.duplicates}
    assert report.duplicate_rule == "gap"
    assert "apart count, where a gap in the distances parts copies from other rows" in report.summary()
    assert planted <= found
    assert len(found) == 41  # two of the digits are nearly alike themselves


@pytest.mark.parametrize(("size", "planted", "others"), [(0.1, 100, 1), (0.5, 100, 1), (1.0, 0, 0)])
def test_as_many_copies_are_found_as_the_documentation_says(size, planted, others):
    copied = np.random.default_rng(0).choice(len(DATA.data), 100, replace=False)
    rows = np.concatenate([DATA.data, DATA.data[copied] + noise((100, 64), size)])
    found = {tuple(group) for group in audit(rows).duplicates}
    expected = {(row, len(DATA.data) + i) for i, row in enumerate(copied.tolist())}
    assert (len(found & expected), len(found - expected)) == (planted, others)


def test_a_row_with_more_copies_than_neighbours_is_in_one_group():
    rows = np.concatenate([BANK, BANK[:1] + noise((60, 64), 0.05)])
    assert [0, *range(len(BANK), len(BANK) + 60)] in audit(rows, k=5).duplicates


def test_a_given_distance_is_kept():
    rows = np.concatenate([BANK[:50], BANK[:3], BANK[5:7] + 0.01])
    report = audit(rows, duplicate_distance=0, distance_metric="euclidean")
    assert report.duplicates == [[0, 50], [1, 51], [2, 52]]
    assert (report.duplicate_distance, report.duplicate_rule) == (0.0, "given")
    assert "3 groups of 6 rows; those at most 0 apart count, as given" in report.summary()
    assert len(audit(rows, duplicate_distance=0.1, distance_metric="euclidean").duplicates) == 5


def test_without_copies_none_is_found():
    report = audit(np.random.default_rng(0).standard_normal((300, 16)))
    assert (report.duplicates, report.duplicate_rule) == ([], "copies")
    assert "near-duplicates  none; copies alone count (at most " in report.summary()


def test_leaks_are_listed_and_accuracy_is_told_without_them():
    leaked = np.concatenate([BANK[:20], BANK[20:50] + noise((30, 64), 0.1)])
    queries, truth = np.concatenate([QUERIES, leaked]), np.concatenate([TRUTH, (LABELS[:50] + 1) % 10])
    report = audit(BANK, LABELS, queries, truth, generative=False)
    assert {leak.query for leak in report.leaks} == set(range(450, 500))
    assert all(leak.row == leak.query - 450 and leak.exact == (leak.row < 20) for leak in report.leaks)
    assert [leak.distance for leak in report.leaks] == sorted(leak.distance for leak in report.leaks)
    expected = [evaluate(BANK, LABELS, *one, k=20).records[0]["top1"] for one in ((queries, truth), (QUERIES, TRUTH))]
    assert list(report.accuracy.values()) == pytest.approx(expected)
    assert "50 of 500 queries are in the bank" in " ".join(report.warnings)
    assert "20 number by number, 30 nearly" in report.summary()


def test_wrong_labels_are_suspects_in_order_of_their_certainty():
    labels, wrong = noisy_labels(0.15)
    report = audit(BANK, labels)
    rows = [suspect.row for suspect in report.label_suspects]
    confidences = [suspect.confidence for suspect in report.label_suspects]
    assert wrong[rows[: len(rows) // 2]].mean() >= 0.98
    assert confidences == sorted(confidences, reverse=True)
    assert all(labels[suspect.row] == suspect.label != suspect.suggested for suspect in report.label_suspects)
    assert report.label_noise["expected_wrong"] == pytest.approx(wrong[rows].sum(), rel=0.015)


@pytest.mark.parametrize(
    ("share", "precision", "recall", "expected"),
    [
        (0.01, 0.86, 0.87, 0.94),
        (0.05, 0.95, 0.97, 0.95),
        (0.1, 0.97, 0.95, 0.96),
        (0.2, 0.97, 0.98, 0.96),
        (0.3, 0.98, 0.98, 0.96),
    ],
)
def test_as_many_wrong_labels_are_found_as_the_documentation_says(share, precision, recall, expected):
    found = []
    for seed in range(3):
        labels, wrong = noisy_labels(share, seed, DATA.target)
        suspects = audit(DATA.data.astype(np.float32), labels).label_suspects
        rows = [suspect.row for suspect in suspects]
        probable = np.mean([suspect.confidence for suspect in suspects])
        found.append((wrong[rows].mean(), wrong[rows].sum() / wrong.sum(), probable))
    assert np.mean(found, axis=0) == pytest.approx((precision, recall, expected), abs=0.006)


def test_a_wrong_label_that_was_copied_is_no_witness_for_itself():
    copied = np.concatenate([BANK, np.repeat(BANK[:1], 30, axis=0)])
    labels = np.concatenate([LABELS, np.full(30, (LABELS[0] + 1) % 10)])
    rows = {suspect.row for suspect in audit(copied, labels, k=50).label_suspects}
    assert rows >= set(range(len(BANK), len(BANK) + 30))
    assert 0 not in rows


def test_names_and_ids_come_back_as_they_were_given():
    named = np.array([f"digit {i}" for i in LABELS])
    labels, _ = noisy_labels(0.1)
    found = audit(BANK, np.array([f"digit {i}" for i in labels])).label_suspects[0]
    assert (found.label, found["suggested"]) == (f"digit {labels[found.row]}", named[found.row])
    large = audit(BANK, torch.from_numpy(labels.astype(np.int64) + 10**9)).label_suspects[0]
    row, label, suggested, confidence, _ = large
    assert (row, label, suggested) == (found.row, labels[row] + 10**9, LABELS[row] + 10**9)
    assert confidence == found.confidence
    report = audit(BANK, labels, class_names=list("abcdefghij"))
    assert report.label_suspects[0].label == labels[found.row]
    assert report.class_name(3) == "d"


def test_novelty_is_the_kth_distance_between_unit_vectors_and_tells_outliers():
    outliers = np.random.default_rng(0).random((40, 64)).astype(np.float32) * 16
    queries, is_outlier = np.concatenate([QUERIES, outliers]), np.arange(490) >= 450
    report = audit(BANK, query_features=queries, k=7, outlier_labels=is_outlier, generative=False)
    unit = [x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1)[:, None] for x in (BANK, queries)]
    expected = np.sort(np.linalg.norm(unit[1][:, None] - unit[0], axis=2), axis=1)[:, 6]
    assert report.novelty == pytest.approx(expected, rel=1e-6)
    assert report.detection["auroc"] == pytest.approx(roc_auc_score(is_outlier, expected))
    assert report.detection == {"auroc": 1.0, "fpr95": 0.0}
    assert set(report.most_novel(40)) == set(range(450, 490))
    assert audit(BANK, k=7).novelty.shape == (len(BANK),)


def test_a_class_that_the_bank_lacks_is_told_as_well_as_the_documentation_says():
    found = []
    for digit in range(10):
        options = {"query_features": QUERIES, "outlier_labels": digit == TRUTH, "generative": False}
        found.append(list(audit(BANK[digit != LABELS], **options).detection.values()))
    assert np.mean(found, axis=0) == pytest.approx((0.939, 0.376), abs=0.001)


def test_confusions_are_those_of_the_evaluation():
    report = audit(BANK, LABELS, QUERIES, TRUTH, generative=False)
    outcome = next(iter(evaluate(BANK, LABELS, QUERIES, TRUTH, k=20).outcomes.values()))
    matrix = confusion_matrix(TRUTH, outcome["prediction"])
    assert {(c.label, c.predicted): c.count for c in report.confusions} == {
        (int(i), int(j)): matrix[i, j] for i, j in zip(*np.nonzero(matrix), strict=True) if i != j
    }
    for pair in report.confusions:
        assert (TRUTH[list(pair.rows)] == pair.label).all()
        assert (outcome["prediction"][list(pair.rows)] == pair.predicted).all()


def test_where_no_class_is_confused_none_is_listed():
    labels = np.repeat([0, 1], 40)
    report = audit(np.eye(2)[labels] + noise((80, 2), 0.05), labels, k=5)
    assert (report.confusions, report.label_suspects) == ([], [])
    assert "none; about 0.00 % of all labels are wrong" in report.summary()


def test_hubs_are_counted_in_the_lists_of_the_bank():
    lists = KNNIndex(distance_metric="cosine").build(BANK).search(BANK, 11).indices.numpy()
    counts = np.bincount(lists[lists != np.arange(len(BANK))[:, None]], minlength=len(BANK))
    hubness = audit(BANK, k=10).hubness
    assert hubness["hub_counts"] == sorted(counts, reverse=True)[:10]
    assert counts[hubness["hubs"]].tolist() == hubness["hub_counts"]
    assert hubness["antihub_share"] == (counts == 0).mean()


def test_sets_are_compared():
    same = audit(BANK, query_features=BANK).generative
    assert (same["precision"], same["recall"], same["coverage"], same["k"]) == (1, 1, 1, 5)
    collapsed = audit(BANK, query_features=BANK[:1] + noise((200, 64), 0.5)).generative
    assert collapsed["precision"] > 0.9
    assert collapsed["recall"] < 0.02
    assert audit(BANK, query_features=QUERIES, generative=False).generative is None
    assert audit(BANK, query_features=QUERIES, sample=100).generative is None


def test_rows_that_cannot_be_compared_are_named_and_the_others_keep_their_numbers():
    bank, labels = np.concatenate([BANK[:100], BANK[:2]]), np.concatenate([LABELS[:100], LABELS[:2]])
    bank[50], bank[60] = 0, np.nan
    queries = np.concatenate([np.full((1, 64), np.inf, np.float32), BANK[70:72]])
    report = audit(bank, labels, queries, [0, 1, 2])
    assert (report.facts["bad_rows"], report.facts["bad_queries"]) == ([50, 60], [0])
    assert report.duplicates == [[0, 100], [1, 101]]
    assert [(leak.query, leak.row) for leak in report.leaks] == [(1, 70), (2, 71)]
    assert np.isnan(report.novelty).tolist() == [True, False, False]
    assert "Left out as zero or not finite: 2 rows (50, 60)." in report.warnings


def test_unlabelled_rows_are_searched_but_do_not_vote():
    labels, _ = noisy_labels(0.1)
    some = np.where(np.arange(len(LABELS)) % 2, labels, -1)
    report = audit(np.concatenate([BANK, BANK[:1]]), np.append(some, -1))
    assert [0, len(BANK)] in report.duplicates
    assert report.label_suspects
    assert all(suspect.row % 2 for suspect in report.label_suspects)


def test_a_sample_sees_all_rows():
    labels, wrong = noisy_labels(0.1)
    whole, part = audit(BANK, labels), audit(BANK, labels, sample=400, seed=3)
    looked = np.flatnonzero(np.isfinite(part.novelty))
    assert len(looked) == 400
    assert part.novelty[looked] == pytest.approx(whole.novelty[looked])
    rows = [suspect.row for suspect in part.label_suspects]
    assert set(rows) <= set(looked)
    assert wrong[rows].mean() >= 0.88
    assert audit(BANK, labels, sample=400, seed=3).summary() == part.summary()
    assert audit(BANK, sample=10**6).facts["sample"] is None


def test_the_bank_may_be_read_from_disk(tmp_path):
    np.save(tmp_path / "bank.npy", BANK)
    held = np.load(tmp_path / "bank.npy", mmap_mode="r")
    assert audit(held, LABELS, QUERIES, TRUTH).summary() == audit(BANK, LABELS, QUERIES, TRUTH).summary()


@pytest.fixture
def files(tmp_path):
    labels, _ = noisy_labels(0.1)
    np.savez(tmp_path / "train.npz", features=np.concatenate([BANK, BANK[:3]]), labels=np.append(labels, labels[:3]))
    queries = np.concatenate([QUERIES, BANK[5:9], 16 * np.random.default_rng(0).random((20, 64), np.float32)])
    truth = np.concatenate([TRUTH, LABELS[5:9], np.full(20, -1)])
    np.savez(tmp_path / "test.npz", features=queries, labels=truth, outlier=(np.arange(474) >= 454).astype(int))
    return tmp_path


def test_the_command_writes_a_line_per_finding(files, capsys):
    (files / "names.txt").write_text("".join(f"{i}.png\n" for i in range(len(BANK) + 3)))
    arguments = [files / "train.npz", files / "test.npz", "--outlier-labels", "outlier", "--names", files / "names.txt"]
    assert main(["audit", *map(str, arguments), "--out", str(files / "out")]) == 0
    out, err = capsys.readouterr()
    report = audit(
        *(np.load(files / "train.npz")[name] for name in ("features", "labels")),
        *(np.load(files / "test.npz")[name] for name in ("features", "labels")),
        outlier_labels=np.arange(474) >= 454,
    )
    assert out.startswith(report.summary())
    assert [line.removeprefix("faiss-knn: warning: ") for line in err.splitlines()] == report.warnings
    lines = [json.loads(line) for line in (files / "out" / "audit.jsonl").read_text().splitlines()]
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in {line["kind"] for line in lines}}
    assert [line["rows"] for line in kinds["duplicates"]] == report.duplicates
    assert kinds["duplicates"][0]["row_names"] == [f"{i}.png" for i in report.duplicates[0]]
    assert [line["query"] for line in kinds["leak"]] == [leak.query for leak in report.leaks]
    assert [line["row"] for line in kinds["label"]] == [suspect.row for suspect in report.label_suspects]
    assert kinds["label"][0]["row_names"] == [f"{report.label_suspects[0].row}.png"]
    assert kinds["detection"][0]["auroc"] == report.detection["auroc"] > 0.99
    assert len(kinds["novelty"]) == 100
    with open(files / "out" / "audit.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(lines)
    with open(files / "out" / "audit_novelty.csv", newline="") as file:
        assert [float(row["novelty"]) for row in csv.DictReader(file)] == report.novelty.tolist()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train.npz", "--query-labels", "test.npz"], 2, "--query-labels needs QUERIES"),
        (["train.npz", "--names", "names.txt"], 2, "--names needs --out"),
        (["train.npz", "--duplicate-distance", "-1"], 2, "must be a distance, 0 or more, got '-1'"),
        (["train.npz", "--distance", "dot"], 2, "invalid choice: 'dot'"),
        (["none.npz"], 1, "none.npz"),
        (["train.npz", "test.npz", "--outlier-labels", "nothing"], 1, "no array 'nothing'"),
        (["train.npz", "--out", "x", "--names", "names.txt"], 1, "2 names for the 1350 rows of"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(files, capsys, monkeypatch, arguments, status, message):
    monkeypatch.chdir(files)
    (files / "names.txt").write_text("a\nb\n")
    try:
        found = main(["audit", *arguments])
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert (found, error.count("\n")) == (status, 1)
    assert message in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be a positive integer, got 0"),
        (
            {"distance_metric": "dot"},
            "`distance_metric` must be one of cosine, euclidean, squared_euclidean, manhattan",
        ),
        ({"duplicate_distance": -1}, "`duplicate_distance` must be a distance, 0 or more, got -1"),
        ({"labels": LABELS[:5]}, r"`labels` must have one entry per row, 1347, got 5"),
        ({"labels": np.eye(10, dtype=int)[LABELS] | 1}, "`labels` must be one class a row, got multi-hot"),
        ({"query_labels": TRUTH}, "`query_labels` need `query_features`, and `labels` beside them"),
        ({"query_features": QUERIES[:, :3]}, "`query_features` must have the bank's dimension 64, got 3"),
        ({"outlier_labels": [1, 0]}, "`outlier_labels` must be 1347 entries, 1 for an outlier and else 0"),
        ({"outlier_labels": np.zeros(1347)}, "`outlier_labels` must hold both outliers and others, got 0 outliers"),
        ({"sample": 0}, "`sample` must be a positive integer, got 0"),
        ({"generative": "yes"}, "`generative`"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        audit(BANK, **options)


def test_a_single_row_cannot_be_audited():
    with pytest.raises(ValueError, match=r"`features` must have two rows or more that can be compared, got 1"):
        audit(BANK[:1])
    with pytest.raises(ValueError, match=r"`features` must have two rows or more that can be compared, got 1"):
        audit(BANK[:1], query_features=QUERIES)


def test_it_is_public():
    assert faiss_knn.audit is audit
    assert faiss_knn.AuditReport is type(audit(BANK[:30]))


@pytest.mark.parametrize("option", ["--query-labels", "--class-names", "--ignore-index"])
def test_what_is_said_of_labels_is_refused_where_there_are_none(tmp_path, capsys, option):
    np.save(tmp_path / "rows.npy", BANK[:50])
    value = "7" if option == "--ignore-index" else str(tmp_path / "rows.npy")
    assert main(["audit", *[str(tmp_path / "rows.npy")] * 2, option, value]) == 1
    assert f"rows.npy: holds no labels, which {option} needs: give them with --labels" in capsys.readouterr().err


def test_without_queries_or_with_a_sample_no_set_is_compared_unasked(tmp_path, capsys):
    np.save(tmp_path / "rows.npy", BANK[:50])
    for arguments, compares in (
        ([], False),
        (["--sample", "9", "--seed", "1"], False),
        ([""], True),
        (["", "--no-generative"], False),
    ):
        command = ["audit", str(tmp_path / "rows.npy"), *(one or str(tmp_path / "rows.npy") for one in arguments)]
        assert main(command) == 0
        assert ("generative" in capsys.readouterr().out) == compares
