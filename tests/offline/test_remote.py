"""Features named by URL, on the file systems of fsspec that need no network, and folders larger than what is held."""

import json

import fsspec
import numpy as np
import pytest
from sklearn.datasets import load_digits

from faiss_knn import evaluate, exact_neighbors, extract, read_features
from faiss_knn.offline import features as reader
from faiss_knn.offline import formats, parquet_rows, remote, streaming
from faiss_knn.offline.cli import main
from faiss_knn.offline.features import open_features
from faiss_knn.offline.formats import DataError
from faiss_knn.offline.lazy_rows import Shards
from faiss_knn.offline.remote import RemoteRows
from tests.offline.test_resumable_neighbors import Watched

DIGITS = load_digits().data.astype(np.float32)[:300]
LABELS = load_digits().target[:300]


def as_npy(path, rows):
    np.save(path, rows)


def as_fbin(path, rows):
    path.write_bytes(np.array(rows.shape, "<u4").tobytes() + rows.astype("<f4").tobytes())


def as_fvecs(path, rows):
    path.write_bytes(np.hstack([np.full((len(rows), 1), rows.shape[1], "<i4").view("<f4"), rows]).tobytes())


def as_h5(path, rows):
    import h5py

    with h5py.File(path, "w") as file:
        file["features"] = rows


def as_parquet(path, rows):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"emb": list(rows), "label": LABELS[: len(rows)]}), path)


def as_npz(path, rows):
    np.savez(path, features=rows, labels=LABELS[: len(rows)])


WRITERS = {"npy": as_npy, "fbin": as_fbin, "fvecs": as_fvecs, "h5": as_h5, "parquet": as_parquet, "npz": as_npz}


@pytest.fixture(params=["memory", "local"])
def place(request, tmp_path):
    """The URL of an empty folder, and a function that puts a file there."""
    url = "memory://tests/bank" if request.param == "memory" else f"local://{tmp_path}/bank"
    system, key = fsspec.core.url_to_fs(url)
    system.makedirs(key, exist_ok=True)

    def put(name, ending, rows):
        local = tmp_path / f"made.{ending}"
        WRITERS[ending](local, rows)
        system.put_file(str(local), f"{key}/{name}.{ending}")
        return f"{url}/{name}.{ending}"

    yield url, put
    system.rm(key, recursive=True)


@pytest.mark.parametrize("ending", WRITERS)
def test_a_file_elsewhere_is_read(place, ending, monkeypatch):
    monkeypatch.setattr(remote, "_RANGE_BYTES", 1000)
    url = place[1]("bank", ending, DIGITS)
    found = read_features(url)
    assert found.rows.shape == (300, 64)
    assert isinstance(found.rows, RemoteRows) == (ending in ("npy", "fbin", "fvecs"))
    np.testing.assert_array_equal(found.rows[7:120], DIGITS[7:120])
    np.testing.assert_array_equal(found.rows[np.array([3, 8, 299])], DIGITS[[3, 8, 299]])
    assert found.source == url
    assert (found.labels is None) == (ending not in ("parquet", "npz"))


def test_a_bank_elsewhere_is_searched_in_one_pass(place, monkeypatch):
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 70)
    bank = Watched(open_features(place[1]("bank", "npy", DIGITS)))
    found = exact_neighbors(bank, DIGITS[:40], 5, distance_metric="cosine")
    assert bank.read == [(0, 70), (70, 140), (140, 210), (210, 280), (280, 300)]
    whole = exact_neighbors(DIGITS, DIGITS[:40], 5, distance_metric="cosine")
    np.testing.assert_array_equal(found.distances, whole.distances)
    np.testing.assert_array_equal(found.indices, whole.indices)


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_a_folder_elsewhere_is_read_in_the_order_of_its_numbers(place, ending):
    url, put = place
    for number, start in ((10, 200), (2, 100), (1, 0)):
        put(f"part-{number}", ending, DIGITS[start : start + 100])
    np.testing.assert_array_equal(open_features(url)[:], DIGITS)


def test_an_extraction_elsewhere_is_read_by_its_manifest(place, tmp_path):
    import torch

    rows = torch.from_numpy(DIGITS)
    loader = [(rows[i : i + 100], torch.from_numpy(LABELS[i : i + 100])) for i in range(0, 300, 100)]
    extract(torch.nn.Identity(), loader, tmp_path / "features", shard_rows=100)
    system, key = fsspec.core.url_to_fs(place[0])
    for file in (tmp_path / "features").iterdir():
        system.put_file(str(file), f"{key}/{file.name}")
    found = read_features(place[0])
    np.testing.assert_array_equal(found.rows[:], DIGITS)
    np.testing.assert_array_equal(found.labels, LABELS)


def test_files_are_written_here_from_features_elsewhere(place, tmp_path, capsys):
    url = place[1]("bank", "npy", DIGITS)
    assert main(["neighbors", url, "--k", "3", "--out", str(tmp_path / "lists.npz")]) == 0
    assert main(["verify", str(tmp_path / "lists.npz"), url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["recall_ids"] == 1.0


def test_eval_takes_urls(place, tmp_path):
    url = place[1]("bank", "npz", DIGITS)
    assert main(["eval", url, "--leave-one-out", "--k", "5", "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert record["top1"] == evaluate(DIGITS, LABELS, leave_one_out=True, k=5).best()["top1"]
    assert record["bank_file"] == url


def test_a_file_url_is_a_path_of_this_machine(tmp_path):
    np.save(tmp_path / "a b.npy", DIGITS)
    assert isinstance(open_features(f"file://{tmp_path}/a%20b.npy"), np.memmap)


def test_what_is_not_there_or_damaged_is_said_with_its_url(place):
    url, put = place
    system, key = fsspec.core.url_to_fs(url)
    with pytest.raises(DataError, match=r"none\.npy: no such file"):
        read_features(f"{url}/none.npy")
    for ending in ("npy", "fbin", "fvecs", "parquet", "h5"):
        put("bank", ending, DIGITS)
        system.pipe_file(f"{key}/bank.{ending}", system.cat_file(f"{key}/bank.{ending}")[:-10])
        with pytest.raises(DataError, match=rf"^{url}/bank\.{ending}: cannot be read as"):
            read_features(f"{url}/bank.{ending}")


def test_kinds_of_urls_that_cannot_be_read_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"^nothing://a/b\.npy: cannot be read: Protocol not known: nothing"):
        read_features("nothing://a/b.npy")
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"^s3://a/b\.npy: cannot be read: "):
        read_features("s3://a/b.npy")


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_of_a_folder_beyond_memory_one_file_at_a_time_is_held(tmp_path, monkeypatch, ending):
    for number in range(6):
        WRITERS[ending](tmp_path / f"part-{number}.{ending}", DIGITS[50 * number : 50 * (number + 1)])
    monkeypatch.setattr(reader, "_HELD_BYTES", 2 * DIGITS[:50].nbytes)
    opened = []
    open_arrays = formats.open_arrays
    monkeypatch.setattr(reader, "open_arrays", lambda path: opened.append(path.name) or open_arrays(path))
    rows = open_features(tmp_path)
    assert isinstance(rows, Shards)
    assert [isinstance(part, np.ndarray) for part in rows.parts] == [True] * 2 + [False] * 4
    opened.clear()
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 20)
    found = exact_neighbors(rows, DIGITS[:40], 5, distance_metric="cosine")
    np.testing.assert_array_equal(found.indices, exact_neighbors(DIGITS, DIGITS[:40], 5, distance_metric="cosine")[1])
    assert opened == [f"part-{number}.{ending}" for number in range(2, 6)]  # each once in a pass


def parquet_of(path, rows, row_group_size, kind):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {f"x{i}": column for i, column in enumerate(rows.T)} if kind == "columns" else {"emb": list(rows)}
    if kind == "fixed":
        flat = pa.array(rows.ravel())
        columns = {"emb": pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])}
    table = pa.table(columns | {"label": np.arange(len(rows)) % 3})
    parquet.write_table(table, path, row_group_size=row_group_size)


@pytest.mark.parametrize("row_group_size", [70, 1000])
@pytest.mark.parametrize("kind", ["lists", "fixed", "columns"])
def test_a_parquet_file_beyond_memory_is_decoded_once_a_pass(tmp_path, monkeypatch, kind, row_group_size):
    parquet_of(tmp_path / "bank.parquet", DIGITS, row_group_size, kind)
    monkeypatch.setattr(parquet_rows, "_HELD_BYTES", DIGITS.nbytes - 1)
    monkeypatch.setattr(parquet_rows, "_DECODED_BYTES", 4 * 64 * 20)
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 50)
    decoded = []
    rows_of = parquet_rows.ParquetRows._rows

    def counted(self, batch, first):
        decoded.append(batch.num_rows)
        return rows_of(self, batch, first)

    monkeypatch.setattr(parquet_rows.ParquetRows, "_rows", counted)
    rows = open_features(tmp_path / "bank.parquet")
    assert (rows.shape, rows.dtype) == ((300, 64), np.float32)
    for part in (slice(70, 130), slice(250, 3, -7), slice(9, 9), slice(None)):
        np.testing.assert_array_equal(rows[part], DIGITS[part])
    np.testing.assert_array_equal(rows[np.array([200, 5, 299])], DIGITS[[200, 5, 299]])
    rows = open_features(tmp_path / "bank.parquet")
    decoded.clear()
    found = exact_neighbors(rows, DIGITS[:40], 5, distance_metric="cosine")
    np.testing.assert_array_equal(found.indices, exact_neighbors(DIGITS, DIGITS[:40], 5, distance_metric="cosine")[1])
    assert sum(decoded) == 300
    assert max(decoded) <= 20
    for place in (slice(200, 260), slice(0, 5), slice(10, 10), slice(7, 290, 3), np.array([3, 8, 299]), ...):
        np.testing.assert_array_equal(rows[place], DIGITS[place])
    decoded.clear()
    np.testing.assert_array_equal(rows[290:], DIGITS[290:])
    assert sum(decoded) <= (70 if row_group_size == 70 else 300) + 20
    assert read_features(tmp_path / "bank.parquet").labels.tolist() == [i % 3 for i in range(300)]


def test_what_is_wrong_in_a_row_far_within_a_parquet_file_is_named(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr(parquet_rows, "_HELD_BYTES", 0)
    monkeypatch.setattr(parquet_rows, "_DECODED_BYTES", 4 * 64 * 20)
    for wrong, message in {
        "null": (None, "column 'emb' has 1 nulls, in rows 233"),
        "short": (DIGITS[0, :63], "'emb' holds vectors of different lengths, 64 in row 220, but not in 233"),
        "hole": ([*DIGITS[0, :63], None], "column 'emb' has nulls within 1 vectors, in rows 233"),
    }.values():
        lists = [*DIGITS[:233], wrong, *DIGITS[234:]]
        parquet.write_table(pa.table({"emb": lists}), tmp_path / "bank.parquet", row_group_size=100)
        with pytest.raises(DataError, match=rf"bank\.parquet: cannot be read as \.parquet: .*{message}"):
            open_features(tmp_path / "bank.parquet")[:]
    parquet.write_table(pa.table({"emb": [*DIGITS[:240], *DIGITS[240:, :63]]}), tmp_path / "bank.parquet")
    with pytest.raises(DataError, match="'emb' holds vectors of different lengths, 64 in row 0, but not in 240"):
        open_features(tmp_path / "bank.parquet")[:]


def test_a_parquet_file_elsewhere_is_decoded_in_parts(place, monkeypatch):
    monkeypatch.setattr(parquet_rows, "_HELD_BYTES", 0)
    rows = open_features(place[1]("bank", "parquet", DIGITS))
    assert not isinstance(rows, np.ndarray)
    np.testing.assert_array_equal(rows[100:200], DIGITS[100:200])
