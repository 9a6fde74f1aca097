"""Collectives over the ranks of a run: uneven gathering and dealing of rows, and agreement on errors.

All ranks of the group call each of these, in the same order. Without a process group there is one rank, and nothing
is sent. Rows travel as bytes, so that every dtype works on every backend, over the device that the backend sends from.

How the ranks stay in step when one fails: they meet before rows travel, and where a block that `all_or_none` guards
ends. Every meeting, be it `raise_together` or `all_gather_object`, is the same exchange, in which each rank also says
whether it failed. A rank that fails anywhere between two meetings goes to one at once, and finds the others at their
next, where all raise. What a transfer takes of memory is taken before the meeting that comes before it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | None"
T = TypeVar("T")

BLOCK_BYTES = 64 << 20


class RowsHeader(NamedTuple):
    """What a rank must know of another rank's rows before it can receive them."""

    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(rows: Tensor | None) -> RowsHeader | None:
        """Describe `rows`; None for None."""
        return None if rows is None else RowsHeader(len(rows), tuple(rows.shape[1:]), rows.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape) * self.dtype.itemsize


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def raise_together(error: BaseException | None, group: Group = None) -> None:
    """Let all ranks fail together: an error of one rank is raised on every rank, where it would otherwise hang.

    Args:
        error: What went wrong on this rank, or None.
        group: The ranks that agree; None for all.

    Raises:
        Exception: This rank's own error; or, naming the first rank that failed, a ValueError where that rank met a
            ValueError or OSError and a RuntimeError where it met anything else.
    """
    if rank_and_size(group)[1] == 1:
        if error is not None:
            raise error
        return
    try:
        _meet(b"", error, group)
    except BaseException as raised:
        if is_final(raised):
            raise
        _meet(b"", error or raised, group)  # it failed on the way there, and the others still wait


@contextmanager
def all_or_none(group: Group = None) -> Iterator[None]:
    """Guard a step that all ranks take: all of them leave the block, or all of them raise (`raise_together`).

    The block may hold collectives of this module, and no others.
    """
    try:
        yield
    except BaseException as error:  # whatever it is, the other ranks are waiting for this one
        if not is_final(error):
            raise_together(error, group)
        raise
    raise_together(None, group)


def is_raised_together(error: BaseException) -> bool:
    """Tell whether an error was raised on all ranks (`raise_together`): none is left to be told."""
    return getattr(error, "_faiss_knn_agreed", False)


def is_final(error: BaseException) -> bool:
    """Tell whether nothing is left to agree on: all ranks know of an error, or it broke what they were sending."""
    return is_raised_together(error) or getattr(error, "_faiss_knn_parted", False)


def all_gather_object(obj: T, group: Group = None) -> list[T]:
    """Gather every rank's small object (pickled), in rank order.

    Raises:
        Exception: As `raise_together`, where a rank failed on its way here.
    """
    if rank_and_size(group)[1] == 1:
        return [obj]
    return [pickle.loads(message) for message in _meet(pickle.dumps(obj), None, group)]


def broadcast_object(obj: T, src: int = 0, group: Group = None) -> T:
    """Rank `src`'s object on every rank (pickled; the other ranks' argument is ignored)."""
    rank, size = rank_and_size(group)
    if size == 1:
        return obj
    with all_or_none(group):
        message = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8) if rank == src else None
        received: T = pickle.loads(gather_rows(message, group=group, device="cpu")[0].numpy().tobytes())
    return received


def gather_rows(
    rows: Tensor | None,
    *,
    group: Group = None,
    device: torch.device | str | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, list[int]]:
    """Gather the rows of all ranks, rank after rank, each row once, on every rank.

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
    if device is None:
        device = comm_device(group) if rows is None else rows.device
    if rank_and_size(group)[1] == 1:
        own = torch.empty(0, dtype=torch.float32, device=device) if rows is None else rows.detach().to(device)
        return own, [0 if rows is None else len(rows)]
    with all_or_none(group):
        kind, counts = common_header(all_gather_object(RowsHeader.of(rows), group))
        return gather_known(rows, counts, kind, torch.device(device), group, block_bytes), counts


def gather_to(
    rows: Tensor, dst: int = 0, *, group: Group = None, block_bytes: int = BLOCK_BYTES
) -> list[Tensor] | None:
    """Gather every rank's rows as CPU tensors on rank `dst` alone, as a checkpoint needs them; None on the others.

    Args:
        rows: (n_r, …) tensor, which may differ between ranks in everything.
        dst: The rank, within the group, that receives.
        group: The ranks that take part; None for all.
        block_bytes: The most bytes in one message, and the most held on a rank that sends.

    Returns:
        On rank `dst`, one tensor per rank; elsewhere None.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        return [rows.detach().cpu()]
    with all_or_none(group):
        headers = all_gather_object(RowsHeader(len(rows), tuple(rows.shape[1:]), rows.dtype), group)
        with all_or_none(group):
            received = [torch.empty(n, *shape, dtype=dtype, device="cpu") for n, shape, dtype in headers if rank == dst]
            places = [_bytes(part) for part in received]
            own = _bytes(rows)
            if rank == dst:
                received[dst].copy_(rows)
            most = max(header.length * header.row_bytes for header in headers)
            block = _block(torch.device("cpu") if rank == dst else own.device, min(most, block_bytes), group)
        for src in range(size):
            if rank == src != dst:
                _point_to_point(dist.isend, own, dst, block, block_bytes, group)
            elif rank == dst != src:
                _point_to_point(dist.irecv, places[src], src, block, block_bytes, group)
    return received if rank == dst else None


def send_rows(rows: Tensor, counts: Sequence[int], *, group: Group = None) -> tuple[Tensor, list[int]]:
    """Deal rows out to the ranks: the first `counts[0]` to rank 0, the next `counts[1]` to rank 1, and so on.

    Args:
        rows: (sum(counts), …), of the same trailing shape and dtype on every rank, also where there are none.
        counts: How many go to each rank.
        group: The ranks that take part; None for all.

    Returns:
        The rows that came, from rank 0 first, on the device of `rows`, and how many came from each rank. Sent back
        by `swap_rows` with the two counts exchanged, rows return to where they came from in the order they left.
    """
    if rank_and_size(group)[1] == 1:
        return rows, list(counts)
    with all_or_none(group):
        came = [dealt[rank_and_size(group)[0]] for dealt in all_gather_object(list(counts), group)]
        return swap_rows(rows, list(counts), came, group), came


def swap_rows(rows: Tensor, sent: list[int], received: list[int], group: Group = None) -> Tensor:
    """Exchange rows unevenly: (sum(sent), …) rows go, as bytes; (sum(received), …) come, from rank 0 first."""
    if rank_and_size(group)[1] == 1:
        return rows
    channel, row_bytes = comm_device(group), prod(rows.shape[1:]) * rows.dtype.itemsize
    with all_or_none(group):
        out = rows.new_empty(sum(received), *rows.shape[1:])
        message = _bytes(rows).to(channel)
        answer = torch.empty_like(_bytes(out), device=channel) if out.device != channel else _bytes(out)
    with _transfer():
        dist.all_to_all_single(
            answer, message, [n * row_bytes for n in received], [n * row_bytes for n in sent], group=group
        )
    if out.device != channel:
        _bytes(out).copy_(answer)
    return out


def comm_device(group: Group = None) -> torch.device:
    """Tell the device that the backend sends from."""
    if rank_and_size(group)[1] == 1 or "nccl" not in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def common_header(headers: Sequence[RowsHeader | None]) -> tuple[RowsHeader | None, list[int]]:
    """Say what the rows of all ranks have in common, and how many each rank has.

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
    rows: Tensor | None,
    counts: list[int],
    kind: RowsHeader | None,
    device: torch.device,
    group: Group,
    block_bytes: int,
) -> Tensor:
    """Gather rows once all ranks know the counts and the kind; a rank whose count is 0 only receives."""
    if kind is None:
        return torch.empty(0, dtype=torch.float32, device=device)
    rank, _ = rank_and_size(group)
    with all_or_none(group):
        gathered = torch.empty(sum(counts), *kind.shape, dtype=kind.dtype, device=device)
        own = _bytes(rows) if rows is not None and counts[rank] else None
        places = torch.split(_bytes(gathered), [count * kind.row_bytes for count in counts])
        block = _block(device, min(gathered.nbytes, block_bytes), group)
    for src, place in enumerate(places):
        _broadcast(own if src == rank else None, place, src, block, block_bytes, group)
    return gathered


def _meet(message: bytes, error: BaseException | None, group: Group) -> list[bytes]:
    """Exchange a message of every rank; where any of them has an error, all raise instead.

    The one way in which ranks tell each other anything: two numbers, and the messages where there are any. So
    whichever function brought a rank here, it finds the others.
    """
    rank, size = rank_and_size(group)
    if error is not None:
        message = pickle.dumps((f"{type(error).__name__}: {error}", _is_input(error)))
    heads = torch.empty(size, 2, dtype=torch.int64, device=comm_device(group))
    head = torch.tensor([len(message), error is not None], dtype=torch.int64, device=heads.device)
    messages, failed = _exchange(head, heads, message, group)
    if any(failed):
        if error is None:
            failures = [pickle.loads(each) if flag else None for each, flag in zip(messages, failed, strict=True)]
            error = _of_another_rank(failures, rank)
        error._faiss_knn_agreed = True  # type: ignore[attr-defined]
        raise error
    return messages


def _exchange(head: Tensor, heads: Tensor, message: bytes, group: Group) -> tuple[list[bytes], list[int]]:
    """Exchange the messages of all ranks, and tell for each whether it is of a failure."""
    with _transfer():
        dist.all_gather(list(heads.unbind(0)), head, group=group)
        lengths, failed = heads.t().tolist()
        longest = max(lengths)
        if longest == 0:
            return [b""] * len(heads), failed
        own = torch.frombuffer(bytearray(message.ljust(longest, b"\0")), dtype=torch.uint8).to(head.device)
        every = torch.empty(len(heads), longest, dtype=torch.uint8, device=head.device)
        dist.all_gather(list(every.unbind(0)), own, group=group)
        return [row[:n].numpy().tobytes() for row, n in zip(every.cpu(), lengths, strict=True)], failed


@contextmanager
def _transfer() -> Iterator[None]:
    """Guard what is sent: an error in the middle of it leaves the ranks where they cannot meet any more."""
    try:
        yield
    except BaseException as error:
        error._faiss_knn_parted = True  # type: ignore[attr-defined]
        raise


def _is_input(error: BaseException) -> bool:
    return isinstance(error, ValueError | OSError)


def _of_another_rank(failures: list[tuple[str, bool] | None], rank: int) -> Exception:
    first, failure = next((index, failure) for index, failure in enumerate(failures) if failure)
    message, is_input = failure
    kind = ValueError if is_input else RuntimeError
    return kind(f"rank {first} failed, so rank {rank} stops too: {message}")


def _global_rank(rank: int, group: Group) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _broadcast(
    own: Tensor | None, target: Tensor, src: int, block: Tensor | None, block_bytes: int, group: Group
) -> None:
    """Put rank `src`'s bytes, which it gives as `own`, into every rank's `target`, block by block."""
    if rank_and_size(group)[1] == 1:
        if own is not None:
            target.copy_(own)
        return
    with _transfer():
        for start, place in zip(range(0, len(target), block_bytes), _blocks(target, block_bytes), strict=True):
            if own is not None:
                place.copy_(own[start : start + block_bytes])
            message = place if block is None else block[: len(place)]
            if own is not None and block is not None:
                message.copy_(place)
            dist.broadcast(message, src=_global_rank(src, group), group=group)
            if own is None and block is not None:
                place.copy_(message)


def _point_to_point(verb: Any, values: Tensor, peer: int, block: Tensor | None, block_bytes: int, group: Group) -> None:
    """Send bytes to, or receive them from another rank, block by block."""
    with _transfer():
        for place in _blocks(values, block_bytes):
            message = place if block is None else block[: len(place)]
            if verb is dist.isend and block is not None:
                message.copy_(place)
            # As a batch, NCCL uses the group's own communicator and opens none per pair of ranks.
            for work in dist.batch_isend_irecv([dist.P2POp(verb, message, _global_rank(peer, group), group)]):
                work.wait()
            if verb is dist.irecv and block is not None:
                place.copy_(message)


def _block(device: torch.device, length: int, group: Group) -> Tensor | None:
    """Make room for one message where the backend sends from another device than `device`, on which the bytes lie."""
    channel = comm_device(group)
    return None if device == channel else torch.empty(length, dtype=torch.uint8, device=channel)


def _bytes(rows: Tensor) -> Tensor:
    return rows.detach().contiguous().view(-1).view(torch.uint8)


def _blocks(values: Tensor, length: int) -> Iterator[Tensor]:
    return (values[start : start + length] for start in range(0, len(values), length))
