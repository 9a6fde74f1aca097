"""Options of the offline half that are of no use: each is refused by its name in one line, or taken."""

import inspect
import re
import warnings

import numpy as np
import pytest
import torch

from faiss_knn import FeatureBank, evaluate
from faiss_knn.offline.features import extract, read_features
from faiss_knn.offline.formats import DataError
from tests.odd import odd

RNG = np.random.default_rng(0)
BANK, QUERIES = RNG.standard_normal((12, 3)).astype(np.float32), RNG.standard_normal((4, 3)).astype(np.float32)
LABELS, TRUTH = np.arange(12) % 3, np.arange(4) % 3
KINDS = (
    "None", "True", "0", "-1", "2.5", "nan", "inf", "2^200", "text", "empty text", "bytes", "complex", "object", "dict",
    "function", "class", "empty list", "list", "list of text", "list of None", "numpy bool", "numpy 0-d", "numpy text",
    "0-d", "1-d", "3-d", "nested", "sparse", "bool tensor", "float8", "module", "bad device", "dtype",
)  # fmt: skip


def call_evaluate(folder, **options):
    evaluate(**{"bank_features": BANK, "bank_labels": LABELS, "query_features": QUERIES, "query_labels": TRUTH}
             | {"k": 1} | options)  # fmt: skip


def call_extract(folder, **options):
    batches = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    extract(**{"model": torch.nn.Linear(3, 2), "dataloader": batches, "out": folder / "f.npz"} | options)


def call_read_features(folder, **options):
    np.savez(folder / "a.npz", features=BANK, labels=LABELS)
    read_features(**{"path": folder / "a.npz"} | options)


BATCHES = ("numpy text", "list", "1-d", "3-d", "nested", "sparse", "bool tensor", "float8")
FUNCTIONS = ("forward", "unpack", "on_record")
CALLS = {"evaluate": (call_evaluate, evaluate), "extract": (call_extract, extract),
         "read_features": (call_read_features, read_features)}  # fmt: skip
OPTIONS = [(call, name) for call, (_, function) in CALLS.items() for name in inspect.signature(function).parameters]


@pytest.mark.parametrize(("call", "option"), OPTIONS)
def test_an_odd_option_is_refused_by_its_name_or_taken(tmp_path, monkeypatch, call, option):
    monkeypatch.chdir(tmp_path)
    names = {*inspect.signature(CALLS[call][1]).parameters} if option == "dataloader" else {option}
    wrong = []
    for kind in KINDS:
        is_function = option in FUNCTIONS and kind in ("class", "function", "module")
        if is_function or (option, kind) == ("model", "module") or (option == "dataloader" and kind in BATCHES):
            continue  # of the right kind, though they do not fit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                CALLS[call][0](tmp_path, **{option: odd(kind)})
        except (ValueError, TypeError) as error:
            words = re.findall(r"\w+", str(error).replace("spec", "index"))
            is_named = isinstance(error, DataError) or not names.isdisjoint(words)
            if "\n" in str(error) or not is_named:
                wrong.append((kind, repr(error)))
        except Exception as error:  # to say of which it is
            wrong.append((kind, repr(error)))
    assert wrong == []


SWITCHES = {
    "evaluate": ("leave_one_out", "skip_bad_rows", "keep_neighbors", "keep_outcomes", "progress"),
    "extract": ("progress", "overwrite"),
    "read_features": ("allow_partial",),
}


@pytest.mark.parametrize(
    ("call", "option"), [(call, option) for call, options in SWITCHES.items() for option in options]
)
def test_a_switch_is_true_or_false_and_no_word(tmp_path, call, option):
    for value in ("no", 1, torch.ones(2)):
        with pytest.raises(ValueError, match=rf"^`{option}` must be True or False, got "):
            CALLS[call][0](tmp_path, **{option: value})


def test_a_target_recall_is_a_share_whatever_the_index():
    with pytest.raises(ValueError, match=r"^`target_recall` must be a number, got 'x'"):
        call_evaluate(None, target_recall="x")


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_of_numpy_is_an_array():
    plain = evaluate(BANK, LABELS, QUERIES, TRUTH, k=3).records[0]
    matrix = evaluate(np.asmatrix(BANK), LABELS, np.asmatrix(QUERIES), TRUTH, k=3).records[0]
    assert (matrix["top1"], matrix["data"]) == (plain["top1"], plain["data"])


@pytest.mark.parametrize("method", ["score", "votes"])
def test_neighbours_of_another_kind_are_refused(method):
    for value in (None, (torch.ones(1, 1), torch.zeros(1, 1)), torch.ones(1, 1)):
        with pytest.raises(ValueError, match=r"^`neighbors` must be Neighbors"):
            getattr(FeatureBank(BANK, LABELS), method)(value)
