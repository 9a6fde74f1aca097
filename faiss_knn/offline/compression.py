"""What shorter or coarser rows are: cut or turned to fewer dimensions, stored in fewer bits.

docs/compression.md says how each is defined.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.offline.lazy_rows import RowSource, read_rows, spans
from faiss_knn.offline.preparation import Steps, with_steps
from faiss_knn.offline.principal import principal_axes
from faiss_knn.offline.task import EvalTask
from faiss_knn.search.distance import directions
from faiss_knn.search.engines.faiss_library import binary_index
from faiss_knn.search.engines.rerank import nearest
from faiss_knn.search.inputs import shown

_DIMS = re.compile(r"(pca)?([1-9]\d{0,8})(?::(unit|whole))?")
_STORAGE = re.compile(r"float16|bfloat16|int8|binary(?::([1-9]\d{0,5}))?")
_BLOCK_VALUES = 1 << 22
_LARGEST = 127  # of a code


@dataclass(frozen=True)
class Dims:
    """How rows are made narrower.

    Attributes:
        count: How many dimensions are left.
        by_axes: The bank's principal axes, instead of the first columns.
        lengths: "unit": rows are divided by their lengths when cut, "whole": before; "": neither.
    """

    count: int
    by_axes: bool = False
    lengths: str = ""


def as_dims(value: Any) -> int | str:
    """Check one value of `dims` and write it plainly.

    Raises:
        ValueError: If it is none.

    Example:
        >>> as_dims(64), as_dims("64"), as_dims("64:unit"), as_dims("pca64")
        (64, 64, '64:unit', 'pca64')
    """
    word = str(value)
    match = None if isinstance(value, bool) else _DIMS.fullmatch(word)
    if match is None or (match[1] and match[3]):
        need = "numbers of dimensions: 64, or 64:unit, 64:whole, pca64"
        raise ValueError(f"`dims` must be {need}, got {shown(value)}")
    return int(word) if word.isdecimal() else word


def as_storage(value: Any) -> str:
    """Check one value of `storage`.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, str) or _STORAGE.fullmatch(value) is None:
        need = "float16, bfloat16, int8, binary, or binary:4 (4 k candidates that are scored again)"
        raise ValueError(f"`storage` must be {need}, got {shown(value)}")
    return value


def check_compression(dims: Any, storage: str | None, dim: int | None, distance_metric: str) -> None:
    """Check that a compression fits the distance and, if it is known, the width of the rows.

    Raises:
        ValueError: If it does not.
    """
    if dims is not None:
        parsed = parse_dims(dims)
        if dim is not None and parsed.count > dim:
            raise ValueError(f"`dims` must be at most the width of the features, {dim}, got {dims}")
        if parsed.lengths == "unit" and distance_metric == "cosine":
            raise ValueError(f"dims={dims}: cosine divides by the lengths of cut rows by itself: give {parsed.count}")
    if storage is not None and ":" in storage and distance_metric not in ("cosine", "dot"):
        raise ValueError(
            f"storage={storage} scores again by inner products with signs: for the distances cosine and dot, got "
            f"{distance_metric}: give binary"
        )


def parse_dims(dims: int | str) -> Dims:
    """Take a value of `dims` apart."""
    match = _DIMS.fullmatch(str(dims))
    assert match is not None  # it was checked where it was given
    return Dims(int(match[2]), bool(match[1]), match[3] or "")


def narrowed(task: EvalTask, dims: int | str) -> EvalTask:
    """Return the task with narrower rows.

    Raises:
        ValueError: If the bank varies along fewer axes.
    """
    parsed = parse_dims(dims)
    if parsed.by_axes:
        mean, axes = principal_axes(task.bank.rows, parsed.count, argument="dims")
        return with_steps(task, Steps(mean=mean, axes=axes))
    unit_first, unit = parsed.lengths == "whole", parsed.lengths == "unit"
    return with_steps(task, Steps(unit_first=unit_first, width=parsed.count, unit=unit))


class ScalarRows:
    """Rows stored as int8: each number is a code times the scale of its column.

    The scale of a column is its largest size over the bank / 127, or 1 for zeros; a code is the nearest whole number,
    of two the even one. A row whose codes would all be 0 keeps that of its largest number, relative to the scales, as 1
    or -1, so that it has a direction.

    Args:
        rows: (N, d) the bank.
        unit: Whether rows are divided by their lengths first, as cosine does.

    Example:
        >>> rows = ScalarRows(torch.tensor([[1.0, -254.0], [0.5, 63.0]]), unit=False)
        >>> rows.codes, rows[0:2]
        (tensor([[ 127, -127],
                [  64,   32]], dtype=torch.int8), tensor([[   1.0000, -254.0000],
                [   0.5039,   64.0000]]))
    """

    def __init__(self, rows: RowSource, *, unit: bool) -> None:
        self.shape, self.dtype = tuple(rows.shape), torch.float32
        blocks = list(spans(len(rows), max(1, _BLOCK_VALUES // self.shape[1])))
        largest = torch.stack([_float64(rows, a, b, unit).abs().amax(0) for a, b in blocks]).amax(0)
        scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
        self.codes = torch.cat([_codes(_float64(rows, a, b, unit) / scales) for a, b in blocks])
        self.scales = scales.float()

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: Any) -> Tensor:
        return self.codes[wanted].float() * self.scales


class BinaryRows:
    """Rows stored as signs, a bit of each number: 1 if it is above 0.

    Two rows that differ in h of d signs are as far as the vectors of 1 and -1 that these stand for: under cosine
    2h / d, euclidean 2√h, manhattan 2h, dot 2h − d. Equal distances are in the order of the rows.

    Args:
        rows: (N, d) the bank.
        distance_metric: As in `KNNIndex`; distances of "squared_euclidean" are their roots.
        again: How many candidates per neighbour are scored again, by the query as it is and the row's signs: under
            cosine 1 − q·s / (|q| √d), dot −q·s (Yamada et al. 2021, arXiv 2106.00882, section 3.2); 0: none.

    Example:
        >>> rows = BinaryRows(torch.tensor([[1.0, 2.0], [-1.0, 3.0], [-1.0, 0.0]]), "cosine")
        >>> rows.nearest(torch.tensor([[-5.0, 1.0]]), 2)
        (tensor([[0., 1.]], dtype=torch.float64), tensor([[1, 0]]))
    """

    def __init__(self, rows: RowSource, distance_metric: str, again: int = 0) -> None:
        self.dim = int(rows.shape[1])
        self._metric, self._again = distance_metric, again
        blocks = spans(len(rows), max(1, _BLOCK_VALUES // self.dim))
        self.codes = np.concatenate([_bits(read_rows(rows, a, b)) for a, b in blocks])
        self._search = binary_index(self.codes)

    @property
    def nbytes(self) -> int:
        """Of the signs."""
        return self.codes.nbytes

    def nearest(self, queries: Any, k: int) -> tuple[Tensor, Tensor]:
        """Find the k nearest rows: (B, min(k, N)) float64 distances, ascending, and indices."""
        wanted = min(len(self.codes), k * max(1, self._again))
        lists = [torch.from_numpy(part) for part in self._search(_bits(queries), wanted)]
        if self._again:
            return self._scored_again(queries, lists[1], min(k, len(self.codes)))
        return self._distances(lists[0].double()), lists[1]

    def _distances(self, differing: Tensor) -> Tensor:
        if self._metric == "cosine":
            return 2 * differing / self.dim
        if self._metric == "dot":
            return 2 * differing - self.dim
        return 2 * differing if self._metric == "manhattan" else 2 * differing.sqrt()

    def _scored_again(self, queries: Any, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(queries).cpu().double()
        rows = directions(rows) / self.dim**0.5 if self._metric == "cosine" else rows
        parts = []
        for part, places in zip(
            *(torch.split(x, max(1, _BLOCK_VALUES // (indices.shape[1] * self.dim))) for x in (rows, indices)),
            strict=True,
        ):
            signs = np.unpackbits(self.codes[places.numpy()], axis=2, count=self.dim)
            products = torch.einsum("bd,bkd->bk", part, 2 * torch.from_numpy(signs).double() - 1)
            parts.append(nearest((1.0 if self._metric == "cosine" else 0.0) - products, places, k))
        distances, ids = (torch.cat(lists) for lists in zip(*parts, strict=True))
        return distances, ids


def _float64(rows: RowSource, start: int, stop: int, unit: bool) -> Tensor:
    block = torch.as_tensor(np.array(x) if isinstance(x := read_rows(rows, start, stop), np.ndarray) else x).double()
    return directions(block) if unit else block


def _codes(relative: Tensor) -> Tensor:
    codes = relative.round().clamp(-_LARGEST, _LARGEST)
    lost = (codes == 0).all(1).nonzero()[:, 0]
    if len(lost):
        largest = relative[lost].abs().argmax(1)
        codes[lost, largest] = relative[lost, largest].sign()
    return codes.to(torch.int8)


def _bits(block: npt.NDArray[Any] | Tensor) -> npt.NDArray[np.uint8]:
    """Pack the signs of (n, d), eight to a byte: (n, ⌈d / 8⌉)."""
    above = (block > 0).cpu().numpy() if isinstance(block, Tensor) else block > 0
    return np.packbits(above, axis=1)
