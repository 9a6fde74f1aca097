"""Votes with the quirks of other libraries, against their rules written out in float32 as their code has them."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import normalize

from faiss_knn import EvalReport, compare, evaluate, protocols
from faiss_knn.offline.cli import main
from faiss_knn.offline.quirks import QuirksJudge
from faiss_knn.offline.report.results import record_key
from faiss_knn.protocol import OwnRule

DIGITS, CLASSES = load_digits(return_X_y=True)
ROWS = (DIGITS + 5 * np.random.default_rng(0).standard_normal(DIGITS.shape)).astype(np.float32)
DATA = ROWS[:1347], CLASSES[:1347], ROWS[1347:], CLASSES[1347:]
TRUTH = torch.from_numpy(CLASSES[1347:])


def similarities(*, unit: bool, factor: float = 1) -> torch.Tensor:
    bank, queries = (factor * torch.from_numpy(rows) for rows in (DATA[0], DATA[2]))
    return normalize(queries) @ normalize(bank).T if unit else queries @ bank.T


def summed(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(Q, C) votes: a zero or one for each query, neighbour and class, times the weight, in float32."""
    labels = torch.from_numpy(DATA[1])[rows]
    one_hot = torch.zeros(labels.numel(), 10).scatter(1, labels.view(-1, 1), 1.0).view(*labels.shape, 10)
    return (one_hot * weights.unsqueeze(2)).sum(1)


def exponential(k: int, temperature: float, *, unit: bool = True, factor: float = 1) -> torch.Tensor:
    weights, rows = similarities(unit=unit, factor=factor).topk(k)
    return summed((weights / temperature).exp(), rows)


def sliced_softmax(k: int, temperature: float) -> torch.Tensor:
    weights, rows = similarities(unit=True).topk(200)
    return summed((weights / temperature).softmax(1)[:, :k], rows[:, :k])


def inverse(k: int, temperature: float) -> torch.Tensor:
    weights, rows = (1 / (torch.cdist(*map(torch.from_numpy, (DATA[2], DATA[0]))) + temperature)).topk(k)
    return summed(weights, rows)


def raw(k: int, temperature: float) -> torch.Tensor:
    return exponential(k, temperature, unit=False)


RULES = {
    "dino": exponential, "dinov2": sliced_softmax, "dinov3": sliced_softmax, "swav": exponential, "vissl": exponential,
    "instdisc": exponential, "lightly": exponential, "lightly-raw": raw, "solo-learn": exponential,
    "solo-learn-online": inverse,
}  # fmt: skip


def check(report: EvalReport, rule) -> None:
    """Hold every record to the ranking of its rule's scores."""
    for record in report.records:
        scores = rule(record["k"], record["temperature"])
        order = scores.argsort(dim=1, descending=True, stable=True)
        assert report.outcomes[record_key(record)]["prediction"].tolist() == order[:, 0].tolist()
        hits = order == TRUTH[:, None]
        assert record["top1"] == hits[:, 0].double().mean().item()
        assert record["top5"] == hits[:, :5].any(1).double().mean().item()
        assert record["macro_top1"] == pytest.approx(
            np.mean([hits[label == TRUTH, 0].double().mean().item() for label in range(10)])
        )


def test_a_rule_is_written_out_for_every_protocol_that_has_one():
    assert list(RULES) == [name for name, protocol in protocols().items() if protocol.own_rule is not None]


@pytest.mark.parametrize("name", RULES)
def test_with_quirks_votes_and_ranks_as_the_librarys_own_code(name):
    check(evaluate(*DATA, protocol=name, with_quirks=True), RULES[name])


def test_top5_counts_classes_without_a_vote_only_where_asked_for():
    plain, quirks = (evaluate(*DATA, protocol="dino", k=10, with_quirks=x).records[0] for x in (False, True))
    assert quirks["top1"] == plain["top1"]
    assert quirks["top5"] > plain["top5"] + 0.001
    votes, order = exponential(10, 0.07).sort(1, descending=True)
    assert plain["top5"] == ((order == TRUTH[:, None]) & (votes > 0))[:, :5].any(1).double().mean().item()


@pytest.mark.parametrize("factor", [1, 0.05])
def test_what_overflows_float32_is_ranked_as_infinity_and_no_number(factor):
    data = (factor * DATA[0], DATA[1], factor * DATA[2], DATA[3])
    votes = exponential(200, 0.1, unit=False, factor=factor)
    assert votes.isnan().any()
    assert factor == 1 or votes.isfinite().all(1).any()
    check(
        evaluate(*data, protocol="lightly-raw", with_quirks=True),
        lambda k, t: exponential(k, t, unit=False, factor=factor),
    )


def test_a_single_class_that_overflows_is_ranked_last_of_those_without_a_number():
    far = torch.tensor([[-900.0, -880.0, -1.0]])  # minus inner products: exp(9000) is infinite
    judge = QuirksJudge(far, torch.tensor([[1, 1, 0]]), torch.tensor([1]), 3, "dot", 3, OwnRule("exp"))
    hits = judge.judge(3, 0.1, "softmax", {})
    assert (hits.prediction.item(), hits.top1.item(), hits.share.item()) == (0, False, 0)


def test_the_score_of_a_sliced_softmax_is_less_than_a_share():
    report = evaluate(*DATA, protocol="dinov2", with_quirks=True)
    for record in report.records:
        expected = sliced_softmax(record["k"], 0.07).max(1).values.numpy()
        np.testing.assert_allclose(report.outcomes[record_key(record)]["score"], expected, rtol=1e-4)


def test_dinos_top5_looks_at_no_more_classes_than_neighbours():
    record = evaluate(*DATA, protocol="dino", k=3, with_quirks=True).records[0]
    order = exponential(3, 0.07).argsort(dim=1, descending=True, stable=True)
    found = [(order == TRUTH[:, None])[:, :n].any(1).double().mean().item() for n in (3, 5)]
    assert record["top5"] == found[0] != found[1]


def test_a_missing_neighbour_has_no_vote_and_lists_may_be_short():
    near = torch.tensor([[0.1, torch.inf]]), torch.tensor([[2, -1]]), torch.tensor([0])
    for rule in (OwnRule("exp"), OwnRule("softmax"), OwnRule("inverse")):
        hits = QuirksJudge(*near, 3, "cosine", 9, rule).judge(9, 0.1, "softmax", {})
        assert (hits.prediction.item(), hits.share.item(), hits.top5.item()) == (2, 1, True)


def test_records_name_it_and_are_no_others():
    plain, quirks = evaluate(*DATA, protocol="dino", k=5), evaluate(*DATA, protocol="dino", k=5, with_quirks=True)
    ours, theirs = plain.records[0], quirks.records[0]
    assert (ours["protocol"], theirs["protocol"]) == ("dino, k=5", "dino, k=5, with_quirks=True")
    assert theirs["options"] == ours["options"] | {"with_quirks": "dino"}
    assert record_key(ours) != record_key(theirs)
    assert any("dino's own float32 rule" in warning for warning in quirks.warnings)
    assert not any("float32 rule" in warning for warning in plain.warnings)
    with pytest.raises(ValueError, match=r"no setting in common.*with the quirks of dino"):
        compare(plain, quirks)
    assert compare(quirks, quirks).table()[0]["difference"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"with_quirks=True needs a protocol, one of dino, .*solo-learn-online: give `protocol`"),
        ({"protocol": "moco"}, "moco has no quirk that changes a number"),
        ({"protocol": "dino", "weighting": "uniform"}, "dino's own rule, .* leave out `weighting`"),
        ({"protocol": "dino", "distance_metric": "euclidean"}, "dino's own rule, .* leave out `weighting`"),
        ({"protocol": "dino", "metrics": ["MulticlassF1Score"]}, "`metrics` are of shares of the votes"),
        ({"protocol": "dino", "with_quirks": "yes"}, "`with_quirks` must be"),
    ],
)
def test_what_has_no_such_rule_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*DATA, **({"with_quirks": True} | given))


def test_labels_of_several_classes_are_refused():
    many = np.eye(10, dtype=int)[CLASSES]
    many[:, 0] = 1
    with pytest.raises(ValueError, match="labels of one class a row"):
        evaluate(DATA[0], many[:1347], DATA[2], many[1347:], protocol="dino", k=5, with_quirks=True)


def test_the_command_line_reproduces_it_beside_the_plain_number(tmp_path, capsys):
    for more in ([], ["--with-quirks"]):
        assert main(["eval", "--protocol", "lightly-raw", "--out", str(tmp_path), *more]) == 0
    assert "lightly-raw's own float32 rule" in capsys.readouterr().err
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [round(100 * json.loads(line)["top1"], 2) for line in lines] == [70.67, 8.67]
    assert "protocol lightly-raw, with_quirks=True" in (tmp_path / "report.md").read_text()
    assert main(["eval", "--with-quirks"]) == 1
    assert "needs a protocol" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--explain", "90", "--protocol", "dino", "--with-quirks"])
