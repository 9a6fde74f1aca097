"""explain(): under which settings features give a number that was published, so that two numbers can be reconciled."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from faiss_knn.offline.accuracy import make_judge
from faiss_knn.offline.options import DEFAULTS, EvalOptions, VoteOptions, vote_settings
from faiss_knn.offline.preparation import prepare
from faiss_knn.offline.report.results_folder import write_into
from faiss_knn.offline.search import EXACT, SearchOptions, SearchResult, search_task
from faiss_knn.offline.task import EvalTask, check_values, make_task
from faiss_knn.protocol import Protocol, protocols
from faiss_knn.search.engines.rerank import drop_self
from faiss_knn.search.inputs import as_number, as_switch, shown

_SHOWN = 12
_DISTANCES = ("cosine", "euclidean", "dot")


@dataclass(frozen=True)
class Setting:
    """One way to score the features, and how far from the number it comes.

    Attributes:
        k: Neighbours that vote.
        temperature: T of the weights; None where they are uniform, as that of one neighbour is.
        weighting: "inverse", "softmax" or "uniform".
        distance_metric: "cosine", "euclidean" or "dot", or another that was given.
        normalize: Whether features are divided by their lengths first; with "cosine" it makes no difference.
        center: Whether the bank's mean is subtracted first; with "euclidean" distances it makes none, unless features
            are normalised after it.
        leave_one_out: Whether each query is left out of its own neighbours; None where it is not in the bank.
        top1: Accuracy, in [0, 1].
        difference: `top1` minus the number.
        standard_errors: That difference in standard errors of the number.
        differs: In words, what differs from the defaults of `evaluate`, beside k.
        protocols: Names of the protocols that score so.
        given: Whether it is what was given, or comes to the same.
    """

    k: int
    temperature: float | None
    weighting: str
    distance_metric: str
    normalize: bool
    center: bool
    leave_one_out: bool | None
    top1: float
    difference: float
    standard_errors: float
    differs: tuple[str, ...]
    protocols: tuple[str, ...]
    given: bool

    @property
    def words(self) -> str:
        """The setting for a reader, such as "k 20, softmax weighting instead of inverse (dino)"."""
        named = f" ({', '.join(self.protocols)})" if self.protocols else ""
        return ", ".join([f"k {self.k}", *(self.differs or ["else the defaults"])]) + named


@dataclass(frozen=True)
class Explanation:
    """The settings that were scored, nearest to the number first; of equally near ones those nearer to the defaults.

    Attributes:
        target: The number, in [0, 1].
        n_queries: Q.
        standard_error: Of the number over Q queries, √(p(1 − p)/Q).
        settings: What was scored.
    """

    target: float
    n_queries: int
    standard_error: float
    settings: list[Setting]

    @property
    def within_two(self) -> int:
        """How many settings lie within two standard errors of the number, which does not tell them apart."""
        return sum(abs(setting.standard_errors) <= 2 for setting in self.settings)

    def table(self, rows: int = _SHOWN) -> str:
        """Return the nearest settings as text, below them those that were given or the nearest with the defaults."""
        lines = [
            f"asked: {self.target:.4f} (standard error {self.standard_error:.4f}, {self.n_queries:,} queries)",
            f"{self.within_two} of {len(self.settings)} settings are within two standard errors of it",
            "",
            f"{'top1':>6}  {'off by':>7}  {'in s.e.':>7}  setting",
            *map(_line, self.settings[:rows]),
        ]
        as_given = [setting for setting in self.settings if setting.given]
        usual = [setting for setting in self.settings if not setting.differs][:1]
        below = [setting for setting in as_given or usual if setting not in self.settings[:rows]]
        if below:
            lines += ["", "as given:" if as_given else "nearest with the defaults:", *map(_line, below)]
        return "\n".join(lines)

    def save(self, folder: str | Path) -> Path:
        """Write explain.json into a folder: the number, and all settings in their order; return the file's path.

        Raises:
            ValueError: If the folder cannot be written.
        """
        name = "explain.json"
        return write_into(folder, {name: json.dumps(asdict(self), indent=2) + "\n"}) / name


def explain(
    target: float,
    bank_features: Any,
    bank_labels: Any,
    query_features: Any = None,
    query_labels: Any = None,
    *,
    k: int | Iterable[int] | None = None,
    temperature: float | Iterable[float] | None = None,
    weighting: str | Iterable[str] | None = None,
    distance_metric: str | None = None,
    center: bool = False,
    protocol: str | None = None,
    leave_one_out: bool = False,
    ignore_index: int | None = None,
    skip_bad_rows: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = False,
) -> Explanation:
    """Say which settings bring the top-1 accuracy of features nearest to a number, such as a paper's.

    Scored are every k and every pair of weighting and T of `protocols` and of the defaults, with the cosine distance,
    the euclidean one and inner products, of features as they are, normalised, centred, and both. Where `leave_one_out`
    is asked for, queries that find themselves are tried too. Five exact searches are enough: the euclidean distance of
    normalised features is √(2 · cosine), and no euclidean distance depends on the mean. Settings that are given are
    tried too, each k and T with all the others, and are always listed; another distance takes a search of its own.

    Args:
        target: The number, as a share (0.7843) or, above 1, in percent (78.43).
        bank_features: As in `evaluate`, and so are all that follow.
        bank_labels: See there.
        query_features: See there.
        query_labels: See there.
        k: Numbers of neighbours to try beside those of the protocols; None: no others.
        temperature: T to try.
        weighting: What the number is thought to be made with.
        distance_metric: See there.
        center: See there.
        protocol: Whose settings it is thought to be made with, but for those that are given.
        leave_one_out: See there.
        ignore_index: See there.
        skip_bad_rows: See there.
        device: See there.
        progress: See there.

    Raises:
        ValueError: If target is no accuracy, or `evaluate` would refuse the features or the settings.

    Example:
        >>> bank, queries = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([[0.8, 0.2], [0.1, 0.9]])
        >>> explanation = explain(50.0, bank, [0, 0, 1], queries, [0, 1])
        >>> explanation.settings[0].words, explanation.settings[0].difference
        ('k 3, uniform weighting instead of inverse (mteb)', 0.0)
    """
    number = as_accuracy(target)
    supposed = given_settings(
        protocol, k=k, temperature=temperature, weighting=weighting, distance_metric=distance_metric, center=center
    )
    task = make_task(
        bank_features, bank_labels, query_features, query_labels, num_classes=None, class_names=None,
        leave_one_out=leave_one_out, ignore_index=ignore_index,
    )  # fmt: skip
    return explain_task(number, task, supposed, skip_bad_rows=skip_bad_rows, device=device, progress=progress)


def given_settings(protocol: str | None, *, center: bool, **vote: Any) -> EvalOptions | None:
    """Check what a number is thought to be made with; None if nothing is given.

    Raises:
        ValueError: If `evaluate` would refuse it.

    Example:
        >>> given_settings("dino", k=5, center=False).k
        (5,)
    """
    if protocol is None and not center and all(value is None for value in vote.values()):
        return None
    return EvalOptions(**vote_settings(protocol, center=as_switch(center, "`center`"), **vote))


def as_accuracy(target: Any) -> float:
    """Return an accuracy as a share, which above 1 is in percent.

    Raises:
        ValueError: If it is none.

    Example:
        >>> as_accuracy(78.5), as_accuracy(0.785)
        (0.785, 0.785)
    """
    number = as_number(target, "`target`")
    if not 0 < number <= 100:
        raise ValueError(
            f"`target` must be an accuracy, as a share in (0, 1] or in percent up to 100, got {shown(target)}"
        )
    return number if number <= 1 else number / 100


def explain_task(
    target: float,
    task: EvalTask,
    supposed: EvalOptions | None,
    *,
    skip_bad_rows: bool,
    device: torch.device | str | None,
    progress: bool | None,
) -> Explanation:
    """Explain as `explain` does, of a share `target` and a task; all ranks call it together and get the same."""
    known = protocols()
    longest = len(task.bank.rows) - task.leave_one_out
    ks = {k for k in (*DEFAULTS["k"], *(k for one in known.values() for k in one.k)) if k <= longest}
    ks |= set(supposed.k if supposed else ())
    supposed_settings = {_same_as(vote, supposed) for vote in supposed.votes} if supposed else set()
    settings: list[Setting] = []
    n_queries = len(task.queries.rows)
    error = _standard_error(target, n_queries)
    for searched, result, facts in _searches(task, max(ks), supposed, skip_bad_rows, device, progress):
        judge = make_judge(searched, result)
        for vote in _votes(sorted(ks), known, supposed, facts):
            top1 = judge.judge(*vote, {}).top1.double().mean().item()
            settings.append(_setting(vote, facts, top1, target, error, known, supposed_settings))
    settings.sort(key=lambda setting: (round(abs(setting.difference), 12), len(setting.differs), setting.k))
    return Explanation(target, n_queries, error, settings)


def _same_as(vote: VoteOptions, supposed: EvalOptions) -> tuple[Any, ...]:
    """Return the setting of the grid that a given one is, or comes to; see `_of_grid`."""
    metric, unit, center = supposed.distance_metric, supposed.normalize, supposed.center
    uniform = vote.weighting == "uniform" or vote.k == 1
    if unit and (metric == "dot" or (metric == "euclidean" and uniform)):
        metric, unit = "cosine", False
    center = center and (unit or metric in ("cosine", "dot"))
    return _of_grid(vote, {"distance_metric": metric, "normalize": unit, "center": center})


def _of_grid(vote: VoteOptions, facts: dict[str, Any]) -> tuple[Any, ...]:
    """Say what tells settings apart: how one neighbour weighs, and T where all weigh the same, do not."""
    how = ("uniform", None) if vote.weighting == "uniform" or vote.k == 1 else (vote.weighting, vote.temperature)
    return (vote.k, *how, *(facts[name] for name in ("distance_metric", "normalize", "center")))


def _standard_error(share: float, count: int) -> float:
    inner = min(max(share, 0.5 / count), 1 - 0.5 / count)  # at 0 and 1 nothing would be near
    return math.sqrt(inner * (1 - inner) / count)


def _searches(
    task: EvalTask,
    k: int,
    supposed: EvalOptions | None,
    skip_bad_rows: bool,
    device: torch.device | str | None,
    progress: bool | None,
) -> Iterator[tuple[EvalTask, SearchResult, dict[str, Any]]]:
    """Find neighbours under each distance of features prepared in each way, from as few searches as possible."""
    kinds = [(x, False, False) for x in _DISTANCES] + [(x, False, True) for x in _DISTANCES if x != "euclidean"]
    if supposed and supposed.distance_metric not in _DISTANCES:
        kinds.append((supposed.distance_metric, supposed.normalize, supposed.normalize and supposed.center))
    for metric, unit, center in kinds:
        prepared = check_values(prepare(task, center=center, unit=unit), metric, skip_bad_rows)
        options = SearchOptions(metric, device, progress=progress)
        for searched, result, own in _with_and_without_self(prepared, k, options):
            facts = {"distance_metric": metric, "center": center, "normalize": unit, "leave_one_out": own}
            yield searched, result, facts
            if metric == "cosine":
                lengths = replace(result, distances=(2 * result.distances.double()).sqrt())
                yield searched, lengths, facts | {"distance_metric": "euclidean", "normalize": True}


def _with_and_without_self(
    task: EvalTask, k: int, options: SearchOptions
) -> Iterator[tuple[EvalTask, SearchResult, bool | None]]:
    """Find the neighbours; with leave-one-out those without and those with the query itself, of one search."""
    if not task.leave_one_out:
        yield task, search_task(task, k, EXACT, options), None
        return
    task = replace(task, leave_one_out=False)
    result = search_task(task, k + 1, EXACT, options)
    own = torch.arange(len(result.indices), device=result.indices.device)
    distances, indices = drop_self(result.distances, result.indices, own)
    yield task, replace(result, distances=distances, indices=indices), True
    yield task, result.first(k), False


def _votes(
    ks: Sequence[int], known: dict[str, Protocol], supposed: EvalOptions | None, facts: dict[str, Any]
) -> Iterator[VoteOptions]:
    """List every k with every weighting and its temperatures, but what comes to the same once.

    One neighbour needs no weight, and neighbours that weigh the same are those of cosine for normalised features.
    """
    usual = DEFAULTS["temperature"][0]
    temperatures = {usual, *(supposed.temperature if supposed else ())}
    pairs = {(weighting, temperature) for weighting in ("inverse", "softmax") for temperature in temperatures}
    pairs |= {(one.weighting, one.temperature) for one in known.values() if one.weighting != "uniform"}
    for k in ks:
        if (facts["distance_metric"], facts["normalize"]) != ("euclidean", True):
            yield VoteOptions(k, usual, "uniform")
        if k > 1:
            yield from (VoteOptions(k, temperature, weighting) for weighting, temperature in sorted(pairs)
                        if (weighting, facts["distance_metric"]) != ("inverse", "dot"))  # fmt: skip


def _setting(
    vote: VoteOptions,
    facts: dict[str, Any],
    top1: float,
    target: float,
    error: float,
    known: dict[str, Protocol],
    supposed_settings: set[tuple[Any, ...]],
) -> Setting:
    temperature = None if vote.weighting == "uniform" else vote.temperature
    difference = top1 - target
    return Setting(
        vote.k, temperature, vote.weighting, **facts, top1=top1, difference=difference,
        standard_errors=difference / error, differs=tuple(_differs(vote, temperature, facts)),
        protocols=tuple(name for name, one in known.items() if _is_scored_by(one, vote, temperature, facts)),
        given=facts["leave_one_out"] is not False and _of_grid(vote, facts) in supposed_settings,
    )  # fmt: skip


def _differs(vote: VoteOptions, temperature: float | None, facts: dict[str, Any]) -> Iterator[str]:
    """Say what differs from the defaults."""
    weighting, usual, metric = DEFAULTS["weighting"][0], DEFAULTS["temperature"][0], DEFAULTS["distance_metric"]
    if vote.weighting != weighting and vote.k > 1:
        yield f"{vote.weighting} weighting instead of {weighting}"
    if temperature not in (None, usual):
        yield f"T {temperature:g} instead of {usual:g}"
    if facts["distance_metric"] != metric:
        of = " of normalised features" if facts["normalize"] else ""
        name = "inner products" if facts["distance_metric"] == "dot" else f"{facts['distance_metric']} distance"
        yield f"{name}{of} instead of {metric}"
    if facts["center"]:
        yield "features centred"
    if facts["leave_one_out"] is False:
        yield "each query among its own neighbours"


def _is_scored_by(protocol: Protocol, vote: VoteOptions, temperature: float | None, facts: dict[str, Any]) -> bool:
    unit = protocol.normalize and protocol.distance_metric != "cosine"
    return (
        vote.k in protocol.k
        and (vote.k == 1 or vote.weighting == protocol.weighting)
        and (temperature is None or temperature == protocol.temperature)
        and facts["leave_one_out"] is not False
        and (facts["distance_metric"], facts["normalize"], facts["center"])
        == (protocol.distance_metric, unit, protocol.center)
    )


def _line(setting: Setting) -> str:
    return f"{setting.top1:6.4f}  {setting.difference:+7.4f}  {setting.standard_errors:+7.2f}  {setting.words}"
