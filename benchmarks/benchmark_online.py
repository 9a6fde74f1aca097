#!/usr/bin/env python3
"""What OnlineKNN adds to a training step, a validation batch and an epoch's end, beside a run without it.

Time is that spent in the hooks of the callback and of its queues, medians over steps and batches. The network is one
linear layer, so that its own step is about the least that a step can take. With search="epoch" a batch's part is that
of keeping it and of the search at the end. Run it on an idle machine.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import OnlineKNN, OnlineQueue
from faiss_knn.online.options import DIAGNOSTICS

SIZES = [(65_536, 384), (262_144, 768)]
CLASSES, BATCH, STEPS = 100, 256, 20
Seconds = dict[str, list[float]]


class Linear(L.LightningModule):
    """One layer that is trained, in batches that are made before."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(dim, dim)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        embedding = self.layer(batch["x"])
        return {"loss": embedding.square().mean(), "embedding": embedding}

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Watch(L.Callback):
    """Times steps, and the hooks of the callbacks that it watches; fills their queues before training."""

    def __init__(self) -> None:
        self.seconds: Seconds = defaultdict(list)
        self._began = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, OnlineQueue):
                fill(callback, trainer, pl_module.layer.in_features)
            if isinstance(callback, OnlineQueue | OnlineKNN):
                for hook in (name for name in dir(L.Callback) if name.startswith("on_")):
                    setattr(callback, hook, self._timed(hook, getattr(callback, hook)))

    def _timed(self, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> None:
            began = time.perf_counter()
            function(*args, **kwargs)
            self.seconds[hook].append(time.perf_counter() - began)

        return timed

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds["step"].append(time.perf_counter() - self._began)


def fill(queue: OnlineQueue, trainer: Any, dim: int) -> None:
    """Fill a queue with clusters of features, or with their labels."""
    ring, generator = queue.storage(trainer).ring, torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, dim, generator=generator)
    for start in range(0, queue.queue_length, 8192):
        labels = torch.arange(start, min(start + 8192, queue.queue_length)) % CLASSES
        noise = torch.randn(len(labels), dim, generator=generator)
        ring.append(centres[labels] + noise if queue.key == "embedding" else labels)


def run(rows: int, dim: int, **options: Any) -> Seconds:
    """Train and validate once; with `options`, under OnlineKNN."""
    data = [{"x": torch.randn(BATCH, dim), "label": torch.randint(0, CLASSES, (BATCH,))} for _ in range(STEPS)]
    watch, callbacks = Watch(), []
    if options:
        metric = MulticlassAccuracy(CLASSES)
        callbacks = [OnlineKNN("knn", "embedding", "label", rows, metric, num_classes=CLASSES, k=20, **options)]
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[watch, *callbacks], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    loader: Any = torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Linear(dim), loader, loader)
    return watch.seconds


def per_step(seconds: Seconds, *hooks: str) -> float:
    """The median over steps of what all watched callbacks together spent in these hooks."""
    total = [0.0] * STEPS
    for hook in hooks:
        callbacks = len(seconds[hook]) // STEPS
        total = [sum(seconds[hook][i * callbacks : (i + 1) * callbacks]) + total[i] for i in range(STEPS)]
    return statistics.median(total)


def row(rows: int, dim: int) -> str:
    bare = statistics.median(run(rows, dim)["step"])
    with_knn = run(rows, dim, diagnostics=())
    at_the_end = run(rows, dim, search="epoch")
    asked = tuple(name for name in DIAGNOSTICS if name != "neighbor_churn")
    diagnosed = run(rows, dim, diagnostics=asked)
    batch = per_step(with_knn, "on_validation_batch_start", "on_validation_batch_end")
    start, end, diagnosed_end, late_end = (
        sum(sum(found[hook]) for hook in hooks)
        for found, hooks in (
            (with_knn, ("on_validation_start", "on_validation_epoch_start")),
            (with_knn, ("on_validation_epoch_end", "on_validation_end")),
            (diagnosed, ("on_validation_epoch_end", "on_validation_end")),
            (at_the_end, ("on_validation_epoch_end", "on_validation_end")),
        )
    )
    kept = per_step(at_the_end, "on_validation_batch_start", "on_validation_batch_end")
    late = kept + (late_end - end) / STEPS
    added = per_step(with_knn, "on_train_batch_end")
    return (
        f"| {rows:,} × {dim} | {1e3 * bare:.2f} ms | {1e6 * added:.0f} µs | {1e3 * batch:.0f} ms | "
        f"{1e3 * late:.0f} ms | {start:.2f} s | {1e3 * end:.0f} ms | {1e3 * (diagnosed_end - end):.0f} ms |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, help="of the queue; with --dim, instead of the two sizes of the table")
    parser.add_argument("--dim", type=int, default=384)
    args = parser.parse_args()
    print(
        '| queue | step without | step adds | batch of 256 adds | with search="epoch" | epoch start (index) | '
        "epoch end | diagnostics add |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for rows, dim in [(args.rows, args.dim)] if args.rows else SIZES:
        print(row(rows, dim), flush=True)


if __name__ == "__main__":
    main()
