"""Whether float32 holds a bank of float64: its differences, and which rows are near each other."""

import torch
from torch import Tensor

from faiss_knn.search.distance import normalize

_BLOCK_VALUES = 1 << 20
_SAMPLE = 1024
_MOVED = 2.0**-20  # of the rows' spread, that rounding may move a coordinate by
_ASKING, _LEAST_ASKING, _NEAREST = 64, 8, 4  # rows whose nearest are looked at
_PRODUCTS = 1 << 31  # that finding them may take
# Of their distances, what rounding may change: in d dimensions the k-th and the next neighbour are 1/(dk) apart.
_CHANGED = 2.0**-14
_FEW = 0.05  # the share of them that it may change by more


def float32_holds(data: Tensor, *, normalized: bool = False) -> bool:
    """Tell whether float64 rows (N, d) keep in float32 what tells them apart.

    They do where rounding moves no coordinate by a millionth of what rows spread, makes no two rows equal that are not,
    and leaves the distances of a sample to its nearest rows as they are.

    Args:
        data: The rows.
        normalized: Whether their directions are compared.
    """
    _, spread = _centre_and_spread(data[:: max(1, len(data) // _SAMPLE)])
    keys = torch.empty(len(data), dtype=torch.int64, device=data.device)
    most = torch.zeros((), dtype=torch.float64, device=data.device)
    for start, block in _blocks(data):
        rounded = block.float()
        most = torch.maximum(most, (rounded.double() - block).abs().amax())
        if not bool(most <= _MOVED * spread):  # nor if one of them is no number
            return False
        keys[start : start + len(block)] = _keys(rounded)
    return bool(most == 0) or (not _are_merged(data, keys) and _keeps_nearest(data, normalized))


def _blocks(data: Tensor) -> list[tuple[int, Tensor]]:
    step = max(1, _BLOCK_VALUES // data.shape[1])
    return [(start, data[start : start + step]) for start in range(0, len(data), step)]


def _centre_and_spread(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return a centre (d,) and how far, in its largest coordinate, the median row is from it."""
    centre = sample.nanmedian(0).values
    return centre, (sample - centre).abs().amax(1).nanmedian()


def _keys(rows: Tensor) -> Tensor:
    """Hash float32 rows (n, d) to (n,) int64: equal rows to equal keys, others to others but for a rare chance."""
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randint(1 << 62, (rows.shape[1],), generator=generator, dtype=torch.int64, device="cpu") * 2 + 1
    return ((rows + 0.0).view(torch.int32).long() * weights.to(rows.device)).sum(1)  # 0.0 has one key, not two


def _are_merged(data: Tensor, keys: Tensor) -> bool:
    """Tell whether rows of equal keys, equal in float32, differ in float64."""
    keys, order = keys.sort(stable=True)
    again = (keys[1:] == keys[:-1]).nonzero()[:, 0]
    for places in torch.split(again, max(1, _BLOCK_VALUES // data.shape[1])):
        one, other = data[order[places]], data[order[places + 1]]
        if bool(((one != other).any(1) & (one.float() == other.float()).all(1)).any()):
            return True
    return False


def _keeps_nearest(data: Tensor, normalized: bool) -> bool:
    """Tell whether a sample's distances to the nearest rows are the same after rounding, but for a few."""

    def compared(rows: Tensor) -> Tensor:
        return normalize(rows) if normalized else rows.double()

    asking = min(_ASKING, max(_LEAST_ASKING, _PRODUCTS // data.numel()))
    chosen = data[:: max(1, -(-len(data) // asking))]
    sample = compared(chosen)
    centre, spread = _centre_and_spread(sample)
    best = torch.empty(len(sample), 0, dtype=torch.float64, device=data.device)
    ids = torch.empty(len(sample), 0, dtype=torch.int64, device=data.device)
    for start, block in _blocks(data):
        norms = torch.cdist((sample - centre) / spread, (compared(block) - centre) / spread)
        numbers = torch.arange(start, start + len(block), device=data.device).expand(len(sample), -1)
        best, order = torch.cat([best, norms], 1).topk(min(1 + _NEAREST, best.shape[1] + len(block)), largest=False)
        ids = torch.cat([ids, numbers], 1).gather(1, order)
    near = data[ids.flatten()]
    exact = (compared(near).view(*ids.shape, -1) - sample[:, None]).div_(spread).norm(dim=2)
    rounded = compared(near.float()).view(*ids.shape, -1) - compared(chosen.float())[:, None]
    rounded = rounded.div_(spread).norm(dim=2)
    changed = ((rounded - exact).abs() > _CHANGED * exact)[exact > 0]
    return changed.numel() == 0 or float(changed.double().mean()) <= _FEW
