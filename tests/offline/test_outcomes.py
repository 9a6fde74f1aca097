"""What became of each query: right by arithmetic, kept in the folder, and told apart by which queries they were."""

from itertools import product

import numpy as np
import pytest
import torch

from faiss_knn import EvalReport, evaluate, vote
from faiss_knn.classify.vote import neighbor_weights, normalize_scores
from faiss_knn.offline import outcomes as outcomes_step
from faiss_knn.offline.accuracy import ClassJudge, MultiHotJudge, SharesJudge, neighbor_labels
from faiss_knn.offline.cli import main
from faiss_knn.offline.report.outcomes_file import pack_outcomes, read_outcomes
from faiss_knn.offline.report.results import record_key

RNG = np.random.default_rng(0)
LABELS, TRUTH = RNG.integers(0, 4, 300), RNG.integers(0, 4, 60)
BANK = (np.eye(4, 8)[LABELS] + 0.6 * RNG.standard_normal((300, 8))).astype(np.float32)
QUERIES = (np.eye(4, 8)[TRUTH] + 0.6 * RNG.standard_normal((60, 8))).astype(np.float32)
BANK[100:150] = BANK[:50]  # votes of equal weight, for other classes


def only(report):
    (record,) = report.records
    return record, report.outcomes[record_key(record)]


def same(left, right):
    assert left.keys() == right.keys()
    for key, outcome in left.items():
        assert outcome.keys() == right[key].keys()
        for name, array in outcome.items():
            assert array.dtype == right[key][name].dtype
            assert array.tolist() == right[key][name].tolist()


def test_outcomes_are_those_of_a_vote_over_all_classes():
    report = evaluate(
        BANK, LABELS, QUERIES, TRUTH, k=(1, 2, 20), weighting=("inverse", "softmax", "uniform"), keep_neighbors=True
    )
    distances, indices = map(torch.from_numpy, report.neighbors["flat"])
    for record, (k, weighting) in zip(
        report.records, product((1, 2, 20), ("inverse", "softmax", "uniform")), strict=True
    ):
        scores = vote(distances[:, :k], torch.from_numpy(LABELS)[indices[:, :k]], 4, weighting=weighting)
        weights = neighbor_weights(distances[:, :k], weighting=weighting)
        outcome = report.outcomes[record_key(record)]
        best = scores.argmax(1)
        assert outcome["prediction"].tolist() == best.tolist()
        assert outcome["correct"].tolist() == (best.numpy() == TRUTH).tolist()
        shares = normalize_scores(scores, weights).gather(1, best[:, None])[:, 0]
        assert outcome["score"] == pytest.approx(shares.numpy(), rel=1e-5)
        assert outcome["correct"].mean() == record["top1"]
        assert [outcome[x].dtype for x in ("prediction", "correct", "score")] == [np.int32, np.bool_, np.float32]


def test_leave_one_out_has_an_outcome_for_each_labelled_row():
    labels = LABELS.copy()
    labels[[3, 7]] = -1
    _, outcome = only(evaluate(BANK, labels, k=5, leave_one_out=True))
    assert outcome["row"].tolist() == [i for i in range(300) if i not in (3, 7)]
    assert outcome["label"].tolist() == [y for y in labels if y >= 0]


def test_labels_that_are_shares_or_multi_hot_have_outcomes_too():
    shares = np.full((300, 4), 0.1)
    shares[np.arange(300), LABELS] = 0.7
    record, outcome = only(evaluate(BANK, shares, QUERIES, TRUTH, k=5))
    assert outcome["correct"].mean() == record["top1"]
    assert ((outcome["prediction"] == TRUTH) == outcome["correct"]).all()
    multi_hot = np.eye(4, dtype=int)[LABELS] | np.eye(4, dtype=int)[(LABELS + 1) % 4]
    truth = np.eye(4, dtype=int)[TRUTH] | np.eye(4, dtype=int)[(TRUTH + 1) % 4]
    record, outcome = only(evaluate(BANK, multi_hot, QUERIES, truth, k=5))
    assert (truth[np.arange(60), outcome["prediction"]].astype(bool) == outcome["correct"]).all()
    assert outcome["correct"].mean() == record["top1"]
    assert "label" not in outcome


def test_without_a_vote_there_is_no_prediction():
    distances = torch.tensor([[0.1, 0.2], [torch.inf, torch.inf], [0.3, torch.inf]])
    indices = torch.tensor([[1, 0], [-1, -1], [2, -1]])
    labels, truth = torch.tensor([2, 1, 0]), torch.tensor([1, 0, 0])
    shares = torch.eye(3)[labels]
    for judge in (
        ClassJudge(distances, neighbor_labels(indices, labels), truth, 3),
        SharesJudge(distances, indices, shares, truth),
        MultiHotJudge(distances, indices, shares.long(), torch.eye(3).long()[truth]),
    ):
        hits = judge.judge(2, 0.07, "inverse", {})
        assert hits.prediction.tolist() == [1, -1, 0]
        assert hits.top1.tolist() == [True, False, True]
        assert hits.share.tolist()[1:] == [0.0, 1.0]


def test_of_equal_votes_the_lowest_class_is_predicted():
    for labels in ([1, 0], [[0.5, 0.5], [0.5, 0.5]]):
        _, outcome = only(evaluate(np.ones((2, 2)), np.array(labels), np.ones((1, 2)), [1], k=2))
        assert outcome["prediction"].tolist() == [0]
        assert outcome["score"].tolist() == [0.5]
        assert not outcome["correct"][0]


def test_each_few_shot_draw_has_outcomes_of_its_own(tmp_path):
    report = evaluate(BANK, LABELS, QUERIES, TRUTH, k=(1, 5), per_class=5, tries=3, seed=4)
    report.save(tmp_path)
    same(EvalReport.load(tmp_path).outcomes, report.outcomes)
    for record in report.records:
        outcome = report.outcomes[record_key(record)]
        assert outcome["row"].tolist() == list(range(60))
        assert [outcome[name].shape for name in ("prediction", "correct", "score")] == [(3, 60)] * 3
        assert (outcome["correct"] == (outcome["prediction"] == TRUTH)).all()
        assert outcome["correct"].mean() == pytest.approx(record["top1"])
        assert outcome["correct"].mean(1).std(ddof=1) == pytest.approx(record["top1_std"])
    first = evaluate(BANK, LABELS, QUERIES, TRUTH, k=(1, 5), per_class=5, tries=1, seed=4)
    for several, alone in zip(report.outcomes.values(), first.outcomes.values(), strict=True):
        assert several["prediction"][0].tolist() == alone["prediction"].tolist()


def test_groups_of_queries_are_kept(tmp_path):
    groups = np.array([f"scene {i // 7}" for i in range(60)])
    report = evaluate(BANK, LABELS, QUERIES, TRUTH, k=1, groups=groups)
    report.save(tmp_path)
    (outcome,) = EvalReport.load(tmp_path).outcomes.values()
    assert (outcome["group"][:, None] == outcome["group"]).tolist() == (groups[:, None] == groups).tolist()


def test_nothing_is_kept_on_refusal_or_beyond_the_bound(monkeypatch):
    assert not evaluate(BANK, LABELS, QUERIES, TRUTH, k=1, keep_outcomes=False).outcomes
    monkeypatch.setattr(outcomes_step, "_KEPT_UNASKED", 2 * 9 * 60 - 1)
    assert len(evaluate(BANK, LABELS, QUERIES, TRUTH, k=1).outcomes) == 1
    assert not evaluate(BANK, LABELS, QUERIES, TRUTH, k=(1, 2)).outcomes
    assert len(evaluate(BANK, LABELS, QUERIES, TRUTH, k=1, per_class=5, tries=1).outcomes) == 1
    assert not evaluate(BANK, LABELS, QUERIES, TRUTH, k=1, per_class=5, tries=2).outcomes
    assert len(evaluate(BANK, LABELS, QUERIES, TRUTH, k=(1, 2), keep_outcomes=True).outcomes) == 2


def test_a_saved_report_is_read_back_and_its_folder_grows(tmp_path):
    first = evaluate(BANK, LABELS, QUERIES, TRUTH, k=(1, 5), index=("flat", "IVF4,Flat"))
    first.save(tmp_path)
    same(EvalReport.load(tmp_path).outcomes, first.outcomes)
    second = evaluate(BANK, LABELS, k=5, leave_one_out=True)
    second.save(tmp_path)
    same(EvalReport.load(tmp_path).outcomes, first.outcomes | second.outcomes)
    with np.load(tmp_path / "outcomes.npz", allow_pickle=False) as held:
        assert [name for name in held if name.startswith("queries/")] == [
            "queries/0/row", "queries/0/label", "queries/1/row", "queries/1/label",
        ]  # fmt: skip
        assert held["records"].tolist() == [record_key(r) for r in first.records + second.records]
    second.save(tmp_path, overwrite=True)
    same(EvalReport.load(tmp_path).outcomes, second.outcomes)
    evaluate(BANK, LABELS, k=5, leave_one_out=True, keep_outcomes=False).save(tmp_path)
    assert not EvalReport.load(tmp_path).outcomes  # the record is another run's now


def test_the_command_writes_them_and_resumes_with_them(tmp_path):
    np.savez(tmp_path / "bank.npz", features=BANK, labels=LABELS)
    np.savez(tmp_path / "queries.npz", features=QUERIES, labels=TRUTH)
    command = ["eval", str(tmp_path / "bank.npz"), str(tmp_path / "queries.npz"), "--out", str(tmp_path / "out")]
    assert main([*command, "--k", "1", "5"]) == 0
    before = EvalReport.load(tmp_path / "out")
    assert main([*command, "--k", "1", "5", "--resume"]) == 0
    after = EvalReport.load(tmp_path / "out")
    same(before.outcomes, after.outcomes)
    assert [o["correct"].mean() for o in after.outcomes.values()] == [r["top1"] for r in after.records]


def test_a_run_that_is_cut_off_keeps_the_outcomes_of_its_records(tmp_path, monkeypatch):
    np.savez(tmp_path / "bank.npz", features=BANK, labels=LABELS)
    np.savez(tmp_path / "queries.npz", features=QUERIES, labels=TRUTH)
    out = tmp_path / "out"
    command = ["eval", str(tmp_path / "bank.npz"), str(tmp_path / "queries.npz"), "--out", str(out), "--k", "1", "5"]

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(EvalReport, "save", cut)
        assert main(command) == 130
    left = EvalReport.load(out)
    assert [left.outcomes[record_key(r)]["correct"].mean() for r in left.records] == [r["top1"] for r in left.records]
    assert main([*command, "--resume", "--index", "flat", "IVF4,Flat"]) == 0
    whole = EvalReport.load(out)
    assert len(whole.outcomes) == 4
    same(left.outcomes, {key: whole.outcomes[key] for key in left.outcomes})
    assert [path.name for path in out.glob("outcomes*")] == ["outcomes.npz"]


def test_a_file_that_is_none_of_outcomes_is_refused_at_once(tmp_path):
    report = evaluate(BANK, LABELS, QUERIES, TRUTH, k=1)
    report.save(tmp_path)
    (tmp_path / "outcomes.npz").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"outcomes.npz: is no file of outcomes: remove it"):
        report.save(tmp_path)
    with pytest.raises(ValueError, match=r"outcomes.npz: cannot be read"):
        EvalReport.load(tmp_path)
    report.save(tmp_path, overwrite=True)
    same(EvalReport.load(tmp_path).outcomes, report.outcomes)


def test_what_a_cut_leaves_is_the_old_file(tmp_path):
    report = evaluate(BANK, LABELS, QUERIES, TRUTH, k=1)
    report.save(tmp_path)
    (tmp_path / "outcomes.npz.partial").write_bytes(pack_outcomes(report.outcomes)[:100])
    same(read_outcomes(tmp_path), report.outcomes)


def fingerprint(bank_labels, query_labels, queries=QUERIES, **options):
    record, _ = only(evaluate(BANK, bank_labels, queries, query_labels, k=1, **options))
    return record["query_fingerprint"]


def test_the_fingerprint_is_of_the_queries_rows_and_classes_alone():
    own = fingerprint(LABELS, TRUTH)
    assert own == fingerprint(LABELS[::-1], TRUTH, QUERIES * 2, distance_metric="euclidean")
    other = TRUTH.copy()
    other[5] = (other[5] + 1) % 4
    assert own != fingerprint(LABELS, other)
    assert own != fingerprint(LABELS, TRUTH[:-1], QUERIES[:-1])
    left_out = TRUTH.copy()
    left_out[5] = -1
    assert len({own, fingerprint(LABELS, other), fingerprint(LABELS, left_out)}) == 3
    alike = [np.where(np.arange(60) == row, -1, 0) for row in (3, 7)]  # the same labels, of other rows
    assert fingerprint(LABELS, alike[0]) != fingerprint(LABELS, alike[1])
    names = np.array(["ant", "bee", "cat", "dog"])
    assert fingerprint(names[LABELS], names[TRUTH]) != own
    more = np.where(np.arange(300) < 5, "aardvark", names[LABELS])  # numbers shift, names do not
    assert fingerprint(more, names[TRUTH]) == fingerprint(names[LABELS], names[TRUTH])
