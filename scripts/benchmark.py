"""How fast is the search, against the bare matrix product, the naive way and FAISS as it comes?

    python scripts/benchmark.py            # some minutes on 2 cores
    python scripts/benchmark.py --quick    # under a minute

Every ratio is the median of runs in pairs, ours and the other in turns, so that a busy machine slows both alike. The
data are synthetic: "random" has no structure, "embeddings" has classes and a decaying spectrum, as learned features do.
Prints tables; writes benchmark.json and benchmark.png to --out. With a CUDA device there are tables of it too.
"""

import argparse
import json
import logging
import multiprocessing
import platform
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import benchmark_cuda
import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from faiss_knn import KNNIndex, OnlineKNN, vote
from faiss_knn.online.queue import RingBuffer

Record = dict[str, Any]

FULL = [  # N, d, B, k, data
    (10_000, 128, 256, 20, "random"),
    (100_000, 512, 256, 20, "random"),
    (100_000, 512, 64, 20, "random"),
    (250_000, 768, 128, 200, "random"),
    (25_000, 384, 500, 20, "embeddings"),
    (25_000, 2048, 500, 20, "rank 100"),
    (1_000_000, 128, 256, 20, "embeddings"),
]
QUICK = [FULL[4], FULL[5]]
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")  # its distributions


def make_data(kind: str, rows: int, dim: int, seed: int) -> Tensor:
    """Return (rows, dim) float32 features; the same distribution for every seed."""
    own, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(12345)
    if kind == "random":
        return torch.randn(rows, dim, generator=own)
    if kind == "rank 100":
        spread = torch.randn(100, dim, generator=fixed) / 10
        return torch.randn(rows, 100, generator=own) @ spread + 0.02 * torch.randn(rows, dim, generator=own)
    centres = torch.randn(70, dim, generator=fixed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=fixed)).Q
    spectrum = torch.arange(1, dim + 1) ** -0.5
    labels = torch.randint(70, (rows,), generator=own)
    return F.normalize((0.6 * centres[labels] + torch.randn(rows, dim, generator=own)) * spectrum @ turn)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def paired(ours: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Return (median of ours / other, median seconds of ours, of other) after one run of each to warm up."""
    ours(), other()
    runs = [(seconds(ours), seconds(other)) for _ in range(repeats)]
    first, second = zip(*runs, strict=True)
    return statistics.median(a / b for a, b in runs), statistics.median(first), statistics.median(second)


def share_found(found: Tensor, exact: Tensor) -> float:
    hits = sum(int((row[:, None] == true).any(0).sum()) for row, true in zip(found, exact, strict=True))
    return hits / exact.numel()


def search_table(grid: list[tuple[int, int, int, int, str]], repeats: int) -> list[Record]:
    records = []
    for rows, dim, batch, k, kind in tqdm(grid, desc="search", unit="case"):
        bank, queries = make_data(kind, rows, dim, 0), make_data(kind, batch, dim, 1)
        case = {"N": rows, "d": dim, "B": batch, "k": k, "data": kind}
        exact = KNNIndex().build(bank).search(queries, k).indices

        def product(queries: Tensor = queries, bank: Tensor = bank) -> Tensor:
            return queries @ bank.T

        for spec in ("flat", "fast", "auto", *(["ivf"] if rows <= 100_000 and dim < 512 else [])):
            index = KNNIndex(spec)
            cold = seconds(lambda i=index, b=bank, k=k: i.build(b, expected_k=k, expected_queries=5000))  # type: ignore[misc]
            warm = seconds(lambda i=index, b=bank, k=k: i.build(b, expected_k=k, expected_queries=5000))  # type: ignore[misc]
            ratio, ours, other = paired(lambda i=index, q=queries, k=k: i.search(q, k), product, repeats)  # type: ignore[misc]
            stats = index.stats
            records.append(
                case
                | {"index": spec, "used": stats.spec, "ratio": ratio, "search_s": ours, "product_s": other}
                | {"ratio_with_rebuild": ratio + warm * batch / (5000 * other)}  # of a rebuild and 5,000 queries
                | {"build_s": cold, "rebuild_s": warm, "recall": share_found(index.search(queries, k).indices, exact)}
                | {"uncertified": stats.uncertified, "bytes": stats.bytes, "parameters": stats.parameters}
            )
        if rows * batch <= 30_000_000:
            ratio, ours, other = paired(lambda q=queries, b=bank, k=k: naive(q, b, k), product, min(repeats, 3))  # type: ignore[misc]
            records.append(case | {"index": "naive", "ratio": ratio, "search_s": ours, "product_s": other})
            records.append(case | {"index": "FAISS as it comes", **stock(rows, dim, batch, k)})
    return records


def naive(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    return torch.cdist(bank, queries).topk(k, dim=0, largest=False).indices


def stock(rows: int, dim: int, batch: int, k: int) -> Record:
    """Time faiss.knn against the product in a process of its own: which kernels it runs is settled at its import."""
    code = (
        "import time,statistics,torch,faiss,numpy as np\n"
        f"x=torch.randn({rows},{dim});q=torch.randn({batch},{dim});a,b=x.numpy(),q.numpy()\n"
        "def s(f):\n t=time.perf_counter();f();return time.perf_counter()-t\n"
        f"f=lambda:faiss.knn(b,a,{k});g=lambda:q@x.T\nf();g()\n"
        "r=[(s(f),s(g)) for _ in range(3)]\n"
        "print(statistics.median(u/v for u,v in r),statistics.median(u for u,_ in r),statistics.median(v for _,v in r))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio, ours, other = map(float, done.stdout.split())
    return {"ratio": ratio, "search_s": ours, "product_s": other}


def growth_table(sizes: list[int], repeats: int) -> list[Record]:
    """How the search grows as N doubles: each size in pairs with half of it."""
    records = []
    for rows in tqdm(sizes, desc="growth", unit="size"):
        bank, queries = torch.randn(rows, 128), torch.randn(256, 128)
        whole, half = KNNIndex().build(bank), KNNIndex().build(bank[: rows // 2])
        ratio, ours, _ = paired(
            lambda w=whole, q=queries: w.search(q, 20),  # type: ignore[misc]
            lambda h=half, q=queries: h.search(q, 20),  # type: ignore[misc]
            repeats,
        )
        records.append({"N": rows, "d": 128, "B": 256, "search_s": ours, "times_half_of_it": ratio})
    return records


def vote_table(repeats: int) -> list[Record]:
    distances, labels = torch.rand(256, 200).sort(1).values, torch.randint(1000, (256, 200))

    def one_hot() -> Tensor:
        return (F.one_hot(labels, 1000) * (1 / (distances + 0.07))[:, :, None]).sum(1)

    ratio, other, ours = paired(one_hot, lambda: vote(distances, labels, 1000), repeats)
    return [{"B": 256, "k": 200, "C": 1000, "one_hot_s": other, "vote_s": ours, "times_faster": ratio}]


def append_table(lengths: list[int], repeats: int) -> list[Record]:
    """An append against the bare slice copy to the same places of as long a buffer, and against a sorted queue."""
    records = []
    for length in lengths:
        ring, batch = RingBuffer(length, 384, torch.float32, "cpu"), torch.randn(256, 384)
        store, order, now = torch.zeros(length, 384), torch.zeros(length, dtype=torch.int64), [0]
        ring.append(torch.zeros(length, 384))  # touched, and back at its start

        def sort_and_copy(store: Tensor = store, order: Tensor = order, now: list[int] = now) -> Tensor:
            oldest = order.argsort()[:256]
            now[0] += 1
            store[oldest], order[oldest] = batch, now[0]  # noqa: B023
            return store[order.argsort()]

        def slice_copy(store: Tensor = store, now: list[int] = now, length: int = length) -> None:
            now[0] = (now[0] + 256) % length
            store[now[0] : now[0] + 256] = batch  # noqa: B023

        _, other, _ = paired(sort_and_copy, lambda r=ring, b=batch: r.append(b), repeats)  # type: ignore[misc]
        now[0] = 0
        ratio, ours, bare = paired(lambda r=ring, b=batch: r.append(b), slice_copy, 200 * repeats)  # type: ignore[misc]
        records.append(
            {"length": length, "d": 384, "B": 256, "append_us": ours * 1e6, "bare_copy_us": bare * 1e6}
            | {"times_bare_copy": ratio, "sorted_us": other * 1e6}
        )
    return records


def anonymous_bytes() -> int:
    """Memory of this process that is no file's; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def peak_while(function: Callable[[], object]) -> int:
    """Return by how many bytes memory grew at most while the function ran."""
    before, seen, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen[0] = max(seen[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(0, seen[0] - before)


def memory_table(cases: list[tuple[int, int, int, int]]) -> list[Record]:
    """Each case in a process of its own: what this one has used before would hide what a search takes."""
    new = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=new, max_tasks_per_child=1) as pool:
        return list(tqdm(pool.map(memory_of, cases), desc="memory", unit="case", total=len(cases)))


def memory_of(case: tuple[int, int, int, int]) -> Record:
    rows, dim, batch, k = case
    KNNIndex().build(torch.randn(3000, 64)).search(torch.randn(100, 64), 20)  # starts threads, loads kernels
    bank, queries = torch.randn(rows, dim), torch.randn(batch, dim)
    peak = peak_while(lambda: KNNIndex().build(bank).search(queries, k))
    bound = bank.nbytes + (256 << 20) + 12 * batch * k
    return {"N": rows, "d": dim, "B": batch, "k": k, "bank_MiB": bank.nbytes >> 20} | {
        "grew_MiB": peak >> 20,
        "allowed_MiB": bound >> 20,
    }


class Encoded(L.LightningModule):
    """Features that are there already: what is timed is their evaluation."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Record:
        return {"loss": torch.zeros((), requires_grad=True), "feature": batch[0], "label": batch[1]}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Record:
        return {"feature": batch[0], "label": batch[1]}

    def configure_optimizers(self) -> None:
        return None


class NaiveKNN(L.Callback):
    """The same number the obvious way: a full distance matrix and a one-hot vote per batch."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.metric = MulticlassAccuracy(classes, average="micro")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append((batch[0].clone(), batch[1].clone()))

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        features, labels = (torch.cat(part) for part in zip(*self.rows, strict=True))
        distances, ids = torch.cdist(features, batch[0]).topk(20, dim=0, largest=False)
        weights = 1 / (distances + 0.07)
        self.metric.update((F.one_hot(labels[ids], self.classes) * weights[..., None]).sum(0), batch[1])


class Clock(L.Callback):
    """Seconds from the start of a validation epoch to its end."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.started = time.perf_counter()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def epoch_seconds(callback: L.Callback, train: Any, val: Any) -> float:
    clock = Clock()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        num_sanity_val_steps=0,
        callbacks=[callback, clock],
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(Encoded(), train, val)
    return clock.seconds


def epoch_table(rows: int, queries: int, repeats: int) -> list[Record]:
    def loader(count: int, seed: int) -> Any:
        features = make_data("embeddings", count, 384, seed)
        data = torch.utils.data.TensorDataset(features, torch.arange(count) % 70)
        return torch.utils.data.DataLoader(data, batch_size=256)

    train, val = loader(rows, 0), loader(queries, 1)
    runs = []
    for _ in tqdm(range(repeats), desc="validation epoch", unit="pair"):
        metric = {"acc": MulticlassAccuracy(70, average="micro")}
        ours = OnlineKNN("knn", "feature", "label", rows, metric, num_classes=70, k=20)
        runs.append((epoch_seconds(ours, train, val), epoch_seconds(NaiveKNN(70), train, val)))
    ratio = statistics.median(naive / ours for ours, naive in runs)
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    return [
        {
            "bank": rows,
            "queries": queries,
            "d": 384,
            "online_s": medians[0],
            "naive_s": medians[1],
            "times_faster": ratio,
        }
    ]


def show(title: str, records: list[Record]) -> None:
    keys = list(dict.fromkeys(key for record in records for key in record if key != "parameters"))
    cells = [[_cell(record.get(key)) for key in keys] for record in records]
    widths = [max(len(row[i]) for row in [keys, *cells]) for i in range(len(keys))]
    print(f"\n{title}")
    for row in [keys, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(records: list[Record], path: Path) -> None:
    import matplotlib as mpl  # here: without it the tables still print

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((r["N"], r["d"], r["B"], r["k"], r["data"]) for r in records))
    names = list(dict.fromkeys(record["index"] for record in records))
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name in names:
        mine = [
            (cases.index((r["N"], r["d"], r["B"], r["k"], r["data"])), r["ratio"])
            for r in records
            if r["index"] == name
        ]
        axes.plot(*zip(*mine, strict=True), "o", label=name)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("search time / bare product")
    axes.set_xticks(range(len(cases)), [f"{n:,} × {d}\nB {b}, k {k}\n{kind}" for n, d, b, k, kind in cases], fontsize=7)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def about_the_machine() -> Record:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "amx_bf16": "amx_bf16" in info,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "faiss": ", ".join(f"{name} {version(name)}" for name in FAISS if installed(name)) or None,
        **benchmark_cuda.about_the_card(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, under a minute")
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmark"), help="folder for benchmark.json and benchmark.png"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    quick = options.quick
    repeats = 3 if quick else 5
    print(machine := about_the_machine())
    measurements: dict[str, Callable[[], list[Record]]] = {
        "search": lambda: search_table(QUICK if quick else FULL, repeats),
        "growth": lambda: growth_table([40_000] if quick else [20_000, 40_000, 80_000, 160_000, 320_000], repeats),
        "memory": lambda: memory_table(
            [(50_000, 256, 512, 20)] if quick else [(200_000, 512, 1024, 20), (50_000, 128, 256, 2000)]
        ),
        "vote": lambda: vote_table(repeats),
        "append": lambda: append_table([4_096] if quick else [4_096, 262_144], repeats),
        "epoch": lambda: epoch_table(10_000 if quick else 50_000, 2_000 if quick else 5_000, 1 if quick else 3),
        **benchmark_cuda.measurements(quick),
    }
    tables = {}
    for title, measure in measurements.items():
        tables[title] = measure()
        show(title, tables[title])
    report = {"machine": machine, "quick": quick, "tables": tables}
    (options.out / "benchmark.json").write_text(json.dumps(report, indent=1))
    try:
        plot(tables["search"], options.out / "benchmark.png")
    except ImportError:
        print("no plot: pip install matplotlib")
    print(f"\nwritten to {options.out}/")


if __name__ == "__main__":
    main()
