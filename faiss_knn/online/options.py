"""What a k-NN score is asked for: the arguments, checked in one place, and what follows from them alone."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from faiss_knn.classify.labels import as_class_count, as_labels, is_labelled, is_soft, one_hot_ids, width_of
from faiss_knn.classify.regression import columns_of, is_finite, read_targets
from faiss_knn.classify.vote import check_vote_options
from faiss_knn.distributed import rank_and_size
from faiss_knn.online.gallery import gallery_options
from faiss_knn.online.metrics import RESERVED, class_count, is_multiclass, named_metrics, rehearse
from faiss_knn.online.number_metrics import are_of_numbers, rehearse_numbers
from faiss_knn.online.ring import RingBuffer, as_device_or_none
from faiss_knn.protocol import choose_settings, get_protocol
from faiss_knn.search.distance import directions, get_distance
from faiss_knn.search.index import KNNIndex
from faiss_knn.search.inputs import as_choice, as_integer, as_key, as_positive, as_switch, named_as_index, shown

_SETTLED: Any = None  # by the protocol, or below
_DEFAULTS = {"k": 5, "temperature": 0.07, "weighting": "inverse", "distance_metric": "euclidean"}
DIAGNOSTICS = ("effective_rank", "alignment", "uniformity", "hubness", "neighbor_churn", "duplicate_share")
VIEW_ALIGNMENT = "view_alignment"  # of two inputs together, where the others are of each
_BANK_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(eq=False, repr=False)
class OnlineOptions:
    """The arguments of `OnlineKNN`, where they are described.

    Attributes:
        kind: What messages call it.
        ks: The numbers of neighbours, as a tuple.
        metrics: Name to metric.
        feature_key: Key of the features; of several, the first.
        label_key: Key of the labels; of several, the first.
        label: What tells this part from the others of several; else empty.
        is_regression: Whether targets are numbers, of which neighbours' means are scored: the metrics are of
            regression, none is of classes, and no num_classes was given.

    Raises:
        ValueError: For each bad argument, naming it.
    """

    kind: ClassVar[str] = "OnlineKNN"

    name: str
    input: str | Sequence[str]
    target: str | Sequence[str] | Mapping[str, Any]
    queue_length: int
    metrics: Any = None
    input_dim: int | Sequence[int] | None = None
    target_dim: int | None = None
    num_classes: int | None = None
    k: int | Sequence[int] = _SETTLED
    temperature: float = _SETTLED
    chunk_size: int = -1
    distance_metric: str = _SETTLED
    verbose: bool | None = None
    _: KW_ONLY
    index: str = "flat"
    nprobe: int | None = None
    target_recall: float | None = None
    weighting: str = _SETTLED
    gather: str = "replicate"
    bank_dtype: torch.dtype | None = None
    bank_device: torch.device | str | None = None
    bank_dataloader_idx: int | None = None
    id: str | None = None
    every_n_epochs: int = 1
    recall_queries: int = 256
    ignore_index: int | None = None
    strict: bool = False
    protocol: str | None = None
    diagnostics: Sequence[str] = ()
    gallery: Any = None
    search: str = "batch"
    seconds: bool = False
    standard_errors: bool = False
    ks: tuple[int, ...] = field(init=False)
    feature_key: str = field(init=False)
    label_key: str = field(init=False)
    label: str = field(init=False, default="")
    is_regression: bool = field(init=False)

    def __post_init__(self) -> None:
        self._settle_protocol()
        self._check_vote()
        self._check_search()
        self._check_rows()
        self._check_run()
        self._check_diagnostics()
        self.gallery = gallery_options(self.gallery)
        if self.gallery is not None and self.search == "epoch":
            raise ValueError("`gallery` needs search='batch': an epoch's images are not kept until its end")
        self._read_metrics()
        self._parts = self._new_parts() if self.has_several else []
        with named_as_index():
            self.new_index()  # a bad index option is an error here, not at the first validation

    def _read_metrics(self) -> None:
        self._metrics_class_count = class_count(self.metrics)
        self._is_multiclass = is_multiclass(self.metrics)
        self.is_regression = self.num_classes is None and are_of_numbers(self.metrics)
        self._value_names = (
            rehearse_numbers(self.metrics, standard_errors=self.standard_errors)
            if self.is_regression
            else rehearse(self.metrics, self.num_classes, standard_errors=self.standard_errors)
        )
        if not self.has_several_k and (twice := self._value_names & set(self.diagnostics)):
            raise ValueError(f"`metrics` must have other names than `diagnostics`, got {', '.join(sorted(twice))}")

    @property
    def has_several(self) -> bool:
        """Whether there are several keys of features or of labels."""
        return len(self._inputs) * len(self._targets) > 1

    @property
    def parts(self) -> "list[OnlineOptions]":
        """What is asked of each key of features and each of labels, all of which share their rows' queues."""
        return self._parts or [self]

    def _new_parts(self) -> "list[OnlineOptions]":
        """Make one part for each pair of keys, in order, named after those of which there are several."""
        if len(set(self.keys)) < len(self.keys):
            raise ValueError(f"`input`, `target` and `id` must be keys of their own, got {', '.join(self.keys)}")
        if self.num_classes is not None and len(self._targets) > 1:
            raise ValueError(
                f"num_classes={self.num_classes} is of one target, got {', '.join(self._targets)}: leave it out, the "
                "metrics of each say theirs"
            )
        return [self._part(key, target) for key in self._inputs for target in self._targets]

    def _part(self, key: str, target: str) -> "OnlineOptions":
        part = copy(self)
        part.label = "_".join([key] * (len(self._inputs) > 1) + [target] * (len(self._targets) > 1))
        part.name = f"{self.name}_{part.label}"
        part.input = part.feature_key = key
        part.target = part.label_key = target
        part._inputs, part._targets, part._parts = (key,), {target: self._targets[target]}, []
        part.metrics = self._targets[target]
        part.diagnostics = tuple(name for name in self.diagnostics if name != VIEW_ALIGNMENT)
        part._read_metrics()
        return part

    def _settle_protocol(self) -> None:
        """Take what was not given from the protocol; `protocol` then names also what was given beside it."""
        arguments = {name: getattr(self, name) for name in _DEFAULTS}
        self.k = _listed(self.k)
        arguments["k"] = tuple(self.k) if isinstance(self.k, list) else self.k
        settled, label = choose_settings(self.protocol, arguments, _DEFAULTS)
        for name in _DEFAULTS:
            if getattr(self, name) is None:
                setattr(self, name, settled[name])
        protocol = None if self.protocol is None else get_protocol(self.protocol)
        self._divides_by_lengths = protocol is not None and protocol.normalize and not self.is_normalized
        self.protocol = label

    def prepared(self, features: Tensor) -> Tensor:
        """Return features (n, d) as they are compared: divided by their lengths where the protocol says so."""
        return directions(features).to(features.dtype) if self._divides_by_lengths else features

    def _check_vote(self) -> None:
        self.ks = _checked_ks(self.k)
        check_vote_options(self.temperature, self.weighting, self.distance_metric)

    def _check_search(self) -> None:
        self.chunk_size = as_integer(self.chunk_size, "chunk_size")
        if self.chunk_size == 0 or self.chunk_size < -1:
            raise ValueError(f"chunk_size must be positive or -1, got {self.chunk_size}")
        get_distance(self.distance_metric)
        as_choice(self.search, ("batch", "epoch"), "`search`")
        if self.gather not in ("replicate", "shard"):
            raise ValueError(f"`gather` must be 'replicate' or 'shard', got {self.gather!r}")
        self.bank_device = as_device_or_none(self.bank_device, "bank_device")
        if self.bank_dtype is not None and not any(self.bank_dtype is dtype for dtype in _BANK_DTYPES):
            raise ValueError(f"bank_dtype must be None or one of {_BANK_DTYPES}, got {shown(self.bank_dtype)}")
        self.recall_queries = as_integer(self.recall_queries, "recall_queries")
        if self.recall_queries < 0:
            raise ValueError(f"recall_queries must be positive, or 0 for none, got {self.recall_queries}")

    def _check_rows(self) -> None:
        self.name = as_key(self.name, "name")
        self._inputs, self._targets = _keys(self.input, "input"), _metrics_by_target(self.target, self.metrics)
        self.feature_key, self.label_key = self._inputs[0], next(iter(self._targets))
        self.id = None if self.id is None else as_key(self.id, "id")
        self.queue_length = as_positive(self.queue_length, "queue_length")
        if isinstance(self.input_dim, Sequence):
            self.input_dim = int(np.prod([as_positive(size, "input_dim") for size in self.input_dim or [0]]))
        for width in ("input_dim", "target_dim", "num_classes"):
            if getattr(self, width) is not None:
                setattr(self, width, as_positive(getattr(self, width), width))
        if self.num_classes is not None:
            as_class_count(self.num_classes)
        self.metrics = {} if len(self._targets) > 1 else self._targets[self.label_key]
        self.ignore_index = None if self.ignore_index is None else as_integer(self.ignore_index, "ignore_index")

    def _check_run(self) -> None:
        if self.bank_dataloader_idx is not None:
            self.bank_dataloader_idx = as_integer(self.bank_dataloader_idx, "bank_dataloader_idx")
            if self.bank_dataloader_idx < 0:
                raise ValueError(
                    f"bank_dataloader_idx must be 0, or None for the queue, got {self.bank_dataloader_idx}"
                )
        self.verbose = None if self.verbose is None else as_switch(self.verbose, "verbose")
        self.every_n_epochs = as_positive(self.every_n_epochs, "every_n_epochs")
        for switch in ("strict", "seconds", "standard_errors"):
            setattr(self, switch, as_switch(getattr(self, switch), switch))

    def _check_diagnostics(self) -> None:
        several = isinstance(self.diagnostics, Sequence) and not isinstance(self.diagnostics, str)
        names = self.diagnostics if several else [self.diagnostics]
        known = (*DIAGNOSTICS, VIEW_ALIGNMENT)
        self.diagnostics = tuple(dict.fromkeys(as_choice(one, known, "`diagnostics`") for one in names))
        if VIEW_ALIGNMENT in self.diagnostics and len(self._inputs) != 2:
            raise ValueError(
                f"`diagnostics` with {VIEW_ALIGNMENT} compares two keys of features, row by row: give "
                f'input=("first", "second"), got {", ".join(self._inputs)}'
            )
        if "neighbor_churn" in self.diagnostics and self.id is None:
            raise ValueError(
                "`diagnostics` with neighbor_churn needs to know which sample a row is of: give `id`, the key of the "
                "sample ids, or leave neighbor_churn out"
            )

    @property
    def title(self) -> str:
        """What messages begin with."""
        return f"{self.kind}[{self.name}]"

    @property
    def keys(self) -> list[str]:
        """Keys of the tensors that are read of each batch: features, labels, and sample ids where they count."""
        return [*self._inputs, *self._targets, *([] if self.id is None else [self.id])]

    @property
    def log_keys(self) -> set[str]:
        """What is logged, as far as is known before: keys without the stage."""
        if self._parts:
            views = {f"{self.name}_{VIEW_ALIGNMENT}"} if self.has_views else set()
            return views.union(*(part.log_keys for part in self._parts))
        stems = [f"{self.name}_k{k}" for k in self.ks] if self.has_several_k else [self.name]
        return {f"{stem}_{value}" for stem in stems for value in self._value_names} | {
            f"{self.name}_{value}" for value in (*RESERVED, *self.diagnostics)
        }

    @property
    def has_views(self) -> bool:
        """Whether two keys of features are compared, row by row."""
        return VIEW_ALIGNMENT in self.diagnostics

    def check_first_step(self, labels: Tensor) -> None:
        """Find out by a training step's labels what would stop a validation much later: labels or metrics.

        Raises:
            ValueError: For labels beyond the scores' width, or metrics that cannot judge such labels.
        """
        if self.is_regression:
            self._check_first_targets(labels)
            return
        labels = self.read_labels(labels)
        self.check_label(width_of(labels) - 1)
        # Those made for one class a row were tried with such labels already.
        undecided = {name: metric for name, metric in self.metrics.items() if not is_multiclass({name: metric})}
        rehearse(undecided, self.num_classes, multi_hot=labels.ndim == 2 and not is_soft(labels))

    def _check_first_targets(self, values: Tensor) -> None:
        """Find out whether the metrics judge as many numbers a row; and say what numbers are taken for."""
        key = self.label_key
        if values.ndim == 1 and not values.is_floating_point():
            try:
                rehearse(self.metrics, 2, multi_hot=False)
            except ValueError as error:
                hint = f"'{key}' is {values.dtype}, as class ids are; cast it with .float() to score numbers"
                raise ValueError(f"{error}: {hint}") from error
        targets = self.read_labels(values)
        rehearse_numbers(self.metrics, targets.shape[1] if targets.ndim == 2 else 0)
        looks_labelled = (values == 0) | (values == 1) | (values == -1)
        if values.is_floating_point() and len(values) and looks_labelled.all() and rank_and_size()[0] == 0:
            logger.warning(
                f"{self.title}: '{key}' holds floats of 0 and 1 (or -1), and is taken as numbers, since the metrics "
                f"({', '.join(self.metrics)}) are of regression: neighbours' means are scored. Give num_classes to "
                "score classes"
            )

    def is_labelled(self, labels: Tensor) -> Tensor:
        """Tell which rows of labels, as they were read, count."""
        return is_finite(labels) if self.is_regression else is_labelled(labels)

    def width_of(self, labels: Tensor) -> int:
        """Count the columns that scores of labels need, as they were read; 0 without labels."""
        if not self.is_regression:
            return width_of(labels)
        return columns_of(labels) if len(labels) else 0

    @property
    def has_several_k(self) -> bool:
        """Whether k was given as several numbers, of which each has log keys of its own."""
        return isinstance(self.k, Sequence)

    @property
    def is_normalized(self) -> bool:
        """Whether rows are compared by their direction, which zero rows do not have."""
        return self.distance_metric == "cosine"

    @property
    def shards(self) -> bool:
        """Whether each rank searches its own rows for all."""
        return self.gather == "shard" and rank_and_size()[1] > 1

    def new_index(self, spec: str | None = None, nprobe: int | None = None) -> KNNIndex:
        """Make an index as the options say, or of a spec (and nprobe) already chosen, which is not tuned again."""
        return KNNIndex(
            spec or self.index,
            distance_metric=self.distance_metric,
            device=self.bank_device,
            nprobe=nprobe if spec else self.nprobe,
            target_recall=None if spec else self.target_recall,
            storage_dtype=self.bank_dtype,
            chunk_size=self.chunk_size,
        )

    def new_ring(self, key: str, device: torch.device) -> RingBuffer:
        """Make room for the rows of a bank's dataloader: as many as a queue would hold, on `device` by default."""
        dtype = self.bank_dtype if key in self._inputs else None
        return RingBuffer(self.queue_length, None, dtype, self.bank_device or device)

    def queue_form(self, key: str) -> tuple[int | None, torch.dtype | None]:
        """Return the `dim` and dtype of the queue that keeps a key's rows; None: as in the first batch."""
        if key in self._inputs:
            assert not isinstance(self.input_dim, Sequence)  # its product by now
            return self.input_dim, self.bank_dtype or (torch.float32 if self.input_dim else None)
        return (self.target_dim if key in self._targets else None), None

    def read_labels(self, values: Tensor) -> Tensor:
        """Read labels; one-hot ones as the class ids they are, where the metrics are made for one class a row.

        Returns:
            (n,) int64 class ids, -1 where unlabelled; or (n, C), 0/1 or shares of the classes. Numbers: (n,) or (n, D)
            float, NaN where unlabelled.

        Raises:
            ValueError: For what is no label, or several labels a row under metrics that know one.
        """
        if self.is_regression:
            return read_targets(values, f"{self.title}: '{self.label_key}'", ignore_index=self.ignore_index)
        labels = as_labels(values, f"'{self.label_key}'", float_ids=True, ignore_index=self.ignore_index)
        if labels.ndim == 1 or not self._is_multiclass:
            return labels
        ids = one_hot_ids(labels)
        if ids is None and not is_soft(labels) and len(labels):
            raise ValueError(
                f"{self.title}: '{self.label_key}' has rows with several or no labels, and the metrics are "
                "made for one class a row: give Multilabel metrics, or class ids"
            )
        return labels if ids is None else ids

    def score_width(self, seen: int, earlier: int) -> int:
        """Decide how many classes are scored: num_classes, else what the metrics were made for, else what is seen.

        Args:
            seen: The bank's largest label + 1.
            earlier: Width of earlier validations, below which it does not fall.
        """
        if self.is_regression:
            return seen
        if self.known_width is not None:
            self.check_label(seen - 1)
            return self.known_width
        return max(seen, earlier)

    def check_label(self, highest: int) -> None:
        """Refuse a label beyond the width that was asked for; where none was, the width grows."""
        width = self.known_width
        if width is not None and highest >= width:
            whose = "" if self.num_classes else f" The metrics are made for {width} classes: make them for more."
            raise ValueError(
                f"{self.title}: configured num_classes={width} but observed label {highest} >= "
                f"num_classes. Increase num_classes to at least {highest + 1}.{whose}"
            )

    @property
    def known_width(self) -> int | None:
        """How many classes are scored, where that is known before any label is seen."""
        return self.num_classes or self._metrics_class_count


def _keys(names: Any, argument: str) -> tuple[str, ...]:
    """Return one key or several."""
    several = isinstance(names, Sequence) and not isinstance(names, str)
    keys = tuple(as_key(key, argument) for key in (names if several else [names]))
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"`{argument}` must be one key or several different ones, got {shown(names)}")
    return keys


def _metrics_by_target(target: Any, metrics: Any) -> dict[str, Any]:
    """Return the metrics by name of each key of labels."""
    if isinstance(target, Mapping):
        if metrics is not None:
            raise ValueError("`metrics` must be left out where `target` gives each key of labels metrics of its own")
        return {key: named_metrics(target[key]) for key in _keys(list(target), "target")}
    keys = _keys(target, "target")
    if len(keys) == 1:
        return {keys[0]: named_metrics(metrics)}
    if metrics is not None and (not isinstance(metrics, Mapping) or set(metrics) != set(keys)):
        raise ValueError(
            f"`metrics` of several targets must be a mapping from each of {', '.join(keys)} to metrics of its own, got "
            f"{shown(metrics)}"
        )
    return {key: named_metrics(None if metrics is None else metrics[key]) for key in keys}


def _listed(k: Any) -> Any:
    """Return an array or tensor of numbers as a list."""
    return k.tolist() if isinstance(k, np.ndarray | Tensor) and k.ndim == 1 else k


def _checked_ks(k: Any) -> tuple[int, ...]:
    ks = (k,) if isinstance(k, str) or not isinstance(k, Sequence) else tuple(k)
    if not ks or any(one == other for one, other in combinations(ks, 2)):
        raise ValueError(f"k must be one number or several different ones, got {k}")
    for one in ks:
        if isinstance(one, str | float):
            raise ValueError(f"k must be positive, got {one}: give a whole number")  # noqa: TRY004
    return tuple(as_positive(one, "k") for one in ks)
