"""How one set of features covers another: the measures by which generated data are judged."""

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


def set_scores(in_real_balls: Counts, real_balls_around: Counts, fake_balls_around: Counts, k: int) -> dict[str, float]:
    """Compute precision, recall, density and coverage of a generated set against a real one.

    The ball of a row reaches to its k-th neighbour in its own set, itself not counted, and holds what is at most as
    far: a row on its edge is inside.

    - precision: share of the generated rows that lie in the ball of a real row; recall: share of the real rows that lie
      in the ball of a generated row (Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing
      Generative Models", arXiv 1904.06991, equations 1 and 2).
    - density: how many real balls a generated row lies in on average, divided by k, which may exceed 1; coverage: share
      of the real balls that hold a generated row (Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for
      Generative Models", arXiv 2002.09797; in their code a row on an edge is outside).

    Args:
        in_real_balls: (N,) how many generated rows the ball of each real row holds.
        real_balls_around: (M,) how many real rows' balls hold each generated row.
        fake_balls_around: (N,) how many generated rows' balls hold each real row.
        k: Which neighbour the balls reach to.

    Example:
        >>> set_scores(np.array([2, 0]), np.array([1, 1, 0]), np.array([1, 0]), k=1)
        {'precision': 0.6666666666666666, 'recall': 0.5, 'density': 0.6666666666666666, 'coverage': 0.5}
    """
    return {
        "precision": float((real_balls_around > 0).mean()),
        "recall": float((fake_balls_around > 0).mean()),
        "density": float(real_balls_around.sum()) / (k * len(real_balls_around)),
        "coverage": float((in_real_balls > 0).mean()),
    }
