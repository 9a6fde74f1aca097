"""Whether a queue's rows were made by the weights that are scored now: told by a few of each module's weights."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from faiss_knn.online.trainer_state import trainer_state

_OTHER = (
    "the queue's rows were made by another module, or by other weights, than are scored now: the score says little. "
    "Give `ckpt_path=` of a checkpoint of that training, which holds its rows, or fill the bank from a dataloader with "
    "bank_dataloader_idx"
)
_SWAPPED = (
    "validation runs with averaged weights (EMA, SWA), and the queue's rows were made by the raw ones: the score says "
    "little. Fill the bank with the same weights, from a dataloader, with bank_dataloader_idx"
)
_DROPPED = (
    "the queue's rows were made by another module, or by other weights, than are trained from here on, and are dropped"
)
AVERAGED = b"averaged"  # the weights of a checkpoint that are not those its rows were made by
_VALUES = 8  # of each parameter
_KEY = "weights"


def weights_fingerprint(module: Any) -> bytes:
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


class WeightsWatch:
    """Compare the weights that are scored with those that made the queue's rows, through one run.

    Every method returns what to complain of, or None.
    """

    def __init__(self) -> None:
        self._at_start: bytes | None = None

    def start_validation(self, trainer: Any, module: Any, *, is_fitting: bool) -> str | None:
        """Look at the weights that a validation begins with, where there are rows; a fit's are those of its rows."""
        self._at_start = weights_fingerprint(module)
        if is_fitting:
            return None
        if remembered(trainer) is None:
            remember(trainer, self._at_start)
        return _OTHER if remembered(trainer) != self._at_start else None

    def check_swapped(self, module: Any) -> str | None:
        """Look whether the weights are others than the validation began with."""
        if self._at_start is None or self._at_start == weights_fingerprint(module):
            return None
        self._at_start = None
        return _SWAPPED

    def end_validation(self, module: Any) -> str | None:
        """Look whether weights that were swapped before the validation are put back at its end."""
        complaint = self.check_swapped(module)
        self._at_start = None
        return complaint


def drop_rows_of_others(trainer: Any, module: Any) -> str | None:
    """Empty the queues where they hold what an earlier fit of another module left; return what to say of it."""
    rings = [storage.ring for storage in trainer_state(trainer).get("queues", {}).values()]
    others = remembered(trainer) not in (None, weights_fingerprint(module)) and any(map(len, rings))
    if others:
        for ring in rings:
            ring.replace(None)
    remember(trainer, None)
    return _DROPPED if others else None
