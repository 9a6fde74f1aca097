"""From a model and a data loader to saved features."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

Batch = Any


def extract(
    model: nn.Module,
    dataloader: Iterable[Batch],
    out: str | Path,
    *,
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    unpack: Callable[[Batch], tuple[Tensor, Tensor | None]] | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    shard_rows: int = 100_000,
    progress: bool | None = None,
) -> Path:
    """Save what a model makes of every batch, for `faiss-knn eval` to read.

    The model runs in eval mode without gradients and goes back to the modes it had. With a folder as `out`, a run that
    was cut off goes on after the last whole shard: the loader is read from its beginning, the model is not run again.

    Args:
        model: Any module.
        dataloader: Gives (inputs, labels) pairs, or what `unpack` understands; in the same order every time, so a
            `DataLoader` that shuffles is refused.
        out: An .npz file (everything is held in memory until the end), or a folder for `features-00000.npy`,
            `labels-00000.npy`, ….
        forward: Called as `forward(model, inputs)` for the (B, d) features; None: `model(inputs)`.
        unpack: From a batch to (inputs, labels or None); None: the first two of a tuple or list.
        device: Where to run; None: where the model's parameters are.
        autocast: A dtype such as `torch.bfloat16` to run under autocast; features are saved in float32 all the same.
        shard_rows: Rows after which a shard is closed, at the end of a batch.
        progress: Show a bar on stderr; None: if stderr is a terminal.

    Returns:
        `out` as a path.

    Raises:
        ValueError: If the loader shuffles, features are not (B, d), or labels are not one row per feature row.

    Example:
        >>> import tempfile
        >>> batches = [(torch.ones(2, 3), torch.tensor([0, 1]))]
        >>> saved = extract(nn.Linear(3, 4), batches, Path(tempfile.mkdtemp()) / "features.npz")
        >>> np.load(saved)["features"].shape
        (2, 4)
    """
    out = Path(out)
    shuffles = isinstance(dataloader, DataLoader) and isinstance(dataloader.sampler, RandomSampler)
    if shuffles:
        raise ValueError("`dataloader` shuffles: make it with shuffle=False, so that a run can be repeated and resumed")
    done = _saved_rows(out) if out.suffix != ".npz" else 0
    device = torch.device(device) if device is not None else next((p.device for p in model.parameters()), None)
    batches = (
        _features(model, inputs, labels, forward, device, autocast)
        for inputs, labels in _remaining(map(unpack or _first_two, dataloader), done)
    )
    with _evaluating(model), torch.no_grad():
        shown = tqdm(batches, unit="batch", disable=None if progress is None else not progress, file=sys.stderr)
        _write(out, shown, shard_rows if out.suffix != ".npz" else sys.maxsize, done)
    return out


def _first_two(batch: Batch) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0], batch[1] if len(batch) > 1 else None
    raise ValueError(
        f"a batch must be (inputs, labels), got a {type(batch).__name__}: say how to unpack it in `unpack`"
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _features(
    model: nn.Module,
    inputs: Any,
    labels: Tensor | None,
    forward: Callable[[nn.Module, Tensor], Tensor] | None,
    device: torch.device | None,
    autocast: torch.dtype | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    if device is not None and isinstance(inputs, Tensor):
        inputs = inputs.to(device, non_blocking=True)
    kind = device.type if device is not None else "cpu"
    with torch.autocast(kind, autocast) if autocast is not None else nullcontext():
        found = model(inputs) if forward is None else forward(model, inputs)
    if not isinstance(found, Tensor) or found.ndim != 2:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ValueError(f"the model must give (B, d) features, got {what}: pick and pool them in `forward`")
    if labels is not None and len(labels) != len(found):
        raise ValueError(f"{len(labels)} labels for {len(found)} features in one batch: say which they are in `unpack`")
    return found.float().cpu().numpy(), None if labels is None else np.asarray(torch.as_tensor(labels).cpu())


def _remaining(batches: Iterable[tuple[Tensor, Tensor | None]], done: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    seen = 0
    for inputs, labels in batches:
        rows = len(labels) if labels is not None else len(inputs)
        if seen >= done:
            yield inputs, labels
        elif seen + rows > done:
            raise ValueError(
                f"the saved shards end at row {done}, inside a batch of rows {seen} to {seen + rows}: "
                "use the batch size of the first run, or another folder"
            )
        seen += rows


def _saved_rows(folder: Path) -> int:
    return sum(len(np.load(file, mmap_mode="r")) for file in sorted(folder.glob("features-*.npy")))


def _write(out: Path, batches: Iterable[tuple[np.ndarray, np.ndarray | None]], shard_rows: int, done: int) -> None:
    shard = len(list(out.glob("features-*.npy"))) if done else 0
    held: list[tuple[np.ndarray, np.ndarray | None]] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += len(batch[0])
        if rows >= shard_rows:
            _close(out, shard, held)
            held, rows, shard = [], 0, shard + 1
    if held:
        _close(out, shard, held)
    elif not done and not shard:
        raise ValueError("`dataloader` gave no batch")


def _close(out: Path, shard: int, held: list[tuple[np.ndarray, np.ndarray | None]]) -> None:
    """Write under another name first: a shard that is there is whole. Labels go first: features count the rows."""
    arrays = {"labels": [labels for _, labels in held if labels is not None], "features": [rows for rows, _ in held]}
    joined = {name: np.concatenate(parts) for name, parts in arrays.items() if parts}
    if out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".partial.npz")
        np.savez(partial, **joined)  # type: ignore[arg-type]
        os.replace(partial, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, array in joined.items():
        partial = out / f".{name}.npy"
        np.save(partial, array)
        os.replace(partial, out / f"{name}-{shard:05d}.npy")
