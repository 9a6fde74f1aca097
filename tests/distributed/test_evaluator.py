"""OnlineEvaluator under plain torch.distributed: the numbers of one process, and no rank that waits for ever."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanAbsoluteError, PearsonCorrCoef, R2Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from faiss_knn import OnlineEvaluator
from faiss_knn.distributed import rank_and_size
from tests.distributed import runs
from tests.distributed.ranks import RankFailed, Ranks
from tests.distributed.runs import CLASSES, TRAIN, VAL
from tests.online.parts import Rows

GATHERS = ("replicate", "shard")


def evaluator(**options: Any) -> OnlineEvaluator:
    metrics = {"acc": MulticlassAccuracy(CLASSES, average="micro"), "auroc": MulticlassAUROC(CLASSES)}
    return OnlineEvaluator("knn", "embedding", "label", **{"queue_length": 400, "metrics": metrics} | options)


def dealt(columns: dict[str, Any], batch_size: int = 7) -> Any:
    rank, size = rank_and_size()
    rows = Rows(**columns)
    return DataLoader(rows, batch_size, sampler=DistributedSampler(rows, size, rank, shuffle=False))


def observed(knn: OnlineEvaluator) -> OnlineEvaluator:
    for batch in dealt(TRAIN):
        knn.observe(embedding=batch["x"], label=batch["label"], id=batch["id"])
    return knn


def scored(knn: OnlineEvaluator) -> dict[str, float]:
    loader = dealt(VAL)
    knn.start(loader)
    for batch in loader:
        knn.score(embedding=batch["x"], label=batch["label"], id=batch["id"])
    return knn.finish()


def loop(options: dict[str, Any]) -> dict[str, float]:
    return scored(observed(evaluator(**options)))


def test_standard_errors_are_of_the_queries_of_all_ranks(ranks: Ranks) -> None:
    ((share, error),) = {
        (values["eval/knn_acc"], values["eval/knn_acc_se"]) for values in ranks.run(loop, {"standard_errors": True})
    }
    assert error == pytest.approx((share * (1 - share) / 97) ** 0.5, abs=1e-7)


@pytest.mark.parametrize("gather", GATHERS)
def test_the_numbers_are_those_of_the_callback_to_the_bit(ranks: Ranks, gather: str) -> None:
    for size in (1, 2, 3):
        ours = ranks.run(loop, {"gather": gather}, ranks=size)
        assert ours == ranks.run(runs.fit, {"gather": gather}, ranks=size)
        assert len({tuple(values.items()) for values in ours}) == 1


def uneven(gather: str) -> tuple[dict[str, float], dict[str, float]]:
    """Rank 1 has all of the batches but one; ids tell which rows are a sampler's repetitions."""
    rank, _ = rank_and_size()
    knn = observed(evaluator(gather=gather, id="id"))
    batches = [range(20)] if rank == 0 else [range(20, 60), range(60, 97), range(5, 20)]
    knn.start([[None] * len(batches)])
    for rows in batches:
        knn.score(embedding=VAL["x"][list(rows)], label=VAL["label"][list(rows)], id=VAL["id"][list(rows)])
    return knn.finish(), scored(observed(evaluator(id="id")))


@pytest.mark.parametrize("gather", GATHERS)
def test_uneven_ranks_count_each_sample_once(ranks: Ranks, gather: str) -> None:
    for by_hand, dealt_out in ranks.run(uneven, gather):
        assert by_hand == pytest.approx(dealt_out, abs=1e-6)


def at_the_end(gather: str) -> tuple[dict[str, float], dict[str, float]]:
    """Kept until the end, where no rank need know how many batches the others have."""
    knn = observed(evaluator(gather=gather, id="id", search="epoch"))
    knn.start()
    rank, _ = rank_and_size()
    for rows in [range(20)] if rank == 0 else [range(20, 60), range(60, 97), range(5, 20)]:
        assert (
            knn.score(embedding=VAL["x"][list(rows)], label=VAL["label"][list(rows)], id=VAL["id"][list(rows)]) is None
        )
    return knn.finish(), uneven(gather)[0]


@pytest.mark.parametrize("gather", GATHERS)
def test_what_is_searched_at_the_end_needs_no_length(ranks: Ranks, gather: str) -> None:
    for values, by_batch in ranks.run(at_the_end, gather):
        assert values == by_batch


def of_two_inputs(options: dict[str, Any]) -> dict[str, float]:
    """Rank 1 scores three batches, rank 0 one."""
    knn = OnlineEvaluator(
        "knn",
        ("x", "double"),
        {"label": MulticlassAccuracy(CLASSES, average="micro"), "id": None},
        **{"queue_length": 400} | options,
    )
    rank, size = rank_and_size()
    for batch in dealt(TRAIN):
        knn.observe(**batch, double=2 * batch["x"])
    batches = [range(97)] if size == 1 else [[range(20)], [range(20, 60), range(60, 97), range(20, 20)]][rank]
    knn.start([[None] * len(batches)])
    for rows in batches:
        batch = {key: values[list(rows)] for key, values in VAL.items()}
        knn.score(**batch, double=-2 * batch["x"])
    return knn.finish()


@pytest.mark.parametrize("options", [{}, {"gather": "shard"}, {"gather": "shard", "search": "epoch"}], ids=str)
def test_several_inputs_and_targets_stay_in_step(ranks: Ranks, options: dict[str, Any]) -> None:
    (expected,) = ranks.run(of_two_inputs, {}, ranks=1)
    assert set(expected) == {f"eval/knn_{key}_label_MulticlassAccuracy" for key in ("x", "double")}
    assert len(set(expected.values())) == 2
    for values in ranks.run(of_two_inputs, options):
        assert values == pytest.approx(expected, abs=1e-6)


def of_numbers(options: dict[str, Any]) -> dict[str, float]:
    """Rank 0 alone trains: the others do not know the numbers' shape or dtype."""
    one, two = {"r2": R2Score(), "r": PearsonCorrCoef()}, MeanAbsoluteError()
    knn = OnlineEvaluator(
        "knn", "x", {"first": one, "rest": two}, **{"queue_length": 400, "standard_errors": True} | options
    )
    rank, size = rank_and_size()
    if rank == 0:
        knn.observe(**_with_numbers(TRAIN))
    batches = [range(97)] if size == 1 else [[range(20)], [range(20, 60), range(60, 97)], []][rank]
    knn.start([[None] * len(batches)])
    for rows in batches:
        knn.score(**{key: values[list(rows)] for key, values in _with_numbers(VAL).items()})
    return knn.finish()


def _with_numbers(columns: dict[str, Any]) -> dict[str, Any]:
    x = columns["x"]
    first = x[:, 0].double().masked_fill(columns["id"] % 10 == 0, torch.nan)
    return {**columns, "first": first, "rest": x[:, 1:4]}


OPTIONS = [{}, {"gather": "shard"}, {"gather": "shard", "search": "epoch", "id": "id"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_numbers_are_the_same_on_any_number_of_ranks_to_the_bit(ranks: Ranks, options: dict[str, Any]) -> None:
    (expected,) = ranks.run(of_numbers, {}, ranks=1)
    assert expected.pop("eval/knn_first_skipped") == 22
    assert 0.5 < expected["eval/knn_first_r2"] < expected["eval/knn_first_r"]
    assert "eval/knn_rest_MeanAbsoluteError_se" in expected
    for size in (2, 3):
        for values in ranks.run(of_numbers, options, ranks=size):
            assert values.pop("eval/knn_first_skipped") == 22
            assert values == expected


def without_length() -> None:
    observed(evaluator(gather="shard")).start()


def test_shards_need_to_know_how_often_the_others_search(ranks: Ranks) -> None:
    with pytest.raises(RankFailed, match="gather='shard' needs validation dataloaders with a length"):
        ranks.run(without_length)


def fail_in_training() -> str:
    knn = observed(evaluator())
    if rank_and_size()[0] == 1:
        knn.observe(embedding=TRAIN["x"])  # logged, and kept
    observed(knn)
    try:
        knn.start()
    except ValueError as error:
        return str(error)
    return "nothing"


def fail_in_validation() -> str:
    knn = observed(evaluator())
    knn.start()
    labels = VAL["label"][:10] + 10 * (rank_and_size()[0] == 1)
    scores = knn.score(embedding=VAL["x"][:10], label=labels)
    assert bool(scores.any()) == (rank_and_size()[0] == 0)
    try:
        knn.finish()
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("run", "message"), [(fail_in_training, "observe() needs the tensors"), (fail_in_validation, "observed label 1")]
)
def test_what_fails_on_one_rank_is_raised_on_all(ranks: Ranks, run: Any, message: str) -> None:
    of_another, own = ranks.run(run)
    assert message in own
    assert of_another.startswith("rank 1 failed, so rank 0 stops too: ValueError: OnlineEvaluator[knn]")
    assert message in of_another


def save(path: Path) -> list[int]:
    state = observed(evaluator()).state_dict()
    if rank_and_size()[0] == 0:
        torch.save(state, path)
    again = evaluator()
    again.load_state_dict(state)  # each rank's own also serves it
    assert scored(again) == loop({})
    return [len(rows) for rows in state["queues"]["embedding"]["rows"]]


def resume(path: Path, length: int) -> tuple[dict[str, float], torch.Tensor]:
    knn = evaluator(queue_length=length)
    knn.load_state_dict(torch.load(path, weights_only=True))
    values, state = scored(knn), knn.state_dict()["queues"]["embedding"]
    return values, torch.cat(state["rows"])


def test_it_resumes_on_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(save, tmp_path / "state.pt") == [[60, 60], [60]]
    ((whole, rows),) = ranks.run(resume, tmp_path / "state.pt", 400, ranks=1)
    assert sorted(rows.tolist()) == sorted(TRAIN["x"].tolist())
    for size in (2, 3):
        for values, _ in ranks.run(resume, tmp_path / "state.pt", 400, ranks=size):
            assert values == pytest.approx(whole, abs=1e-6)
    ((_, rows),) = ranks.run(resume, tmp_path / "state.pt", 30, ranks=1)
    assert sorted(rows.tolist()) == sorted(TRAIN["x"][90:].tolist())  # the newest of both
