"""torchmetrics metrics by name, for the command line and evaluate()."""

import ast
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_COUNT = {"Multiclass": "num_classes", "Multilabel": "num_labels"}


def make_metrics(names: Iterable[str], num_classes: int, multi_hot: bool) -> dict[str, Any]:
    """Build metrics from names such as "MulticlassF1Score" or "MulticlassAccuracy(average='micro', top_k=3)".

    Args:
        names: Classes of `torchmetrics.classification` whose names begin with Multiclass, or Multilabel for multi-hot
            labels, with keyword arguments if wanted.
        num_classes: Given to each as `num_classes` or `num_labels`.
        multi_hot: Whether labels are multi-hot.

    Returns:
        The metrics by the names that were given.

    Raises:
        ValueError: If a name is unknown or of the other kind, or its arguments do not fit.

    Example:
        >>> list(make_metrics(["MulticlassF1Score(average='macro')"], 3, multi_hot=False))
        ["MulticlassF1Score(average='macro')"]
    """
    prefix = "Multilabel" if multi_hot else "Multiclass"
    with plain_defaults():
        return {text: _make(text, prefix, num_classes) for text in names}


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Let torchmetrics count on the CPU and divide in float32, whatever the process has made torch's defaults."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _make(text: str, prefix: str, num_classes: int) -> Any:
    from torchmetrics import classification  # seconds to import, and needed only if a metric is asked for

    name, arguments = _parsed(text)
    known = [known for known in classification.__all__ if known.startswith(prefix)]
    if name not in known and name in classification.__all__:
        kind = "multi-hot labels" if prefix == "Multilabel" else "class ids"
        raise ValueError(
            f"`metrics`: {name} does not go with {kind}: take one of the {prefix} metrics, such as {known[0]}"
        )
    if name not in known:
        raise ValueError(f"`metrics` must name classes of torchmetrics.classification such as {known[0]}, got {text!r}")
    try:
        made = getattr(classification, name)(**{_COUNT[prefix]: num_classes, **arguments})
    except (TypeError, ValueError) as error:
        raise ValueError(f"`metrics`: {text} cannot be made: {error}") from error
    made.sync_on_compute = False  # with several ranks, each scores all queries
    return made


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {str(word.arg): _value(text, word.value) for word in call.keywords}
    except SyntaxError as error:
        raise ValueError(f"`metrics` must be Name or Name(argument=value), got {text!r}: {error}") from error
    raise ValueError(f"`metrics` must be Name or Name(argument=value), got {text!r}")


def _value(text: str, value: ast.expr) -> Any:
    """Read an argument's value; a bare word is text, as nobody likes to quote twice on a command line."""
    if isinstance(value, ast.Name):
        return value.id
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise ValueError(f"`metrics` must have plain values, such as 3, None or 'micro', got {text!r}") from None
