"""Collectives over the ranks of a run: uneven gathering and dealing of rows, and agreement on errors.

All ranks of the group call each of these, in the same order. Without a process group there is one rank, and nothing
is sent. Rows travel as bytes, so that every dtype works on every backend, over the device that the backend sends from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | None"
T = TypeVar("T")

BLOCK_BYTES = 64 << 20


class Rows(NamedTuple):
    """What a rank must know of another rank's rows before it can receive them."""

    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(rows: Tensor | None) -> Rows | None:
        """Describe `rows`; None for None."""
        return None if rows is None else Rows(len(rows), tuple(rows.shape[1:]), rows.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape) * self.dtype.itemsize


def world(group: Group = None) -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def agree(error: Exception | None, group: Group = None) -> None:
    """Let all ranks fail together: an error of one rank is raised on every rank, where it would otherwise hang.

    Args:
        error: What went wrong on this rank, or None.
        group: The ranks that agree; None for all.

    Raises:
        Exception: This rank's own error; or, naming the first rank that failed, a ValueError where that rank met a
            ValueError or OSError and a RuntimeError where it met anything else.
    """
    rank, size = world(group)
    if size > 1:
        failed = torch.tensor(error is not None, dtype=torch.int32, device=wire(group))
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
        if failed.item():
            failures = share((f"{type(error).__name__}: {error}", _is_input(error)) if error else None, group)
            if error is None:
                raise _of_another_rank(failures, rank)
    if error is not None:
        raise error


@contextmanager
def agreed(group: Group = None) -> Iterator[None]:
    """Guard this rank's own share of a collective step: all ranks leave the block, or all of them raise (`agree`).

    The block must not hold a collective: a rank that fails in it would leave the others waiting there.
    """
    error = None
    try:
        yield
    except Exception as raised:  # whatever it is, the other ranks are waiting for it
        error = raised
    agree(error, group)


def broadcast_object(obj: T, src: int = 0, group: Group = None) -> T:
    """Rank `src`'s object on every rank (pickled; the other ranks' argument is ignored)."""
    if world(group)[1] == 1:
        return obj
    box: list[Any] = [obj]
    dist.broadcast_object_list(box, src=_global_rank(src, group), group=group)
    received: T = box[0]
    return received


def gather_rows(
    rows: Tensor | None,
    *,
    group: Group = None,
    device: torch.device | str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, list[int]]:
    """The rows of all ranks, rank after rank, each row once, on every rank.

    Each block is received where it stays: one output is allocated, and beyond it and this rank's own rows at most
    `block_bytes` are held (none, where the rows already lie on the device that the backend sends from).

    Args:
        rows: (n_r, …) tensor of any dtype and device; n_r may differ between ranks. None, or a tensor without rows,
            from a rank that has none: it need not know the shape and dtype of the others.
        group: The ranks that take part; None for all.
        device: Where the result is wanted; None for this rank's rows' device (without rows: the backend's device).
        block_bytes: The most bytes in one message.

    Returns:
        The (sum n_r, …) rows, rank-major, and the list of all n_r. If no rank has rows, an empty tensor, of the
        shape and dtype of the first rank that gave any. With one rank the result is `rows`, not a copy of it.

    Raises:
        ValueError: On every rank, where ranks with rows differ in dtype or in shape beyond the first axis.

    Example:
        >>> import torch
        >>> gather_rows(torch.ones(2, 3))
        (tensor([[1., 1., 1.],
                [1., 1., 1.]]), [2])
        >>> gather_rows(None)
        (tensor([]), [0])
    """
    kind, counts = survey(share(Rows.of(rows), group))
    if device is None:
        device = wire(group) if rows is None else rows.device
    if len(counts) == 1:
        return (
            torch.empty(0, dtype=torch.float32, device=device) if rows is None else rows.detach().to(device)
        ), counts
    return gather_known(rows, counts, kind, torch.device(device), group, block_bytes), counts


def gather_to(
    rows: Tensor, dst: int = 0, *, group: Group = None, block_bytes: int = BLOCK_BYTES
) -> list[Tensor] | None:
    """Every rank's rows as CPU tensors on rank `dst` alone, as a checkpoint needs them; None on the other ranks.

    Args:
        rows: (n_r, …) tensor, which may differ between ranks in everything.
        dst: The rank, within the group, that receives.
        group: The ranks that take part; None for all.
        block_bytes: The most bytes in one message, and the most held on a rank that sends.

    Returns:
        On rank `dst`, one tensor per rank; elsewhere None.
    """
    rank, _ = world(group)
    received = []
    for src, header in enumerate(share(Rows(len(rows), tuple(rows.shape[1:]), rows.dtype), group)):
        if rank == src == dst:
            received.append(rows.detach().cpu())
        elif rank == dst:
            received.append(_receive(header, src, group, block_bytes))
        elif rank == src:
            _send(rows, dst, group, block_bytes)
    return received if rank == dst else None


def send_rows(rows: Tensor, counts: Sequence[int], *, group: Group = None) -> tuple[Tensor, list[int]]:
    """Deal rows out to the ranks: the first `counts[0]` to rank 0, the next `counts[1]` to rank 1, and so on.

    Args:
        rows: (sum(counts), …), of the same trailing shape and dtype on every rank, also where there are none.
        counts: How many go to each rank.
        group: The ranks that take part; None for all.

    Returns:
        The rows that came, from rank 0 first, on the device of `rows`, and how many came from each rank. Sent back
        with those counts, rows return to where they came from in the order they left.
    """
    if len(counts) == 1:
        return rows, list(counts)
    sent = torch.tensor(counts, device=wire(group))
    came = torch.empty_like(sent)
    dist.all_to_all_single(came, sent, group=group)
    received = came.tolist()
    return swap_rows(rows, list(counts), received, group), received


def swap_rows(rows: Tensor, sent: list[int], received: list[int], group: Group = None) -> Tensor:
    """Uneven all-to-all of (sum(sent), …) rows, as bytes: (sum(received), …), from rank 0 first."""
    out = rows.new_empty(sum(received), *rows.shape[1:])
    row_bytes = prod(rows.shape[1:]) * rows.dtype.itemsize
    message = _bytes(rows).to(wire(group))
    answer = message.new_empty(out.nbytes)
    dist.all_to_all_single(
        answer, message, [n * row_bytes for n in received], [n * row_bytes for n in sent], group=group
    )
    _bytes(out).copy_(answer)
    return out


def wire(group: Group = None) -> torch.device:
    """The device that the backend sends from."""
    if world(group)[1] == 1 or "nccl" not in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _global_rank(rank: int, group: Group) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def share(obj: T, group: Group = None) -> list[T]:
    """Every rank's small object, in rank order."""
    _, size = world(group)
    if size == 1:
        return [obj]
    shared: list[Any] = [None] * size
    dist.all_gather_object(shared, obj, group=group)
    return shared


def _is_input(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError)


def _of_another_rank(failures: list[tuple[str, bool] | None], rank: int) -> Exception:
    first, failure = next((index, failure) for index, failure in enumerate(failures) if failure)
    message, is_input = failure
    kind = ValueError if is_input else RuntimeError
    return kind(f"rank {first} failed, so rank {rank} stops too: {message}")


def survey(headers: Sequence[Rows | None]) -> tuple[Rows | None, list[int]]:
    """What the rows of all ranks have in common, and how many each rank has.

    Ranks without rows have no say about the shape and dtype, unless no rank has rows; None if no rank knows any.

    Raises:
        ValueError: If ranks with rows differ.
    """
    counts = [header.length if header else 0 for header in headers]
    known = [(rank, header) for rank, header in enumerate(headers) if header]
    holders = [(rank, header) for rank, header in known if header.length] or known[:1]
    for rank, header in holders[1:]:
        first, expected = holders[0]
        if header[1:] != expected[1:]:
            raise ValueError(
                "rows must have the same shape and dtype on every rank, got "
                f"{expected.shape} {expected.dtype} on rank {first} and {header.shape} {header.dtype} on rank {rank}."
            )
    return (holders[0][1] if holders else None), counts


def gather_known(
    rows: Tensor | None, counts: list[int], kind: Rows | None, device: torch.device, group: Group, block_bytes: int
) -> Tensor:
    """`gather_rows` once all ranks know the counts and the kind; a rank whose count is 0 only receives."""
    if kind is None:
        return torch.empty(0, dtype=torch.float32, device=device)
    with agreed(group):  # the one large allocation: a rank that has no room for it must not leave the others waiting
        gathered = torch.empty(sum(counts), *kind.shape, dtype=kind.dtype, device=device)
    ends = list(accumulate(count * kind.row_bytes for count in counts))
    for src, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        _broadcast(rows, _bytes(gathered)[start:end], src, group, block_bytes)
    return gathered


def _broadcast(rows: Tensor | None, target: Tensor, src: int, group: Group, block_bytes: int) -> None:
    """Put rank `src`'s rows into every rank's `target` (bytes), block by block."""
    own = _bytes(rows) if rows is not None and world(group)[0] == src else None
    channel = wire(group)
    for start, place in zip(range(0, len(target), block_bytes), _blocks(target, block_bytes), strict=True):
        if own is not None:
            place.copy_(own[start : start + block_bytes])
        message = place.to(channel)
        if world(group)[1] > 1:
            dist.broadcast(message, src=_global_rank(src, group), group=group)
        if own is None and message is not place:
            place.copy_(message)


def _send(rows: Tensor, dst: int, group: Group, block_bytes: int) -> None:
    for block in _blocks(_bytes(rows), block_bytes):
        _point_to_point(dist.isend, block.to(wire(group)), dst, group)


def _receive(header: Rows, src: int, group: Group, block_bytes: int) -> Tensor:
    rows = torch.empty(header.length, *header.shape, dtype=header.dtype, device="cpu")
    for block in _blocks(_bytes(rows), block_bytes):
        message = block.to(wire(group))
        _point_to_point(dist.irecv, message, src, group)
        if message is not block:
            block.copy_(message)
    return rows


def _point_to_point(verb: Any, message: Tensor, peer: int, group: Group) -> None:
    if message.numel():
        # As a batch, NCCL uses the group's own communicator and opens none per pair of ranks.
        for work in dist.batch_isend_irecv([dist.P2POp(verb, message, _global_rank(peer, group), group)]):
            work.wait()


def _bytes(rows: Tensor) -> Tensor:
    return rows.detach().contiguous().view(-1).view(torch.uint8)


def _blocks(values: Tensor, length: int) -> Iterator[Tensor]:
    return (values[start : start + length] for start in range(0, len(values), length))
