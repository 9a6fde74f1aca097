"""Files of neighbours, each read back by those who define it: h5py, SciPy, pyarrow, or by hand from the layout."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.datasets import load_digits

from faiss_knn.offline.formats import DataError
from faiss_knn.offline.neighbor_files import NeighborLists, read_neighbors, write_neighbors
from faiss_knn.offline.neighbors import exact_neighbors, is_tied

DIGITS = load_digits().data.astype(np.float32)[:300]


def lists_of(rows, queries=None, k=4, metric="euclidean"):
    deeper = exact_neighbors(rows, queries, k + 1, distance_metric=metric)
    indices, distances = deeper.indices[:, :k].numpy(), deeper.distances[:, :k].numpy()
    asked = rows if queries is None else queries
    return NeighborLists(indices, distances, is_tied(deeper, k).numpy(), metric, rows, asked, is_own=queries is None)


LISTS = lists_of(DIGITS)
SOME = lists_of(DIGITS, DIGITS[:7] + 0.25, metric="cosine")


def test_npz(tmp_path):
    assert write_neighbors(tmp_path / "a" / "lists.npz", LISTS) == [tmp_path / "a" / "lists.npz"]
    with np.load(tmp_path / "a" / "lists.npz") as held:
        np.testing.assert_array_equal(held["indices"], LISTS.indices)
        np.testing.assert_array_equal(held["distances"], LISTS.distances)
        np.testing.assert_array_equal(held["tied"], LISTS.tied)
        assert str(held["distance_metric"]) == "euclidean"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["lists.npz"]


def test_ground_truth_of_big_ann(tmp_path):
    write_neighbors(tmp_path / "gt.bin", SOME)
    content = (tmp_path / "gt.bin").read_bytes()
    assert len(content) == 8 + 7 * 4 * 8
    assert np.frombuffer(content, "<u4", 2).tolist() == [7, 4]
    np.testing.assert_array_equal(np.frombuffer(content, "<u4", 28, 8).reshape(7, 4), SOME.indices)
    np.testing.assert_array_equal(np.frombuffer(content, "<f4", 28, 8 + 112).reshape(7, 4), SOME.distances)


@pytest.mark.parametrize(("name", "beside"), [("gt.ibin", "gt.fbin"), ("gt.neighbors.ibin", "gt.distances.fbin")])
def test_ids_and_distances_in_a_pair_of_files(tmp_path, name, beside):
    assert write_neighbors(tmp_path / name, SOME) == [tmp_path / name, tmp_path / beside]
    for file, kind, expected in ((name, "<i4", SOME.indices), (beside, "<f4", SOME.distances)):
        content = (tmp_path / file).read_bytes()
        assert len(content) == 8 + 28 * 4
        assert np.frombuffer(content, "<u4", 2).tolist() == [7, 4]
        np.testing.assert_array_equal(np.frombuffer(content, kind, 28, 8).reshape(7, 4), expected)


def test_hdf5_of_ann_benchmarks(tmp_path):
    import h5py

    write_neighbors(tmp_path / "set.hdf5", SOME)
    with h5py.File(tmp_path / "set.hdf5") as file:
        assert dict(file.attrs) == {"distance": "angular", "type": "dense", "point_type": "float", "dimension": 64}
        assert {name: file[name].dtype for name in file} == {
            "train": "f4", "test": "f4", "neighbors": "i4", "distances": "f4", "tied": "?"
        }  # fmt: skip
        train, test = file["train"][:], file["test"][:]
        every = 1 - (test / np.linalg.norm(test, axis=1)[:, None]) @ (train / np.linalg.norm(train, axis=1)[:, None]).T
        np.testing.assert_allclose(np.sort(every)[:, :4], file["distances"][:], atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(every, file["neighbors"][:], 1), file["distances"], atol=1e-6)


def test_parquet(tmp_path):
    from pyarrow import parquet

    write_neighbors(tmp_path / "lists.parquet", LISTS)
    table = parquet.read_table(tmp_path / "lists.parquet")
    assert table.column_names == ["query", "neighbors", "distances", "tied"]
    assert table.schema.metadata[b"distance_metric"] == b"euclidean"
    assert table["query"].to_pylist() == list(range(300))
    assert table["neighbors"].to_pylist() == LISTS.indices.tolist()
    assert table["distances"].to_pylist() == LISTS.distances.tolist()
    assert table["tied"].to_pylist() == LISTS.tied.tolist()


def test_sparse_matrix_of_distances(tmp_path):
    rows = np.concatenate([DIGITS[:40], DIGITS[:2]])  # copies: their distance of 0 is an entry all the same
    lists = lists_of(rows)
    write_neighbors(tmp_path / "graph.npz", lists, "distances")
    graph = scipy.sparse.load_npz(tmp_path / "graph.npz")
    assert (graph.format, graph.shape, graph.nnz) == ("csr", (42, 42), 42 * 4)
    np.testing.assert_array_equal(graph.indices.reshape(42, 4), lists.indices)
    np.testing.assert_array_equal(graph.data.reshape(42, 4), lists.distances)
    assert graph.data.min() == 0


@pytest.mark.parametrize("graph", ["distances", "connectivities"])
def test_symmetric_sparse_matrix(tmp_path, graph):
    write_neighbors(tmp_path / "graph.npz", LISTS, graph, symmetric=True)
    found = scipy.sparse.load_npz(tmp_path / "graph.npz")
    dense = np.zeros((300, 300), np.float32)
    np.put_along_axis(dense, LISTS.indices, LISTS.distances if graph == "distances" else 1, 1)
    np.testing.assert_array_equal(found.toarray(), np.maximum(dense, dense.T))
    found.check_format()
    assert found.nnz == np.count_nonzero(np.maximum(dense, dense.T))


def test_rows_that_end_early_have_no_entries(tmp_path):
    short = lists_of(DIGITS[:3], k=2)
    short.indices[1, 1], short.distances[1, 1] = -1, np.inf
    write_neighbors(tmp_path / "graph.npz", short, "connectivities")
    assert scipy.sparse.load_npz(tmp_path / "graph.npz").toarray().tolist() == [[0, 1, 1], short_row(short), [1, 1, 0]]
    np.testing.assert_array_equal(read_neighbors(tmp_path / "graph.npz")[0], short.indices)


def short_row(lists):
    return [int(column == lists.indices[1, 0]) for column in range(3)]


@pytest.mark.parametrize("name", ["a.npz", "a.ibin", "a.bin", "a.h5", "a.parquet", "graph.npz"])
def test_what_is_written_is_read(tmp_path, name):
    write_neighbors(tmp_path / name, LISTS, "distances" if name == "graph.npz" else None)
    indices, distances = read_neighbors(tmp_path / name)
    np.testing.assert_array_equal(indices, LISTS.indices)
    np.testing.assert_array_equal(distances, LISTS.distances)


def test_files_of_ids_alone_are_read(tmp_path):
    np.save(tmp_path / "a.npy", LISTS.indices)
    write_neighbors(tmp_path / "b.ibin", LISTS)
    (tmp_path / "b.fbin").unlink()
    np.hstack([np.full((300, 1), 4), LISTS.indices]).astype("<i4").tofile(tmp_path / "c.ivecs")
    np.savez(tmp_path / "d.npz", knn_indices=LISTS.indices, other=DIGITS)
    for name in ("a.npy", "b.ibin", "c.ivecs", "d.npz"):
        indices, distances = read_neighbors(tmp_path / name)
        np.testing.assert_array_equal(indices, LISTS.indices)
        assert distances is None


def test_a_file_that_could_not_be_finished_leaves_the_old_one(tmp_path):
    write_neighbors(tmp_path / "set.h5", SOME)
    before = (tmp_path / "set.h5").read_bytes()

    class Broken:
        shape, dtype = (300, 64), np.dtype(np.float32)

        def __len__(self):
            return 300

        def __getitem__(self, rows):
            raise OSError("the disk is gone")

    with pytest.raises(DataError, match=r"set\.h5: cannot be written as \.h5: the disk is gone"):
        write_neighbors(
            tmp_path / "set.h5",
            NeighborLists(SOME.indices, SOME.distances, SOME.tied, "cosine", Broken(), DIGITS[:7], is_own=False),
        )
    assert (tmp_path / "set.h5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["set.h5"]


@pytest.mark.parametrize(
    ("name", "graph", "symmetric", "message"),
    [
        ("a.txt", None, False, r"neighbours are not written as '\.txt': choose one of \.npz"),
        ("a.h5", "distances", False, r"a sparse graph is written as \.npz"),
        ("a.npz", None, True, "only a --graph of the bank's own rows can be symmetric"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, graph, symmetric, message):
    with pytest.raises(DataError, match=message):
        write_neighbors(tmp_path / name, LISTS, graph, symmetric=symmetric)


def test_what_holds_no_lists_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", features=DIGITS, labels=DIGITS)
    (tmp_path / "b.bin").write_bytes(np.array([3, 2, 1], "<u4").tobytes())
    (tmp_path / "c.ivecs").write_bytes(b"")
    np.savez(tmp_path / "d.npz", indptr=[0, 3], indices=[1], data=[1.0], shape=[1, 2])
    messages = {
        "a.npz": "none of its arrays features, labels",
        "b.bin": "its header tells of 3 x 2",
        "c.ivecs": "truncated",
        "d.npz": "not those of a sparse matrix",
        "e.bin": "no such file",
    }
    for name, message in messages.items():
        with pytest.raises(DataError, match=rf"{name}: .*{message}"):
            read_neighbors(tmp_path / name)
