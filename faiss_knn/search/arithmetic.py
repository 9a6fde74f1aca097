"""What a training loop may have switched on and a search must not inherit: autocast, low-precision products."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


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
            stack.enter_context(_legacy_precision())
        else:
            stack.enter_context(_held(per_backend, "fp32_precision", "ieee"))
            stack.enter_context(_held(torch.backends.cuda.matmul, "fp32_precision", "ieee"))
        if device.type == "cuda":
            # Sums of a split product would be rounded to bfloat16 in between.
            stack.enter_context(_held(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False))
        yield


@contextmanager
def _held(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    if before == value:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _legacy_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
