"""Arguments as people and programs give them, right and wrong, by name."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged)


def masked(values: Any) -> Any:
    return np.ma.masked_array(values, mask=np.arange(np.size(values)).reshape(np.shape(values)) == 0)


ODD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "-3": lambda: -3,
    "2": lambda: 2,
    "2.5": lambda: 2.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1e-46": lambda: 1e-46,
    "2^63": lambda: 2**63,
    "2^200": lambda: 2**200,
    "text": lambda: "text",
    "empty text": lambda: "",
    "number as text": lambda: "3",
    "bytes": lambda: b"3",
    "complex": lambda: 1j,
    "object": object,
    "dict": lambda: {"a": 1},
    "set": lambda: {1, 2},
    "function": lambda: len,
    "class": lambda: int,
    "empty list": list,
    "list": lambda: [1, 2, 3],
    "list of lists": lambda: [[1.0, 2.0], [3.0, 4.0]],
    "ragged": lambda: [[1.0], [2.0, 3.0]],
    "list of text": lambda: ["a", "b"],
    "list of None": lambda: [None, None],
    "generator": lambda: (i for i in (1, 2)),
    "range": lambda: range(1, 3),
    "numpy int": lambda: np.int64(2),
    "numpy uint8": lambda: np.uint8(2),
    "numpy float": lambda: np.float32(0.5),
    "numpy bool": lambda: np.bool_(True),
    "numpy 0-d": lambda: np.array(2),
    "numpy nan": lambda: np.array([[np.nan, 1.0], [1.0, 2.0]]),
    "numpy empty": lambda: np.empty((0,)),
    "numpy no rows": lambda: np.empty((0, 2), np.float32),
    "numpy no width": lambda: np.empty((3, 0), np.float32),
    "numpy 3-d": lambda: np.ones((2, 3, 2)),
    "numpy text": lambda: np.array(["a", "b"]),
    "numpy object": lambda: np.array([object(), None], object),
    "numpy complex": lambda: np.ones((3, 2), complex),
    "numpy dates": lambda: np.array(["2020-01-01"], "M8[D]"),
    "numpy longdouble": lambda: np.ones((3, 2), np.longdouble),
    "numpy structured": lambda: np.zeros(3, [("a", "f4")]),
    "numpy bools": lambda: np.array([True, False, True]),
    "numpy huge": lambda: np.array([2**63, 1], np.uint64),
    "numpy ids of int64": lambda: np.array([2**62, 1, 2**62]),
    "masked": lambda: masked(np.ones((3, 2), np.float32)),
    "masked ids": lambda: masked(np.array([1, 0, 1])),
    "0-d": lambda: torch.tensor(2),
    "0-d float": lambda: torch.tensor(0.5),
    "1-d": lambda: torch.rand(3),
    "3-d": lambda: torch.rand(2, 3, 2),
    "4-d": lambda: torch.rand(2, 3, 2, 2),
    "wide": lambda: torch.rand(3, 50),
    "integers": lambda: torch.tensor([[1, 2], [3, 4], [5, 6]]),
    "negative": lambda: -torch.rand(3, 2),
    "nan tensor": lambda: torch.tensor([[float("nan"), 1.0], [1.0, 2.0], [3.0, 4.0]]),
    "inf tensor": lambda: torch.tensor([[float("inf"), 1.0], [1.0, 2.0], [3.0, 4.0]]),
    "zero rows": lambda: torch.zeros(3, 2),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "sparse ids": lambda: torch.tensor([1, 0, 1]).to_sparse(),
    "meta": lambda: torch.empty(3, 2, device="meta"),
    "meta ids": lambda: torch.empty(3, dtype=torch.int64, device="meta"),
    "nested": nested,
    "quantized": lambda: torch.quantize_per_tensor(torch.rand(3, 2), 0.1, 0, torch.quint8),
    "complex tensor": lambda: torch.ones(3, 2, dtype=torch.complex64),
    "bool tensor": lambda: torch.tensor([True, False, True]),
    "uint16": lambda: torch.tensor([1, 0, 1]).to(torch.uint16),
    "uint64": lambda: torch.tensor([1, 0, 1]).to(torch.uint64),
    "float8": lambda: torch.rand(3, 2).to(torch.float8_e4m3fn),
    "series": lambda: pd.Series([1, 0, 1]),
    "series with gaps": lambda: pd.Series([1, None, 1], dtype="Int64"),
    "frame": lambda: pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [1.0, 3.0, 2.0]}),
    "frame of text": lambda: pd.DataFrame({"a": ["x", "y", "z"]}),
    "dtype": lambda: torch.float32,
    "bad device": lambda: "cuda:7",
    "module": lambda: torch.nn.Linear(1, 1),
}


def odd(name: str) -> Any:
    """Make one of them, the same each time."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # what torch says about tensors of its rarer kinds
        torch.manual_seed(0)
        return ODD[name]()
