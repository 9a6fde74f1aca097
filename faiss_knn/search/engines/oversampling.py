"""Choose how many extra candidates to measure beyond k."""

import math
from bisect import bisect_right

_WATCHED = 256  # queries between two choices
_FALL = 8  # one in so many, at most, are fewer after each: the worst of few queries are at times few


class Oversampling:
    """How many candidates beyond k to measure: as many as certify nearly every query, by those searched before.

    Too few cost a second pass, too many are selected and measured in vain; neither changes what is found.

    Args:
        k: The neighbours asked for.
        candidate: Seconds that a candidate of one query takes.
        second_pass: Seconds of a second pass, for however many queries of a chunk.
        query: Seconds that each query adds to it.
        first: How many before anything is known, k at least.

    Attributes:
        count: How many.
        first: How many before anything is known.
        usual: How many half of the queries need; 0 before anything is known.
        seconds: What these and second passes cost a query; 0 before anything is known.

    Example:
        >>> oversampling = Oversampling(200, candidate=1e-6, second_pass=1.0, query=1e-3)
        >>> oversampling.learn([10] * 300)
        >>> oversampling.count  # an eighth fewer, 16 after some more
        175
    """

    def __init__(self, k: int, candidate: float, second_pass: float, query: float, first: int = 32) -> None:
        self.k = k
        self.count = self.first = max(first, k)
        self.usual = 0
        self.seconds = 0.0
        self._candidate, self._second_pass, self._query = candidate, second_pass, query
        self._chunks: list[list[int]] = []

    def learn(self, needed: list[int]) -> None:
        """Take note of how many each query of a chunk would have needed.

        Args:
            needed: One number a query; below 0 where copies of candidates are among its neighbours.
        """
        self._chunks.append(needed)
        needs = sorted(need for chunk in self._chunks for need in chunk)
        if len(needs) < _WATCHED:
            return
        self.usual = max(0, needs[len(needs) // 2])
        worst = sorted(max(chunk) for chunk in self._chunks)

        def cost(count: int) -> float:
            lost, passes = len(needs) - bisect_right(needs, count), len(worst) - bisect_right(worst, count)
            return self._candidate * len(needs) * count + self._second_pass * passes + self._query * lost

        best = min(sorted(set(needs)), key=cost)
        self.seconds = cost(best) / len(needs)
        if best == needs[-1]:  # what none of them needed, others may
            best += best // 4 + 4
        self.count = min(max(best, self.count - math.ceil(self.count / _FALL)), 4 * self.first)
        self._chunks = []

    def begin_anew(self) -> None:
        """Forget what was learned: other queries come than those before."""
        self.count, self._chunks = max(self.count, self.first), []
