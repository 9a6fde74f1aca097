"""explain(): every setting's accuracy is evaluate()'s, and the one that made a number is found again."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from faiss_knn import evaluate, explain, protocols
from faiss_knn.offline.cli import main

DIGITS, LABELS = load_digits(return_X_y=True)
DIGITS = DIGITS.astype(np.float32)
DATA = DIGITS[:260], LABELS[:260], DIGITS[300:400], LABELS[300:400]


@cache
def explained(target):
    return explain(target, *DATA)


def normalized(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def centred(rows, by):
    return rows - by.astype(np.float64).mean(0).astype(np.float32)


def as_asked(setting):
    """evaluate()'s top-1 under a setting, from features prepared by hand."""
    bank, bank_labels, queries, labels = DATA
    if setting.center:
        bank, queries = centred(bank, bank), centred(queries, bank)
    if setting.normalize:
        bank, queries = normalized(bank), normalized(queries)
    report = evaluate(
        bank, bank_labels, queries, labels, k=setting.k, weighting=setting.weighting,
        temperature=setting.temperature, distance_metric=setting.distance_metric,
    )  # fmt: skip
    return report.records[0]["top1"]


def test_every_kind_of_setting_scores_as_evaluate_does():
    kinds = {}
    for setting in explained(0.9).settings:
        if setting.k == 20:
            kinds.setdefault((setting.distance_metric, setting.normalize, setting.center, setting.weighting), setting)
    assert len(kinds) == 3 * 3 + 2 * 2 + 2 * 2  # unit euclidean without uniform, dot without inverse
    for setting in kinds.values():
        assert setting.top1 == pytest.approx(as_asked(setting), abs=1.5 / 100), setting.words
        assert setting.difference == pytest.approx(setting.top1 - 0.9)


@pytest.mark.parametrize("name", ["mteb", "moco", "lightly-raw", "solo-learn-online", "dinov2"])
def test_the_protocol_that_made_a_number_is_named_at_it(name):
    record = evaluate(*DATA, protocol=name).records[-1]
    (setting,) = [one for one in explained(0.9).settings if name in one.protocols and one.k == record["k"]]
    assert setting.top1 == record["top1"]
    assert setting.k in protocols()[name].k


def test_the_nearest_stand_first_and_simpler_ones_before_others():
    explanation = explained(95.0)
    assert explanation.target == 0.95
    distances = [(round(abs(one.difference), 12), len(one.differs)) for one in explanation.settings]
    assert distances == sorted(distances)
    error = np.sqrt(0.95 * 0.05 / 100)
    assert explanation.standard_error == pytest.approx(error)
    nearest = explanation.settings[-1]
    assert nearest.standard_errors == pytest.approx(nearest.difference / error)
    assert explanation.within_two == sum(abs(one.top1 - 0.95) <= 2 * error for one in explanation.settings)


def test_settings_are_told_in_words():
    words = {one.words for one in explained(0.9).settings}
    assert "k 20, else the defaults" in words
    assert "k 200, softmax weighting instead of inverse, T 0.1 instead of 0.07 " \
        "(swav, vissl, moco, instdisc, lightly, simsiam)" in words  # fmt: skip
    assert "k 3, uniform weighting instead of inverse (mteb)" in words
    assert "k 5, euclidean distance instead of cosine (stable-pretraining)" in words
    assert "k 10, euclidean distance of normalised features instead of cosine, features centred" in words
    assert "k 1, euclidean distance instead of cosine (pytorch-metric-learning)" in words


def test_a_query_that_finds_itself_is_suspected_where_rows_are_left_out_in_turn():
    rows, labels = DIGITS[:120], LABELS[:120]
    explanation = explain(1.0, rows, labels, leave_one_out=True)
    assert explanation.settings[0].leave_one_out is False
    assert "each query among its own neighbours" in explanation.settings[0].words
    (without,) = (one for one in explanation.settings if one.words == "k 5, else the defaults")
    assert without.top1 == evaluate(rows, labels, k=5, leave_one_out=True).records[0]["top1"]


def test_longer_lists_than_the_bank_has_rows_are_not_tried():
    few = explain(0.5, torch.eye(4), [0, 0, 1, 1], torch.eye(4)[:2], [0, 1])
    assert {one.k for one in few.settings} == {1, 3}


GIVEN = [
    ({"k": 7}, 1),
    ({"k": (4, 7), "temperature": 0.3}, 2),
    ({"k": 7, "temperature": (0.3, 0.5), "weighting": ("softmax", "uniform"), "center": True}, 3),
    ({"k": 9, "distance_metric": "manhattan"}, 1),
    ({"protocol": "dino", "k": 9, "distance_metric": "manhattan", "center": True}, 1),
    ({"k": 9, "distance_metric": "squared_euclidean", "center": True}, 1),
    ({"k": 9, "distance_metric": "euclidean", "center": True}, 1),
    ({"protocol": "dino", "k": 9, "distance_metric": "euclidean", "center": True}, 1),
    ({"protocol": "dino", "k": 9, "distance_metric": "euclidean", "weighting": "uniform"}, 1),
    ({"protocol": "dino", "k": (1, 9), "distance_metric": "dot", "center": True}, 2),
    ({"k": 300, "weighting": "softmax"}, 1),
]


@pytest.mark.parametrize(("options", "count"), GIVEN)
def test_what_is_given_is_tried_and_listed_whatever_the_protocols_have(options, count):
    explanation = explain(0.5, *DATA, **options)
    given = [one for one in explanation.settings if one.given]
    records = evaluate(*DATA, **options).records
    assert len(given) == count
    for one in given:
        vote = one.k, one.temperature, one.weighting
        votes = [((r["k"], r["temperature"], r["weighting"]), (r["k"], None, "uniform")) for r in records]
        same = [r["top1"] for r, either in zip(records, votes, strict=True) if vote in either]
        assert one.top1 == pytest.approx(same[0], abs=1.5 / 100)  # the root of twice a cosine distance is rounded
    listed = explanation.table().split("as given:")[-1]
    assert all(one.words in listed for one in given)


def test_a_given_k_and_temperature_are_tried_with_all_else():
    kinds = {
        (one.distance_metric, one.normalize, one.center, one.weighting)
        for one in explain(0.9, *DATA, k=7, temperature=0.3).settings
        if (one.k, one.temperature) == (7, 0.3)
    }
    assert kinds == {
        (one.distance_metric, one.normalize, one.center, one.weighting)
        for one in explained(0.9).settings
        if one.temperature == 0.07
    }
    assert not any(one.given for one in explained(0.9).settings)


def test_settings_that_evaluate_refuses_are_refused():
    with pytest.raises(ValueError, match="`protocol` must be one of dino"):
        explain(0.5, *DATA, protocol="dina")
    with pytest.raises(ValueError, match="distance_metric='dot'"):
        explain(0.5, *DATA, distance_metric="dot")


@pytest.mark.parametrize("target", [0, -1, 101, float("nan"), "much"])
def test_a_number_that_is_no_accuracy_is_refused(target):
    with pytest.raises(ValueError, match="`target` must be"):
        explain(target, *DATA)


def test_the_command_line_lists_and_writes_them(tmp_path, capsys):
    np.savez(tmp_path / "bank.npz", features=DATA[0], labels=DATA[1])
    np.savez(tmp_path / "queries.npz", features=DATA[2], labels=DATA[3])
    files = [str(tmp_path / "bank.npz"), str(tmp_path / "queries.npz")]
    assert main(["eval", *files, "--explain", "95.0", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "asked: 0.9500 (standard error 0.0218, 100 queries)"
    expected = explained(95.0)
    assert lines[4].endswith(expected.settings[0].words)
    saved = json.loads((tmp_path / "out/explain.json").read_text())
    assert [one["top1"] for one in saved["settings"]] == [one.top1 for one in expected.settings]
    assert main(["eval", *files, "--explain", "10", "--protocol", "moco", "--k", "7", "--temperature", "0.2"]) == 0
    given = explain(10.0, *DATA, protocol="moco", k=7, temperature=0.2)
    assert capsys.readouterr().out == f"{given.table()}\n"
    assert "as given:" in given.table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--explain", "780"], "must be an accuracy in (0, 1], or in percent up to 100, got '780'"),
        (["--explain", "0.78", "--pca", "5"], "--pca does not go with --explain"),
        (["--explain", "0.78", "--storage", "int8"], "--storage does not go with --explain"),
        (["--explain", "0.78", "--index", "ivf"], "--index does not go with --explain"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
