"""Whose rows a queue holds: by a few of the weights of the module that made them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from faiss_knn.online.state import trainer_state

AVERAGED = b"averaged"  # the weights of a checkpoint that are not those its rows were made by
_VALUES = 8  # of each parameter
_KEY = "weights"


def fingerprint(module: Any) -> bytes:
    """Return the class and some values of every parameter: equal for equal weights, others after a training step."""
    name = f"{type(module).__module__}.{type(module).__qualname__}".encode()
    parts = [_some(parameter) for parameter in module.parameters() if not isinstance(parameter, UninitializedParameter)]
    with torch.no_grad():
        return name + (torch.cat(parts).cpu().numpy().tobytes() if parts else b"")  # one wait for a GPU


def _some(parameter: Tensor) -> Tensor:
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    values = local.detach().flatten()
    return values[:: max(1, len(values) // _VALUES)][:_VALUES].double()


def remember(trainer: Any, weights: bytes | None) -> None:
    """Note whose rows the trainer's queues hold; None: not known, as they come from a checkpoint like the weights."""
    trainer_state(trainer)[_KEY] = weights


def remembered(trainer: Any) -> bytes | None:
    """Return what was noted last; None if that is nothing."""
    noted: bytes | None = trainer_state(trainer).get(_KEY)
    return noted
