"""Training runs that the tests start on every rank; module-level, so that a spawned process finds them."""

import atexit
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from faiss_knn import KNNIndex, OnlineKNN
from faiss_knn.distributed import rank_and_size
from faiss_knn.online import diagnostics
from faiss_knn.online.options import DIAGNOSTICS
from faiss_knn.online.queue import OnlineQueue, find_or_create_queue
from faiss_knn.search.engines.faiss_engine import FaissEngine
from tests.distributed.failures import fail_in
from tests.online.parts import Echo, Rows, clusters, loader, trainer

CLASSES = 4
TRAIN = {**clusters(120, CLASSES, spread=3.0), "id": torch.arange(120)}
VAL = {**clusters(97, CLASSES, spread=3.0, seed=1), "id": torch.arange(97)}  # no number of ranks divides 97


def knn(**options: Any) -> OnlineKNN:
    metrics = {"acc": MulticlassAccuracy(CLASSES, average="micro"), "auroc": MulticlassAUROC(CLASSES)}
    return OnlineKNN("knn", "embedding", "label", **{"queue_length": 400, "metrics": metrics} | options)


def ddp(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return trainer(
        *callbacks, **{"strategy": "ddp", "devices": rank_and_size()[1], "num_sanity_val_steps": 0} | options
    )


def logged(run: L.Trainer) -> dict[str, float]:
    return {key: value.item() for key, value in run.callback_metrics.items()}


def queued(run: L.Trainer, key: str = "embedding") -> Tensor:
    """This rank's rows of a queue, oldest first."""
    queue = next(q for q in run.callbacks if getattr(q, "key", None) == key)
    return find_or_create_queue(run, key, queue.queue_length, gather_distributed=True).snapshot(run, gathered=False)


def fit(options: dict[str, Any], batch_size: int = 7, epochs: int = 1) -> dict[str, float]:
    """The usual run: Lightning deals both data sets out with its DistributedSampler."""
    run = ddp(knn(**options), max_epochs=epochs)
    run.fit(Echo(), loader(batch_size, **TRAIN), loader(batch_size, **VAL))
    return logged(run)


def count_builds(options: dict[str, Any]) -> int:
    """Fit, and count how often this rank built an index."""
    with mock.patch.object(KNNIndex, "build", autospec=True, side_effect=KNNIndex.build) as build:
        fit(options)
    return build.call_count


class Batches(L.LightningDataModule):
    """Training batches of this rank as they are given, and a shared validation set."""

    def __init__(self, per_rank: list[list[dict[str, Tensor]]], val: Any = None) -> None:
        super().__init__()
        self.batches, self.val = per_rank[rank_and_size()[0]], val

    def train_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self.val or loader(16, **VAL)


def uneven_batches(counts: list[list[int]]) -> list[list[dict[str, Tensor]]]:
    """`counts[r]` rows per batch on rank r, dealt in turn from TRAIN."""
    start, per_rank = 0, []
    for rank_counts in counts:
        batches = []
        for n in rank_counts:
            batches.append({key: values[start : start + n].clone() for key, values in TRAIN.items()})
            start += n
        per_rank.append(batches)
    return per_rank


def fit_uneven(counts: list[list[int]], options: dict[str, Any]) -> tuple[dict[str, float], Tensor, Tensor]:
    run = ddp(knn(**options), use_distributed_sampler=False)
    run.fit(Echo(), datamodule=Batches(uneven_batches(counts)))
    queue = find_or_create_queue(run, "embedding", 400, gather_distributed=True)
    return logged(run), queued(run), queue.snapshot(run)


class Padding(Sampler[int]):
    """Deals samples out like a DistributedSampler, but is none: nothing tells that it pads."""

    def __init__(self, n: int) -> None:
        rank, size = rank_and_size()
        self.inner = DistributedSampler(range(n), size, rank, shuffle=False)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Any:
        return iter(self.inner)


def fit_with_ids(options: dict[str, Any], epochs: int = 1) -> dict[str, float]:
    """Both sets are dealt out by a sampler that repeats samples, which only their ids tell."""
    sets = [{key: values[:n] for key, values in data.items()} for data, n in ((TRAIN, 119), (VAL, 97))]
    loaders = [DataLoader(Rows(**data), 7, sampler=Padding(len(data["x"]))) for data in sets]
    run = ddp(knn(id="id", **options), use_distributed_sampler=False, max_epochs=epochs)
    run.fit(Moving(), *loaders)
    return logged(run)


def fit_diagnosed(gather: str, sample: int) -> dict[str, float]:
    """Two epochs of moving features, judged by a sample of the bank, with the same rows on any number of ranks."""
    with mock.patch.object(diagnostics, "SAMPLE_ROWS", sample):
        return fit_with_ids({"gather": gather, "diagnostics": DIAGNOSTICS}, epochs=2)


class Moving(Echo):
    """In its first epoch each class lies where the next class belongs."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        shift = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(99)) * 3
        wrong = batch["x"] - shift[batch["label"]] + shift[(batch["label"] + 1) % CLASSES]
        last = self.current_epoch == self.trainer.max_epochs - 1
        return {**self.step(batch), "embedding": batch["x"] if last else wrong}


def fit_with_bank_loader(options: dict[str, Any], loaders: int) -> dict[str, float]:
    bank = loader(16, **TRAIN)
    scored = [loader(7, **VAL) for _ in range(loaders)]
    run = ddp(knn(bank_dataloader_idx=0, **options))
    run.validate(Echo(), [bank, *scored], verbose=False)
    return logged(run)


def save(path: Path, options: dict[str, Any], counts: list[list[int]]) -> Tensor:
    run = ddp(knn(**options), use_distributed_sampler=False)
    run.fit(Echo(), datamodule=Batches(uneven_batches(counts)))
    run.save_checkpoint(path)
    return queued(run)


def resume(path: Path, options: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, float]]:
    run = ddp(knn(**options))
    run.validate(Echo(), loader(7, **VAL), ckpt_path=path, verbose=False)
    return queued(run), queued(run, "label"), logged(run)


class Net(Echo):
    """Learns a little, so that every epoch's features differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, CLASSES)

    def step(self, batch: Any) -> dict[str, Tensor]:
        embedding = self.encoder(batch["x"]).tanh()
        loss = torch.nn.functional.cross_entropy(self.head(embedding), batch["label"]) + 0 * self.weight.sum()
        return {"loss": loss, "embedding": embedding}


class Kill(L.Callback):
    """SIGKILL to this process at a training step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, epochs: int, *, ckpt: Path | None = None, kill_at: int = 0, **options: Any) -> dict[str, float]:
    """Train with a checkpoint per epoch, up to the end or to death."""
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    run = ddp(knn(**options), checkpoints, Kill(kill_at), max_epochs=epochs, enable_checkpointing=True)
    run.fit(Net(), loader(8, **TRAIN), loader(8, **VAL), ckpt_path=ckpt)
    return logged(run)


def save_while_failing(path: Path) -> str:
    """Only one rank fails, and saves what it has."""

    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 2 and rank_and_size()[0] == 1:
                raise RuntimeError("a broken batch")

        def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
            connector = trainer._checkpoint_connector
            torch.save(connector.dump_checkpoint(), path)

    run = ddp(knn(), Fails(), use_distributed_sampler=False)
    try:
        run.fit(Echo(), datamodule=Batches(uneven_batches([[4] * 4, [4] * 4])))
    except RuntimeError as error:
        return str(error)
    return "no error"


def fit_with_one_bad_rank(where: str, options: dict[str, Any]) -> str:
    rank, _ = rank_and_size()

    class Faulty(Echo):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = self.step(batch)
            if where == "validation" and rank == 1 and batch_idx == 1:
                outputs.pop("embedding")
            return outputs

    batches = uneven_batches([[8, 8], [8, 8]])
    if where == "label":
        batches[1][0]["label"][3] = 17
    if where == "shape" and rank == 1:
        batches[1] = [{**batch, "x": batch["x"][:, :5]} for batch in batches[1]]
    try:
        ddp(knn(**options), use_distributed_sampler=False).fit(Faulty(), datamodule=Batches(batches))
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail_in_hooks(gather: str, failing: int, cases: list[tuple[str, str, int]], folder: Path) -> list[tuple[str, str]]:
    """Fit, save and validate from the file, where a hook of the callback or of a queue fails on one rank.

    Returns:
        For each case how far this rank came, and what was raised there.
    """
    return [_fail_in_hook(gather, failing, *case, folder) for case in cases]


def _fail_in_hook(gather: str, failing: int, who: str, hook: str, n: int, folder: Path) -> tuple[str, str]:
    callbacks = {"queue": OnlineQueue("label", 400, gather_distributed=True), "knn": knn(gather=gather, id="id")}
    fail_in(callbacks[who], hook, failing, n)
    reached, batches = "fit", uneven_batches([[6, 6]] * rank_and_size()[1])
    try:
        run = ddp(*callbacks.values(), use_distributed_sampler=False)
        run.fit(Echo(), datamodule=Batches(batches))
        reached = "save"
        run.save_checkpoint(folder / "run.ckpt")
        reached = "validate"
        run.validate(Echo(), loader(16, **VAL), ckpt_path=folder / "run.ckpt", verbose=False, weights_only=True)
    except BaseException as error:
        return reached, f"{type(error).__name__}: {error}"
    return reached, "nothing"


def fit_with_a_failing_rank(how: str, failing: int, options: dict[str, Any]) -> None:
    """Four steps and a validation of the user's own, in the third of which, or in the second batch, one rank fails."""

    class Fails(Echo):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = self.step(batch)
            if batch_idx == 2 and rank_and_size()[0] == failing:
                end_by(how)
                if how == "misaligned":
                    outputs["embedding"] = outputs["embedding"][:-1]
                if how == "missing":
                    outputs.pop("embedding")
            return outputs

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1 and rank_and_size()[0] == failing:
                end_by(how.removeprefix("validation "))
            return self.step(batch)

    run = ddp(knn(**options), use_distributed_sampler=False)
    run.fit(Fails(), datamodule=Batches(uneven_batches([[6] * 4] * rank_and_size()[1])))


def end_by(how: str) -> None:
    if how == "error":
        raise LookupError("a broken image")
    if how == "hang":
        time.sleep(60)
    if how in ("SIGINT", "SIGTERM", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, how))


class Wilful(MulticlassAccuracy):
    """Fails on one rank when the value of many rows is asked for (of few, to see whether it works, it gives one)."""

    def compute(self) -> Tensor:
        if rank_and_size()[0] == 1 and (self.tp + self.fn).sum() > 20:
            raise ArithmeticError("no value")
        return super().compute()


def gather_plainly(state: Tensor, group: Any = None) -> list[Tensor]:
    states = [torch.empty_like(state) for _ in range(rank_and_size()[1])]
    dist.all_gather(states, state, group=group)
    return states


def fit_with_a_failing_metric(own_gather: bool) -> str:
    options = {"dist_sync_fn": gather_plainly} if own_gather else {}
    metrics = {"bad": Wilful(CLASSES, **options), "good": MulticlassAccuracy(CLASSES, **options)}
    try:
        fit({"metrics": metrics})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fit_with_own_validation(
    batches: list[list[list[dict[str, Tensor]]]], endless: bool, options: dict[str, Any]
) -> Any:
    """Validation batches of which ranks have different numbers, or do not know the number."""
    rank, _ = rank_and_size()
    val = [DataLoader(part, batch_size=None) for part in batches[rank]]  # type: ignore[arg-type]
    if endless:
        val = [DataLoader(Endless(batches[rank][0]), batch_size=None)]
    run = ddp(knn(**options), use_distributed_sampler=False)
    try:
        run.fit(Echo(), datamodule=Batches(uneven_batches([[30, 30], [30, 30]]), val))
    except ValueError as error:
        return str(error)
    return logged(run)


class Endless(IterableDataset[Any]):
    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def rows_in_a_buffer_and_in_the_queue(counts: list[list[int]]) -> tuple[Tensor, Tensor]:
    class Buffered(Echo):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(4, 8))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen = self.rows.clone()
            self.rows.copy_(batch["x"])
            return self.step(batch)

    module, run = Buffered(), ddp(knn(), use_distributed_sampler=False)
    run.fit(module, datamodule=Batches(uneven_batches(counts)))
    return module.seen, queued(run)


class Sharded(Net):
    """Its parameters are spread over the ranks by FSDP."""

    def configure_model(self) -> None:
        for part in (self.encoder, self.head):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


def fit_fsdp_and_resume(path: Path) -> tuple[bool, Tensor, Tensor, dict[str, float], dict[str, float]]:
    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=rank_and_size()[1], tensor_parallel_size=1)

    module, run = Sharded(), ddp(knn(), strategy=strategy())
    run.fit(module, loader(8, **TRAIN), loader(8, **VAL))
    run.save_checkpoint(path)
    resumed = ddp(knn(), strategy=strategy())
    resumed.validate(Sharded(), loader(8, **VAL), ckpt_path=path, verbose=False)
    is_sharded = all(isinstance(parameter, DTensor) for parameter in module.encoder.parameters())
    return is_sharded, queued(run), queued(resumed), logged(run), logged(resumed)


def fit_with_other_tuning() -> list[Tensor]:
    """Scores of validation batches that both ranks have, where left to itself rank 1 would visit one list only."""
    rank, _ = rank_and_size()
    predictions = []

    class Keep(L.Callback):
        def on_validation_batch_end(
            self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *rest: Any
        ) -> None:
            predictions.append(batch["knn_preds"])

    def tune(engine: FaissEngine, *args: Any) -> None:
        engine.nprobe = engine._set_nprobe(1 if rank else 4)

    with mock.patch.object(FaissEngine, "tune", tune):
        run = ddp(knn(index="IVF4,Flat", target_recall=0.99), Keep(), use_distributed_sampler=False)
        run.fit(Echo(), datamodule=Batches(uneven_batches([[30, 30], [30, 30]])))
    return predictions


class LeaveTogether(L.Callback):
    """Ends the process group before each process does: Lightning leaves gloo's open, whose threads then may abort."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        atexit.register(self.leave)

    @staticmethod
    def leave() -> None:
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


if __name__ == "__main__":  # what a user of a strategy that starts its own processes runs
    run = trainer(knn(), LeaveTogether(), strategy=sys.argv[1], devices=2, num_sanity_val_steps=0)
    run.fit(Echo(), loader(7, **TRAIN), loader(7, **VAL))
    sys.stdout.write(f"{logged(run)}\n")
