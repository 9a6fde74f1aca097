"""Single arguments checked where they come in: numbers of Python, numpy and torch, choices, switches."""

import math
import operator
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHOWN = 60  # characters of a value in an error


def shown(value: Any) -> str:
    """Describe a value in one short line for an error.

    Example:
        >>> shown(2.5), shown("a" * 100), shown(np.zeros((2, 3)))
        ('2.5', "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…", 'ndarray of shape (2, 3)')
    """
    if value is None or isinstance(value, (bool, Real, complex, str, bytes, np.generic, type, torch.dtype)):
        text = repr(value)
        return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    kind = type(value).__name__
    if isinstance(value, (Tensor, np.ndarray)) and not getattr(value, "is_nested", False):
        return f"{kind} of shape {tuple(value.shape)}"
    return kind


def first_line(error: Exception) -> str:
    """Return what an error says in its first line, or what it is."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def named_as_index() -> Iterator[None]:
    """Call what is wrong with a `spec` by the argument that it came from, `index`."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("`spec`"):
            raise
        raise ValueError(str(error).replace("`spec`", "`index`", 1)) from error


def as_integer(value: Any, argument: str) -> int:
    """Return an integer of Python, numpy or torch as an int.

    Raises:
        ValueError: If it is something else, also a bool or a float that is whole.
    """
    try:
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # the latter two from tensors that hold no one number
        number = None
    if number is None or isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise ValueError(f"{argument} must be an integer, got {shown(value)}")
    return number


def as_count(value: Any, argument: str) -> int:
    """Return an integer above 0 as an int.

    Raises:
        ValueError: If it is something else.
    """
    try:
        count = as_integer(value, argument)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"{argument} must be a positive integer, got {shown(value)}")
    return count


def as_positive(value: Any, argument: str) -> int:
    """Return an integer above 0 as an int, in the words of stable-pretraining where it is not above.

    Raises:
        ValueError: If it is something else.
    """
    number = as_integer(value, argument)
    if number <= 0:
        raise ValueError(f"{argument} must be positive, got {number}")
    return number


def as_k(k: Any) -> int:
    """Return `k` as an int.

    Raises:
        ValueError: If it is not an integer above 0.
    """
    return as_count(k, "`k`")


def as_key(value: Any, argument: str) -> str:
    """Return a text that is not empty.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(value, str) or not value:
        raise ValueError(f"{argument} must be a name, got {shown(value)}")
    return value


def as_path(value: Any, argument: str) -> Path:
    """Return the path of a file or folder.

    Raises:
        ValueError: If it is something else than a text or path, or an empty text.
    """
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ValueError(f"{argument} must be the path of a file or folder, got {shown(value)}")
    return Path(value)


def as_number(value: Any, argument: str) -> float:
    """Return one real number of Python, numpy or torch as a float, NaN if it is that.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(value, (bool, np.bool_, str, bytes, complex)):
        raise ValueError(f"{argument} must be a number, got {shown(value)}")  # noqa: TRY004
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{argument} must be a number, got {shown(value)}") from error


def as_choice(value: Any, choices: Sequence[str], argument: str) -> str:
    """Return a text that is one of `choices`.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(choices)}, got {shown(value)}")
    return value


def as_switch(value: Any, argument: str) -> bool:
    """Return True or False, of Python or numpy, as a bool.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{argument} must be True or False, got {shown(value)}")  # noqa: TRY004
    return bool(value)


_NAMED_ROWS = 5


def as_device(device: torch.device | str) -> torch.device:
    """Return the device, a CUDA one with its number: which GPU "cuda" is depends on when one asks.

    Raises:
        ValueError: If this machine or this build of PyTorch has no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # AssertionError: a build without CUDA
        raise ValueError(
            f"`device` must be one that PyTorch can use here, got {shown(device)}: {first_line(error)}"
        ) from error


def is_memmap(features: object) -> bool:
    """Tell whether an array reads from a mapped file, also as a view of one."""
    while isinstance(features, np.ndarray):
        if isinstance(features, np.memmap):
            return True
        features = features.base
    return False


def as_matrix(features: Any, argument: str) -> Tensor:
    """Return (n, d) float data as a tensor that shares its memory, without gradient.

    Raises:
        ValueError: If it is neither tensor nor array, not dense, not two-dimensional, not float, masked, or d is 0.
    """
    if not isinstance(features, (Tensor, np.ndarray)) and hasattr(features, "to_numpy"):  # a DataFrame
        features = features.to_numpy()
    if isinstance(features, np.ndarray):
        features = _from_numpy(features, argument)
    if not isinstance(features, Tensor):  # a ValueError like every other unfit input
        raise ValueError(f"`{argument}` must be a tensor or ndarray of shape (n, d), got {shown(features)}")  # noqa: TRY004
    check_dense(features, f"`{argument}`")
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(f"`{argument}` must have shape (n, d) with d > 0, got {tuple(features.shape)}")
    if features.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"`{argument}` must be float16, bfloat16, float32 or float64, got {features.dtype}: convert it first"
        )
    return features.detach()


def check_dense(values: Tensor, argument: str) -> None:
    """Check that a tensor holds its values, one beside the other.

    Raises:
        ValueError: If it is sparse, nested, quantized or on the meta device.
    """
    kinds = {"nested": values.is_nested, "quantized": values.is_quantized, "meta": values.is_meta}
    kinds["sparse"] = values.layout != torch.strided
    if kind := next((kind for kind, is_so in kinds.items() if is_so), None):
        raise ValueError(f"{argument} must be an ordinary dense tensor, got a {kind} one: convert it first")


def _from_numpy(array: np.ndarray, argument: str) -> Tensor:
    if np.ma.is_masked(array):
        raise ValueError(f"`{argument}` must not have masked entries: leave those rows out, or fill them in")
    array = np.asarray(array)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(
            f"`{argument}` must be float16, bfloat16, float32 or float64, got {array.dtype}: convert it first"
        )
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        array = array.astype(array.dtype.newbyteorder("="))  # torch holds neither
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor do we write
        return torch.from_numpy(array)


def check_finite(block: Tensor, argument: str, start: int = 0) -> None:
    """Check that `block`, whose first row is number `start`, is finite.

    Raises:
        ValueError: If not; names the first rows.
    """
    # One pass that makes nothing: a sum is finite only if every value is.
    if not torch.isfinite(block.sum(dtype=torch.promote_types(block.dtype, torch.float32))):
        bad = (~torch.isfinite(block)).any(1)
        if bad.any():
            _refuse(bad, start, f"`{argument}` must be finite as {block.dtype}", "NaN or infinite")


def check_comparable(rows: Tensor, argument: str, *, normalized: bool, start: int = 0) -> None:
    """Check that rows (n, d), the first of which is number `start`, have distances to others.

    Args:
        rows: In any float dtype.
        argument: What an error calls them.
        normalized: Whether they are compared by direction, which a zero row does not have.
        start: Number of the first row.

    Raises:
        ValueError: If a row is not finite or has no direction; names the first ones.
    """
    check_finite(rows, argument, start)
    if normalized and (zero := (rows == 0).all(1)).any():
        refuse_zero(zero, argument, start)


def are_comparable(rows: Tensor, *, normalized: bool) -> Tensor:
    """Tell which rows (n, d) have distances to others, (n,) bool: where `check_comparable` would raise, False.

    Example:
        >>> are_comparable(torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, torch.nan]]), normalized=True)
        tensor([ True, False, False])
    """
    finite = rows.isfinite().all(1)
    return finite & rows.any(1) if normalized else finite


def refuse_zero(bad: Tensor, argument: str, start: int = 0) -> None:
    """Raise a ValueError that names the rows which `bad` (n,) marks as zero, the first of which is number `start`."""
    _refuse(bad, start, f"`{argument}` must have no zero rows for the cosine distance", "zero")


def _refuse(bad: Tensor, start: int, need: str, what: str) -> None:
    ids = bad.nonzero()[:, 0] + start
    named = ", ".join(str(int(row)) for row in ids[:_NAMED_ROWS]) + (", …" if len(ids) > _NAMED_ROWS else "")
    raise ValueError(f"{need}, got {len(ids)} {what} row(s) (row {named}): leave them out or mend them")
