"""Who may use an index when: searches side by side, changes alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Access:
    """Lets any number of threads search at once, and one that changes the index only while nobody searches.

    A thread that waits to change goes before searches that have not begun. Neither may be asked for within the other.

    Example:
        >>> access = Access()
        >>> with access.shared():
        ...     pass  # search
        >>> with access.alone():
        ...     pass  # change
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._searching = self._waiting = 0
        self._is_changing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the index as it is, beside others who do."""
        with self._condition:
            self._condition.wait_for(lambda: not (self._is_changing or self._waiting))
            self._searching += 1
        try:
            yield
        finally:
            with self._condition:
                self._searching -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the index to oneself."""
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not (self._is_changing or self._searching))
                self._is_changing = True
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._is_changing = False
                self._condition.notify_all()
