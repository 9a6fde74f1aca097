"""The GPU's tables of benchmarks/benchmark.py: our search there against the bare product, PyTorch's ways and FAISS's.

Every search is timed in turns with the bare TF32 product and with one read of the bank, the GPU waited for after each.
The data are made on the device: unit vectors of 1,000 classes, of equal spread in all directions ("clusters"), of a
decaying spectrum ("embeddings"), or nearly all of it in 100 directions ("rank 100", where a projection pays).
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from faiss_knn import KNNIndex
from faiss_knn.search.engines import exact as exact_search
from faiss_knn.search.engines.faiss_library import faiss

Record = dict[str, Any]
KINDS = ("clusters", "embeddings", "rank 100")
CASES = ((512, 20), (64, 20), (512, 200))  # B, k
_BLOCK = 1 << 16  # rows made, or compared in float64, at once
_SAMPLE = 64  # queries whose neighbours are found in float64
_PATIENCE = 3.0  # seconds after which a row is not repeated more often than thrice
_MOST_K = 2048  # of FAISS's knn_gpu, which aborts the process beyond it


class Data(NamedTuple):
    """What is searched."""

    bank: Tensor  # (N, d)
    queries: Tensor  # (B, d)
    exact: Tensor  # (_SAMPLE, k) ids of the nearest rows of the first queries


class Way(NamedTuple):
    """A way to search one bank: queries (B, d), k -> ids (B, k), or None where only a part of the work is timed."""

    search: Callable[[Tensor, int], Tensor | None]
    ours: KNNIndex | None = None


Maker = Callable[[Tensor], Way | None]


def measurements(quick: bool, *, stand_in: bool = False) -> dict[str, Callable[[], list[Record]]]:
    """Return the tables that this machine's GPU allows, by title; none, and a word about it, without one.

    With `stand_in` the CPU takes its place, at toy size: to see that the tables come out, not for their figures.
    """
    if stand_in:
        device = torch.device("cpu")
        return {
            "gpu search": lambda: search_table(5_000, 32, CASES, KINDS, device, 1),
            "gpu rebuild": lambda: rebuild_table(5_000, 32, 2_000, device, 1),
            "gpu memory": lambda: memory_table(5_000, 32, 3, device),
        }
    if not torch.cuda.is_available():
        print("no CUDA device, so no GPU tables")
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    rows, fewer = (200_000, 20_000) if quick else (1_281_167, 200_000)
    return {
        "gpu search": lambda: search_table(rows, 768, CASES, KINDS, device, 5 if quick else 20),
        "gpu rebuild": lambda: rebuild_table(rows, 768, 50_000, device, 3),
        "gpu memory": lambda: memory_table(fewer, 768, 100, device),
    }


def about_the_card() -> Record:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        drivers = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        drivers = []
    there = torch.cuda.is_available()
    library = faiss_on_gpu() if there else None
    return {
        "card": torch.cuda.get_device_name() if there else None,
        "driver": drivers[0] if drivers else None,
        "cuda": torch.version.cuda,
        "faiss_on_gpu": None if library is None else library.__version__,
    }


def make_rows(kind: str, rows: int, dim: int, seed: int, device: torch.device) -> Tensor:
    """Return (rows, dim) float32 unit vectors; the same distribution for every seed."""
    own, fixed = torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(12345)
    width = min(100, dim) if kind == "rank 100" else dim
    centres = 0.6 * torch.randn(1000, width, generator=fixed, device=device)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=fixed, device=device)).Q[:width]
    if kind == "embeddings":
        turn = torch.arange(1, dim + 1, device=device)[:, None] ** -0.5 * turn
    made = torch.empty(rows, dim, device=device)
    for block in torch.split(made, _BLOCK):
        labels = torch.randint(1000, (len(block),), generator=own, device=device)
        spread = torch.randn(len(block), width, generator=own, device=device)
        around = torch.randn(len(block), dim, generator=own, device=device) if kind == "rank 100" else 0.0
        block.copy_(F.normalize((centres[labels] + spread) @ turn + 0.01 * around))
    return made


def make_data(kind: str, rows: int, dim: int, queries: int, k: int, device: torch.device) -> Data:
    bank, asked = make_rows(kind, rows, dim, 0, device), make_rows(kind, queries, dim, 1, device)
    return Data(bank, asked, exact_neighbors(bank, asked[:_SAMPLE], k))


def exact_neighbors(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Return the ids (B, k) of the nearest rows, from differences in float64."""
    best = torch.empty(len(queries), 0, dtype=torch.float64, device=bank.device)
    ids = torch.empty(len(queries), 0, dtype=torch.int64, device=bank.device)
    for start in range(0, len(bank), _BLOCK):
        rows = bank[start : start + _BLOCK].double()
        found = torch.cdist(queries.double(), rows, compute_mode="donot_use_mm_for_euclid_dist")
        found, columns = found.topk(min(k, len(rows)), largest=False)
        best, ids = torch.cat([best, found], 1), torch.cat([ids, columns + start], 1)
        best, order = best.topk(min(k, best.shape[1]), largest=False)
        ids = ids.gather(1, order)
    return ids


def share_found(ids: Tensor, exact: Tensor) -> float:
    return float((ids[:, :, None] == exact[:, None, :]).any(1).double().mean())


def seconds(function: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    function()
    return now() - start


def in_turns(functions: Sequence[Callable[[], object]], repeats: int, device: torch.device) -> list[list[float]]:
    """Return the seconds of each function in each round, after two rounds to warm up: one may settle an index."""
    for function in (*functions, *functions):
        function()
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < min(3, repeats) or (len(rounds) < repeats and time.perf_counter() - start < _PATIENCE):
        rounds.append([seconds(function, device) for function in functions])
    return rounds


@contextmanager
def tensor_cores(allowed: bool) -> Iterator[None]:
    """Switch PyTorch's TF32 products on or off, and back."""
    owner = torch.backends.cuda.matmul
    newer = hasattr(owner, "fp32_precision")  # since torch 2.9
    name, value = ("fp32_precision", "tf32" if allowed else "ieee") if newer else ("allow_tf32", allowed)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def reading(bank: Tensor) -> Way:
    def search(queries: Tensor, k: int) -> None:  # noqa: ARG001
        bank.sum()

    return Way(search)


def product(bank: Tensor, precision: str, *, select: bool) -> Way:
    """The whole (B, N) product, and its best k columns if asked for: the nearest rows, of unit vectors."""
    stored = bank.bfloat16() if precision == "bf16" else bank

    def search(queries: Tensor, k: int) -> Tensor | None:
        with tensor_cores(precision == "TF32"):
            scores = queries.to(stored.dtype) @ stored.T
        return scores.topk(k, dim=1).indices if select else None

    return Way(search)


def cdist(bank: Tensor) -> Way:
    """As stable-pretraining does it."""
    return Way(lambda queries, k: torch.cdist(bank, queries).topk(k, dim=0, largest=False).indices.T)


def ours(bank: Tensor, spec: str) -> Way:
    index = KNNIndex(spec).build(bank)
    return Way(lambda queries, k: index.search(queries, k).indices, index)


def unprojected(bank: Tensor) -> Way | None:
    """Flat without its projection; None if it uses none of these data anyway."""
    if KNNIndex().build(bank).stats.parameters.get("scan_dims") == bank.shape[1]:
        return None
    with mock.patch.object(exact_search, "_worthwhile_basis", return_value=None):
        return ours(bank, "flat")


def faiss_on_gpu() -> Any | None:
    """Return FAISS, taught to take PyTorch's tensors, if its build and a GPU are there."""
    try:
        library = faiss()
    except ImportError:
        return None
    if not hasattr(library, "StandardGpuResources") or library.get_num_gpus() == 0:
        return None
    import_module("faiss.contrib.torch_utils")
    return library


def knn_gpu(bank: Tensor, library: Any, resources: Any, dtype: torch.dtype) -> Way:
    stored = bank.to(dtype)

    def search(queries: Tensor, k: int) -> Tensor:
        if k > _MOST_K:
            raise ValueError(f"`k` must be at most {_MOST_K} for knn_gpu, got {k}")
        with torch.cuda.device(bank.device):
            found: Tensor = library.knn_gpu(resources, queries.to(dtype), stored, k, device=bank.device.index)[1]
        return found

    return Way(search)


def gpu_index_flat(bank: Tensor, library: Any, resources: Any) -> Way:
    config = library.GpuIndexFlatConfig()
    config.device, config.use_cuvs = bank.device.index, False
    index = library.GpuIndexFlatL2(resources, bank.shape[1], config)

    def search(queries: Tensor, k: int) -> Tensor:
        with torch.cuda.device(bank.device):
            found: Tensor = index.search(queries, k)[1]
        return found

    with torch.cuda.device(bank.device):
        index.add(bank)
    return Way(search)


def ways(device: torch.device) -> dict[str, Maker]:
    """Return all ways to search that there are here, by the name of their row."""
    made: dict[str, Maker] = {"read of the bank": reading}
    for name, select in (("product", False), ("mm + topk", True)):
        made |= {f"{name} {p}": partial(product, precision=p, select=select) for p in ("fp32", "TF32", "bf16")}
    made["cdist + topk"] = cdist
    library = faiss_on_gpu() if device.type == "cuda" else None
    if library is not None:
        given = {"library": library, "resources": library.StandardGpuResources()}
        made["FAISS knn_gpu fp32"] = partial(knn_gpu, **given, dtype=torch.float32)
        made["FAISS knn_gpu bf16"] = partial(knn_gpu, **given, dtype=torch.bfloat16)
        made["FAISS GpuIndexFlat"] = partial(gpu_index_flat, **given)
    made["ours flat"] = partial(ours, spec="flat")
    made["ours flat, unprojected"] = unprojected
    made["ours fast"] = partial(ours, spec="fast")
    return made


def reason(error: Exception) -> str:
    text = str(error).strip() or "no reason given"
    if "out of memory" in text.lower() or isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def attempt(case: Record, measure: Callable[[], Record]) -> Record:
    """Return the case with what was measured, or with why it could not be: the other rows are worth having."""
    try:
        return case | measure()
    except Exception as error:
        return case | {"error": reason(error)}


def search_table(
    rows: int, dim: int, cases: Sequence[tuple[int, int]], kinds: Sequence[str], device: torch.device, repeats: int
) -> list[Record]:
    records: list[Record] = []
    for kind in kinds:
        data = make_data(kind, rows, dim, max(b for b, _ in cases), max(k for _, k in cases), device)
        of_kind: list[Record] = []
        for name, make in tqdm(ways(device).items(), desc=f"gpu search, {kind}", unit="way"):
            of_kind += rows_of_a_way(name, make, data, cases, repeats)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # FAISS cannot take what PyTorch keeps
        of_kind.sort(key=lambda record: cases.index((record["B"], record["k"])))
        records += [{"N": rows, "d": dim, "data": kind} | record for record in of_kind]
    return records


def rows_of_a_way(name: str, make: Maker, data: Data, cases: Sequence[tuple[int, int]], repeats: int) -> list[Record]:
    named = [{"B": batch, "k": k, "way": name} for batch, k in cases]
    try:
        way = make(data.bank)
    except Exception as error:
        return [case | {"error": reason(error)} for case in named]
    if way is None:
        return []
    return [
        attempt(case, partial(measured, way, data, batch, k, repeats))
        for case, (batch, k) in zip(named, cases, strict=True)
    ]


def measured(way: Way, data: Data, batch: int, k: int, repeats: int) -> Record:
    bank, queries = data.bank, data.queries[:batch]
    beside = (way, product(bank, "TF32", select=False), reading(bank))
    rounds = in_turns([partial(one.search, queries, k) for one in beside], repeats, bank.device)
    record: Record = {
        "ms": 1000 * statistics.median(own for own, _, _ in rounds),
        "times_tf32": statistics.median(own / other for own, other, _ in rounds),
        "times_read": statistics.median(own / other for own, _, other in rounds),
        "read_GB_s": bank.nbytes / 1e9 / statistics.median(read for _, _, read in rounds),
    }
    before = way.ours.stats.uncertified if way.ours is not None else 0
    ids = way.search(queries, k)
    record["recall"] = None if ids is None else share_found(ids[:_SAMPLE], data.exact[:batch, :k])
    if way.ours is not None:
        stats = way.ours.stats
        record["certified"] = 1 - (stats.uncertified - before) / batch if stats.exact else None
        record |= {"scan_dims": stats.parameters.get("scan_dims"), "scan_dtype": stats.parameters.get("scan_dtype")}
        record["device"] = stats.device
    return record


def rebuild_table(rows: int, dim: int, queries: int, device: torch.device, repeats: int) -> list[Record]:
    """A build, a rebuild and the search of a whole validation set, beside the flat search of it."""
    data = make_data("clusters", rows, dim, queries, 20, device)
    case = {"N": rows, "d": dim, "queries": queries}
    return [attempt(case | {"index": spec}, partial(rebuilt, spec, data, repeats)) for spec in ("flat", "ivf")]


def rebuilt(spec: str, data: Data, repeats: int) -> Record:
    def epoch(index: KNNIndex) -> None:
        for batch in torch.split(data.queries, 512):
            index.search(batch, 20)

    index, device = KNNIndex(spec), data.bank.device
    memory(device)  # from here on
    build, rebuild = (seconds(partial(index.build, data.bank), device) for _ in range(2))
    sizes = memory(device)
    flat = index if spec == "flat" else KNNIndex().build(data.bank)
    at_once = partial(index.search, data.queries, 20)
    rounds = in_turns([partial(epoch, index), at_once, partial(epoch, flat)], repeats, device)
    search, wide, of_flat = (statistics.median(column) for column in zip(*rounds, strict=True))
    stats = index.stats
    record: Record = {"used": stats.spec, "backend": stats.backend, "device": stats.device, "nprobe": stats.nprobe}
    record |= {"build_s": build, "rebuild_s": rebuild, "search_s": search, "search_at_once_s": wide}
    record["flat_search_s"] = of_flat
    record["rebuild_and_search_s"] = rebuild + search
    record["recall"] = share_found(index.search(data.queries[:_SAMPLE], 20).indices, data.exact)
    return record | sizes


def memory_table(rows: int, dim: int, rebuilds: int, device: torch.device) -> list[Record]:
    """Memory after the first rebuild and after the last: it must not grow."""
    bank = make_rows("clusters", rows, dim, 0, device)
    case = {"N": rows, "d": dim, "rebuilds": rebuilds}
    return [attempt(case | {"index": spec}, partial(grown, spec, bank, rebuilds)) for spec in ("flat", "ivf")]


def grown(spec: str, bank: Tensor, rebuilds: int) -> Record:
    index = KNNIndex(spec).build(bank)
    record: Record = {"used": index.stats.spec}
    memory(bank.device)  # from here on
    for number in tqdm(range(1, rebuilds + 1), desc=f"gpu memory, {spec}", unit="rebuild"):
        index.build(bank)
        if number in (1, rebuilds):
            sizes = memory(bank.device)
            record |= {f"{what}_after_{number}": size for what, size in sizes.items()}
    return record


def memory(device: torch.device) -> Record:
    """What PyTorch holds, and held at most since the last call; and what is taken of the card, FAISS's part too."""
    if device.type != "cuda":
        return {"allocated_MiB": None, "peak_MiB": None, "card_MiB": None}
    allocated, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return {"allocated_MiB": allocated >> 20, "peak_MiB": peak >> 20, "card_MiB": (total - free) >> 20}
