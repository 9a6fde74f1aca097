"""What a training loop may have switched on and a search must not inherit: autocast, low-precision products."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch


class SharedSetting:
    """A setting of the whole process that several threads hold at once: the last to leave puts it back.

    Args:
        read: Returns its value.
        write: Changes it.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self.read, self._write = read, write
        self._lock = threading.Lock()
        self._holders, self._before = 0, None

    @contextmanager
    def held_at(self, value: Any) -> Iterator[None]:
        """Keep it at `value`."""
        with self._lock:
            if self._holders == 0:
                self._before = self.read()
                if self._before != value:
                    self._write(value)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0 and self._before != value:
                    self._write(self._before)


def _attribute(owner: Any, name: str) -> SharedSetting:
    return SharedSetting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


_CUDA = _attribute(torch.backends.cuda.matmul, "fp32_precision")
_ONEDNN = _attribute(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
_REDUCTION = _attribute(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction")
_LEGACY = SharedSetting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes asked for, without autocast, TF32 or bfloat16 products of float32, and without gradients.

    `torch.set_float32_matmul_precision("medium")` makes float32 products bfloat16 ones, on CPUs too: every bound on
    their error would be wrong. The settings are left as they were found.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        per_backend = getattr(torch.backends.mkldnn, "matmul", None)
        if per_backend is None:  # torch before 2.9 knows one setting for all backends
            stack.enter_context(_LEGACY.held_at("highest"))
        else:
            stack.enter_context(_ONEDNN.held_at("ieee"))
            stack.enter_context(_CUDA.held_at("ieee"))
        if device.type == "cuda":
            # Sums of a split product would be rounded to bfloat16 in between.
            stack.enter_context(_REDUCTION.held_at(False))
        yield


@cache
def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags as Linux names them; empty where /proc/cpuinfo does not list them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())
