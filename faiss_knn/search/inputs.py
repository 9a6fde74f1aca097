"""Single arguments checked where they come in: numbers of Python, numpy and torch, choices, switches."""

import math
import operator
from collections.abc import Sequence
from numbers import Real
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
    if value is None or isinstance(value, (bool, Real, complex, str, bytes, np.generic, type)):
        text = repr(value)
        return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    kind = type(value).__name__
    if isinstance(value, (Tensor, np.ndarray)) and not getattr(value, "is_nested", False):
        return f"{kind} of shape {tuple(value.shape)}"
    return kind


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
