"""What evaluate() takes: labels and rows of every kind, rows that cannot be compared, and arguments out of range."""

import numpy as np
import pandas as pd
import pytest
import torch

from faiss_knn import FeatureBank, evaluate

RNG = np.random.default_rng(0)
CENTRES = RNG.standard_normal((4, 6))
BANK_LABELS, QUERY_LABELS = RNG.integers(0, 4, 80), RNG.integers(0, 4, 30)
BANK, QUERIES = (
    (CENTRES[y] + RNG.standard_normal((len(y), 6))).astype(np.float32) for y in (BANK_LABELS, QUERY_LABELS)
)
NAMES = np.array(["ant", "bee", "cat", "dog"])
PLAIN = evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=(1, 5))


def scores(report):
    return [(r["top1"], r["top5"], r["macro_top1"], r["retrieval_map"]) for r in report.records]


LABELS = {
    "int8": lambda y: y.astype(np.int8),
    "uint16": lambda y: y.astype(np.uint16),
    "list": list,
    "column": lambda y: y[:, None],
    "series": pd.Series,
    "categorical of numbers": lambda y: pd.Categorical(y),
    "names": lambda y: NAMES[y],
    "names as objects": lambda y: NAMES[y].astype(object),
    "series of names": lambda y: pd.Series(NAMES[y]),
    "categorical": lambda y: pd.Categorical(NAMES[y], categories=NAMES[::-1]),
    "categorical series": lambda y: pd.Series(NAMES[y], dtype="category"),
    "nullable integers": lambda y: pd.Series(y, dtype="Int64"),
    "one-hot": lambda y: np.eye(4, dtype=int)[y],
    "one-hot floats": lambda y: torch.eye(4)[y],
    "bool one-hot": lambda y: np.eye(4, dtype=bool)[y],
    "large": lambda y: y * 10**9 + 3,
    "as large as can be": lambda y: 2**63 - 1 - 1000 * y,
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_any_kind_give_the_same_numbers(kind):
    given = LABELS[kind]
    report = evaluate(BANK, given(BANK_LABELS), QUERIES, given(QUERY_LABELS), k=(1, 5))
    if kind == "as large as can be":  # the order of the classes is the other one, and with it that of ties
        assert [s[2:] for s in scores(report)[:1]] == [pytest.approx(s[2:]) for s in scores(PLAIN)[:1]]
    else:
        assert scores(report) == [pytest.approx(s) for s in scores(PLAIN)]
    assert report.records[0]["num_classes"] == 4
    assert all(len(by_class) == 4 for by_class in report.per_class.values())


def gaps(filler):
    return lambda names: np.array([filler if i % 5 == 0 else name for i, name in enumerate(names)], object)


MISSING = {
    **{repr(filler): gaps(filler) for filler in (None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, -1)},
    "list": lambda names: gaps(None)(names).tolist(),
    "list with NaN": lambda names: gaps(float("nan"))(names).tolist(),
    "column": lambda names: gaps(None)(names)[:, None],
    "series": lambda names: pd.Series(gaps(None)(names)),
    "series of strings": lambda names: pd.Series(gaps(None)(names), dtype="string"),
    "categorical": lambda names: pd.Categorical(gaps(None)(names), categories=NAMES),
    "categorical series": lambda names: pd.Series(gaps(None)(names), dtype="category"),
    "masked": lambda names: np.ma.masked_array(names, mask=np.arange(len(names)) % 5 == 0),
    "categorical numbers": lambda names: pd.Categorical(
        [None if name is None else NAMES.tolist().index(name) for name in gaps(None)(names)]
    ),
}


@pytest.mark.parametrize("kind", MISSING)
def test_rows_whose_name_is_missing_are_unlabelled(kind):
    bank, queries = (MISSING[kind](NAMES[labels]) for labels in (BANK_LABELS, QUERY_LABELS))
    plain = [np.where(np.arange(len(y)) % 5 == 0, -1, y) for y in (BANK_LABELS, QUERY_LABELS)]
    expected = evaluate(BANK, plain[0], QUERIES, plain[1], k=(1, 5))
    found = evaluate(BANK, bank, QUERIES, queries, k=(1, 5))
    assert scores(found) == scores(expected)
    assert (found.checks["unlabelled_bank"], found.checks["unlabelled_queries"]) == (16, 6)
    assert found.class_names in (NAMES.tolist(), None)
    assert FeatureBank(BANK, bank).predict(QUERIES).equal(FeatureBank(BANK, plain[0]).predict(QUERIES))


def test_large_class_ids_are_numbered_and_named_by_id(tmp_path):
    report = evaluate(BANK, BANK_LABELS * 10**9, QUERIES, (QUERY_LABELS + 1) * 10**9, k=1)
    assert report.class_ids == [i * 10**9 for i in range(5)]
    assert report.checks["classes_unseen"] == ["4000000000"]
    rows = (report.save(tmp_path) / "per_class.csv").read_text().splitlines()[1:]
    assert [row.split(",")[4] for row in rows] == [str(i * 10**9) for i in range(5)]


def test_class_ids_that_are_not_sparse_stay():
    report = evaluate(BANK, BANK_LABELS * 100, QUERIES, QUERY_LABELS * 100, k=1)
    assert (report.class_ids, report.records[0]["num_classes"]) == (None, 301)


def test_rows_with_several_classes_stay_multi_hot_and_so_do_one_hot_ones_on_request():
    one_hot = np.eye(4, dtype=int)[BANK_LABELS], np.eye(4, dtype=int)[QUERY_LABELS]
    several = one_hot[0].copy()
    several[0] = 1
    assert evaluate(BANK, several, QUERIES, one_hot[1], k=5).records[0]["map"] > 0
    asked = evaluate(BANK, one_hot[0], QUERIES, one_hot[1], k=5, metrics="MultilabelAccuracy").records[0]
    assert asked["map"] > 0


def test_soft_labels_vote_by_their_shares_and_are_judged_by_the_largest():
    mixed = 0.7 * np.eye(4)[BANK_LABELS] + 0.3 * np.eye(4)[(BANK_LABELS + 1) % 4]
    truth = 0.9 * np.eye(4)[QUERY_LABELS] + 0.1 / 4
    for queries in (QUERY_LABELS, truth, np.eye(4, dtype=int)[QUERY_LABELS]):
        report = evaluate(
            BANK, mixed, QUERIES, queries, k=(1, 9), weighting="uniform", keep_neighbors=True,
            metrics=["MulticlassAccuracy(average='micro')"],
        )  # fmt: skip
        for record in report.records:
            votes = mixed[report.neighbors["flat"][1][:, : record["k"]]].sum(1)
            right = votes.argmax(1) == QUERY_LABELS
            assert record["top1"] == pytest.approx(right.mean())
            assert record["MulticlassAccuracy(average='micro')"] == pytest.approx(right.mean())
    assert report.records[1]["top5"] == 1  # of four classes, each with a vote


def test_an_ignored_label_is_unlabelled():
    bank_labels, query_labels = BANK_LABELS.copy(), QUERY_LABELS.copy()
    bank_labels[:9], query_labels[:4] = 255, 255
    report = evaluate(BANK, bank_labels.astype(np.uint8), QUERIES, query_labels.astype(np.uint8), k=3, ignore_index=255)
    assert scores(report) == scores(evaluate(BANK[9:], bank_labels[9:], QUERIES[4:], query_labels[4:], k=3))
    assert (report.checks["unlabelled_bank"], report.checks["unlabelled_queries"]) == (9, 4)
    with pytest.raises(ValueError, match="`ignore_index` is for class ids"):
        evaluate(BANK, NAMES[BANK_LABELS], QUERIES, NAMES[QUERY_LABELS], ignore_index=3)


ROWS = {
    "frame": lambda x: pd.DataFrame(x),
    "list": lambda x: x.tolist(),
    "reversed strides": lambda x: x[:, ::-1],
    "wants a gradient": lambda x: torch.tensor(x).requires_grad_(),
    "big-endian doubles": lambda x: x.astype(">f8"),
    "column order": np.asfortranarray,
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_features_of_any_kind_give_the_same_numbers(kind, metric):
    given = ROWS[kind]
    report = evaluate(given(BANK), BANK_LABELS, given(QUERIES), QUERY_LABELS, k=(1, 5), distance_metric=metric)
    assert scores(report) == scores(
        evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=(1, 5), distance_metric=metric)
    )


COLUMNS = ["f0", "f1", "f2", "f3", "f4", "f5"]


def framed(columns=COLUMNS, bank=BANK, queries=QUERIES):
    """The bank with its columns in one order, the queries with theirs in that of `columns`."""
    return pd.DataFrame(bank, columns=COLUMNS), pd.DataFrame(queries, columns=COLUMNS)[columns]


def test_columns_of_frames_are_joined_by_their_names_in_whatever_order():
    bank, queries = framed(COLUMNS[::-1])
    assert scores(evaluate(bank, BANK_LABELS, queries, QUERY_LABELS, k=(1, 5))) == scores(PLAIN)
    classes = [pd.DataFrame(np.eye(4, dtype=int)[labels], columns=NAMES) for labels in (BANK_LABELS, QUERY_LABELS)]
    found = evaluate(BANK, classes[0], QUERIES, classes[1][NAMES[::-1]], k=(1, 5))
    assert scores(found) == scores(PLAIN)


def test_columns_without_names_are_joined_in_their_order():
    counted = pd.DataFrame(QUERIES)
    for queries in (counted, QUERIES):
        assert scores(evaluate(framed()[0], BANK_LABELS, queries, QUERY_LABELS, k=(1, 5))) == scores(PLAIN)
    labels = pd.DataFrame({"y": BANK_LABELS}), pd.DataFrame({"label": QUERY_LABELS})
    assert scores(evaluate(BANK, labels[0], QUERIES, labels[1], k=(1, 5))) == scores(PLAIN)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"f5": "g5"}, r"^`query_features` must have the columns of `bank_features`.* without 'f5' and with 'g5'"),
        ({"f5": "f4"}, "^`query_features` must have the columns of `bank_features`, each once.* without 'f5'"),
    ],
)
def test_frames_of_other_columns_are_refused(columns, message):
    bank, queries = framed()
    with pytest.raises(ValueError, match=message):
        evaluate(bank, BANK_LABELS, queries.rename(columns=columns), QUERY_LABELS)
    twice = [frame.rename(columns={"f5": "f4"}) for frame in (bank, queries[COLUMNS[::-1]])]
    with pytest.raises(ValueError, match="that has some twice"):
        evaluate(twice[0], BANK_LABELS, twice[1], QUERY_LABELS)


def test_labels_with_the_index_of_their_rows_in_another_order_are_refused():
    bank, queries = framed()
    labels = pd.Series(BANK_LABELS).sample(frac=1, random_state=0)
    with pytest.raises(ValueError, match=r"^`bank_labels` must be in the order of `bank_features`.*\.loc\["):
        evaluate(bank, labels, queries, QUERY_LABELS)
    other = pd.Series(QUERY_LABELS, index=range(100, 130))  # of rows that are numbered otherwise, in order
    assert scores(evaluate(bank, labels.loc[bank.index], queries, other, k=(1, 5))) == scores(PLAIN)


def test_bfloat16_features_are_evaluated_as_they_are():
    bank, queries = torch.tensor(BANK).bfloat16(), torch.tensor(QUERIES).bfloat16()
    report = evaluate(bank, BANK_LABELS, queries, QUERY_LABELS, k=(1, 5))
    plain = evaluate(bank.float(), BANK_LABELS, queries.float(), QUERY_LABELS, k=(1, 5))
    assert scores(report) == scores(plain)


def test_bad_rows_are_left_out_and_counted_on_request():
    bank, queries = BANK.copy(), QUERIES.copy()
    bank[[0, 7]], bank[70], queries[3] = np.nan, 0, np.inf
    good = np.delete(np.arange(80), [0, 7, 70]), np.delete(np.arange(30), 3)
    report = evaluate(bank, BANK_LABELS, queries, QUERY_LABELS, k=(1, 5), skip_bad_rows=True, keep_neighbors=True)
    kept = evaluate(BANK[good[0]], BANK_LABELS[good[0]], QUERIES[good[1]], QUERY_LABELS[good[1]], k=(1, 5),
                    keep_neighbors=True)  # fmt: skip
    assert scores(report) == scores(kept)
    np.testing.assert_array_equal(report.neighbors["flat"][1], good[0][kept.neighbors["flat"][1]])
    first = report.records[0]
    assert (first["n_bank"], first["n_queries"], first["skipped_bank"], first["skipped_queries"]) == (77, 29, 3, 1)
    euclidean = evaluate(bank, BANK_LABELS, QUERIES, QUERY_LABELS, distance_metric="euclidean", k=1, skip_bad_rows=True)
    assert euclidean.records[0]["skipped_bank"] == 2  # the zero row has a distance
    with pytest.raises(ValueError, match="row 0 is not"):
        evaluate(bank, BANK_LABELS, queries, QUERY_LABELS)
    with pytest.raises(ValueError, match="every row of `bank_features` is zero or not finite"):
        evaluate(0 * BANK, BANK_LABELS, QUERIES, QUERY_LABELS, skip_bad_rows=True)
    own = evaluate(bank, BANK_LABELS, leave_one_out=True, k=1, skip_bad_rows=True).records[0]
    assert (own["n_queries"], own["skipped_bank"]) == (77, 3)


def test_the_storage_dtype_is_taken_and_recorded():
    bank = BANK.astype(np.float64) + 1e8
    wide = evaluate(
        bank, BANK_LABELS, bank[:9], BANK_LABELS[:9], k=1, distance_metric="euclidean", storage_dtype=torch.float64
    )
    assert (wide.records[0]["storage_dtype"], wide.records[0]["top1"]) == ("float64", 1.0)
    half = evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=1, storage_dtype=torch.float16).records[0]
    assert half["storage_dtype"] == "float16"
    assert half["bytes"] < PLAIN.records[0]["bytes"]
    assert PLAIN.records[0]["storage_dtype"] == "float32"
    with pytest.raises(ValueError, match="`storage_dtype` must be"):
        evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, storage_dtype="half")


def copies(bank, queries, **options):
    (record,) = evaluate(
        bank, np.arange(len(bank)) % 4, queries, np.arange(len(queries)) % 4, **{"k": 1} | options
    ).records
    return record["duplicates"], record["near_duplicates"]


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "squared_euclidean", "manhattan"])
def test_copies_of_bank_rows_are_counted_rounded_ones_too(metric):
    options = {"distance_metric": metric}
    assert copies(BANK, BANK[:20], **options) == (20, 0)
    assert copies(BANK, BANK[:20].astype(np.float16), **options) == (0, 20)
    assert copies(BANK, torch.tensor(BANK[:20]).bfloat16(), **options) == (0, 20)
    assert copies(np.repeat(BANK, 2, 0), BANK * np.float32(1 + 1e-6), k=3, **options) == (0, 80)
    assert copies(BANK, QUERIES, **options) == (0, 0)


def test_scaled_copies_are_copies_under_cosine_alone():
    scaled = BANK[:20] * np.linspace(0.1, 9, 20)[:, None]
    assert copies(BANK, scaled) == (0, 20)
    assert copies(BANK, scaled, distance_metric="euclidean") == (0, 0)


def test_rows_that_all_lie_close_together_are_no_copies():
    close = [(1000 + 1e-2 * x).astype(np.float64) for x in (BANK, QUERIES)]  # float16 would round by 0.25
    assert copies(*close, distance_metric="euclidean") == (0, 0)


ARGUMENTS = [
    ({"per_class": 2.5}, "`per_class` must be positive, an integer, got 2.5"),
    ({"per_class": 2, "tries": 1.5}, "`tries` must be positive, an integer, got 1.5"),
    ({"per_class": 2, "seed": -1}, "`seed` must be 0 or a positive integer, got -1"),
    ({"seed": 0.5}, "`seed` must be an integer, got 0.5"),
    ({"latency": -1}, "`latency` must be 0 or a positive integer, got -1"),
    ({"latency": 2.0}, "`latency` must be an integer, got 2.0"),
    ({"depth": 2.5}, "must be positive integers, got 2.5"),
    ({"depth": 0}, "must be positive integers, got 0"),
    ({"k": True}, "must be positive integers, got True"),
    ({"k": np.array([])}, "`k` needs at least one value"),
    ({"temperature": ()}, "`temperature` needs at least one value"),
    ({"temperature": float("inf")}, "temperature must be between .* got inf"),
    ({"temperature": 1e-46}, "temperature must be between .* got 1e-46"),
    ({"temperature": float("nan")}, "temperature must be positive, got nan"),
    ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
    ({"weighting": []}, "`weighting` needs at least one value"),
    ({"weighting": 3}, "`weighting` must be one of"),
    ({"sweep": {"nprobe": []}}, "`sweep` needs at least one value of nprobe"),
    ({"sweep": {"nprobe": [0]}}, "`sweep` must give positive integers for nprobe, got 0"),
    ({"sweep": [("nprobe", 1)]}, "`sweep` must give values by name"),
    ({"num_classes": 0}, "num_classes must be positive"),
    ({"num_classes": 4.5}, "num_classes must be a positive integer"),
    ({"ignore_index": 0.5}, "`ignore_index` must be an integer, got 0.5"),
]


@pytest.mark.parametrize(("options", "message"), ARGUMENTS)
def test_arguments_are_checked_by_type_and_range(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, **options)


def test_numbers_of_numpy_and_torch_are_arguments():
    report = evaluate(
        BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=np.array([1, 5]), temperature=np.float32(0.5),
        depth=torch.tensor(9), num_classes=np.int64(4), latency=np.int64(0), seed=np.int64(3),
        index="IVF4,Flat", sweep={"nprobe": np.int64(1)},
    )  # fmt: skip
    assert [(r["k"], r["temperature"], r["seed"]) for r in report.records] == [(1, 0.5, 3), (5, 0.5, 3)]
    assert evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, k=np.int64(5)).records[0]["k"] == 5


FEATURES = [
    (np.array([["a", "b"]]), "must be numbers of at most 64 bits, got <U1"),
    (np.ma.masked_equal(BANK, BANK[0, 0]), "must not have masked entries"),
    (torch.tensor(BANK).to_sparse(), "must be an ordinary dense tensor, got a sparse one"),
    (BANK.astype(complex), "must be numbers of at most 64 bits, got complex128"),
    ([[1.0], [1.0, 2.0]], "must be rows of one length"),
    (pd.DataFrame({"a": [1.0], "b": ["x"]}), "must be numbers of at most 64 bits, got object"),
    (None, "must be an \\(N, d\\) tensor or array, got NoneType"),
    (3.5, "must be an \\(N, d\\) tensor or array, got float"),
]


@pytest.mark.parametrize(("features", "message"), FEATURES)
def test_features_of_no_use_are_named(features, message):
    with pytest.raises(ValueError, match=f"`bank_features` {message}"):
        evaluate(features, BANK_LABELS, QUERIES, QUERY_LABELS)
