"""Protocols of other libraries by name: with which settings a published k-NN number was made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

_LONGEST = 60
_SORTED = "unspecified there (an unstable sort); here the lowest class id"
_LOWEST = "the lowest class id"
_ZERO_WEIGHT = "its top-5 also counts classes without a vote, here none of them is a hit"


class OwnRule(NamedTuple):
    """How a library's own code votes in float32 and ranks classes, where that can change a number.

    All classes are ranked, also those without a vote.

    Attributes:
        weights: "exp" of s / T, which may overflow; "softmax" of s / T over the largest k, cut for smaller ones;
            "inverse", 1 / (d + T).
        top5_within_k: Whether top-5 looks at the first min(5, k) classes alone.
    """

    weights: str
    top5_within_k: bool = False


@dataclass(frozen=True)
class Protocol:
    """How a library scores features by their nearest neighbours.

    Attributes:
        k: Numbers of neighbours that it reports.
        temperature: T of the weights; without meaning where they are uniform.
        weighting: "inverse", "softmax" or "uniform", see `neighbor_weights`.
        distance_metric: As in `KNNIndex`.
        normalize: Whether features are divided by their lengths first, which the cosine distance does by itself.
        center: Whether the bank's mean is subtracted first.
        tie_break: Which of several classes with equal votes is predicted.
        top: The n of its top-n accuracies.
        source: Where its rule is written, a file of a repository or a section of a paper.
        quirks: What to know of it, and where it differs from here.
        excludes_self: Whether it is made for queries that are the bank's rows, none of which is its own neighbour.
        draws: Rows per class and number of the few-shot banks that it draws; None: the whole bank.
        own_rule: What `with_quirks=True` reproduces of its code; None where nothing would change.

    What is done to rows and votes is settled by a protocol's name; which queries and banks there are is asked for, with
    `leave_one_out`, `per_class` and `tries`.

    Example:
        >>> dino = protocols()["dino"]
        >>> dino.k, dino.temperature, dino.weighting, dino.distance_metric
        ((10, 20, 100, 200), 0.07, 'softmax', 'cosine')
    """

    k: tuple[int, ...]
    temperature: float
    weighting: str
    distance_metric: str
    normalize: bool
    center: bool
    tie_break: str
    top: tuple[int, ...]
    source: str
    quirks: str
    excludes_self: bool = False
    draws: tuple[int, int] | None = None
    own_rule: OwnRule | None = None


def _cosine(k: tuple[int, ...], temperature: float, source: str, quirks: str, own_rule: OwnRule | None) -> Protocol:
    """Describe a vote by exp(cos / T): the softmax of minus the cosine distance but for a factor of the query's own."""
    top = (1,) if own_rule is None else (1, 5)
    return Protocol(k, temperature, "softmax", "cosine", True, False, _SORTED, top, source, quirks, own_rule=own_rule)


_VISSL = _cosine(
    (200,),
    0.1,
    "facebookresearch/vissl, vissl/utils/knn_utils.py",
    f"Sums exp(cos / T); {_ZERO_WEIGHT}; 0 for fewer than five classes. Features are normalised with its option "
    "L2_NORM_FEATS, which is off by default: without it the rule is that of lightly-raw.",
    OwnRule("exp"),
)

_PROTOCOLS = {
    "dino": _cosine(
        (10, 20, 100, 200),
        0.07,
        "facebookresearch/dino, eval_knn.py",
        f"Sums exp(cos / T), which float32 holds down to T = 0.0113; {_ZERO_WEIGHT}; a k above the bank's rows ends "
        "it.",
        OwnRule("exp", top5_within_k=True),
    ),
    "dinov2": _cosine(
        (10, 20, 100, 200),
        0.07,
        "facebookresearch/dinov2, dinov2/eval/knn.py",
        "The softmax runs over the largest k and is sliced for smaller ones: their scores are smaller by a factor of "
        f"the query's own, their order is the same; {_ZERO_WEIGHT}; few-shot banks are scored at k up to their rows "
        "per class, and at that.",
        OwnRule("softmax"),
    ),
    "dinov3": _cosine(
        (10, 20, 100, 200),
        0.07,
        "facebookresearch/dinov3, dinov3/eval/knn.py",
        "As dinov2, but a k above the bank's rows becomes their number; skip_first_nn drops the nearest row whatever "
        f"it is, leave-one-out here the query itself; {_ZERO_WEIGHT}.",
        OwnRule("softmax"),
    ),
    "swav": _VISSL,
    "vissl": _VISSL,
    "moco": _cosine(
        (200,),
        0.1,
        "facebookresearch/moco, colab/moco_cifar10_demo.ipynb (branch colab-notebook), knn_predict",
        "Sums exp(cos / T) on normalised features; a k above the bank's rows ends it.",
        None,
    ),
    "instdisc": _cosine(
        (200,),
        0.1,
        "zhirongw/lemniscate.pytorch, test.py, kNN; Wu et al. 2018 (arXiv 1805.01978), section 3.4, has T = 0.07",
        f"The bank is the training's memory of moving averages, unless it is computed anew; {_ZERO_WEIGHT}.",
        OwnRule("exp"),
    ),
    "lightly": _cosine(
        (200,),
        0.1,
        "lightly-ai/lightly, lightly/utils/benchmarking/knn_classifier.py, with the k and T of knn_predict",
        f"KNNClassifier normalises by default; {_ZERO_WEIGHT}; its benchmarks took T = 0.1, later 0.07. For "
        "knn_predict on features as they are see lightly-raw.",
        OwnRule("exp"),
    ),
    "lightly-raw": Protocol(
        (200,), 0.1, "softmax", "dot", False, False, _SORTED, (1, 5),
        "lightly-ai/lightly, lightly/utils/benchmarking/knn.py, knn_predict",
        "Inner products of features as they are. Before 1.6.1 exp(q·x / T) overflows float32 from q·x / T = 88.7 on: "
        "votes are then infinite or no number, and the prediction means nothing; here nothing overflows; "
        f"{_ZERO_WEIGHT}.",
        own_rule=OwnRule("exp"),
    ),
    "solo-learn": _cosine(
        (20,),
        0.07,
        "vturrisi/solo-learn, solo/utils/knn.py, WeightedKNNClassifier",
        "Version 1.0.2 and others leave it to the caller to normalise. A k above the bank's rows becomes their number; "
        f"{_ZERO_WEIGHT}.",
        OwnRule("exp", top5_within_k=True),
    ),
    "solo-learn-online": Protocol(
        (20,), 1e-5, "inverse", "euclidean", False, False, _SORTED, (1, 5),
        "vturrisi/solo-learn, solo/methods/base.py, WeightedKNNClassifier with distance_fx='euclidean'",
        f"What it logs while training: weights 1 / (d + 1e-5) of features as they are; {_ZERO_WEIGHT}.",
        own_rule=OwnRule("inverse", top5_within_k=True),
    ),
    "simsiam": _cosine(
        (200,),
        0.1,
        "PatrickHua/SimSiam, tools/knn_monitor.py; Chen & He 2021 (arXiv 2011.10566) name no k",
        "MoCo's knn_predict on normalised features.",
        None,
    ),
    "mteb": Protocol(
        (3,), 0.07, "uniform", "cosine", False, False, _LOWEST, (1,),
        "embeddings-benchmark/mteb, kNNClassificationEvaluator, with the k of AbsTaskClassification",
        "Of scikit-learn's KNeighborsClassifier by cosine and by euclidean distance the better accuracy is reported: "
        "evaluate the second with distance_metric='euclidean' beside it. Banks hold 8 or 16 rows per class, drawn ten "
        "times: per_class=8, tries=10.",
        draws=(8, 10),
    ),
    "stable-pretraining": Protocol(
        (5,), 0.07, "inverse", "euclidean", False, False, _LOWEST, (1, 5),
        "galilai-group/stable-pretraining, stable_pretraining/callbacks/knn.py, OnlineKNN",
        "Weights 1 / (d + T) of features as they are; the defaults of OnlineKNN here.",
    ),
    "pytorch-metric-learning": Protocol(
        (1,), 0.07, "uniform", "euclidean", False, False, "none: one neighbour", (1,),
        "KevinMusgrave/pytorch-metric-learning, utils/accuracy_calculator.py, precision_at_1",
        "Retrieval, with leave_one_out where query is reference; queries whose class no other row has are left out "
        "there. Its testers normalise embeddings first, its AccuracyCalculator does not. r_precision and "
        "mean_average_precision_at_r are retrieval_r_precision and retrieval_map_r of the records, at a depth of the "
        "largest class.",
        excludes_self=True,
    ),
}  # fmt: skip


def protocols() -> dict[str, Protocol]:
    """Return the known protocols by name.

    Example:
        >>> protocols()["dinov2"].k
        (10, 20, 100, 200)
    """
    return dict(_PROTOCOLS)


def get_protocol(name: str) -> Protocol:
    """Look a protocol up.

    Raises:
        ValueError: If there is none of that name; lists those there are.
    """
    if not isinstance(name, str) or name not in _PROTOCOLS:
        got = repr(name[:_LONGEST]) if isinstance(name, str) else type(name).__name__
        raise ValueError(f"`protocol` must be one of {', '.join(_PROTOCOLS)}, got {got}")
    return _PROTOCOLS[name]


def choose_settings(
    name: str | None, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """Choose settings: what was given, else what the protocol says, else the default.

    Args:
        name: Of the protocol, or None.
        given: Options by name, None where not given; sequences as tuples.
        defaults: Theirs without a protocol.

    Returns:
        The options, and how they are called: the protocol's name and what differs from it, such as "dino, k=5".

    Raises:
        ValueError: If there is no such protocol.

    Example:
        >>> choose_settings("dino", {"k": (5,), "temperature": None}, {"k": (1, 5), "temperature": (0.07,)})
        ({'k': (5,), 'temperature': (0.07,)}, 'dino, k=5')
    """
    fallback, label = dict(defaults), None
    if name is not None:
        protocol = get_protocol(name)
        fallback = {option: _alike(getattr(protocol, option), defaults[option]) for option in defaults}
        named = {option: _shown(value) for option, value in given.items() if value is not None}
        overrides = [f"{option}={value}" for option, value in named.items() if value != _shown(fallback[option])]
        label = ", ".join([name, *overrides])
    return {option: fallback[option] if value is None else value for option, value in given.items()}, label


def _alike(value: Any, default: Any) -> Any:
    return (value,) if isinstance(default, tuple) and not isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return str(value[0]) if len(value) == 1 else f"({', '.join(map(str, value))})"
