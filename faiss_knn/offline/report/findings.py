"""What an audit finds, as data: each kind of finding, and all of them together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Side = str  # "row" or "query"


class Finding:
    """Values that are read by attribute, by name, by place, or in order."""

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]

    def __getitem__(self, key: str | int) -> Any:
        return self.as_dict()[key] if isinstance(key, str) else tuple(self)[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.as_dict().values())


@dataclass(frozen=True)
class Leak(Finding):
    """A query that is in the bank.

    Attributes:
        query: Its row number.
        row: The bank's row that it is, or nearly is.
        distance: Between them.
        exact: Whether they are equal number by number.

    Example:
        >>> leak = Leak(3, 17, 0.0, True)
        >>> query, row, distance, exact = leak
        >>> query, leak["row"], leak.exact
        (3, 17, True)
    """

    query: int
    row: int
    distance: float
    exact: bool


@dataclass(frozen=True)
class LabelSuspect(Finding):
    """A row whose neighbours contradict its label.

    Attributes:
        row: Its number.
        label: As it was given.
        suggested: The label that most of its neighbours have.
        confidence: Probability that the label is wrong; see `faiss_knn.measures.label_errors.label_noise`.
        share: Of its neighbours' votes that the suggested label has.
    """

    row: int
    label: Any
    suggested: Any
    confidence: float
    share: float


@dataclass(frozen=True)
class Confusion(Finding):
    """A class whose rows are taken for another.

    Attributes:
        label: The class, as it was given.
        predicted: What its rows were taken for.
        count: How many of them.
        share: Of the class's rows.
        rows: Numbers of the first of them.
    """

    label: Any
    predicted: Any
    count: int
    share: float
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Wrong(Finding):
    """A query that was taken for another class.

    Attributes:
        row: Its number.
        label: Its class number.
        answer: That of what it was taken for, -1 for nothing.
        share: Of the votes that this had.
    """

    row: int
    label: int
    answer: int
    share: float


@dataclass(frozen=True)
class Mistakes:
    """What an evaluation got wrong under one setting.

    Attributes:
        setting: Which, in words.
        rank: Whether its neighbours are exact, how many vote, and top-1: of two settings the larger is shown.
        side: Whether the queries are the bank's own rows ("row") or not ("query").
        queries: How many there were.
        wrong: How many of them were wrong.
        surest: The first of these, those that were wrong by the largest shares of the votes.
        near: Of some of these, in the same order, the bank's nearest rows, each with its class number.
        pairs: The classes that are confused most often, by number.
        pair_count: How many pairs there are.
    """

    setting: str
    rank: tuple[bool, int, float]
    side: Side
    queries: int
    wrong: int
    surest: list[Wrong]
    near: list[list[tuple[int, int]]]
    pairs: list[Confusion]
    pair_count: int

    @classmethod
    def read(cls, held: dict[str, Any]) -> "Mistakes":
        """Make it anew of what `dataclasses.asdict` gave, after JSON."""
        held = held | {
            "rank": tuple(held["rank"]),
            "surest": [Wrong(**one) for one in held["surest"]],
            "near": [[(row, label) for row, label in near] for near in held["near"]],
            "pairs": [Confusion(**one | {"rows": tuple(one["rows"])}) for one in held["pairs"]],
        }
        return cls(**held)


@dataclass(frozen=True)
class Findings:
    """What `audit` found. Row numbers are those of the features as they were given.

    Attributes:
        duplicates: Groups of near-duplicates, each a list of rows in ascending order, the largest group first.
        leaks: Queries that are in the bank, exactly or nearly, the nearest first; `query`, `row`, `distance`, `exact`.
        label_suspects: Rows whose label is more probably wrong than not, the most probable first: `row`, `label`,
            `suggested`, `confidence`, `share`.
        novelty: (Q,) how far each query is from everything known: the distance to its k-th neighbour, under cosine as
            the length between unit vectors (Sun et al. 2022). Without queries of each row, (N,), by the other rows.
            NaN where it was not searched for.
        hubness: `skewness`, `antihub_share`, `hubs` (rows), `hub_counts`, `hub_share` of the bank's own lists; see
            `faiss_knn.measures.hubness`.
        confusions: Pairs of classes that are confused, the most frequent first: `label`, `predicted`, `count`, `share`,
            `rows`; of the queries where they have labels, else of the rows.
        generative: `precision`, `recall`, `density`, `coverage`, `k` of the queries as a generated set against the bank
            as the real one; see `faiss_knn.measures.generative`. None without queries.
        accuracy: Of labelled queries `with_leaks` and `without_leaks`, top-1 by the vote that `evaluate` takes.
        label_noise: `noise`, the estimated share of wrong labels; `expected_wrong`, how many of the suspects probably
            are; `contradicted`, how many rows' neighbours say something else than the label.
        detection: `auroc` and `fpr95` of the novelty, if outliers were labelled.
        duplicate_distance: At most how far near-duplicates are apart.
        duplicate_rule: How that came: "given", "gap" (chosen from the distances), or "copies" (no gap: copies alone).
        facts: What was audited: `rows`, `queries`, `dim`, `k`, `distance_metric`, `sample`, `bad_rows`, `bad_queries`
            (left out as not finite or, under cosine, zero), `conflicts` (groups whose labels differ), `side` (whose
            confusions and novelty these are, "row" or "query").
        neighbors: Rows next to some of the findings, by ("row" or "query", number).
        labels: Labels as given by ("row" or "query", number), of what findings and neighbours name.
        class_names: Names by class id, or None.

    Example:
        >>> import numpy as np
        >>> from faiss_knn import audit
        >>> rows = np.random.default_rng(0).standard_normal((60, 8))
        >>> found = audit(np.concatenate([rows, rows[:1]]), progress=False)
        >>> found.duplicates, found.facts["rows"]
        ([[0, 60]], 61)
    """

    duplicates: list[list[int]]
    leaks: list[Leak]
    label_suspects: list[LabelSuspect]
    novelty: npt.NDArray[np.float64]
    hubness: dict[str, Any]
    confusions: list[Confusion]
    generative: dict[str, float] | None
    accuracy: dict[str, float] | None
    label_noise: dict[str, float] | None
    detection: dict[str, float] | None
    duplicate_distance: float
    duplicate_rule: str
    facts: dict[str, Any]
    neighbors: dict[tuple[Side, int], list[int]] = field(default_factory=dict)
    labels: dict[tuple[Side, int], Any] = field(default_factory=dict)
    class_names: Sequence[str] | None = None

    def class_name(self, label: Any) -> str:
        """Name a class: its name if there are names, else its label."""
        if self.class_names and isinstance(label, int) and 0 <= label < len(self.class_names):
            return str(self.class_names[label])
        return str(label)

    def most_novel(self, count: int) -> list[int]:
        """List the queries, or without queries the rows, that are farthest from everything known."""
        known = np.flatnonzero(np.isfinite(self.novelty))
        order = np.argsort(-self.novelty[known], kind="stable")[:count]
        return [int(i) for i in known[order]]
