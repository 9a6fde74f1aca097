"""Counts what would make the host wait for a GPU, on a machine that has none."""

import sys
from types import TracebackType
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_AWAITED = {
    "aten::_local_scalar_dense",  # bool(), int(), float(), item()
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXING = {"aten::index.Tensor", "aten::index_put_", "aten::index_put"}
_READ = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}


class Waits:
    """As a context: `lines` are the lines of faiss_knn, one for each time that a GPU would be waited for."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def note(self) -> None:
        """Note the line that is to blame, unless another library is: what its user chose is the user's."""
        frame = sys._getframe(2)
        while frame.f_back is not None and (
            "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
        ):
            frame = frame.f_back
        if "/faiss_knn/" in frame.f_code.co_filename:
            self.lines.append(f"{frame.f_code.co_filename.rpartition('/faiss_knn/')[2]}:{frame.f_lineno}")


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READ:
            self._waits.note()
        return func(*args, **kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.name() in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or func.name() in _AWAITED:
            self._waits.note()
        return func(*args, **kwargs or {})
