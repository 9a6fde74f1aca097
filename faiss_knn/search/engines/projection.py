"""The leading directions of a bank: real features lie near fewer dimensions than they are written in."""

import torch
from torch import Tensor

_GRAM = 512
SAMPLE_ROWS = 2048  # that directions are found from
_POWERS = 2


def participation_ratio(sample: Tensor) -> float:
    """Return about how many directions the rows (n, d), centred, spread over: (Σλ)² / Σλ² of their covariance.

    From n rows the second moment is too large by what n noise rows add to it; that part is taken off.
    """
    part = _of_norm_one(sample[:_GRAM])
    gram = part @ part.T
    squares = gram.diagonal()
    between = (gram.square().sum() - squares.square().sum()) / max(1, len(part) * (len(part) - 1))
    return float(squares.mean().square() / between.clamp(min=1e-30))


def leading_directions(sample: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find orthonormal directions of the largest spread, by subspace iteration (Halko et al. 2011, algorithm 4.4).

    Args:
        sample: (n, d) centred rows.
        count: How many, at most d.

    Returns:
        (d, count) float32 directions, the leading first, and (count,) float64 energies, shares of the whole spread.
    """
    sample = _of_norm_one(sample[:SAMPLE_ROWS])
    rows = sample.float()
    generator = torch.Generator("cpu").manual_seed(0)
    basis = torch.randn(rows.shape[1], count, generator=generator, dtype=torch.float32, device="cpu").to(rows.device)
    for _ in range(_POWERS + 1):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    inside = (rows @ basis).double()
    _, rotation = torch.linalg.eigh(inside.T @ inside)
    basis = torch.linalg.qr(basis.double() @ rotation.flip(1)).Q
    return basis.float(), (sample @ basis).square().sum(0)


def _of_norm_one(sample: Tensor) -> Tensor:
    """Scale rows (n, d), so that squares of their squares neither over- nor underflow; zeros stay zeros."""
    sample = sample.double()
    sample = sample / sample.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    scaled: Tensor = sample / sample.norm().clamp(min=1.0)
    return scaled
