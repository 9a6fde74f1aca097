"""Where a training or validation step's tensors are found."""

from collections.abc import Mapping
from typing import Any

from loguru import logger
from torch import Tensor


def find_tensor(key: str, outputs: Any, batch: Any, caller: str) -> Tensor:
    """Return `outputs[key]` if there, else `batch[key]`.

    Raises:
        ValueError: If neither has the key, or what it names is not a tensor with a batch dimension.
    """
    for place in (outputs, batch):
        if isinstance(place, Mapping) and key in place:
            return _batched(place[key], key, caller)
    message = (
        f"{caller}: Key '{key}' not found in batch or outputs. "
        f"Available batch keys: {_keys(batch)}, Available output keys: {_keys(outputs)}"
    )
    logger.warning(message)
    raise ValueError(message)


def was_skipped(pl_module: Any, outputs: Any) -> bool:
    """Tell whether `training_step` returned None, which Lightning takes as "skip this batch".

    Under automatic optimization any other return leaves at least the loss in the outputs.
    """
    return not outputs and getattr(pl_module, "automatic_optimization", False) is True


def _batched(value: Any, key: str, caller: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim == 0:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{caller}: '{key}' must be a tensor with one row per sample, got {what}")
    return value


def _keys(place: Any) -> list[Any] | None:
    return list(place.keys()) if isinstance(place, Mapping) else None
