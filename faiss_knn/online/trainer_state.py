"""State that belongs to one trainer, or to one evaluator."""

from typing import Any


def trainer_state(trainer: Any) -> dict[Any, Any]:
    """Return the mapping in which this package keeps what belongs to `trainer`, Lightning's or an `OnlineEvaluator`.

    It is an attribute of it: a callback that serves two trainers, one after or inside the other, cannot mix
    them up, nothing outlives its trainer, and a trainer sent to a spawned process takes it along.
    """
    state: dict[Any, Any] = vars(trainer).setdefault("_faiss_knn", {})
    return state
