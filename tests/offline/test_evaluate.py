"""evaluate() against slow float64 arithmetic, scikit-learn and torchmetrics."""

import importlib.util
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from faiss_knn import KNNIndex, evaluate
from faiss_knn.offline import search as search_step
from faiss_knn.offline.features import digits
from faiss_knn.offline.lazy_rows import Shards
from faiss_knn.offline.report.results import Record

_spec = importlib.util.spec_from_file_location("offline_oracle", Path(__file__).with_name("oracle.py"))
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

KS, TEMPERATURES, WEIGHTINGS = (1, 4, 9), (0.07, 1.0), ("inverse", "softmax", "uniform")


def blobs(seed=0, n=90, num_queries=40, dim=5, classes=7, spread=1.2):
    """Overlapping clusters, so that accuracy is far from 1; class 2 is empty, class 6 has queries alone."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, dim))
    bank_labels = rng.choice([0, 1, 3, 4, 5], n)
    query_labels = rng.choice([0, 1, 3, 4, 5, 6], num_queries)
    draw = lambda labels: (centres[labels] + spread * rng.standard_normal((len(labels), dim))).astype(np.float32)  # noqa: E731
    return draw(bank_labels), bank_labels, draw(query_labels), query_labels


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "squared_euclidean", "manhattan"])
def test_every_setting_equals_float64_arithmetic(metric):
    bank, bank_labels, queries, query_labels = blobs()
    report = evaluate(
        bank,
        bank_labels,
        queries,
        query_labels,
        k=KS,
        temperature=TEMPERATURES,
        weighting=WEIGHTINGS,
        distance_metric=metric,
    )
    distances, indices = oracle.neighbors(queries, bank, max(KS), metric)
    points = list(product(KS, TEMPERATURES, WEIGHTINGS))
    assert [(r["k"], r["temperature"], r["weighting"]) for r in report.records] == points
    for record, (k, temperature, weighting) in zip(report.records, points, strict=True):
        top1, top5 = oracle.judge(
            distances[:, :k], indices[:, :k], bank_labels, query_labels, temperature, weighting, 7
        )
        assert record["top1"] == pytest.approx(top1.mean(), abs=1e-12)
        assert record["top5"] == pytest.approx(top5.mean(), abs=1e-12)
        assert record["macro_top1"] == pytest.approx(oracle.macro(top1, query_labels), abs=1e-12)
        assert record["top1_se"] == pytest.approx(top1.std() / np.sqrt(len(top1)))
        bounds = binomtest(int(top1.sum()), len(top1)).proportion_ci(0.95, method="wilson")
        assert (record["top1_low"], record["top1_high"]) == pytest.approx(tuple(bounds))
        assert (record["recall"], record["accuracy_loss"], record["exact"]) == (1.0, 0.0, True)
        assert (record["num_classes"], record["n_bank"], record["n_queries"], record["dim"]) == (7, 90, 40, 5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_digits_agree_with_scikit_learn(metric):
    from sklearn.neighbors import KNeighborsClassifier

    bank, queries = digits()
    report = evaluate(
        bank.rows, bank.labels, queries.rows, queries.labels, k=(1, 5, 20), weighting=WEIGHTINGS, distance_metric=metric
    )
    rules = {
        "uniform": "uniform",
        "inverse": lambda d: 1 / (d + 0.07),
        "softmax": lambda d: np.exp((d.min(1, keepdims=True) - d) / 0.07),
    }
    for record in report.records:
        theirs = KNeighborsClassifier(record["k"], weights=rules[record["weighting"]], metric=metric, algorithm="brute")
        theirs.fit(bank.rows.astype(np.float64), bank.labels)
        assert record["top1"] == pytest.approx(theirs.score(queries.rows.astype(np.float64), queries.labels))


def test_leave_one_out_removes_the_row_itself_and_not_its_twin():
    bank, labels, *_ = blobs(1)
    bank[50], labels[50], labels[10] = bank[10], 0, 1  # row 10 stands before its twin 50 in any list
    report = evaluate(bank, labels, leave_one_out=True, k=KS, keep_neighbors=True, distance_metric="euclidean")
    distances, indices = oracle.neighbors(bank, bank, 9, "euclidean", leave_one_out=True)
    np.testing.assert_array_equal(report.neighbors["flat"][1], indices)
    assert report.neighbors["flat"][1][50, 0] == 10
    for record in report.records:
        k = record["k"]
        top1, _ = oracle.judge(distances[:, :k], indices[:, :k], labels, labels, 0.07, "inverse", 7)
        assert record["top1"] == pytest.approx(top1.mean())
    assert report.records[0]["duplicates"] == 2


def test_leave_one_out_with_an_index_that_misses_rows():
    bank, labels, *_ = blobs(2, n=300)
    report = evaluate(bank, labels, leave_one_out=True, k=9, index=["IVF8,Flat"], nprobe=1, keep_neighbors=True)
    indices = report.neighbors["IVF8,Flat"][1]
    assert indices.shape == (300, 9)
    assert not (indices == np.arange(300)[:, None]).any()


def test_a_class_is_a_hit_in_the_first_five_if_a_neighbour_voted_for_it_however_far():
    bank = np.array([[0.0], [1.0], [2.0], [3.0]])
    for k, hit in ((4, 1), (3, 0)):  # exp(-2.8 / 0.001) is 0 in float32, and in float64
        far = evaluate(
            bank, [0, 1, 2, 3], [[0.1]], [3], k=k, distance_metric="euclidean", temperature=1e-3, weighting="softmax"
        )
        assert far.records[0]["top5"] == hit
    wide = evaluate(bank, [0, 1, 2, 3], [[0.1]], [3], k=4, distance_metric="euclidean", weighting="uniform")
    assert wide.records[0]["top5"] == 1
    unseen = evaluate(bank, [0, 1, 2, 3], [[0.1]], [0], k=1, num_classes=9, distance_metric="euclidean")
    assert unseen.records[0]["top5"] == 1


def test_equal_scores_go_to_the_lowest_class():
    bank, labels = [[1.0, 0.0], [0.0, 1.0]], [1, 0]
    report = evaluate(bank, labels, [[1.0, 1.0], [1.0, 1.0]], [0, 1], k=2, weighting="uniform")
    assert report.per_class[next(iter(report.per_class))] == [1.0, 0.0]


def test_multi_hot_labels_give_mean_average_precision():
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(3)
    bank, _, queries, _ = blobs(3)
    bank_labels, query_labels = (rng.random((n, 4)) < 0.4 for n in (90, 40))
    query_labels[:, 3] = False
    report = evaluate(
        bank, bank_labels.astype(int), queries, query_labels.astype(int), k=(3, 9), weighting="uniform",
        metrics=["MultilabelAUROC(average='micro')"],
    )  # fmt: skip
    _, indices = oracle.neighbors(queries, bank, 9, "cosine")
    for record in report.records:
        scores = bank_labels[indices[:, : record["k"]]].mean(1)
        expected = np.mean([average_precision_score(query_labels[:, c], scores[:, c]) for c in range(3)])
        assert record["map"] == pytest.approx(expected)
        hits = [truth[np.argmax(s)] and s.max() > 0 for s, truth in zip(scores, query_labels, strict=True)]
        assert record["top1"] == pytest.approx(np.mean(hits))
        assert record["MultilabelAUROC(average='micro')"] > 0
        assert record["macro_top1"] is None
        assert record["retrieval_precision"] is None


def few_shot(seed, tries):
    report = evaluate(*blobs(4, num_queries=997), k=3, per_class=4, tries=tries, seed=seed, keep_neighbors=True)
    return report.records[0]


def test_few_shot_is_the_mean_over_draws():
    first, both = few_shot(5, 1), few_shot(5, 2)  # more tries go on with the draws of fewer
    second = 2 * both["top1"] - first["top1"]
    assert both["n_bank"] == 4 * 5
    assert first["top1_std"] is None
    assert both["top1_std"] == pytest.approx(np.std([first["top1"], second], ddof=1))
    assert both["top1_std"] > 0


def test_no_two_seeds_share_a_draw():
    seconds = [2 * few_shot(seed, 2)["top1"] - few_shot(seed, 1)["top1"] for seed in range(4)]
    firsts = [few_shot(seed, 1)["top1"] for seed in range(1, 5)]
    assert not any(np.isclose(seconds, firsts))


def test_draws_of_more_rows_than_classes_have_are_no_draws():
    bank, labels = np.arange(24.0).reshape(12, 2) + 1, np.repeat([0, 1, 2], [3, 4, 5])
    whole = evaluate(bank, labels, bank + 0.1, labels, k=3)
    report = evaluate(bank, labels, bank + 0.1, labels, k=3, per_class=1000)
    assert (report.records[0]["top1"], report.records[0]["top1_std"]) == (whole.records[0]["top1"], None)
    short = "3 classes have fewer bank rows than the 1,000 that a draw takes (the smallest 3)"
    assert [warning for warning in report.warnings if short in warning]
    assert [warning for warning in report.warnings if "No class has more than 1,000 bank rows" in warning]
    some = evaluate(bank, labels, bank + 0.1, labels, k=3, per_class=4)
    assert some.records[0]["top1_std"] is not None
    assert [w for w in some.warnings if w.startswith("1 classes have fewer bank rows than the 4")]
    assert not [w for w in some.warnings if "No class has more" in w]
    enough = evaluate(bank, labels, bank + 0.1, labels, k=3, per_class=2)
    assert not [w for w in enough.warnings if "draw" in w]


def test_a_few_shot_draw_has_rows_of_each_class_once():
    bank, bank_labels, queries, query_labels = blobs(4)
    report = evaluate(bank, bank_labels, queries, query_labels, k=60, per_class=4, tries=1, keep_neighbors=True)
    drawn = report.neighbors["flat"][1][0]
    assert np.unique(bank_labels[drawn[drawn >= 0]], return_counts=True)[1].tolist() == [4] * 5
    assert report.checks["rows_per_class"] == [4, 4, 4]
    assert report.checks["k_above_bank"] == [60]


def test_torchmetrics_metrics_see_the_shares_of_weight():
    from torchmetrics.classification import MulticlassAUROC, MulticlassCalibrationError

    from faiss_knn.classify.vote import neighbor_weights, normalize_scores, vote

    bank, bank_labels, queries, query_labels = blobs(5)
    bank_labels, query_labels = bank_labels % 3, query_labels % 3  # torchmetrics warns of classes without queries
    names = ["MulticlassAUROC", "MulticlassCalibrationError(n_bins=5)", "MulticlassAccuracy(average='micro')"]
    (record,) = evaluate(bank, bank_labels, queries, query_labels, k=9, metrics=names).records
    found = KNNIndex(distance_metric="cosine").build(bank).search(queries, 9)
    weights = neighbor_weights(found.distances)
    shares = normalize_scores(vote(found.distances, torch.from_numpy(bank_labels)[found.indices], 3), weights)
    truth = torch.from_numpy(query_labels)
    assert record["MulticlassAUROC"] == pytest.approx(MulticlassAUROC(3)(shares, truth).item())
    assert record[names[1]] == pytest.approx(MulticlassCalibrationError(3, n_bins=5)(shares, truth).item())
    assert record[names[2]] == pytest.approx(record["top1"])


def test_an_index_is_compared_with_exact_neighbours_of_the_same_queries():
    bank, bank_labels, queries, query_labels = blobs(6, n=400, num_queries=150, spread=0.8)
    bank[200:] = bank[:200]  # every neighbour has a twin at the same distance
    report = evaluate(
        bank, bank_labels, queries, query_labels, k=(2, 5), weighting=("uniform", "softmax"),
        index=("IVF16,Flat", "flat"), nprobe=1, keep_neighbors=True,
    )  # fmt: skip
    (found_d, found_i), (exact_d, exact_i) = report.neighbors["IVF16,Flat"], report.neighbors["flat"]
    for record in report.records[:4]:
        k, w = record["k"], record["weighting"]
        hits = []
        for d, i in ((found_d, found_i), (exact_d, exact_i)):
            lists = [
                (np.ma.compressed(np.ma.masked_invalid(x)), y[y >= 0]) for x, y in zip(d[:, :k], i[:, :k], strict=True)
            ]
            hits.append(
                np.array([
                    oracle.judge(x[None], y[None], bank_labels, [t], 0.07, w, 7)[0][0]
                    for (x, y), t in zip(lists, query_labels, strict=True)
                ])
            )  # fmt: skip
        loss = hits[1].astype(float) - hits[0]
        assert record["accuracy_loss"] == pytest.approx(loss.mean(), abs=1e-12)
        assert record["accuracy_loss_se"] == pytest.approx(loss.std() / np.sqrt(150))
        by_id = np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(found_i, exact_i, strict=True)])
        by_distance = np.mean(found_d[:, :k] <= exact_d[:, k - 1 : k] * (1 + 1e-5))
        assert record["recall_ids"] == pytest.approx(by_id)
        assert record["recall"] == pytest.approx(by_distance)
        assert 0.2 < record["recall"] < 1
    assert [record["accuracy_loss"] for record in report.records[4:]] == [0, 0, 0, 0]


def test_one_search_serves_every_setting(monkeypatch):
    built = []
    monkeypatch.setattr(KNNIndex, "build", _counting(KNNIndex.build, built))
    report = evaluate(*blobs(), k=KS, temperature=TEMPERATURES, weighting=WEIGHTINGS, index=("flat", "IVF4,Flat"))
    assert len(report.records) == 2 * 18
    assert built == ["flat", "IVF4,Flat"]


def _counting(build, built):
    def counted(index, *args, **options):
        built.append(index.spec)
        return build(index, *args, **options)

    return counted


def test_a_sweep_tries_each_value_on_the_indexes_that_have_the_parameter():
    bank, bank_labels, queries, query_labels = blobs(7, n=400)
    report = evaluate(
        bank, bank_labels, queries, query_labels, k=5, index=("flat", "IVF16,Flat"), sweep={"nprobe": [1, 4, 16]}
    )
    assert [(r["spec"], r["settings"], r["nprobe"]) for r in report.records] == [
        ("flat", {}, None), *(("IVF16,Flat", {"nprobe": n}, n) for n in (1, 4, 16)),
    ]  # fmt: skip
    recalls = [r["recall"] for r in report.records]
    assert recalls[1] < recalls[2] < recalls[3] == 1.0


def test_k_factor_asks_codes_for_more_candidates():
    bank, bank_labels, queries, query_labels = blobs(8, n=600, dim=8)
    report = evaluate(
        bank,
        bank_labels,
        queries,
        query_labels,
        k=5,
        index=("flat", "SQ4", "IVF4,Flat"),
        sweep={"k_factor": [1, 2, 120]},
    )
    assert [r["settings"] for r in report.records] == [{}, {"k_factor": 1}, {"k_factor": 2}, {"k_factor": 120}, {}]
    recalls = [r["recall"] for r in report.records[1:4]]
    assert recalls[0] < recalls[1] <= recalls[2] == 1.0


def test_records_that_are_there_are_not_made_again(monkeypatch):
    data = blobs()
    full = evaluate(*data, k=KS, index=("flat", "IVF4,Flat"))
    built, fresh = [], []
    monkeypatch.setattr(KNNIndex, "build", _counting(KNNIndex.build, built))
    again = evaluate(*data, k=KS, index=("flat", "IVF4,Flat"), done=full.records)
    assert (again.records, built) == (full.records, [])
    part = evaluate(
        *data, k=KS, index=("flat", "IVF4,Flat"), done=full.records[:4], on_record=lambda r, _: fresh.append(r)
    )
    assert [(r["spec"], r["k"]) for r in fresh] == [("IVF4,Flat", 4), ("IVF4,Flat", 9)]
    assert [r["top1"] for r in part.records] == [r["top1"] for r in full.records]
    other = data[0] + 1, *data[1:]
    evaluate(*other, k=KS, done=full.records, on_record=lambda r, _: fresh.append(r))
    assert len(fresh) == 5  # other features: nothing of the old run is taken


@pytest.mark.parametrize("kind", ["shards", "bytes", "memmap", "half", "big-endian", "tensor"])
@pytest.mark.parametrize("index", ["flat", "IVF4,Flat"])
def test_rows_of_any_kind_give_the_same_neighbours(tmp_path, monkeypatch, kind, index):
    monkeypatch.setattr(search_step, "BANK_BLOCK_BYTES", 4 * 5 * 37)  # pieces of 37 rows
    rng = np.random.default_rng(8)
    bank, queries = rng.integers(0, 20, (150, 5)).astype(np.float32), rng.integers(1, 20, (20, 5)).astype(np.float32)
    bank[:, 0] += 1  # no zero row
    np.save(tmp_path / "bank.npy", bank)
    rows = {
        "shards": lambda: Shards([bank[:1], bank[1:90], bank[90:]]),
        "bytes": lambda: bank.astype(np.uint8),
        "memmap": lambda: np.load(tmp_path / "bank.npy", mmap_mode="r"),
        "half": lambda: bank.astype(np.float16),
        "big-endian": lambda: bank.astype(">f4"),
        "tensor": lambda: torch.from_numpy(bank),
    }[kind]()
    labels, query_labels = rng.integers(0, 4, 150), rng.integers(0, 4, 20)
    options = {"k": 9, "index": index, "nprobe": 4 if index != "flat" else None, "keep_neighbors": True}
    got = evaluate(rows, labels, queries, query_labels, distance_metric="euclidean", **options)
    distances, indices = oracle.neighbors(queries, bank, 9, "euclidean")
    np.testing.assert_array_equal(got.neighbors[index][1], indices)
    np.testing.assert_allclose(got.neighbors[index][0], distances, rtol=1e-6)


def test_pieces_whose_squared_distances_float64_cannot_hold_are_joined_in_order(monkeypatch):
    monkeypatch.setattr(search_step, "BANK_BLOCK_BYTES", 4 * 5 * 37)
    rng = np.random.default_rng(9)
    bank, queries = rng.standard_normal((150, 5)), rng.standard_normal((20, 5))
    _, indices = oracle.neighbors(queries, bank, 9, "euclidean")
    large = Shards([1e180 * bank[:70], 1e180 * bank[70:]])
    labels = np.arange(150) % 4
    options = {"distance_metric": "squared_euclidean", "storage_dtype": torch.float64, "keep_neighbors": True}
    got = evaluate(large, labels, 1e180 * queries, labels[:20], k=9, **options)
    np.testing.assert_array_equal(got.neighbors["flat"][1], indices)


LIMITED = """
import resource, sys
import numpy as np
from faiss_knn import evaluate
from faiss_knn.offline import search, task
bank, labels = np.load(sys.argv[1], mmap_mode="r"), np.arange(400_000) % 10
search.BANK_BLOCK_BYTES = task._CHECKED_BYTES = 8 << 20
queries, truth = bank[:20] + np.float32(1e-3), labels[:20]
evaluate(bank[:1000], labels[:1000], queries, truth, k=1)  # threads and libraries are there
held = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
limit = held + (100 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
print(evaluate(bank, labels, queries, truth, k=1).records[0]["top1"])
"""


def test_a_bank_on_disk_is_searched_in_less_memory_than_it_takes(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(tmp_path / "bank.npy", "w+", np.float32, (400_000, 128))  # 195 MiB
    for start in range(0, len(rows), 100_000):
        rows[start : start + 100_000] = rng.standard_normal((100_000, 128), np.float32)
    rows.flush()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "bank.npy")], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # on a busy machine threads wait for each other at every small step
    )  # fmt: skip
    assert done.stdout.strip() == "1.0", done.stderr


def test_unlabelled_rows_are_left_out_and_row_numbers_stay():
    bank, bank_labels, queries, query_labels = blobs(9)
    bank_labels[::3] = -1
    query_labels[:5] = -1
    report = evaluate(bank, bank_labels, queries, query_labels, k=4, keep_neighbors=True)
    kept = np.flatnonzero(bank_labels >= 0)
    _, indices = oracle.neighbors(queries[5:], bank[kept], 4, "cosine")
    np.testing.assert_array_equal(report.neighbors["flat"][1], kept[indices])
    assert (report.checks["unlabelled_bank"], report.checks["unlabelled_queries"]) == (30, 5)


def test_names_are_numbered_in_their_order():
    bank, bank_labels, queries, query_labels = blobs(10)
    words = np.array(["ant", "bee", "cat", "dog", "eel", "fox", "gnu"])
    named = evaluate(bank, words[bank_labels], queries, words[query_labels], k=5)
    plain = evaluate(bank, bank_labels, queries, query_labels, k=5)
    assert named.records[0]["top1"] == plain.records[0]["top1"]
    assert named.class_names == ["ant", "bee", "dog", "eel", "fox", "gnu"]  # no cat in the data
    assert named.checks["classes_unseen"] == ["gnu"]


def test_what_makes_a_number_suspect_is_found():
    bank, bank_labels, queries, query_labels = blobs(11)
    queries[:3] = bank[40:43]
    report = evaluate(bank, bank_labels, queries, query_labels, k=(1, 200))
    counts = np.bincount(bank_labels, minlength=7)
    present = counts[counts > 0]
    assert report.checks["rows_per_class"] == [present.min(), np.median(present), present.max()]
    assert report.checks["queries_unseen"] == (query_labels == 6).sum()
    assert report.checks["majority_baseline"] == pytest.approx((query_labels == counts.argmax()).mean())
    assert report.checks["k_above_bank"] == [200]
    assert report.records[0]["duplicates"] == 3


def test_retrieval_metrics_come_from_the_lists():
    from faiss_knn import retrieval_metrics
    from faiss_knn.measures.average_precision import micro_average_precision
    from faiss_knn.measures.retrieval import retrieval_by_class
    from faiss_knn.offline.report.results import record_key

    bank, bank_labels, queries, query_labels = blobs(12)
    _, indices = oracle.neighbors(queries, bank, 90, "cosine")
    relevant = torch.from_numpy((bank_labels[None] == query_labels[:, None]).sum(1))
    whole = retrieval_metrics(torch.from_numpy(bank_labels[indices]), torch.from_numpy(query_labels), relevant, [3, 9])
    deep = evaluate(bank, bank_labels, queries, query_labels, k=(3, 9), depth=90)
    for record in deep.records:
        for name in ("precision", "hit_rate", "recall", "map", "ndcg"):
            assert record[f"retrieval_{name}"] == pytest.approx(whole[f"{name}@{record['k']}"]), name
        assert record["retrieval_mrr"] == pytest.approx(whole["mrr"])
        assert record["retrieval_r_precision"] == pytest.approx(whole["r_precision"])
        assert record["retrieval_map_r"] == pytest.approx(whole["map@r"])
    by_class = retrieval_by_class(
        torch.from_numpy(bank_labels[indices]), torch.from_numpy(query_labels), relevant, [3, 9], 7
    )
    distances, _ = oracle.neighbors(queries, bank, 90, "cosine")
    for record in deep.records:
        k = record["k"]
        assert record["retrieval_macro_map"] == pytest.approx(by_class[f"map@{k}"].nanmean().item())
        assert record["retrieval_macro_mrr"] == pytest.approx(by_class["mrr"].nanmean().item())
        kept = deep.retrieval_by_class[record_key(record)]
        for name, values in kept.items():
            own = name.removeprefix("retrieval_").replace("map_r", "map@r")
            assert values == pytest.approx(by_class.get(f"{own}@{k}", by_class.get(own)).tolist(), nan_ok=True), name
        assert len(kept) == 8
        matches = bank_labels[indices[:, :k]] == query_labels[:, None]
        every = micro_average_precision(-distances[:, :k].ravel(), matches.ravel(), int(relevant.sum()))
        assert record["retrieval_micro_ap"] == pytest.approx(every)
    shallow = evaluate(bank, bank_labels, queries, query_labels, k=9)
    assert shallow.records[0]["retrieval_r_precision"] is None


def test_single_queries_are_timed_on_request():
    (record,) = evaluate(*blobs(), k=1, latency=10).records
    assert 0 < record["latency_p50_ms"] <= record["latency_p95_ms"]
    assert "latency_p50_ms" not in evaluate(*blobs(), k=1).records[0]


BANK, LABELS, QUERIES, TRUTH = [[1.0, 2.0], [3.0, 4.0]], [0, 1], [[1.0, 1.0]], [0]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((BANK, LABELS, None, None), {}, "`query_features` and `query_labels` are needed"),
        ((BANK, LABELS, QUERIES, TRUTH), {"leave_one_out": True}, "leave_one_out takes the bank alone"),
        ((BANK, [0], QUERIES, TRUTH), {}, "`bank_labels` must have one entry per row, 2, got 1"),
        ((BANK, [0, -2], QUERIES, TRUTH), {}, "`bank_labels` must be class ids from 0, .* got -2"),
        ((BANK, [-1, -1], QUERIES, TRUTH), {}, "every entry of `bank_labels` is -1"),
        ((BANK, [0.5, 1], QUERIES, TRUTH), {}, "`bank_labels` must be .* float64"),
        ((BANK, LABELS, [[1.0]], TRUTH), {}, "`query_features` must have the bank's dimension 2, got 1"),
        ((BANK, LABELS, QUERIES, ["a"]), {}, "both be names"),
        ((BANK, LABELS, QUERIES, [[1, 0]]), {}, "of one kind"),
        ((BANK, [[0, 2], [1, 0]], QUERIES, [[1, 0]]), {}, "`bank_labels` must be 0 and 1, .* got 2"),
        ((BANK, LABELS, QUERIES, TRUTH), {"num_classes": 1}, "give num_classes=2"),
        ((BANK, LABELS, QUERIES, TRUTH), {"class_names": ["a"]}, "`class_names` must name all 2"),
        ((BANK, LABELS, QUERIES, TRUTH), {"k": 0}, "must be positive integers, got 0"),
        ((BANK, LABELS, QUERIES, TRUTH), {"k": []}, "`k` needs at least one value"),
        ((BANK, LABELS, QUERIES, TRUTH), {"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ((BANK, LABELS, QUERIES, TRUTH), {"weighting": "loud"}, "`weighting` must be one of"),
        ((BANK, LABELS, QUERIES, TRUTH), {"index": []}, "`index` needs at least one spec"),
        ((BANK, LABELS, QUERIES, TRUTH), {"sweep": {"speed": [1]}}, "`sweep` must name one of"),
        ((BANK, LABELS, QUERIES, TRUTH), {"index": ["flat", "IVG4,Flat"]}, "FAISS factory string .* got 'IVG4,Flat'"),
        ((BANK, LABELS, QUERIES, TRUTH), {"distance_metric": "far"}, "`distance_metric` must be one of"),
        ((BANK, LABELS, QUERIES, TRUTH), {"tries": 3}, "give per_class too"),
        ((BANK, LABELS, QUERIES, TRUTH), {"per_class": 0}, "`per_class` must be positive"),
        ((BANK, LABELS, QUERIES, TRUTH), {"metrics": ["Accuracy"]}, "such as Multiclass"),
        ((BANK, LABELS, QUERIES, TRUTH), {"metrics": ["import os"]}, "must be Name or Name"),
        ((BANK, LABELS, QUERIES, TRUTH), {"metrics": ["MulticlassAccuracy(colour=3)"]}, "cannot be made"),
        ((BANK, LABELS, QUERIES, TRUTH), {"metrics": ["MulticlassConfusionMatrix"]}, "not give a single number"),
        (
            ([[float("nan"), 1.0], [1.0, 1.0]], LABELS, QUERIES, TRUTH),
            {},
            "`bank_features` must be finite, .* row 0 is not",
        ),
        ((BANK, LABELS, [[1.0, 1.0], [0.0, 0.0]], [-1, 1]), {}, "`query_features` must be finite, .* row 1 is not"),
        ((BANK, LABELS, [[float("inf"), 1.0]], TRUTH), {"distance_metric": "euclidean"}, "must be finite: row 0"),
    ],
)
def test_bad_input_is_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*given, **{"k": 1} | options)


def test_a_record_holds_the_fields_described_in_their_order():
    rows = np.eye(4, dtype=np.float32)
    report = evaluate(rows, [0, 1, 0, 1], rows[:2], [0, 1], k=1, latency=1)
    assert list(report.records[0]) == list(Record.__annotations__)
