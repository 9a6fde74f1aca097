"""What an evaluation is asked to do: its options, checked once, where they are made."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch

from faiss_knn.classify.vote import check_vote_options
from faiss_knn.offline.compression import as_dims, as_storage, check_compression
from faiss_knn.offline.search import SearchOptions, Variant, has_parameter
from faiss_knn.protocol import choose_settings, get_protocol, protocols
from faiss_knn.search.distance import get_distance
from faiss_knn.search.inputs import as_count, as_integer, as_key, as_number, as_switch, shown

_MOST = 2**31 - 1  # rows or neighbours that anything is counted with

DEFAULTS: dict[str, Any] = {
    "k": (1, 5, 10, 20), "temperature": (0.07,), "weighting": ("inverse",), "distance_metric": "cosine", "center": False
}  # fmt: skip


class VoteOptions(NamedTuple):
    """How the neighbours vote: one record of each index is made under each."""

    k: int
    temperature: float
    weighting: str


@dataclass
class EvalOptions:
    """The options of `evaluate`, which describes them, under the same names.

    What was given is checked and made plain: values that repeat are dropped, `tries` is a number where there is a
    few-shot bank to draw. Nothing changes them after that.

    Attributes:
        protocol: What the settings are called, a protocol's name and what differs from it; see `vote_settings`.
        normalize: Whether rows are divided by their lengths.
        with_quirks: The protocol by whose own rule neighbours vote, or None.
        length: How long the lists are: `depth`, but at least the largest k.
        variants: The indexes to evaluate: each spec of `index`, at each point of `sweep`, and flat with each of `dims`
            and `storage`.
        search: How to search.

    Raises:
        ValueError: If an option is out of range, or two do not go together.

    Example:
        >>> options = EvalOptions(k=(5, 1, 5), index=("flat", "ivf"), sweep={"nprobe": (1, 4)})
        >>> options.k, options.length, [variant.name for variant in options.variants]
        ((5, 1), 5, ['flat', 'ivf nprobe=1', 'ivf nprobe=4'])
    """

    k: tuple[int, ...] = (1, 5, 10, 20)
    temperature: tuple[float, ...] = (0.07,)
    weighting: tuple[str, ...] = ("inverse",)
    distance_metric: str = "cosine"
    index: tuple[str, ...] = ("flat",)
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    leave_one_out: bool = False
    per_class: int | None = None
    tries: int | None = None
    seed: int = 0
    metrics: tuple[str, ...] = ()
    depth: int | None = None
    sweep: Mapping[str, Iterable[int]] = field(default_factory=dict)
    nprobe: int | None = None
    target_recall: float | None = None
    latency: int = 0
    device: torch.device | str | None = None
    storage_dtype: torch.dtype | None = None
    ignore_index: int | None = None
    skip_bad_rows: bool = False
    keep_neighbors: bool = False
    keep_outcomes: bool | None = None
    progress: bool | None = False
    protocol: str | None = None
    normalize: bool = False
    center: bool = False
    pca: int | None = None
    whiten: bool = False
    dims: tuple[int | str, ...] = ()
    storage: tuple[str, ...] = ()
    with_quirks: str | None = None
    length: int = field(init=False)
    variants: tuple[Variant, ...] = field(init=False)
    search: SearchOptions = field(init=False)

    def __post_init__(self) -> None:
        get_distance(self.distance_metric)  # refuses unknown ones
        for name in ("leave_one_out", "skip_bad_rows", "keep_neighbors", "keep_outcomes", "progress"):
            if getattr(self, name) is not None:  # of the latter two, None is: as it comes
                setattr(self, name, as_switch(getattr(self, name), f"`{name}`"))
        self.metrics = tuple(as_key(name, "`metrics`") for name in self.metrics)
        self.class_names = _checked_names(self.class_names)
        self.ignore_index = None if self.ignore_index is None else as_integer(self.ignore_index, "`ignore_index`")
        self.pca = None if self.pca is None else as_count(self.pca, "`pca`")
        if self.metrics and self.with_quirks is not None:
            raise ValueError("`metrics` are of shares of the votes, which with_quirks=True has none of: leave out one")
        self._check_votes()
        self._check_draws()
        self._check_search()

    def _check_votes(self) -> None:
        for name in ("k", "temperature", "weighting"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` needs at least one value, got none")
        need = "`k` and `depth` must be positive integers"
        self.k = tuple(dict.fromkeys(_positive(k, need) for k in self.k))
        self.length = max(*self.k, 1 if self.depth is None else _positive(self.depth, need))
        for temperature, weighting in product(self.temperature, self.weighting):
            check_vote_options(temperature, weighting, self.distance_metric)
        self.temperature = tuple(dict.fromkeys(map(float, self.temperature)))
        self.weighting = tuple(dict.fromkeys(self.weighting))

    def _check_draws(self) -> None:
        self.seed = _count_from_zero(self.seed, "seed")
        if self.per_class is None:
            if self.tries is not None:
                raise ValueError("`tries` is for few-shot banks: give per_class too")
            return
        if self.leave_one_out:
            raise ValueError("per_class draws a bank for other queries: it does not go with leave_one_out")
        self.per_class = _positive(self.per_class, "`per_class` must be positive, an integer")
        self.tries = 5 if self.tries is None else _positive(self.tries, "`tries` must be positive, an integer")

    def _check_search(self) -> None:
        self.latency = _count_from_zero(self.latency, "latency")
        self.nprobe = None if self.nprobe is None else as_count(self.nprobe, "`nprobe`")
        self.target_recall = _checked_share(self.target_recall)
        self.variants = (*_variants(self.index, self.sweep), *self._compressed())
        if self.nprobe is not None and all(spec == "flat" for spec in self.index):
            raise ValueError("`nprobe` is for indexes with inverted lists, got index='flat': give one, such as 'ivf'")
        self.search = SearchOptions(
            self.distance_metric, self.device, self.nprobe, self.target_recall, self.latency, self.progress,
            self.storage_dtype,
        )  # fmt: skip
        for variant in self.variants:
            self.search.index(variant)  # refuses bad options before any work

    def _compressed(self) -> Iterator[Variant]:
        """List each of `dims` and `storage` alone, and each with each."""
        self.dims = tuple(dict.fromkeys(as_dims(value) for value in self.dims))
        self.storage = tuple(dict.fromkeys(as_storage(value) for value in self.storage))
        for dims, storage in product((None, *self.dims), (None, *self.storage)):
            settings = {name: value for name, value in (("dims", dims), ("storage", storage)) if value is not None}
            check_compression(dims, storage, None, self.distance_metric)
            if settings:
                yield Variant("flat", settings)

    @property
    def votes(self) -> Iterator[VoteOptions]:
        """Every k with every temperature and weighting."""
        return map(VoteOptions._make, product(self.k, self.temperature, self.weighting))


def vote_settings(
    protocol: str | None,
    *,
    k: Any = None,
    temperature: Any = None,
    weighting: Any = None,
    distance_metric: str | None = None,
    center: bool = False,
    pca: int | None = None,
    whiten: bool = False,
    with_quirks: bool = False,
) -> dict[str, Any]:
    """Settle what a protocol decides, unless it is given: arguments of `EvalOptions`.

    Raises:
        ValueError: If there is no such protocol, or with_quirks does not go with it.

    Example:
        >>> vote_settings("dino", k=5)["protocol"]
        'dino, k=5'
    """
    given = {"k": k, "temperature": temperature, "weighting": weighting}
    settled, label = choose_settings(
        protocol,
        {name: None if value is None else several(value) for name, value in given.items()}
        | {"distance_metric": distance_metric, "center": center or None},
        DEFAULTS,
    )
    unit = protocol is not None and get_protocol(protocol).normalize and settled["distance_metric"] != "cosine"
    turned = {"pca": pca, "whiten": whiten}
    if with_quirks:
        _check_quirks(protocol, settled)
    if label is not None:
        named = turned | {"with_quirks": with_quirks}
        label = ", ".join([label, *(f"{name}={value}" for name, value in named.items() if value)])
    quirks = protocol if with_quirks else None
    return settled | turned | {
        "protocol": label, "normalize": unit, "center": bool(settled["center"]), "with_quirks": quirks
    }  # fmt: skip


def _check_quirks(name: str | None, settled: Mapping[str, Any]) -> None:
    """Raise ValueError if no rule of a protocol's own could be reproduced with these settings."""
    having = ", ".join(known for known, protocol in protocols().items() if protocol.own_rule is not None)
    if name is None:
        raise ValueError(f"with_quirks=True needs a protocol, one of {having}: give `protocol` too")
    protocol = get_protocol(name)
    if protocol.own_rule is None:
        raise ValueError(f"with_quirks=True: {name} has no quirk that changes a number, others have ({having})")
    if (settled["weighting"], settled["distance_metric"]) != ((protocol.weighting,), protocol.distance_metric):
        raise ValueError(
            f"with_quirks=True is {name}'s own rule, with the weighting {protocol.weighting!r} and the distance "
            f"{protocol.distance_metric!r}: leave out `weighting` and `distance_metric`"
        )


def several(given: Any) -> tuple[Any, ...]:
    """Take one value or several as a tuple.

    Example:
        >>> several("flat"), several([1, 5])
        (('flat',), (1, 5))
    """
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        return (given,)
    return tuple(given)


def _variants(specs: tuple[str, ...], sweep: Mapping[str, Iterable[int]]) -> Iterator[Variant]:
    """List each spec, or where the sweep has parameters of it each point of the sweep."""
    if not specs:
        raise ValueError("`index` needs at least one spec, got none")
    if not isinstance(sweep, Mapping):
        raise ValueError(f"`sweep` must give values by name, such as {{'nprobe': [1, 4]}}, got {shown(sweep)}")  # noqa: TRY004
    points = {name: several(values) for name, values in sweep.items()}
    for name, values in points.items():
        if not values:
            raise ValueError(f"`sweep` needs at least one value of {name}, got none")
    sweep = {name: [_positive(v, f"`sweep` must give positive integers for {name}") for v in values]
             for name, values in points.items()}  # fmt: skip
    for name in sweep:
        if not any(has_parameter(str(spec), name) for spec in specs):
            raise ValueError(f"`sweep` gives {name}, which none of the indexes has, got {', '.join(map(str, specs))}")
    for spec in dict.fromkeys(as_key(spec, "`index`") for spec in specs):
        names = [name for name in sweep if has_parameter(spec, name)]
        for values in product(*(sweep[name] for name in names)):
            yield Variant(spec, dict(zip(names, values, strict=True)))


def _checked_share(target_recall: Any) -> float | None:
    """Check the recall to tune to; "flat" would not look at it."""
    share = None if target_recall is None else as_number(target_recall, "`target_recall`")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"`target_recall` must be in (0, 1], got {share!r}")
    return share


def _checked_names(class_names: Any) -> Any:
    if class_names is None:
        return None
    is_several = isinstance(class_names, Iterable) and not isinstance(class_names, (str, bytes, Mapping))
    if not is_several or getattr(class_names, "ndim", 1) != 1:
        raise ValueError(f"`class_names` must be names by class id, such as a list of str, got {shown(class_names)}")
    return tuple(map(str, class_names))


def _positive(value: Any, need: str) -> int:
    try:
        count = as_count(value, "it")
    except ValueError:
        raise ValueError(f"{need}, got {shown(value)}") from None
    if count > _MOST:
        raise ValueError(f"{need}, at most {_MOST}, got {shown(value)}")
    return count


def _count_from_zero(value: Any, name: str) -> int:
    number = as_integer(value, f"`{name}`")
    if number < 0:
        raise ValueError(f"`{name}` must be 0 or a positive integer, got {number}")
    return number
