"""What an evaluation will take, before it is run."""

import time
from collections.abc import Sequence

import torch

from faiss_knn.offline.report.tables import format_bytes
from faiss_knn.offline.task import EvalTask

_OVERHEAD = 1.5  # of an exact search over the bare matrix product: selection, the exact distances of what is kept


def estimate(task: EvalTask, depth: int, indexes: Sequence[str]) -> str:
    """Describe sizes, memory and the time of the exact search, from the speed of a short matrix product here.

    Args:
        task: Bank and queries.
        depth: Neighbours kept per query.
        indexes: The specs that would be built.
    """
    bank, queries = task.bank, task.queries
    held = 4 * task.dim * len(bank.rows)
    neighbors = 12 * depth * len(queries.rows)
    exact_s = _OVERHEAD * 2 * len(bank.rows) * len(queries.rows) * task.dim / _flops(task.dim)
    others = [spec for spec in indexes if spec != "flat"]
    lines = [
        f"bank     {len(bank.rows):>12,} x {task.dim:,} {bank.rows.dtype}, {format_bytes(held)} as float32",
        f"queries  {len(queries.rows):>12,} x {task.dim:,} {queries.rows.dtype}",
        f"classes  {task.num_classes:>12,}" + (" (multi-hot)" if task.multi_hot else ""),
        f"memory   {format_bytes(neighbors):>12} per index for {depth} neighbours per query, "
        "and the rows that are not on disk",
        f"time     {_seconds(exact_s):>12} for the exact search on the CPU, roughly",
    ]
    if others:
        lines.append(
            f"further  {len(others)} indexes to build and search ({', '.join(others)}), "
            f"each up to {format_bytes(held)} more"
        )
    return "\n".join(lines)


def _flops(dim: int) -> float:
    """Time a float32 matrix product of this depth for a fraction of a second: floating-point operations per second."""
    left, right = (torch.ones(n, dim, dtype=torch.float32, device="cpu") for n in (512, 8192))
    left @ right.T
    start = time.perf_counter()
    rounds = 0
    while time.perf_counter() - start < 0.1:
        left @ right.T
        rounds += 1
    return 2 * 512 * 8192 * dim * rounds / (time.perf_counter() - start)


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
