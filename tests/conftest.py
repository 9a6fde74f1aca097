import os
from collections.abc import Iterator

import pytest
import torch
from loguru import logger
from threadpoolctl import threadpool_limits


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several workers, and what they start, one thread, so that none waits for another's core."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
        threadpool_limits(1)


SLOW = (
    "distributed", "search/test_memory.py", "test_benchmark.py", "test_docs.py", "test_entrances.py",
    "test_examples.py", "test_lazy_imports.py", "test_notebook.py", "test_readme.py", "test_sklearn.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and begin with it: of several workers none ends with a long test alone."""
    for item in items:
        path = item.path.as_posix()
        if any(f"/tests/{name}" in path for name in SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch and the BLAS libraries on two threads, for what one alone could not break."""
    before = torch.get_num_threads()
    with threadpool_limits(2):
        torch.set_num_threads(2)
        yield
    torch.set_num_threads(before)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The messages of loguru at WARNING and above."""
    messages: list[str] = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)
