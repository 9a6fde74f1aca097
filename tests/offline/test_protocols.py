"""Protocols by name: each one's predictions against its library's rule, written out naively from the formula."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import faiss_knn
from faiss_knn import EvalReport, evaluate, protocols
from faiss_knn.offline.cli import main
from faiss_knn.offline.report.results import record_key

CLASSES = 7
RNG = np.random.default_rng(3)
LABELS, TRUTH = RNG.integers(0, CLASSES, 700), RNG.integers(0, CLASSES, 150)
CENTRES = RNG.standard_normal((CLASSES, 12)) + 0.7


def drawn(classes: np.ndarray) -> np.ndarray:
    """Rows of many lengths, of classes that overlap."""
    rows = CENTRES[classes] + 0.9 * RNG.standard_normal((len(classes), 12))
    return (rows * np.exp(0.5 * RNG.standard_normal((len(classes), 1)))).astype(np.float32)


BANK, QUERIES = drawn(LABELS), drawn(TRUTH)


def voted(weights: np.ndarray, neighbors: torch.Tensor) -> np.ndarray:
    """(Q, C) sums of the weights (Q, k) of each class, neighbour by neighbour, in extended precision."""
    votes = np.zeros((len(weights), CLASSES), np.longdouble)
    for query, rows in enumerate(neighbors.numpy()):
        for weight, row in zip(weights[query], rows, strict=True):
            votes[query, LABELS[row]] += weight
    return votes


def as_doubles(*, unit: bool) -> tuple[torch.Tensor, torch.Tensor]:
    bank, queries = torch.from_numpy(BANK).double(), torch.from_numpy(QUERIES).double()
    return (normalize(bank), normalize(queries)) if unit else (bank, queries)


def exponential(k: int, temperature: float, *, unit: bool = True) -> np.ndarray:
    """Sum exp(q·x / T): DINO, VISSL, InstDisc, MoCo, SimSiam, lightly, solo-learn."""
    bank, queries = as_doubles(unit=unit)
    similarities, neighbors = (queries @ bank.T).topk(k)
    largest = similarities[:, :1] if not unit else 0  # a factor of the query's own, so that the numbers hold them
    return voted(np.exp((similarities - largest).numpy().astype(np.longdouble) / temperature), neighbors)


def sliced_softmax(k: int, temperature: float, largest: int = 200) -> np.ndarray:
    """Slice the softmax over the 200 nearest: DINOv2, DINOv3."""
    bank, queries = as_doubles(unit=True)
    similarities, neighbors = (queries @ bank.T).topk(largest)
    return voted((similarities / temperature).softmax(1).numpy()[:, :k], neighbors[:, :k])


def inverse(k: int, temperature: float) -> np.ndarray:
    """Sum 1 / (d + T) of euclidean distances: stable-pretraining, solo-learn while training."""
    bank, queries = as_doubles(unit=False)
    distances, neighbors = torch.cdist(queries, bank).topk(k, largest=False)
    return voted(1 / (distances.numpy() + temperature), neighbors)


def counted(k: int, metric: str) -> np.ndarray:
    """Count neighbours: scikit-learn's classifier in mteb; the nearest row in pytorch-metric-learning."""
    bank, queries = as_doubles(unit=metric == "cosine")
    distances, neighbors = torch.cdist(queries, bank).topk(k, largest=False)
    return voted(np.ones(distances.shape), neighbors)


RULES = {
    "dino": exponential,
    "dinov2": sliced_softmax,
    "dinov3": sliced_softmax,
    "swav": exponential,
    "vissl": exponential,
    "moco": exponential,
    "instdisc": exponential,
    "lightly": exponential,
    "lightly-raw": lambda k, temperature: exponential(k, temperature, unit=False),
    "solo-learn": exponential,
    "solo-learn-online": inverse,
    "simsiam": exponential,
    "mteb": lambda k, _: counted(k, "cosine"),
    "stable-pretraining": inverse,
    "pytorch-metric-learning": lambda k, _: counted(k, "euclidean"),
}
SETTINGS = {
    "dino": ((10, 20, 100, 200), 0.07),
    "dinov2": ((10, 20, 100, 200), 0.07),
    "dinov3": ((10, 20, 100, 200), 0.07),
    "swav": ((200,), 0.1),
    "vissl": ((200,), 0.1),
    "moco": ((200,), 0.1),
    "instdisc": ((200,), 0.1),
    "lightly": ((200,), 0.1),
    "lightly-raw": ((200,), 0.1),
    "solo-learn": ((20,), 0.07),
    "solo-learn-online": ((20,), 1e-5),
    "simsiam": ((200,), 0.1),
    "mteb": ((3,), None),
    "stable-pretraining": ((5,), 0.07),
    "pytorch-metric-learning": ((1,), None),
}


def outcomes(report: EvalReport) -> dict[int, np.ndarray]:
    return {record["k"]: report.outcomes[record_key(record)]["prediction"] for record in report.records}


def test_there_is_a_rule_for_every_protocol_and_each_says_where_it_is_from():
    assert list(RULES) == list(protocols()) == list(SETTINGS)
    for protocol in protocols().values():
        assert protocol.source
        assert protocol.quirks.endswith(".")
        assert protocol.tie_break
    assert {name: one.draws for name, one in protocols().items() if one.draws} == {"mteb": (8, 10)}
    assert [name for name, one in protocols().items() if one.excludes_self] == ["pytorch-metric-learning"]
    with pytest.raises(AttributeError):
        protocols()["dino"].k = (5,)


@pytest.mark.parametrize("name", SETTINGS)
def test_predictions_are_those_of_the_librarys_rule(name):
    ks, temperature = SETTINGS[name]
    report = evaluate(BANK, LABELS, QUERIES, TRUTH, protocol=name)
    found = outcomes(report)
    assert tuple(found) == ks
    assert all(len(set(row.tolist())) > 1 for row in found.values())
    for record in report.records:
        votes = RULES[name](record["k"], temperature)
        expected = np.argsort(-votes, axis=1, kind="stable")
        assert found[record["k"]].tolist() == expected[:, 0].tolist()
        assert record["top1"] == np.mean(expected[:, 0] == TRUTH)
        has_vote = np.take_along_axis(votes, expected, 1) > 0
        assert record["top5"] == np.mean(((expected == TRUTH[:, None]) & has_vote)[:, :5].any(1))
        assert record["protocol"] == name
    assert 0.5 < report.best()["top1"] < 0.99  # settings that differ would predict otherwise


def test_settings_that_differ_predict_otherwise():
    predictions = {name: RULES[name](max(SETTINGS[name][0]), SETTINGS[name][1]).argmax(1) for name in SETTINGS}
    groups = ["dino", "swav", "lightly-raw", "solo-learn", "solo-learn-online", "mteb", "stable-pretraining"]
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            assert (predictions[one] != predictions[other]).any(), (one, other)


def test_a_softmax_that_is_sliced_has_scores_of_its_own_but_the_same_order():
    whole, sliced = exponential(10, 0.07), sliced_softmax(10, 0.07)
    assert (sliced.sum(1) < 0.99).any()
    shares = [(votes / votes.sum(1, keepdims=True)).astype(float) for votes in (sliced, whole)]
    np.testing.assert_allclose(*shares, rtol=1e-12)


def test_products_that_overflow_float32_there_are_votes_here():
    bank, queries = 30 * BANK, 30 * QUERIES
    similarities, neighbors = (torch.from_numpy(queries) @ torch.from_numpy(bank).T).topk(200)
    there = torch.nn.functional.one_hot(torch.from_numpy(LABELS)[neighbors]) * (similarities / 0.1).exp()[:, :, None]
    assert there.sum(1).isnan().any()
    here = outcomes(evaluate(bank, LABELS, queries, TRUTH, protocol="lightly-raw"))[200]
    assert here.tolist() == exponential(200, 0.1 / 900, unit=False).argmax(1).tolist()


def test_pytorch_metric_learning_leaves_the_query_itself_out():
    report = evaluate(BANK, LABELS, leave_one_out=True, protocol="pytorch-metric-learning")
    bank, _ = as_doubles(unit=False)
    distances = torch.cdist(bank, bank).fill_diagonal_(torch.inf)
    assert outcomes(report)[1].tolist() == LABELS[distances.argmin(1)].tolist()


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ({}, "dino"),
        ({"k": 5}, "dino, k=5"),
        ({"k": (10, 20, 100, 200), "weighting": ("softmax",)}, "dino"),
        ({"k": [3, 5], "temperature": 0.1}, "dino, k=(3, 5), temperature=0.1"),
        ({"distance_metric": "euclidean", "center": True}, "dino, distance_metric=euclidean, center=True"),
    ],
)
def test_what_is_given_beside_a_protocol_counts_and_is_named(given, label):
    report = evaluate(BANK, LABELS, QUERIES, TRUTH, protocol="dino", **given)
    assert {record["protocol"] for record in report.records} == {label}
    plain = {"k": (10, 20, 100, 200), "weighting": "softmax"} | given
    unit = {"euclidean": lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)}
    mean = BANK.mean(0, dtype=np.float64) if plain.pop("center", False) else 0
    bank, queries = (unit.get(given.get("distance_metric"), lambda x: x)(rows - mean) for rows in (BANK, QUERIES))
    same = evaluate(bank.astype(np.float32), LABELS, queries.astype(np.float32), TRUTH, **plain)
    for ours, theirs in zip(report.records, same.records, strict=True):
        for field in ("k", "temperature", "weighting", "distance_metric", "top1", "top5"):
            assert ours[field] == theirs[field]
        assert theirs["protocol"] is None


def test_centring_subtracts_the_mean_of_the_banks_labelled_finite_rows(tmp_path):
    bank, labels = BANK + 5, LABELS.copy()
    labels[:50] = -1
    bank[:50] += 1000  # not labelled: not of the mean
    mean = bank[50:].mean(0, dtype=np.float64)
    wanted = evaluate(bank - mean, labels, QUERIES + 5 - mean, TRUTH, k=9)
    np.save(tmp_path / "bank.npy", bank)
    for rows in (bank, torch.from_numpy(bank), np.load(tmp_path / "bank.npy", mmap_mode="r")):
        centred = evaluate(rows, labels, QUERIES + 5, TRUTH, k=9, center=True)
        assert outcomes(centred)[9].tolist() == outcomes(wanted)[9].tolist()
        assert (centred.records[0]["center"], wanted.records[0]["center"]) == (True, False)
    plain = evaluate(bank, labels, QUERIES + 5, TRUTH, k=9)
    assert outcomes(plain)[9].tolist() != outcomes(wanted)[9].tolist()
    assert plain.records[0]["data"] != centred.records[0]["data"]
    bank[60] = np.nan
    with pytest.raises(ValueError, match="row 60 is not"):
        evaluate(bank, labels, QUERIES, TRUTH, center=True)
    record = evaluate(bank, labels, QUERIES, TRUTH, center=True, skip_bad_rows=True).records[0]
    assert (record["skipped_bank"], record["skipped_queries"]) == (1, 0)


def test_an_unknown_protocol_is_refused_with_those_there_are(capsys):
    for wrong in ("dino2", "", 5):
        with pytest.raises(ValueError, match=r"`protocol` must be one of dino, dinov2, .*pytorch-metric-learning, got"):
            evaluate(BANK, LABELS, QUERIES, TRUTH, protocol=wrong)
    with pytest.raises(ValueError, match="`center`"):
        evaluate(BANK, LABELS, QUERIES, TRUTH, center="yes")
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--protocol", "dino2"])
    assert "dinov2" in capsys.readouterr().err


def test_the_command_line_takes_a_protocol(tmp_path, capsys):
    assert main(["eval", "--protocol", "dinov2", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["k"], r["temperature"], r["weighting"], r["protocol"]) for r in records] == [
        (k, 0.07, "softmax", "dinov2") for k in (10, 20, 100, 200)
    ]
    assert main(["eval", "--protocol", "dinov2", "--k", "5", "--out", str(tmp_path), "--center"]) == 0
    last = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert (last["k"], last["protocol"], last["center"]) == (5, "dinov2, k=5, center=True", True)
    assert "protocol dinov2" in (tmp_path / "report.md").read_text()
    assert main(["eval", "--distance", "dot", "--k", "5"]) == 1
    assert "distance_metric='dot'" in capsys.readouterr().err


def test_protocols_are_listed_without_torch(capsys):
    assert main(["protocols"]) == 0
    printed = capsys.readouterr().out
    for name, protocol in protocols().items():
        row = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert all(word in row for word in (protocol.weighting, protocol.distance_metric, *map(str, protocol.k)))
        assert protocol.source.split(",")[0] in printed
    assert "8 per class, 10 draws" in printed
    assert "without the query" in printed
    code = "import sys; from faiss_knn.offline.cli import main; main(['protocols']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_has_gone_is_no_error():
    program = subprocess.Popen(
        [sys.executable, "-m", "faiss_knn", "protocols"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    program.stdout.close()
    assert (program.stderr.read(), program.wait()) == (b"", 0)
    program.stderr.close()


def test_the_public_name_is_the_function_whatever_was_imported_before():
    code = "import faiss_knn.offline.evaluate; from faiss_knn import protocols; assert 'dino' in protocols()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert "protocols" in faiss_knn.__all__
