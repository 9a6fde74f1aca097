"""What a validation's scoring costs: seconds by part."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from faiss_knn.distributed import all_gather_object

PARTS = ("build", "search", "vote")


class Clock:
    """Seconds of wall time that one validation's parts took on this rank.

    Args:
        device: A GPU is waited for before and after each part, so that its work counts where it belongs.
        is_asked: Whether to measure at all; without, nothing is waited for.

    Example:
        >>> clock = Clock(torch.device("cpu"), is_asked=True)
        >>> with clock.measure("search"):
        ...     pass
        >>> clock.seconds()["vote"], clock.seconds()["search"] < 1
        (0.0, True)
    """

    def __init__(self, device: torch.device, is_asked: bool) -> None:
        self._device, self._is_asked = device, is_asked
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._began = time.perf_counter()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block to a part, "build", "search" or "vote"; also where it raises."""
        if not self._is_asked:
            yield
            return
        began = self._now()
        try:
            yield
        finally:
            self._seconds[part] += self._now() - began

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part, of the rank where they all together took longest; all ranks must ask."""
        on_ranks = all_gather_object(self._seconds)
        return max(on_ranks, key=lambda parts: sum(parts.values()))

    def since_start(self) -> float:
        """Return the seconds since the validation began."""
        return time.perf_counter() - self._began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
