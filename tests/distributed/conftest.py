from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four processes for the whole session."""
    pool = Ranks(4)
    yield pool
    pool.close()
