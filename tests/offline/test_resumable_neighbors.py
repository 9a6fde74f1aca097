"""A long search that is cut off: the next run reads no block again, and finds what an uninterrupted one finds."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from faiss_knn import exact_neighbors
from faiss_knn.offline import resumable_neighbors, streaming
from faiss_knn.offline.resumable_neighbors import forget_pieces, search_resumably

DIGITS = load_digits().data.astype(np.float32)[:400]
OPTIONS = {"distance_metric": "cosine", "exclude_self": False, "progress": False}


class Watched:
    """Rows that note what is read of them, and end when it is too much."""

    def __init__(self, rows, most=10**9):
        self.rows, self.most, self.read = rows, most, []
        self.shape, self.dtype = rows.shape, rows.dtype

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, rows):
        if rows.stop - rows.start > 1:  # not the few that tell data apart
            self.read.append((rows.start, rows.stop))
        if len(self.read) > self.most:
            raise RuntimeError("killed")
        return self.rows[rows]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "BANK_BLOCK_BYTES", 4 * 64 * 100)
    monkeypatch.setattr(streaming, "QUERY_BLOCK", 30)


def cut_off(folder, blocks=2, queries=DIGITS[:50], **options):
    with pytest.raises(RuntimeError, match="killed"):
        search_resumably(Watched(DIGITS, blocks), queries, 5, folder=folder, **OPTIONS | options)


def test_a_run_goes_on_after_the_last_block(tmp_path):
    cut_off(tmp_path / "parts")
    bank = Watched(DIGITS)
    (distances, indices), tied = search_resumably(bank, DIGITS[:50], 5, folder=tmp_path / "parts", **OPTIONS)
    assert bank.read == [(200, 300), (300, 400)]
    whole = exact_neighbors(DIGITS, DIGITS[:50], 6, distance_metric="cosine")
    np.testing.assert_array_equal(distances, whole.distances[:, :5])
    np.testing.assert_array_equal(indices, whole.indices[:, :5])
    np.testing.assert_array_equal(tied, whole.distances[:, 5] == whole.distances[:, 4])
    assert (tmp_path / "parts").is_dir()
    forget_pieces(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_a_run_cut_off_within_a_block_searches_it_for_the_other_queries_alone(tmp_path, monkeypatch):
    keep = resumable_neighbors.SearchedPieces.save
    calls = []

    def save(self, first, searched, found):
        calls.append((first, searched))
        if len(calls) == 4:
            raise RuntimeError("killed")
        keep(self, first, searched, found)

    monkeypatch.setattr(resumable_neighbors.SearchedPieces, "save", save)
    cut_off(tmp_path, blocks=9)
    bank = Watched(DIGITS)
    found = search_resumably(bank, DIGITS[:50], 5, folder=tmp_path, **OPTIONS)[0]
    assert calls[3:5] == [(30, 200), (30, 200)]  # those from 0 on were searched for in that block
    assert bank.read[0] == (100, 200)
    np.testing.assert_array_equal(found.indices, exact_neighbors(DIGITS, DIGITS[:50], 5, distance_metric="cosine")[1])


def test_pieces_of_another_search_are_not_gone_on_with(tmp_path):
    for name, change in {
        "k": {}, "queries": {"queries": DIGITS[1:51]}, "distance": {"distance_metric": "euclidean"},
    }.items():  # fmt: skip
        cut_off(tmp_path / name, **change)
        bank = Watched(DIGITS)
        search_resumably(bank, DIGITS[:50], 5 + (name == "k"), folder=tmp_path / name, **OPTIONS)
        assert len(bank.read) == 4, name


def test_a_damaged_piece_is_searched_for_again(tmp_path):
    cut_off(tmp_path)
    piece = sorted(tmp_path.glob("queries-*.npz"))[0]
    piece.write_bytes(piece.read_bytes()[:-30])
    bank = Watched(DIGITS)
    found = search_resumably(bank, DIGITS[:50], 5, folder=tmp_path, **OPTIONS)[0]
    assert len(bank.read) == 4
    np.testing.assert_array_equal(found.indices, exact_neighbors(DIGITS, DIGITS[:50], 5, distance_metric="cosine")[1])


def test_own_rows_are_left_out_and_ties_marked(tmp_path):
    rows = np.repeat(np.arange(6.0, dtype=np.float32), 3)[:, None] + 1
    found, tied = search_resumably(
        rows, None, 3, folder=tmp_path, distance_metric="euclidean", exclude_self=True, progress=False
    )
    whole = exact_neighbors(rows, k=4, distance_metric="euclidean")
    np.testing.assert_array_equal(found.indices, whole.indices[:, :3])
    np.testing.assert_array_equal(tied, whole.distances[:, 3] == whole.distances[:, 2])
    assert tied.all()  # two twins, then one of three or six that are one step away
