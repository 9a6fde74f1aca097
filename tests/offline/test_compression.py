"""Fewer dimensions and fewer bits against their definitions, written out in numpy on the digits of scikit-learn."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from faiss_knn import compare, evaluate
from faiss_knn.offline import search as search_step
from faiss_knn.offline.cli import main
from faiss_knn.offline.lazy_rows import Shards
from faiss_knn.offline.principal import principal_axes

FEATURES, LABELS = load_digits(return_X_y=True)
FEATURES = FEATURES.astype(np.float32) - 5  # some of both signs in each row
BANK, BANK_LABELS, QUERIES, QUERY_LABELS = FEATURES[:700], LABELS[:700], FEATURES[700:850], LABELS[700:850]
OPTIONS = {"k": 10, "keep_neighbors": True}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def table(queries, bank, metric):
    queries, bank = queries.astype(np.float64), bank.astype(np.float64)
    if metric == "cosine":
        return 1 - unit(queries) @ unit(bank).T
    if metric == "dot":
        return -queries @ bank.T
    gaps = queries[:, None] - bank[None]
    return {
        "euclidean": np.sqrt((gaps**2).sum(2)),
        "squared_euclidean": (gaps**2).sum(2),
        "manhattan": np.abs(gaps).sum(2),
    }[metric]


def lists(distances, k=10):
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order


def run(metric="cosine", bank=BANK, **options):
    weighting = "uniform" if metric == "dot" else "inverse"
    return evaluate(
        bank, BANK_LABELS, QUERIES, QUERY_LABELS, distance_metric=metric, weighting=weighting, **OPTIONS | options
    )


def check(report, name, expected, metric="cosine", decimals=5):
    """Distances are those expected, and so are the rows but where two are as far but for rounding."""
    distances, indices = report.neighbors[name]
    wanted, _ = lists(expected)
    np.testing.assert_allclose(distances, wanted, rtol=1e-4, atol=10.0**-decimals)
    np.testing.assert_allclose(np.take_along_axis(expected, indices, 1), wanted, rtol=1e-4, atol=10.0**-decimals)
    record = next(
        r for r in report.records if " ".join(["flat", *(f"{a}={b}" for a, b in r["settings"].items())]) == name
    )
    exact = lists(table(QUERIES, BANK, metric))[1]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(indices, exact, strict=True)])
    assert record["recall"] == record["recall_ids"] == pytest.approx(shared, abs=2e-3)
    assert record["accuracy_loss"] == pytest.approx(report.records[0]["top1"] - record["top1"])
    assert not record["exact"]
    return record


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "dot", "manhattan"])
def test_the_first_dimensions(metric):
    report = run(metric, dims=20)
    record = check(report, "flat dims=20", table(QUERIES[:, :20], BANK[:, :20], metric), metric)
    assert (record["row_bytes"], report.records[0]["row_bytes"], record["dim"]) == (80, 256, 64)


def test_lengths_before_and_after_the_cut():
    whole = table(unit(QUERIES)[:, :20], unit(BANK)[:, :20], "dot") + 1
    check(run(dims="20:whole"), "flat dims=20:whole", whole)
    short = table(unit(QUERIES[:, :20]), unit(BANK[:, :20]), "euclidean")
    check(run("euclidean", dims="20:unit"), "flat dims=20:unit", short, "euclidean")
    cut = table(unit(QUERIES)[:, :20], unit(BANK)[:, :20], "euclidean")
    check(run("euclidean", dims="20:whole"), "flat dims=20:whole", cut, "euclidean")


def test_principal_axes_of_the_bank_alone():
    turned = PCA(12).fit(BANK.astype(np.float64))
    expected = table(turned.transform(QUERIES), turned.transform(BANK), "euclidean")
    check(run("euclidean", dims="pca12"), "flat dims=pca12", expected, "euclidean", decimals=4)
    report = run("euclidean", pca=12)
    np.testing.assert_allclose(report.neighbors["flat"][0], lists(expected)[0], rtol=1e-4)
    assert (report.records[0]["pca"], report.records[0]["dim"]) == (12, 12)


def int8(rows, of):
    scales = np.abs(of).max(0) / 127
    scales[scales == 0] = 1
    return np.round(rows / scales) * scales


@pytest.mark.parametrize("metric", ["cosine", "squared_euclidean"])
@pytest.mark.parametrize("pieces", [False, True])
def test_int8_has_a_scale_for_each_column(monkeypatch, metric, pieces):
    monkeypatch.setattr(search_step, "BANK_BLOCK_BYTES", 4 * 64 * 97 if pieces else 1 << 28)
    rows = (unit(BANK.astype(np.float64)) if metric == "cosine" else BANK).astype(np.float64)
    report = run(metric, storage="int8", bank=Shards([BANK[:300], BANK[300:]]) if pieces else BANK)
    record = check(report, "flat storage=int8", table(QUERIES, int8(rows, rows), metric), metric, decimals=4)
    assert (record["bytes"], record["storage_dtype"]) == (700 * 64 + 4 * 64, "int8")


def test_a_row_too_small_for_a_code_keeps_its_direction():
    bank = np.vstack([np.eye(3), [[1e-3, -2e-3, 1e-3]]]).astype(np.float32)
    report = evaluate(
        bank, [0, 1, 2, 3], [[0.0, -1.0, 0.0]], [3], k=1, storage="int8", distance_metric="euclidean",
        keep_neighbors=True,
    )  # fmt: skip
    assert report.neighbors["flat storage=int8"][1].tolist() == [[3]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "squared_euclidean", "manhattan", "dot"])
def test_signs_are_as_far_as_the_vectors_they_stand_for(metric):
    signs = [np.where(rows > 0, 1.0, -1.0) for rows in (QUERIES, BANK)]
    expected = table(*signs, metric).round(9)
    report = run(metric, storage="binary")
    record = check(report, "flat storage=binary", expected, metric)
    np.testing.assert_array_equal(report.neighbors["flat storage=binary"][1], lists(expected)[1])  # ties by row
    assert (record["bytes"], record["row_bytes"]) == (700 * 8, 8)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_candidates_by_signs_are_scored_again_by_the_whole_query(metric):
    signs = np.where(BANK > 0, 1.0, -1.0)
    differing = (np.sign(QUERIES) * 1.0 > 0)[:, None] != (BANK > 0)[None]
    candidates = lists(differing.sum(2), 30)[1]
    again = np.full((150, 700), np.inf)
    scored = table(QUERIES, signs, metric)
    np.put_along_axis(again, candidates, np.take_along_axis(scored, candidates, 1), 1)
    report = run(metric, storage=("binary", "binary:3"))
    record = check(report, "flat storage=binary:3", again, metric)
    assert record["bytes"] == 700 * 8
    by_storage = {r["settings"].get("storage"): r["recall"] for r in report.records}
    assert by_storage["binary:3"] > by_storage["binary"]


def test_float16_rows_are_rounded_and_each_storage_goes_with_each_width():
    report = run("euclidean", dims=(16, "pca8"), storage=("float16", "int8", "binary"))
    names = [tuple(record["settings"].values()) for record in report.records]
    kinds = ["float16", "int8", "binary"]
    assert names == [
        (),
        *((x,) for x in kinds),
        (16,),
        *((16, x) for x in kinds),
        ("pca8",),
        *(("pca8", x) for x in kinds),
    ]
    sizes = {name: record["row_bytes"] for name, record in zip(names, report.records, strict=True)}
    assert sizes[16, "float16"] == 32
    assert sizes[16, "binary"] == 2
    assert sizes["pca8", "int8"] == pytest.approx(8 + 4 * 8 / 700)
    check(report, "flat storage=float16", table(QUERIES, BANK.astype(np.float16), "euclidean"), "euclidean")
    cut = BANK[:, :16].astype(np.float64)
    check(report, "flat dims=16 storage=int8", table(QUERIES[:, :16], int8(cut, cut), "euclidean"), "euclidean", 4)


def test_whitening_leaves_out_what_does_not_vary_and_signs_do_not_depend_on_the_order():
    rows = BANK.astype(np.float64)
    mean, axes = principal_axes(rows, whiten=True)
    varying = int((rows.std(0) > 0).sum())
    assert axes.shape == (64, np.linalg.matrix_rank(rows - rows.mean(0)))
    assert axes.shape[1] <= varying < 64
    white = (rows - mean.numpy()) @ axes.numpy()
    np.testing.assert_allclose(white.T @ white / 700, np.eye(axes.shape[1]), atol=1e-8)
    again = principal_axes(rows[::-1].copy(), whiten=True).directions
    np.testing.assert_allclose(again[:, :20], axes[:, :20], rtol=1e-6, atol=1e-9)
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()
    asked = (QUERIES - mean.numpy()) @ axes.numpy()
    report = run("euclidean", whiten=True)
    expected = lists(table(asked, white, "euclidean"))[0]
    np.testing.assert_allclose(report.neighbors["flat"][0], expected, rtol=1e-4)
    assert report.records[0]["whiten"] is True


def test_leave_one_out_and_groups_hold_for_compressed_rows():
    report = evaluate(
        BANK, BANK_LABELS, leave_one_out=True, groups=np.arange(700) // 3, exclude_same_group=True, dims=16,
        storage=("int8", "binary"), **OPTIONS,
    )  # fmt: skip
    for _, indices in report.neighbors.values():
        assert not (indices // 3 == (np.arange(700) // 3)[:, None]).any()
        assert (indices >= 0).all()


def test_a_results_folder_takes_them_up_again_and_the_report_shows_them(tmp_path, capsys):
    np.savez(tmp_path / "bank.npz", features=BANK, labels=BANK_LABELS)
    np.savez(tmp_path / "queries.npz", features=QUERIES, labels=QUERY_LABELS)
    out = tmp_path / "out"
    arguments = ["eval", str(tmp_path / "bank.npz"), str(tmp_path / "queries.npz"), "--k", "5", "--out", str(out)]
    arguments += ["--dims", "pca8", "--storage", "binary:2"]
    assert main(arguments) == 0
    before = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(before) == 4
    assert main([*arguments, "--resume"]) == 0
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == before
    assert len({json.dumps(record["settings"]) for record in before}) == 4
    page = (out / "report.md").read_text()
    assert "flat dims=pca8 storage=binary:2" in page
    assert "bytes a row" in page
    capsys.readouterr()
    for bad in (["--dims", "0"], ["--storage", "int4"], ["--dims", "pca8:unit"]):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, *bad])
        assert capsys.readouterr().err.count("\n") == 1


def test_compressed_runs_are_compared_with_their_like():
    runs = [run(bank=bank, dims=16, storage="binary") for bank in (BANK, BANK + 1)]
    settings = [row["setting"] for row in compare(*runs).table()]
    assert len(settings) == len(set(settings)) == 4
    assert any("flat dims=16 storage=binary" in setting for setting in settings)


def test_records_name_what_was_done_beside_a_protocol():
    report = evaluate(BANK, BANK_LABELS, QUERIES, QUERY_LABELS, protocol="dino", k=5, pca=8, whiten=True)
    assert report.records[0]["protocol"] == "dino, k=5, pca=8, whiten=True"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 65}, "`dims` must be at most the width of the features, 64, got 65"),
        ({"dims": "64:long"}, "`dims` must be numbers of dimensions: 64, or 64:unit, 64:whole, pca64"),
        ({"dims": True}, "`dims` must be numbers of dimensions"),
        ({"dims": "8:unit"}, "cosine divides by the lengths of cut rows by itself: give 8"),
        ({"storage": "int4"}, "`storage` must be float16, bfloat16, int8, binary"),
        ({"storage": "binary:2", "metric": "euclidean"}, "for the distances cosine and dot, got euclidean"),
        ({"pca": 64}, "`pca` must be at most 58, the axes along which the bank varies, got 64"),
        ({"pca": 0}, "`pca` must be a positive integer, got 0"),
        ({"dims": "pca64"}, "`dims` must be at most 58, the axes along which the bank varies"),
        ({"nprobe": 4}, "`nprobe` is for indexes with inverted lists, got index='flat'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_tensors_are_compressed_as_arrays_are():
    options = {"dims": (16, "pca8"), "storage": ("int8", "binary")}
    as_tensor, as_array = run(bank=torch.from_numpy(BANK), **options), run(**options)
    for name, (_, indices) in as_array.neighbors.items():
        np.testing.assert_array_equal(as_tensor.neighbors[name][1], indices)
