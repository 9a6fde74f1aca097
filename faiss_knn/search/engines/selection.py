"""The highest few of each row of scores: PyTorch's on a GPU; on a CPU numpy's, whose sorts use the CPU's vectors."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Values = npt.NDArray[Any]

_PIECE = 512  # values that are sorted at once; see `_sorted_out`
_PLACES = 1 << 16  # that go into a key beside a score of 16 bits


def needs_no_wait(device: torch.device) -> bool:
    """Tell whether what was computed can be looked at at once: a GPU would be waited for every time.

    Example:
        >>> needs_no_wait(torch.device("cpu")), needs_no_wait(torch.device("cuda"))
        (True, False)
    """
    return device.type == "cpu"


def highest(scores: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return the `kept` highest of each row of scores and their places, in no order; equal ones are kept by chance.

    Args:
        scores: (B, m), of bfloat16 or any dtype that numpy has.
        kept: At most m.

    Returns:
        (B, kept) scores and (B, kept) int64 places.

    Example:
        >>> scores, places = highest(torch.tensor([[3.0, -1.0, 5.0, 4.0]]), 2)
        >>> sorted(scores[0].tolist()), sorted(places[0].tolist())
        ([4.0, 5.0], [2, 3])
    """
    width = scores.shape[1]
    if not needs_no_wait(scores.device):
        return scores.topk(kept, dim=1, sorted=False)
    if kept == width:
        return scores, torch.arange(width, device="cpu").expand(len(scores), -1)
    if scores.dtype in (torch.bfloat16, torch.int16) and width <= _PLACES:
        places = _by_keys(_ordered_bits(scores), kept)
    elif scores.dtype == torch.bfloat16:
        return scores.topk(kept, dim=1, sorted=False)
    else:
        places = _by_the_least(scores.numpy(), kept)
    order = torch.from_numpy(places)
    return scores.gather(1, order), order


def _ordered_bits(scores: Tensor) -> npt.NDArray[np.int32]:
    """Return scores of bfloat16 or int16 as integers of the same order; -0 comes before 0."""
    if scores.dtype != torch.bfloat16:
        return scores.numpy().astype(np.int32)
    bits = scores.contiguous().view(torch.int16).numpy().astype(np.int32)
    bits ^= (bits >> 31) & 0x7FFF  # negative floats have the reverse order of their bits
    return bits


def _by_keys(keys: npt.NDArray[np.int32], kept: int) -> npt.NDArray[np.int64]:
    """Find the places of the highest (B, m) keys: each takes its own along, in its lower half."""
    keys <<= 16
    keys |= np.arange(keys.shape[1], dtype=np.int32)
    return (_sorted_out(keys, kept)[:, -kept:] & (_PLACES - 1)).astype(np.int64)


def _by_the_least(scores: Values, kept: int) -> npt.NDArray[np.int64]:
    """Find the places of the highest (B, m) scores: those that reach the least of them."""
    queries, width = scores.shape
    least = _sorted_out(scores, kept)[:, -kept, None]
    is_kept = scores >= least
    more = np.flatnonzero(np.count_nonzero(is_kept, axis=1) > kept)
    if len(more):  # of those equal to the least, the first
        above, equal = scores[more] > least[more], scores[more] == least[more]
        room = kept - np.count_nonzero(above, axis=1)
        is_kept[more] = above | (equal & (equal.cumsum(1) <= room[:, None]))
    places: npt.NDArray[np.int64] = np.flatnonzero(is_kept) % width
    return places.reshape(queries, kept)


def _sorted_out(values: Values, kept: int) -> Values:
    """Return values of which the last `kept` of each row are the highest of (B, m), the least of them first.

    Rows of a few hundred are sorted by networks in the CPU's registers, longer ones ten times as slowly per value on
    some CPUs: so they are cut into such pieces, and the highest of each compared again.
    """
    while values.shape[1] > _PIECE and 2 * kept <= _PIECE:
        pieces = values.shape[1] // _PIECE
        whole = values[:, : pieces * _PIECE].reshape(-1, _PIECE)  # a copy, or the caller's own
        upper = np.sort(whole, axis=1)[:, -kept:].reshape(len(values), -1)
        values = np.concatenate([upper, values[:, pieces * _PIECE :]], axis=1)
    return np.partition(values, values.shape[1] - kept, axis=1)
