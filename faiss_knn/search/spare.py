"""How many candidates more than the neighbours asked for."""

_WATCHED = 256  # queries between two choices


class Spare:
    """How many candidates beyond k to measure: as many as certify nearly every query, by those searched before.

    Too few cost a second pass, too many are selected and measured in vain; neither changes what is found.

    Args:
        k: The neighbours asked for.
        price: What a second pass of one query costs, in candidates.
    """

    def __init__(self, k: int, price: float) -> None:
        self.k = k
        self.count = self._most = max(20, k)
        self._price = price
        self._needed: list[int] = []

    def learn(self, needed: list[int]) -> None:
        """Take note of how many each of some queries would have needed; `count` + 1: more than there were."""
        self._needed += [2 * need if need > self.count else need for need in needed]
        if len(self._needed) < _WATCHED:
            return
        needs = sorted(self._needed)
        costs = [len(needs) * need + self._price * (len(needs) - 1 - i) for i, need in enumerate(needs)]
        best = needs[costs.index(min(costs))]
        self.count = min(best + best // 8 + 1, 4 * self._most)
        self._needed = []
