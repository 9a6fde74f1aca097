"""Groups, and rows that queries may not find, against a loop over float64 distances."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from faiss_knn import evaluate
from faiss_knn.measures.significance import cluster_bootstrap_interval, cluster_standard_error
from faiss_knn.offline import search as search_step
from faiss_knn.offline.cli import main
from faiss_knn.offline.lazy_rows import Shards
from tests.reference import brute_force

FEATURES, LABELS = load_digits(return_X_y=True)
FEATURES = FEATURES.astype(np.float32)
BANK, BANK_LABELS, QUERIES, QUERY_LABELS = FEATURES[:900], LABELS[:900], FEATURES[900:1100], LABELS[900:1100]


def allowed(queries, bank, forbidden, k):
    """(Q, k) the nearest rows that are not forbidden (Q, N), -1 where there are no more."""
    found = np.full((len(queries), k), -1)
    _, order = brute_force(queries, bank, len(bank))
    for row, (ids, no) in enumerate(zip(order, forbidden, strict=True)):
        kept = [i for i in ids if not no[i]][:k]
        found[row, : len(kept)] = kept
    return found


def relevant(forbidden, bank_labels, query_labels):
    return np.array([((bank_labels == y) & ~no).sum() for y, no in zip(query_labels, forbidden, strict=True)])


def check(report, expected, forbidden, bank_labels, query_labels, index="flat"):
    np.testing.assert_array_equal(report.neighbors[index][1], expected)
    record = report.records[0]
    hits = np.array([
        np.isin(ids, np.flatnonzero(bank_labels == y)).sum() for ids, y in zip(expected, query_labels, strict=True)
    ])  # fmt: skip
    counts = relevant(forbidden, bank_labels, query_labels)
    assert record["retrieval_recall"] == pytest.approx((hits[counts > 0] / counts[counts > 0]).mean())
    assert (record["recall"], record["recall_ids"], record["accuracy_loss"]) == (1, 1, 0)


OPTIONS = {"k": 5, "distance_metric": "euclidean", "keep_neighbors": True}


@pytest.mark.parametrize("size", [3, 40, 400])
@pytest.mark.parametrize("pieces", [False, True])
def test_no_query_finds_rows_of_its_own_group(monkeypatch, size, pieces):
    monkeypatch.setattr(search_step, "BANK_BLOCK_BYTES", 4 * 64 * 211)  # shards are searched 211 rows at a time
    rng = np.random.default_rng(size)
    groups = np.arange(900) // size, rng.integers(0, 900 // size + 3, 200)
    forbidden = groups[0][None] == groups[1][:, None]
    bank = Shards([BANK[:500], BANK[500:]]) if pieces else BANK
    report = evaluate(bank, BANK_LABELS, QUERIES, QUERY_LABELS, groups=groups, exclude_same_group=True, **OPTIONS)
    check(report, allowed(QUERIES, BANK, forbidden, 5), forbidden, BANK_LABELS, QUERY_LABELS)


def test_one_group_that_is_nearly_the_whole_bank_leaves_few_neighbours():
    groups = np.where(np.arange(900) < 897, 7, -1), np.where(np.arange(200) < 100, 7, 8)
    forbidden = (groups[0] == 7)[None] & (groups[1] == 7)[:, None]
    report = evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, groups=groups, exclude_same_group=True, **OPTIONS)
    expected = allowed(QUERIES, BANK, forbidden, 5)
    assert (expected[:100, 3:] == -1).all()
    check(report, expected, forbidden, BANK_LABELS, QUERY_LABELS)


def test_leave_one_out_by_groups_with_names_and_rows_without_one():
    names = np.array([f"scene {i // 6}" for i in range(900)], object)
    names[::50] = None  # a group of its own
    codes = np.array([i if name is None else 10_000 + i // 6 for i, name in enumerate(names)])
    forbidden = codes[None] == codes[:, None]
    report = evaluate(BANK, BANK_LABELS, groups=names, exclude_same_group=True, leave_one_out=True, **OPTIONS)
    check(report, allowed(BANK, BANK, forbidden, 5), forbidden, BANK_LABELS, BANK_LABELS)
    assert report.records[0]["n_groups"] == len(np.unique(codes))
    assert "No query finds rows of its own group." in " ".join(_summary(report))


def _summary(report):
    from faiss_knn.offline.report.content import sections

    return sections(report)[0].text


def test_groups_follow_rows_that_are_left_out_for_want_of_a_label_or_a_number():
    groups = np.arange(900) // 9, np.arange(200) // 2
    labels, query_labels, bank = BANK_LABELS.copy(), QUERY_LABELS.copy(), BANK.copy()
    labels[::7], query_labels[::5], bank[3] = -1, -1, np.nan
    report = evaluate(
        bank, labels, QUERIES, query_labels, groups=groups, exclude_same_group=True, skip_bad_rows=True, **OPTIONS
    )
    bad = (labels < 0) | np.isnan(bank[:, 0])
    forbidden = (groups[0][None] == groups[1][:, None]) | bad
    asked = query_labels >= 0
    expected = allowed(QUERIES[asked], BANK, forbidden[asked], 5)
    check(report, expected, forbidden[asked], labels, query_labels[asked])


def test_queries_that_are_part_of_the_bank_do_not_find_themselves():
    own = np.arange(100, 300)
    forbidden = np.arange(900)[None] == own[:, None]
    report = evaluate(BANK, BANK_LABELS, BANK[own], BANK_LABELS[own], own_rows=own, **OPTIONS)
    check(report, allowed(BANK[own], BANK, forbidden, 5), forbidden, BANK_LABELS, BANK_LABELS[own])
    assert report.records[0]["duplicates"] == 0
    whole = evaluate(BANK, BANK_LABELS, leave_one_out=True, **OPTIONS)
    np.testing.assert_array_equal(report.neighbors["flat"][1], whole.neighbors["flat"][1][own])


@pytest.mark.parametrize("padded", [False, True])
def test_a_query_finds_no_row_of_its_list(padded):
    rng = np.random.default_rng(0)
    near = brute_force(QUERIES, BANK, 60)[1]
    lists = [near[row, rng.permutation(60)[: row % 40]].tolist() for row in range(200)]
    forbidden = np.array([np.isin(np.arange(900), one) for one in lists])
    given = np.full((200, 41), -1) if padded else lists
    if padded:
        for row, one in enumerate(lists):
            given[row, : len(one)] = one
            given[row, len(one) : 41] = one[0] if one else -1  # named twice: counted once
    report = evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, ignored_rows=given, **OPTIONS)
    check(report, allowed(QUERIES, BANK, forbidden, 5), forbidden, BANK_LABELS, QUERY_LABELS)


def test_groups_lists_and_own_rows_together_count_each_row_once():
    rng = np.random.default_rng(1)
    own = np.where(np.arange(200) % 3, np.arange(200), -1)
    groups = np.arange(900) // 4, np.arange(200) // 4
    lists = rng.integers(0, 900, (200, 30))
    lists[:, 0] = np.maximum(own, 0)
    rows = np.arange(900)
    forbidden = (rows == own[:, None]) | (groups[0] == groups[1][:, None])
    forbidden |= np.array([np.isin(rows, one) for one in lists])
    report = evaluate(
        BANK, BANK_LABELS, BANK[:200], BANK_LABELS[:200], own_rows=own, ignored_rows=lists, groups=groups,
        exclude_same_group=True, **OPTIONS,
    )  # fmt: skip
    check(report, allowed(BANK[:200], BANK, forbidden, 5), forbidden, BANK_LABELS, BANK_LABELS[:200])


def test_an_approximate_index_is_compared_with_exact_neighbours_of_other_groups():
    groups = np.arange(900) // 30, np.arange(200) // 5
    report = evaluate(
        BANK, BANK_LABELS, QUERIES, QUERY_LABELS, groups=groups, exclude_same_group=True, index=("flat", "IVF8,Flat"),
        nprobe=2, **OPTIONS,
    )  # fmt: skip
    found, exact = report.neighbors["IVF8,Flat"][1], report.neighbors["flat"][1]
    assert not (groups[0][found] == groups[1][:, None])[found >= 0].any()
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, exact, strict=True)])
    assert report.records[1]["recall_ids"] == pytest.approx(shared)
    assert 0.5 < shared < 1


def test_the_interval_is_drawn_over_the_groups_of_the_queries():
    groups = np.arange(200) // 8
    plain = evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=5)
    record = evaluate(
        BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=5, groups=groups, index="IVF8,Flat", nprobe=1
    ).records[0]
    report = evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=5, groups=groups)
    right = next(iter(report.outcomes.values()))["correct"]
    assert report.records[0]["top1"] == plain.records[0]["top1"]
    bounds = (report.records[0]["top1_low"], report.records[0]["top1_high"])
    assert bounds == cluster_bootstrap_interval(right, groups)
    assert report.records[0]["top1_se"] == cluster_standard_error(right, groups)
    assert record["accuracy_loss_se"] > 0
    assert report.records[0]["data"] != plain.records[0]["data"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": np.zeros(199)}, r"`groups` must be one group for each of 200 rows, got shape \(199,\)"),
        ({"groups": np.zeros(200, int)}, "`groups` must name two groups of queries or more, got 1"),
        ({"exclude_same_group": True}, "exclude_same_group needs groups: give `groups`"),
        ({"groups": np.arange(200), "exclude_same_group": True}, "give those of the bank too"),
        ({"groups": (np.arange(900), ["a"] * 200)}, "must both be integers or both be names"),
        ({"groups": (np.zeros(900, int), np.zeros(200, int)), "exclude_same_group": True}, "no query has a neighbour"),
        ({"own_rows": np.arange(200) + 800}, r"`own_rows` must be rows of the bank, in \[0, 900\), or -1, got 999"),
        ({"own_rows": [0]}, "`own_rows` must be a row of the bank, or -1, for each of 200 queries"),
        ({"ignored_rows": [[0.5]] * 200}, "`ignored_rows` must be a list of rows of the bank for each of 200 queries"),
        ({"exclude_same_group": "yes"}, "`exclude_same_group` must be"),
    ],
)
def test_bad_limits_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=1, **options)


def test_the_command_line_reads_groups_and_own_rows_from_the_files(tmp_path, capsys):
    groups = np.arange(900) // 6
    np.savez(tmp_path / "bank.npz", features=BANK, labels=BANK_LABELS, scene=groups)
    own = {"scene": groups[:90], "place": np.arange(90), "junk": np.arange(90)[:, None] + [[90, 91]]}
    np.savez(tmp_path / "queries.npz", features=BANK[:90], labels=BANK_LABELS[:90], **own)
    files = [str(tmp_path / "bank.npz"), str(tmp_path / "queries.npz")]
    out = tmp_path / "out"
    arguments = ["eval", *files, "--k", "5", "--distance", "euclidean", "--out", str(out), "--groups", "scene"]
    assert main([*arguments, "--exclude-same-group"]) == 0
    assert main([*arguments, "--own-rows", "place", "--ignored-rows", "junk"]) == 0
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    here = evaluate(
        BANK, BANK_LABELS, BANK[:90], BANK_LABELS[:90], k=5, distance_metric="euclidean",
        groups=(groups, groups[:90]), exclude_same_group=True,
    )  # fmt: skip
    assert [record["exclude_same_group"] for record in records] == [True, False]
    assert (records[0]["top1"], records[0]["data"]) == (here.records[0]["top1"], here.records[0]["data"])
    assert records[0]["n_groups"] == records[1]["n_groups"] == 15
    assert main(["eval", files[0], "--leave-one-out", "--k", "5", "--groups", "scenes"]) == 1
    assert "no array 'scenes'" in capsys.readouterr().err


def test_tensors_and_strings_are_groups_too():
    codes = torch.arange(200) // 8
    reports = [
        evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=5, groups=groups).records[0]
        for groups in (codes, [f"g{int(code):02}" for code in codes], codes.numpy().astype(np.uint8))
    ]
    assert len({(record["top1_low"], record["top1_high"]) for record in reports}) == 1
