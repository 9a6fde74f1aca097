"""State that belongs to one trainer."""

from typing import Any


def trainer_state(trainer: Any) -> dict[Any, Any]:
    """Return the mapping in which this package's callbacks keep what belongs to `trainer`.

    It is an attribute of the trainer: a callback that serves two trainers, one after or inside the other, cannot mix
    them up, nothing outlives its trainer, and a trainer sent to a spawned process takes it along.
    """
    state: dict[Any, Any] = vars(trainer).setdefault("_faiss_knn", {})
    return state
