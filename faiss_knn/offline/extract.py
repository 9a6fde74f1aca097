"""From a model and a data loader to saved features."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loguru import logger
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from tqdm import tqdm

from faiss_knn.offline.formats import OPENERS
from faiss_knn.offline.manifest import MANIFEST, DataDigest, Manifest, Shard, model_fingerprint, read_manifest
from faiss_knn.search.inputs import as_count, as_device, as_path, as_switch, shown

Batch = Any
Features = tuple[np.ndarray, np.ndarray | None]

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


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
    overwrite: bool = False,
) -> Path:
    """Save what a model makes of every batch, for `faiss-knn eval` to read.

    The model runs in eval mode without gradients and goes back to the modes it had. With a folder as `out`, a run that
    was cut off, at whatever moment, goes on after the last whole shard: the loader is read from its beginning and must
    give the same rows again, the model is not run on them. The folder's `manifest.json` says which model and data
    its features are of, and whether the run was finished; a folder with features of others is refused.

    Args:
        model: Any module.
        dataloader: Gives (inputs, labels) pairs, or what `unpack` understands; in the same order every time, so a
            `DataLoader` that shuffles is refused.
        out: An .npz file (everything is held in memory until the end; a file of that name is replaced), or a folder
            for `features-00000.npy`, `labels-00000.npy`, …, of which no two runs may write to one at a time.
        forward: Called as `forward(model, inputs)` for the (B, d) features; None: `model(inputs)`.
        unpack: From a batch to (inputs, labels or None); None: the first two of a tuple or list.
        device: Where to run; None: where the model's parameters are.
        autocast: A dtype such as `torch.bfloat16` to run under autocast; features are saved in float32 all the same.
        shard_rows: Rows after which a shard is closed, at the end of a batch.
        progress: Show a bar on stderr; None: if stderr is a terminal.
        overwrite: Remove the shards that an earlier run wrote to the folder, and no other file, and begin anew.

    Returns:
        `out` as a path.

    Raises:
        ValueError: If the loader shuffles or gives other rows than a run before it, the folder holds features of
            another model or data set, features are not (B, d), or labels are not one row per feature row.

    Example:
        >>> import tempfile
        >>> batches = [(torch.ones(2, 3), torch.tensor([0, 1]))]
        >>> saved = extract(nn.Linear(3, 4), batches, Path(tempfile.mkdtemp()) / "features.npz")
        >>> np.load(saved)["features"].shape
        (2, 4)
    """
    out = as_path(out, "`out`")
    progress = None if progress is None else as_switch(progress, "`progress`")
    overwrite = as_switch(overwrite, "`overwrite`")
    _check_what_runs(model, dataloader, forward, unpack, autocast)
    _check_order(dataloader)
    _check_out(out, shard_rows)
    device = as_device(device) if device is not None else next((p.device for p in model.parameters()), None)

    def computed(inputs: Any, labels: Any) -> Features:
        return _features(model, inputs, labels, forward, device, autocast)

    shown = tqdm(dataloader, unit="batch", disable=None if progress is None else not progress, file=sys.stderr)
    with _evaluating(model), torch.no_grad():
        batches = map(unpack or _first_two, shown)
        if out.suffix == ".npz":
            _write_file(out, [computed(inputs, labels) for inputs, labels in batches])
        else:
            manifest = _begin(out, model_fingerprint(model, forward, autocast), _length(dataloader), overwrite)
            _fill(out, manifest, batches, computed, shard_rows)
    return out


def _check_what_runs(model: Any, dataloader: Any, forward: Any, unpack: Any, autocast: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a torch.nn.Module, got {shown(model)}: wrap a function in one")  # noqa: TRY004
    if (
        not isinstance(dataloader, Iterable)
        or isinstance(dataloader, (str, bytes))
        or getattr(dataloader, "ndim", 1) == 0
    ):
        raise ValueError(f"`dataloader` must give batches, as a DataLoader does, got {shown(dataloader)}")
    for name, function in (("forward", forward), ("unpack", unpack)):
        if function is not None and not callable(function):
            raise ValueError(f"`{name}` must be a function or None, got {shown(function)}")
    if autocast is not None and not any(autocast is dtype for dtype in (torch.bfloat16, torch.float16)):
        raise ValueError(f"`autocast` must be torch.bfloat16, torch.float16 or None, got {shown(autocast)}")


def _check_order(dataloader: Iterable[Batch]) -> None:
    """Refuse a loader that is known to give another order, or only some of the rows, next time."""
    if not isinstance(dataloader, DataLoader):
        return
    if dataloader.num_workers and not getattr(dataloader, "in_order", True):
        raise ValueError("`dataloader` gives batches as they are ready: make it with in_order=True")
    for sampler in _samplers(dataloader):
        if isinstance(sampler, _SHUFFLING) or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
            raise ValueError(
                f"`dataloader` shuffles ({type(sampler).__name__}): make it with shuffle=False, so that a run can be "
                "repeated and resumed"
            )
        if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise ValueError(
                f"`dataloader` gives one of {sampler.num_replicas} ranks its part of the rows, some of them twice: "
                "extract in one process, or give each rank a torch.utils.data.Subset and a folder of its own"
            )
    if dataloader.drop_last:
        logger.warning("extract: `dataloader` has drop_last=True, the rows of an incomplete last batch are left out")


def _samplers(dataloader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the samplers of a loader, and those that they wrap."""
    waiting = [dataloader.sampler, dataloader.batch_sampler]
    met: list[Any] = []
    while waiting:
        sampler = waiting.pop()
        if sampler is not None and not any(sampler is other for other in met):
            met.append(sampler)
            yield sampler
            waiting += [getattr(sampler, name, None) for name in ("sampler", "batch_sampler")]


def _check_out(out: Path, shard_rows: int) -> None:
    as_count(shard_rows, "`shard_rows`")
    if out.suffix != ".npz" and (out.suffix.lower() in OPENERS or (out.exists() and not out.is_dir())):
        raise ValueError(f"`out` must be an .npz file or a folder, got {out}: choose another name")


def _length(dataloader: Iterable[Batch]) -> int | None:
    data: Any = getattr(dataloader, "dataset", None)
    return len(data) if hasattr(data, "__len__") else None


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
    labels: Any,
    forward: Callable[[nn.Module, Tensor], Tensor] | None,
    device: torch.device | None,
    autocast: torch.dtype | None,
) -> Features:
    if device is not None and isinstance(inputs, Tensor):
        inputs = inputs.to(device, non_blocking=True)
    kind = device.type if device is not None else "cpu"
    with torch.autocast(kind, autocast) if autocast is not None else nullcontext():
        features = model(inputs) if forward is None else forward(model, inputs)
    if not isinstance(features, Tensor) or features.ndim != 2:
        what = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise ValueError(f"the model must give (B, d) features, got {what}: pick and pool them in `forward`")
    if labels is not None and len(labels) != len(features):
        raise ValueError(
            f"{len(labels)} labels for {len(features)} features in one batch: say which they are in `unpack`"
        )
    return features.float().cpu().numpy(), None if labels is None else _labels(labels)


def _labels(labels: Any) -> np.ndarray:
    if isinstance(labels, (list, tuple)) and all(isinstance(label, str) for label in labels):
        return np.asarray(labels, dtype=str)
    return np.asarray(torch.as_tensor(labels).cpu())


def _begin(folder: Path, model: str, length: int | None, overwrite: bool) -> Manifest:
    """Find the folder's manifest to go on with, or begin a new one; whatever else the folder holds stays."""
    manifest = read_manifest(folder)
    if manifest is not None and overwrite:
        for name in (name for number in range(len(manifest.shards) + 1) for name in manifest.names(number)):
            (folder / name).unlink(missing_ok=True)  # the one after the last may have been cut off
    elif manifest is not None and manifest.shards:
        _check_same(folder, manifest, model, length)
        return manifest
    elif manifest is None:
        others = sorted(file.name for file in folder.glob("features-*.npy"))
        if others or (folder / MANIFEST).exists():
            raise ValueError(
                f"{folder} holds {others[0] if others else MANIFEST}, of which it is not known what wrote it: "
                "choose another folder"
            )
    manifest = Manifest(model, length)
    folder.mkdir(parents=True, exist_ok=True)
    manifest.save(folder)
    return manifest


def _check_same(folder: Path, manifest: Manifest, model: str, length: int | None) -> None:
    differences = []
    if manifest.model != model:
        differences.append("another model (its weights, its modules, `forward` or `autocast` differ)")
    if None not in (length, manifest.length) and length != manifest.length:
        differences.append(f"a data set of {manifest.length} rows, not {length}")
    if differences:
        raise ValueError(
            f"{folder} holds features of {' and of '.join(differences)}: choose another folder, or overwrite=True"
        )
    missing = [name for i in range(len(manifest.shards)) for name in manifest.names(i) if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder}: {missing[0]} is missing: choose another folder, or overwrite=True")


def _fill(
    folder: Path,
    manifest: Manifest,
    batches: Iterator[tuple[Any, Any]],
    computed: Callable[[Any, Any], Features],
    shard_rows: int,
) -> None:
    """Check what is saved against what the loader gives, and write what is not saved yet."""
    digest = DataDigest()
    _pass_saved(folder, manifest, batches, digest)
    parts: list[Features] = []
    rows = 0
    for inputs, labels in batches:
        if manifest.finished:
            raise _other_rows(folder, manifest.rows, manifest.rows + _count(inputs, labels))
        digest.add(inputs, labels)
        parts.append(computed(inputs, labels))
        rows += len(parts[-1][0])
        if rows >= shard_rows:
            _commit(folder, manifest, parts, digest.value())
            parts, rows = [], 0
    if parts:
        _commit(folder, manifest, parts, digest.value())
    if manifest.finished:
        logger.info(f"extract: {folder} holds all {manifest.rows} rows of this model and data: nothing to do")
    elif manifest.shards:
        manifest.finished = True
        manifest.save(folder)
    else:
        raise ValueError("`dataloader` gave no batch")


def _pass_saved(folder: Path, manifest: Manifest, batches: Iterator[tuple[Any, Any]], digest: DataDigest) -> None:
    """Read the batches of the saved shards again, without the model."""
    ends = list(accumulate(shard.rows for shard in manifest.shards))
    seen_at = {end: shard.seen for end, shard in zip(ends, manifest.shards, strict=True)}
    done, seen, agreed = manifest.rows, 0, 0
    while seen < done:
        inputs, labels = next(batches, (None, None))
        if inputs is None:
            raise _other_rows(folder, seen, done)
        rows = _count(inputs, labels)
        if seen + rows > done:
            raise ValueError(
                f"the saved shards end at row {done}, inside a batch of rows {seen} to {seen + rows}: "
                "use the batch size of the first run, or another folder"
            )
        digest.add(inputs, labels)
        seen += rows
        if seen in seen_at:
            if seen_at[seen] != digest.value():
                raise _other_rows(folder, agreed, seen)
            agreed = seen


def _count(inputs: Any, labels: Any) -> int:
    return len(labels) if labels is not None else len(inputs)


def _other_rows(folder: Path, start: int, stop: int) -> ValueError:
    return ValueError(
        f"`dataloader` gives other rows than those saved in {folder}, within rows {start} to {stop}: it shuffles, "
        "augments at random or reads other data: make it repeatable, choose another folder, or overwrite=True"
    )


def _commit(folder: Path, manifest: Manifest, parts: list[Features], seen: str) -> None:
    """Write a shard: first its files, each under another name until it is whole, then the line that makes it count."""
    joined = _joined(parts)
    rows, dim = joined["features"].shape
    labelled = "labels" in joined
    if manifest.shards and (manifest.dim, manifest.labelled) != (dim, labelled):
        raise ValueError(
            f"{folder} holds shards of dimension {manifest.dim} with{'' if manifest.labelled else 'out'} labels, the "
            f"next one has dimension {dim}, with{'' if labelled else 'out'}: choose another folder, or overwrite=True"
        )
    manifest.dim, manifest.labelled = dim, labelled
    for name, array in zip(manifest.names(len(manifest.shards)), joined.values(), strict=True):
        partial = folder / f".{name}"
        np.save(partial, array)
        os.replace(partial, folder / name)
    manifest.shards.append(Shard(rows, seen))
    manifest.save(folder)


def _write_file(out: Path, parts: list[Features]) -> None:
    """Write an .npz under another name first: a file that is there is whole."""
    if not parts:
        raise ValueError("`dataloader` gave no batch")
    joined = _joined(parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial.npz")
    np.savez(partial, **joined)  # type: ignore[arg-type]
    os.replace(partial, out)


def _joined(held: list[Features]) -> dict[str, np.ndarray]:
    labels = [labels for _, labels in held if labels is not None]
    if labels and len(labels) != len(held):
        raise ValueError(f"{len(labels)} of {len(held)} batches have labels: give all of them labels, or none")
    arrays = {"features": [rows for rows, _ in held]} | ({"labels": labels} if labels else {})
    return {name: np.concatenate(parts) for name, parts in arrays.items()}
