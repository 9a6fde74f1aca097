"""What a folder of extracted features holds: the manifest beside the shards, and what tells models and data apart."""

import dis
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from faiss_knn.offline.formats import DataError
from faiss_knn.offline.remote import FilePath

MANIFEST = "manifest.json"
_FORMAT = "faiss-knn extraction 1"
_NUMBERS_PER_ROW = 64
_EMPTY_CELL = CellType()


@dataclass
class Shard:
    """A committed pair of files.

    Attributes:
        rows: Rows of the shard.
        seen: `DataDigest` of everything that the loader gave up to the shard's end.
    """

    rows: int
    seen: str


@dataclass
class Manifest:
    """The account of an extraction. A shard counts once it is listed here, its features and labels together.

    Attributes:
        model: Fingerprint of the model and of how it was called.
        length: Rows that the data set has, or None if the loader does not tell.
        labelled: Whether rows have labels; None before the first shard.
        dim: Width of the features; None before the first shard.
        dtype: Of the saved features.
        shards: In the order of their numbers.
        finished: Whether the loader was read to its end.
    """

    model: str
    length: int | None
    labelled: bool | None = None
    dim: int | None = None
    dtype: str = "float32"
    shards: list[Shard] = field(default_factory=list)
    finished: bool = False

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    def names(self, number: int) -> list[str]:
        """Name the files of a shard: features, and labels unless rows have none."""
        kinds = ["features"] if self.labelled is False else ["features", "labels"]
        return [f"{kind}-{number:05d}.npy" for kind in kinds]

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest in one step, so that a reader finds the old or the new one."""
        partial_file = folder / f".{MANIFEST}"
        partial_file.write_text(json.dumps({"format": _FORMAT} | asdict(self), indent=1), encoding="utf-8")
        os.replace(partial_file, folder / MANIFEST)


def read_manifest(folder: FilePath) -> Manifest | None:
    """Read a folder's manifest; None if it has none, or one that another tool wrote.

    Raises:
        DataError: If it is damaged, or of a later version.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON: {error}") from error
    name = stored.pop("format", None) if isinstance(stored, dict) else None
    if not isinstance(name, str) or not name.startswith("faiss-knn extraction"):
        return None
    try:
        shards = [Shard(int(shard["rows"]), str(shard["seen"])) for shard in stored.pop("shards")]
        return Manifest(**stored, shards=shards)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: damaged, or written by a later version ({name}): {error}") from error


class DataDigest:
    """Tell loaders apart by what they give: all labels, and 64 numbers of each input, spread over it.

    The digest depends on the rows and their order, not on the batches that they come in.

    Example:
        >>> whole, parts = DataDigest(), DataDigest()
        >>> whole.add(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 2]))
        >>> parts.add(torch.arange(4.0).view(2, 2), torch.tensor([0, 1]))
        >>> parts.value() == whole.value()
        False
        >>> parts.add(torch.tensor([[4.0, 5.0]]), torch.tensor([2]))
        >>> parts.value() == whole.value()
        True
    """

    def __init__(self) -> None:
        self._streams: dict[str, Any] = {}

    def add(self, inputs: Any, labels: Any) -> None:
        """Take in a batch."""
        for name, rows in _leaves("", {"inputs": inputs, "labels": labels}):
            stream = self._streams.setdefault(name, blake2b(digest_size=16))
            stream.update(_sample(rows))

    def value(self) -> str:
        """Return the digest of all batches so far."""
        digests = {name: stream.hexdigest() for name, stream in self._streams.items()}
        return blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=8).hexdigest()


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor | npt.NDArray[Any] | bytes]]:
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield name, value.detach()
    elif isinstance(value, (np.ndarray, np.generic)):
        yield name, np.atleast_1d(value)
    elif isinstance(value, (str, int, float, bool, bytes)):
        yield name, repr(value).encode()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}/{key}", item)
    elif isinstance(value, (list, tuple)):
        words = all(isinstance(item, (str, int, float)) for item in value)  # as many as rows: one stream for all
        for i, item in enumerate(value):
            yield from _leaves(name if words else f"{name}/{i}", item)


def _sample(rows: Tensor | npt.NDArray[Any] | bytes) -> bytes:
    if isinstance(rows, bytes):
        return rows + b"\n"
    length = len(rows) if rows.ndim else 1
    flat = rows.reshape(length, -1)
    if 0 in flat.shape:
        return b""
    columns = np.unique(np.linspace(0, flat.shape[1] - 1, _NUMBERS_PER_ROW).astype(np.int64))
    if isinstance(flat, np.ndarray):
        return "\n".join(map(str, flat.ravel())).encode() if flat.dtype.kind in "OUS" else flat[:, columns].tobytes()
    return _bytes(flat[:, torch.from_numpy(columns).to(flat.device)])


def model_fingerprint(model: nn.Module, *called_with: Any) -> str:
    """Fingerprint a model: its modules, every parameter and buffer, and how it is called.

    Args:
        model: Any module.
        called_with: What else the features depend on, such as a function that calls the model.
    """
    digest = blake2b(digest_size=16)
    for name, module in model.named_modules():
        settings = re.sub(r"0x[0-9a-f]+", "", module.extra_repr())  # addresses differ between processes
        digest.update(f"{name}:{type(module).__qualname__}({settings})\n".encode())
    for kind in (model.named_parameters(), model.named_buffers()):
        for name, tensor in kind:
            uninitialized = nn.parameter.is_lazy(tensor)
            digest.update(f"{name}:{tensor.dtype}{'' if uninitialized else tuple(tensor.shape)}\n".encode())
            if not uninitialized and tensor.layout == torch.strided and not tensor.is_meta:
                digest.update(_bytes(tensor.detach()))
    for value in called_with:
        digest.update(_described(value).encode() + b"\n")
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    whole = tensor.resolve_conj().resolve_neg().cpu().contiguous()
    return whole.reshape(-1).view(torch.uint8).numpy().tobytes()


def _described(value: Any) -> str:
    """Describe a function or setting without addresses: the same in each process."""
    if isinstance(value, CodeType):
        return f"code({value.co_code.hex()},{value.co_names},{_all_described(value.co_consts)})"
    if isinstance(value, tuple):
        return _all_described(value)
    if isinstance(value, frozenset):
        return str(sorted(map(_described, value)))
    if isinstance(value, partial):
        named = _all_described(sorted(value.keywords.items()))
        return f"partial({_described(value.func)},{_all_described(value.args)},{named})"
    if isinstance(value, FunctionType):
        settings = _all_described((*(value.__defaults__ or ()), *_enclosed(value)))
        return f"function({_described(value.__code__)},{settings})"
    if isinstance(value, (str, int, float, complex, bool, bytes, torch.dtype, type(None), type(...))):
        return repr(value)
    return type(value).__qualname__


def _enclosed(function: FunctionType) -> list[Any]:
    """List values that a function takes from around it and does not set itself, as a counter of its calls would be."""
    counters = {step.argval for step in dis.get_instructions(function.__code__) if step.opname == "STORE_DEREF"}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = [cell.cell_contents for name, cell in cells if name not in counters and cell != _EMPTY_CELL]
    return [value for value in values if not callable(value)]  # a function may enclose itself


def _all_described(values: Any) -> str:
    return str([_described(value) for value in values])
