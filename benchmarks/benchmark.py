"""How fast is the search, against the bare matrix product, the naive way and FAISS as it comes?

    python benchmarks/benchmark.py            # some minutes on 2 cores
    python benchmarks/benchmark.py --quick    # under a minute

Every ratio is the median of runs in turns, ours and the others, so that a busy machine slows all alike: `ratio` to
PyTorch's float32 product `queries @ bank.T`, `to_fastest` to the fastest float32 product found here, of PyTorch's and
numpy's. The data are synthetic: "random" has no structure, "embeddings" has classes and a decaying spectrum, as learned
features do. Prints tables; writes benchmark.json and benchmark.png to --out. With a CUDA device there are tables of it
too.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import benchmark_cuda
import lightning as L
import numpy as np
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
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
_NUMPY_BLOCK = 1024
_REST = 0.15  # seconds after which the threads of the last run have gone to sleep: OpenBLAS's spin for 0.1
_EXPECTED = (500, 5_000, 50_000)  # queries
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


def seconds(function: Callable[[], object], rest: float = 0.0) -> float:
    time.sleep(rest)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(functions: Sequence[Callable[[], object]], repeats: int, rest: float = _REST) -> list[list[float]]:
    """Return the seconds of each function, run in turns after one run of each to warm up.

    Each waits until the threads of the one before sleep: while they spin, they take a core from it.
    """
    for function in functions:
        function()
    runs = [[seconds(function, rest) for function in functions] for _ in range(repeats)]
    return [list(column) for column in zip(*runs, strict=True)]


def ratio_of(ours: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def paired(
    ours: Callable[[], object], other: Callable[[], object], repeats: int, rest: float = _REST
) -> tuple[float, float, float]:
    """Return (median of ours / other, median seconds of ours, of other)."""
    first, second = in_turns([ours, other], repeats, rest)
    return ratio_of(first, second), statistics.median(first), statistics.median(second)


def products(queries: Tensor, bank: Tensor) -> dict[str, Callable[[], object]]:
    """Return the float32 products of this case that a search could stand on, PyTorch's `queries @ bank.T` first."""
    left, right = queries.numpy(), bank.numpy()
    out = np.empty((len(left), _NUMPY_BLOCK), np.float32)

    def numpy_in_blocks() -> None:
        for start in range(0, len(right), _NUMPY_BLOCK):
            block = right[start : start + _NUMPY_BLOCK]
            np.matmul(left, block.T, out=out[:, : len(block)])

    return {
        "torch queries @ bank.T": lambda: queries @ bank.T,
        "torch bank @ queries.T": lambda: bank @ queries.T,
        "numpy queries @ bank.T": lambda: left @ right.T,
        "numpy bank @ queries.T": lambda: right @ left.T,
        f"numpy in blocks of {_NUMPY_BLOCK} rows": numpy_in_blocks,
    }


def product_table(grid: list[tuple[int, int, int, int, str]], repeats: int) -> list[Record]:
    """Time the bare products: which is fastest depends on the CPU, the BLAS that each library brings, and the shape."""
    records = []
    for rows, dim, batch in tqdm(list(dict.fromkeys(case[:3] for case in grid)), desc="products", unit="case"):
        queries, bank = torch.randn(batch, dim), torch.randn(rows, dim)
        halves = queries.bfloat16(), bank.bfloat16()
        ways = products(queries, bank) | {"torch bfloat16 bank @ queries.T": lambda h=halves: h[1] @ h[0].T}
        for name, times in zip(ways, in_turns(list(ways.values()), repeats), strict=True):
            taken = statistics.median(times)
            case = {"N": rows, "d": dim, "B": batch}
            records.append(case | {"product": name, "s": taken, "GFLOP_s": 2e-9 * rows * dim * batch / taken})
    return records


def fastest_product(queries: Tensor, bank: Tensor) -> tuple[str, Callable[[], object]]:
    ways = products(queries, bank)
    times = [statistics.median(column) for column in in_turns(list(ways.values()), 3)]
    return list(ways.items())[times.index(min(times))]


def share_found(found: Tensor, exact: Tensor) -> float:
    hits = sum(int((row[:, None] == true).any(0).sum()) for row, true in zip(found, exact, strict=True))
    return hits / exact.numel()


def search_table(grid: list[tuple[int, int, int, int, str]], repeats: int) -> list[Record]:
    records = []
    for rows, dim, batch, k, kind in tqdm(grid, desc="search", unit="case"):
        bank, queries = make_data(kind, rows, dim, 0), make_data(kind, batch, dim, 1)
        case = {"N": rows, "d": dim, "B": batch, "k": k, "data": kind}
        exact = KNNIndex().build(bank).search(queries, k).indices
        product = products(queries, bank)["torch queries @ bank.T"]
        name, fastest = fastest_product(queries, bank)
        case["fastest"] = name

        for spec in ("flat", "fast", "auto", *(["ivf"] if rows <= 100_000 and dim < 512 else [])):
            index = KNNIndex(spec)
            cold = seconds(lambda i=index, b=bank, k=k: i.build(b, expected_k=k, expected_queries=5000))  # type: ignore[misc]
            warm = seconds(lambda i=index, b=bank, k=k: i.build(b, expected_k=k, expected_queries=5000))  # type: ignore[misc]
            turns = in_turns([lambda i=index, q=queries, k=k: i.search(q, k), product, fastest], repeats)  # type: ignore[misc]
            ours, other, least = map(statistics.median, turns)
            stats = index.stats
            records.append(
                case
                | {"index": spec, "used": stats.spec, "ratio": ratio_of(turns[0], turns[1])}
                | {"to_fastest": ratio_of(turns[0], turns[2]), "search_s": ours, "product_s": other, "fastest_s": least}
                # of a rebuild and 5,000 queries
                | {"to_fastest_with_rebuild": (ours + warm * batch / 5000) / least}
                | {"build_s": cold, "rebuild_s": warm, "recall": share_found(index.search(queries, k).indices, exact)}
                | {"uncertified": stats.uncertified, "bytes": stats.bytes, "parameters": stats.parameters}
            )
        if rows * batch <= 30_000_000:
            ratio, ours, other = paired(lambda q=queries, b=bank, k=k: naive(q, b, k), product, min(repeats, 3))  # type: ignore[misc]
            records.append(case | {"index": "naive", "ratio": ratio, "search_s": ours, "product_s": other})
        records.append(case | {"index": "FAISS as it comes", **stock(rows, dim, batch, k)})
        records.append(case | {"index": "FAISS, BLAS forced", **stock(rows, dim, batch, k, forced=True)})
    return records


def auto_table(grid: list[tuple[int, int, int, int, str]], repeats: int) -> list[Record]:
    """Time "auto" from cold, a build and so many queries, against the better one of "flat" and "fast"."""
    records = []
    for rows, dim, batch, k, kind in tqdm(grid, desc="auto", unit="case"):
        bank, queries = make_data(kind, rows, dim, 0), make_data(kind, batch, dim, 1)
        builds, searches = {}, {}
        for spec in ("flat", "fast"):
            index = KNNIndex(spec)
            builds[spec] = seconds(lambda i=index, b=bank, k=k: i.build(b, expected_k=k))  # type: ignore[misc]
            (turns,) = in_turns([lambda i=index, q=queries, k=k: i.search(q, k)], repeats)  # type: ignore[misc]
            searches[spec] = statistics.median(turns) / batch
        for expected in _EXPECTED:
            auto = KNNIndex("auto")
            build = seconds(lambda i=auto, b=bank, k=k, e=expected: i.build(b, expected_k=k, expected_queries=e))  # type: ignore[misc]
            totals = {spec: builds[spec] + expected * searches[spec] for spec in builds}
            ours = build + expected * searches[auto.stats.spec]
            case = {"N": rows, "d": dim, "k": k, "data": kind, "queries": expected, "used": auto.stats.spec}
            records.append(
                case
                | {f"{spec}_s": total for spec, total in totals.items()}
                | {"auto_build_s": build, "auto_s": ours, "to_best": ours / min(totals.values())}
            )
    return records


def naive(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    return torch.cdist(bank, queries).topk(k, dim=0, largest=False).indices


def stock(rows: int, dim: int, batch: int, k: int, *, forced: bool = False) -> Record:
    """Time faiss.knn against the product in a process of its own: which kernels it runs is settled at its import.

    As it comes FAISS multiplies matrices for batches of some size alone, and compares pair by pair below; `forced` has
    it multiply always.
    """
    code = (
        "import time,statistics,torch,faiss,numpy as np\n"
        f"x=torch.randn({rows},{dim});q=torch.randn({batch},{dim});a,b=x.numpy(),q.numpy()\n"
        f"{'faiss.cvar.distance_compute_blas_threshold=1' if forced else ''}\n"
        f"def s(f):\n time.sleep({_REST});t=time.perf_counter();f();return time.perf_counter()-t\n"
        f"f=lambda:faiss.knn(b,a,{k});g=lambda:q@x.T\nf();g()\n"
        "r=[(s(f),s(g)) for _ in range(3)]\n"
        "print(statistics.median(u/v for u,v in r),statistics.median(u for u,_ in r),statistics.median(v for _,v in r))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio, ours, other = map(float, done.stdout.split())
    return {"ratio": ratio, "search_s": ours, "product_s": other}


def busy_table(rows: int, dim: int, batch: int, repeats: int) -> list[Record]:
    """Time flat and the fastest product while this machine does nothing else, and with every core taken twice over."""
    queries, bank = make_data("random", batch, dim, 1), make_data("random", rows, dim, 0)
    index = KNNIndex().build(bank)
    name, fastest = fastest_product(queries, bank)
    records = []
    for others in (0, 2 * (os.cpu_count() or 1)):
        with company(others):
            ratio, ours, product = paired(lambda: index.search(queries, 20), fastest, repeats)
        case = {"N": rows, "d": dim, "B": batch, "k": 20, "other_processes": others, "fastest": name}
        records.append(case | {"to_fastest": ratio, "search_s": ours, "fastest_s": product})
    return records


@contextmanager
def company(count: int) -> Iterator[None]:
    """Keep `count` other processes busy, each with products on one thread."""
    code = "import torch\ntorch.set_num_threads(1)\nx = torch.randn(512, 512)\nprint(1, flush=True)\nwhile True: x @ x"
    others = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.read(1)  # it has begun
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
            assert other.stdout is not None
            other.stdout.close()


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
        ratio, ours, bare = paired(lambda r=ring, b=batch: r.append(b), slice_copy, 200 * repeats, rest=0.0)  # type: ignore[misc]
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
    try:
        function()
    finally:
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
        "instructions": [flag for flag in INSTRUCTIONS if f" {flag} " in f"{info} ".replace("\n", " ")],
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "faiss": ", ".join(f"{name} {version(name)}" for name in FAISS if installed(name)) or None,
        **benchmark_cuda.about_the_card(),
    }


def measurements(quick: bool) -> dict[str, Callable[[], list[Record]]]:
    repeats, grid = (3, QUICK) if quick else (5, FULL)
    return {
        "products": lambda: product_table(grid, repeats),
        "search": lambda: search_table(grid, repeats),
        "auto": lambda: auto_table(list({case[:2]: case for case in grid}.values()), repeats),
        "busy": lambda: busy_table(25_000 if quick else 100_000, 384, 256, repeats),
        "growth": lambda: growth_table([40_000] if quick else [20_000, 40_000, 80_000, 160_000, 320_000], repeats),
        "memory": lambda: memory_table(
            [(50_000, 256, 512, 20)] if quick else [(200_000, 512, 1024, 20), (50_000, 128, 256, 2000)]
        ),
        "vote": lambda: vote_table(repeats),
        "append": lambda: append_table([4_096] if quick else [4_096, 262_144], repeats),
        "epoch": lambda: epoch_table(10_000 if quick else 50_000, 2_000 if quick else 5_000, 1 if quick else 3),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases, under a minute")
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmark"), help="folder for benchmark.json and benchmark.png"
    )
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="only these: products, search, busy, … or gpu")
    parser.add_argument(
        "--stand-in", action="store_true", help="the GPU's tables at toy size on the CPU, to see that they come out"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = about_the_machine()
    print(machine)
    asked = measurements(options.quick) | benchmark_cuda.measurements(options.quick, stand_in=options.stand_in)
    if options.tables:
        asked = {title: asked[title] for title in asked if {title, title.split()[0]} & set(options.tables)}
        if not asked:
            sys.exit(f"benchmark: no table here is named {' or '.join(options.tables)}")
    tables: dict[str, list[Record]] = {}
    for title, measure in asked.items():
        tables[title] = measure()
        show(title, tables[title])
        report = {"machine": machine, "quick": options.quick, "tables": tables}
        (options.out / "benchmark.json").write_text(json.dumps(report, indent=1))  # whatever stops the next table
    if "search" in tables:
        try:
            plot(tables["search"], options.out / "benchmark.png")
        except ImportError:
            print("no plot: pip install matplotlib")
    print(f"\nwritten to {options.out}/")


if __name__ == "__main__":
    main()
