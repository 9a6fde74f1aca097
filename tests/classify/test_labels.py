import numpy as np
import pandas as pd
import pytest
import torch

from faiss_knn.classify.labels import as_labels, as_labels_or_names, most_likely, number_classes, one_hot_ids

IDS = [3, 0, 255, 2, 2]


@pytest.mark.parametrize(
    "values",
    [
        IDS,
        tuple(IDS),
        *(np.array(IDS, dtype) for dtype in ("u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", object)),
        np.array(IDS)[:, None],
        np.array(IDS[::-1])[::-1],
        *(torch.tensor(IDS).to(dtype) for dtype in (torch.uint8, torch.uint16, torch.uint64, torch.int32)),
        pd.Series(IDS),
        pd.Series(IDS, dtype="Int64"),
        pd.Categorical(IDS),
        pd.DataFrame({"label": IDS}),
    ],
    ids=lambda values: f"{type(values).__name__}-{getattr(values, 'dtype', '')}",
)
def test_class_ids_of_any_type_are_read(values):
    labels = as_labels(values, "`labels`")
    assert labels.dtype == torch.int64
    assert labels.tolist() == IDS


def test_bools_are_the_classes_0_and_1():
    assert as_labels(np.array([True, False]), "`labels`").tolist() == [1, 0]


@pytest.mark.parametrize("values", [["b", "a"], np.array(["b", "a"], object), pd.Series(["b", "a"]).astype("category")])
def test_names_are_read_as_names(values):
    assert as_labels_or_names(values, "`labels`").tolist() == ["b", "a"]
    with pytest.raises(ValueError, match="`labels` must be class ids, got names such as 'b'"):
        as_labels(values, "`labels`")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_whole_floats_are_class_ids_as_long_as_the_dtype_tells_them_from_their_neighbours(dtype):
    ids = torch.tensor([0.0, 3.0, 255.0]).to(dtype)
    assert as_labels(ids, "'label'", float_ids=True).tolist() == [0, 3, 255]
    first_doubtful = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}[dtype]
    with pytest.raises(ValueError, match=f"'label' must be integers, got {dtype} of {first_doubtful} and more"):
        as_labels(torch.tensor([0, first_doubtful]).to(dtype), "'label'", float_ids=True)


def test_another_value_may_mean_unlabelled():
    assert as_labels(np.array([7, 255, -1], np.int16), "`labels`", ignore_index=255).tolist() == [7, -1, -1]
    rows = as_labels(torch.tensor([[1, 0], [255, 0]], dtype=torch.uint8), "`labels`", ignore_index=255)
    assert rows.tolist() == [[1, 0], [-1, -1]]


def test_shares_stay_shares():
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0], [-1.0, -1.0]])
    assert torch.equal(as_labels(shares, "`labels`", ignore_index=-100), shares)
    assert most_likely(shares).tolist() == [1, 0, -1]


def test_rows_of_0_and_1_are_multi_hot_also_as_floats():
    assert as_labels(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), "`labels`").dtype == torch.int64


def test_one_hot_rows_are_class_ids_and_others_are_not():
    assert one_hot_ids(torch.tensor([[0, 0, 1], [1, 0, 0], [-1, 0, 0]])).tolist() == [2, 0, -1]
    for rows in ([[0, 0, 1], [1, 1, 0]], [[0, 0, 0]], [[0.5, 0.5, 0]]):
        assert one_hot_ids(torch.tensor(rows)) is None
    assert one_hot_ids(torch.tensor([0, 1])) is None


def test_class_ids_are_renumbered_in_their_order():
    top = 2**63 - 1
    classes, (bank, queries) = number_classes(torch.tensor([top, 5, -1, 9]), torch.tensor([9, 6]))
    assert classes.tolist() == [5, 6, 9, top]
    assert bank.tolist() == [3, 0, -1, 2]
    assert queries.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([2**63], np.uint64), "below 2\\^63"),
        ([2**70], "below 2\\^63"),
        ([1, "cat"], "all integers or all names, got 'cat' at place 1"),
        (["cat", 3], "all integers or all names, got 3 at place 1: give every row a name .*None"),
        (pd.Series([1, None], dtype="Int64"), "got float64 with NaN at place 1: fill what is missing with -1"),
        ([1.0, 2.0], "must be integers, got torch.float64: cast them"),
        ([[1], [2, 3]], "must be one array, got list"),
        (None, "all integers or all names, got None"),
        (3, r"must be \(N,\) class ids or \(N, C\) multi-hot labels, got shape \(\)"),
        ("cat", r"must be \(N,\) class ids or names"),
        (np.zeros((2, 2, 2), int), r"got shape \(2, 2, 2\)"),
        (np.ma.masked_array([1, 2], mask=[True, False]), "must not have masked entries"),
        (np.array(["2020-01-01"], "M8[D]"), "must be integers or names, got datetime64"),
        (torch.tensor([1j]), "must be real numbers of an ordinary dtype, got torch.complex64"),
        (torch.tensor([0, 1]).to_sparse(), "must be an ordinary dense tensor, got a sparse one"),
        (torch.empty(2, device="meta"), "got a meta one"),
        (torch.tensor([[0.5, 0.6], [1.0, 0.0]]), "shares of classes in .0, 1. that add up to 1"),
        (torch.tensor([[1.5, -0.5]]), r"with fractions or NaN: .* FeatureBank\(task='regression'\)"),
        (torch.tensor([1.5, -0.5]), r"whole numbers, got float32 with fractions: .* FeatureBank\(task='regression'\)"),
        (torch.tensor([[float("nan"), 1.0]]), "with fractions or NaN"),
    ],
)
def test_what_is_no_label_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=f"`labels`.*{message}"):
        as_labels(values, "`labels`")
