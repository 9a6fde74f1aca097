"""What was found: records, the scores by class, and what makes them suspect; how records are told apart."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

Record = dict[str, Any]

_TASK = ("data", "leave_one_out", "per_class", "tries", "seed", "distance_metric", "num_classes")
_IDENTITY = (
    "spec", "settings", "k", "temperature", "weighting", "distance_metric", "leave_one_out", "per_class", "tries",
    "seed", "options", "data", "num_classes",
)  # fmt: skip

_TASK_WORDS = {
    "bank_file": "bank {}", "query_file": "queries {}", "leave_one_out": "leave-one-out: {}",
    "distance_metric": "{} distance", "per_class": "rows per class: {}", "tries": "draws: {}", "seed": "seed {}",
    "num_classes": "{} classes", "storage_dtype": "stored as {}",
}  # fmt: skip


@dataclass
class Results:
    """What evaluate() found.

    Attributes:
        class_names: Names by class number, or None.
        checks: What makes the numbers suspect; see `faiss_knn.offline.task.warning_facts`.
        records: One per index × k × temperature × weighting.
        per_class: The scores of each class by `record_key`: top-1, or average precision for multi-hot labels.
        neighbors: (Q, K) distances and indices by index name, if they were kept.
        class_ids: Class ids by class number, where these are not the same.
    """

    class_names: list[str] | None
    checks: Record
    records: list[Record] = field(default_factory=list)
    per_class: dict[str, list[float]] = field(default_factory=dict)
    neighbors: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=dict)
    class_ids: list[int] | None = None

    def class_name(self, number: int) -> str:
        """What a class is called."""
        if self.class_names:
            return self.class_names[number]
        return str(self.class_ids[number] if self.class_ids else number)


def record_key(record: Record) -> str:
    """What a record is of, without what came out; equal for a record read back from a file."""
    return json.dumps([record.get(name) for name in _IDENTITY], sort_keys=True)


def task_key(record: Record) -> str:
    """What a record's index, k, temperature and weighting were tried on; see `record_key`."""
    stored = (record.get("options") or {}).get("storage_dtype")
    return json.dumps([*(record.get(name) for name in _TASK), stored])


def best_of(records: Sequence[Record], by: str) -> Record:
    """The record with the highest value of a field; of equal ones the first.

    Raises:
        ValueError: If no record has that field.
    """
    scored = [record for record in records if record.get(by) is not None]
    if not scored:
        raise ValueError(f"`by` must be a field of the records with a value, got {by!r}")
    return max(scored, key=lambda record: float(record[by]))


def newest_of_each(records: Iterable[Record]) -> list[Record]:
    """The last record of each index, k, temperature and weighting: one made anew at another depth is no second row."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        found[index_name(record), record["k"], record["temperature"], record["weighting"]] = record
    return list(found.values())


def name_tasks(firsts: Sequence[Record]) -> list[str]:
    """What tells tasks apart, in words, from a record of each: the fields in which they differ."""
    differing = [name for name in _TASK_WORDS if len({str(record.get(name)) for record in firsts}) > 1]
    names = [
        ", ".join(word for name in differing if (word := _TASK_WORDS[name].format(_shown(record.get(name)))))
        for record in firsts
    ]
    if len(set(names)) < len(names):  # other content under the same names
        names = [f"{name}, data {record['data'][:6]}" for name, record in zip(names, firsts, strict=True)]
    return [f"{number}. {name}" for number, name in enumerate(names, 1)]


def _shown(value: Any) -> str:
    return "none" if value is None else Path(value).name if isinstance(value, str) else str(value)


def index_name(record: Record) -> str:
    """A record's index with its point of a sweep and what else was asked of it, as tables and plots call it."""
    options = record.get("options") or {}
    asked = {"nprobe": options.get("nprobe")} if record.get("nprobe") is not None else {}
    asked |= {"target_recall": options.get("target_recall")} if record["spec"] in ("ivf", "fast", "auto") else {}
    asked = {name: value for name, value in asked.items() if value is not None}
    return " ".join([record["spec"], *(f"{name}={value}" for name, value in (asked | record["settings"]).items())])


def searches(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each index, in order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(index_name(record), []).append(record)
    return found


def pareto_names(points: dict[str, tuple[float, float]]) -> set[str]:
    """The names of points that no other one beats in both coordinates, higher being better.

    Example:
        >>> sorted(pareto_names({"a": (1.0, 2.0), "b": (2.0, 1.0), "c": (0.5, 1.0)}))
        ['a', 'b']
    """
    return {
        name
        for name, (x, y) in points.items()
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())
    }


def depth_of(record: Record) -> int:
    """How many neighbours the search behind a record looked for."""
    return int((record.get("options") or {}).get("depth") or record["k"])


def at_common_k(records: Iterable[Record]) -> dict[str, Record]:
    """A record of each index whose recall and speed can be compared: of one k, from searches of one depth.

    These are the depth and k that the most indexes have; of equals the deepest, where recall is hardest to keep. An
    index that was only searched at other depths has no record here.
    """
    found: dict[tuple[int, int], dict[str, Record]] = {}
    for record in records:
        found.setdefault((depth_of(record), record["k"]), {}).setdefault(index_name(record), record)
    return found[max(found, key=lambda depth_and_k: (len(found[depth_and_k]), *depth_and_k))] if found else {}


def pareto_front(records: Iterable[Record]) -> set[str]:
    """Index names on the Pareto front of recall against queries per second, of those that can be compared."""
    return pareto_names({name: (record["recall"], record["qps"]) for name, record in at_common_k(records).items()})
