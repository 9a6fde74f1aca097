"""Reading features: every format gives the same rows, and every bad file is named in one line."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from faiss_knn.offline.features import digits, read_class_names, read_features, read_labels
from faiss_knn.offline.formats import DataError

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((7, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2, -1])


def write_npz(path):
    np.savez(path, features=ROWS, labels=LABELS)


def write_torch(path):
    torch.save({"features": torch.from_numpy(ROWS), "labels": torch.from_numpy(LABELS), "epoch": 3}, path)


def write_torch_pair(path):
    torch.save((torch.from_numpy(ROWS), torch.from_numpy(LABELS)), path)


def write_torch_legacy(path):
    torch.save({"x": torch.from_numpy(ROWS), "y": torch.from_numpy(LABELS)}, path, _use_new_zipfile_serialization=False)


def write_safetensors(path):
    from safetensors.numpy import save_file

    save_file({"features": ROWS, "labels": LABELS}, path)


def write_parquet_list(path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"embedding": list(ROWS), "label": LABELS}), path, row_group_size=3)


def write_parquet_fixed(path):
    import pyarrow as pa
    from pyarrow import parquet

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel()), 3)
    parquet.write_table(pa.table({"label": LABELS, "vector": vectors}), path)


def write_parquet_columns(path):
    import pandas

    pandas.DataFrame(ROWS, columns=["f0", "f1", "f2"]).assign(label=LABELS).to_parquet(path)


def write_hdf5(path):
    import h5py

    with h5py.File(path, "w") as file:
        file["train"], file["train_labels"] = ROWS, LABELS
        file["test"], file["test_labels"] = ROWS[:2], LABELS[:2]
        file["neighbors"], file["distances"] = np.zeros((2, 5), int), np.zeros((2, 5), np.float32)


CONTAINERS = [
    ("a.npz", write_npz),
    ("a.pt", write_torch),
    ("a.pth", write_torch_pair),
    ("a.pt", write_torch_legacy),
    ("a.safetensors", write_safetensors),
    ("a.parquet", write_parquet_list),
    ("a.parquet", write_parquet_fixed),
    ("a.parquet", write_parquet_columns),
    ("a.h5", write_hdf5),
]


@pytest.mark.parametrize(("name", "write"), CONTAINERS)
def test_containers_hold_features_and_labels(tmp_path, name, write):
    write(tmp_path / name)
    found = read_features(tmp_path / name)
    np.testing.assert_array_equal(found.rows[0:7], ROWS)
    np.testing.assert_array_equal(found.labels, LABELS)


def write_fvecs(path, rows=ROWS, dtype=np.float32):
    with open(path, "wb") as file:
        for row in rows:
            file.write(np.int32(len(row)).tobytes() + row.astype(dtype).tobytes())


def write_bin(path, rows=ROWS, dtype=np.float32):
    path.write_bytes(np.array(rows.shape, np.uint32).tobytes() + rows.astype(dtype).tobytes())


@pytest.mark.parametrize(
    ("name", "write"), [("a.npy", lambda path: np.save(path, ROWS)), ("a.fvecs", write_fvecs), ("a.fbin", write_bin)]
)
def test_arrays_stay_on_disk_and_take_labels_from_another_file(tmp_path, name, write):
    write(tmp_path / name)
    np.save(tmp_path / "labels.npy", LABELS)
    found = read_features(tmp_path / name, labels=tmp_path / "labels.npy")
    assert isinstance(found.rows, np.memmap)
    np.testing.assert_array_equal(found.rows, ROWS)
    np.testing.assert_array_equal(found.labels, LABELS)


@pytest.mark.parametrize(("name", "write"), [("a.bvecs", write_fvecs), ("a.u8bin", write_bin)])
def test_bytes_are_features(tmp_path, name, write):
    rows = RNG.integers(0, 256, (5, 4))
    write(tmp_path / name, rows, np.uint8)
    np.testing.assert_array_equal(read_features(tmp_path / name).rows, rows)


def test_a_role_picks_its_half_of_a_file(tmp_path):
    write_hdf5(tmp_path / "a.hdf5")
    assert len(read_features(tmp_path / "a.hdf5", "bank").rows) == 7
    assert len(read_features(tmp_path / "a.hdf5", "queries").rows) == 2
    np.testing.assert_array_equal(read_features(tmp_path / "a.hdf5", "queries").labels, LABELS[:2])


def test_keys_name_the_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", teacher=ROWS, student=-ROWS, kind=LABELS)
    found = read_features(tmp_path / "a.npz", features_key="student", labels_key="kind")
    np.testing.assert_array_equal(found.rows, -ROWS)
    np.testing.assert_array_equal(found.labels, LABELS)


def test_bfloat16_is_read(tmp_path):
    torch.save({"features": torch.from_numpy(ROWS).bfloat16()}, tmp_path / "a.pt")
    np.testing.assert_allclose(read_features(tmp_path / "a.pt").rows, ROWS, rtol=1e-2)


@pytest.mark.parametrize("with_labels", ["inside", "beside", "none"])
def test_a_folder_is_its_files_in_order(tmp_path, with_labels):
    for i, part in enumerate([slice(0, 3), slice(3, 4), slice(4, 7)]):
        if with_labels == "inside":
            np.savez(tmp_path / f"part-{i}.npz", features=ROWS[part], labels=LABELS[part])
            continue
        np.save(tmp_path / f"features-{i}.npy", ROWS[part])
        if with_labels == "beside":
            np.save(tmp_path / f"labels-{i}.npy", LABELS[part])
    found = read_features(tmp_path)
    assert found.rows.shape == (7, 3)
    np.testing.assert_array_equal(found.rows[2:5], ROWS[2:5])
    np.testing.assert_array_equal(found.rows[0:7], ROWS)
    np.testing.assert_array_equal(found.rows[np.array([0, 3, 6])], ROWS[[0, 3, 6]])
    if with_labels == "none":
        assert found.labels is None
    else:
        np.testing.assert_array_equal(found.labels, LABELS)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([1.0, 2.0, -1.0]), [1, 2, -1]),
        (np.array([[1], [0]]), [1, 0]),
        (np.array([True, False]), [1, 0]),
        (np.array(["cat", "dog"]), ["cat", "dog"]),
        (np.array([[1, 0], [1, 1]], np.uint8), [[1, 0], [1, 1]]),
    ],
)
def test_labels_of_many_kinds(tmp_path, array, expected):
    np.save(tmp_path / "labels.npy", array)
    assert read_labels(tmp_path / "labels.npy").tolist() == expected


def test_names_are_labels_in_parquet_and_text(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"embedding": list(ROWS), "label": list("abcabca")}), tmp_path / "a.parquet")
    assert read_features(tmp_path / "a.parquet").labels.tolist() == list("abcabca")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert read_labels(tmp_path / "labels.txt").tolist() == ["cat", "dog"]
    (tmp_path / "ids.txt").write_text("3\n-1\n")
    assert read_labels(tmp_path / "ids.txt").tolist() == [3, -1]


def test_class_names(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"1": "dog", "0": "cat", "10": "emu"}))
    (tmp_path / "b.json").write_text(json.dumps(["cat", "dog"]))
    (tmp_path / "c.txt").write_text("cat\ndog\n")
    np.savez(tmp_path / "d.npz", features=ROWS, labels=LABELS, class_names=np.array(["a", "b", "c"]))
    assert read_class_names(tmp_path / "a.json") == ["cat", "dog", "emu"]
    assert read_class_names(tmp_path / "b.json") == read_class_names(tmp_path / "c.txt") == ["cat", "dog"]
    assert read_features(tmp_path / "d.npz").class_names == ["a", "b", "c"]


def test_digits_are_split_without_overlap():
    bank, queries = digits()
    assert (len(bank.rows), len(queries.rows)) == (1347, 450)
    from sklearn.datasets import load_digits

    both = np.concatenate([bank.rows, queries.rows])
    np.testing.assert_array_equal(np.sort(both.sum(1)), np.sort(load_digits().data.sum(1)))


def _npy_bytes():
    out = io.BytesIO()
    np.save(out, ROWS)
    return out.getvalue()


def truncated(path, write):
    write(path)
    path.write_bytes(path.read_bytes()[:-5])


BAD = {
    "truncated npy": ("a.npy", lambda p: truncated(p, lambda q: np.save(q, ROWS)), "cannot be read as .npy"),
    "truncated npz": ("a.npz", lambda p: truncated(p, write_npz), "cannot be read as .npz"),
    "truncated pt": ("a.pt", lambda p: truncated(p, write_torch), "cannot be read as .pt"),
    "truncated safetensors": ("a.safetensors", lambda p: truncated(p, write_safetensors), "cannot be read"),
    "truncated parquet": ("a.parquet", lambda p: truncated(p, write_parquet_list), "cannot be read as .parquet"),
    "truncated hdf5": ("a.h5", lambda p: (write_hdf5(p), p.write_bytes(p.read_bytes()[:900])), "cannot be read as .h5"),
    "truncated fvecs": ("a.fvecs", lambda p: truncated(p, write_fvecs), "are not rows of 16 bytes"),
    "truncated fbin": ("a.fbin", lambda p: truncated(p, write_bin), "7 x 3 numbers, 92 bytes, but it has 87"),
    "empty": ("a.fbin", lambda p: p.write_bytes(b""), "its header tells of 0 x 0"),
    "empty fvecs": ("a.fvecs", lambda p: p.write_bytes(b""), "dimension 0"),
    "another format": ("a.npy", write_parquet_list, "cannot be read as .npy"),
    "npy named npz": ("a.npz", lambda p: p.write_bytes(_npy_bytes()), "a single array: name it .npy"),
    "pickled npy": ("a.npy", lambda p: np.save(p, np.array([{1}, {2}])), "cannot be read as .npy"),
    "pickled npz": ("a.npz", lambda p: np.savez(p, features=np.array([{1}, {2}])), "cannot be read as .npz"),
    "pickled pt": ("a.pt", lambda p: torch.save({"features": Path("x")}, p), "cannot be read as .pt: it holds objects"),
    "unknown suffix": ("a.dat", lambda p: p.write_text("1,2"), "unknown format '.dat'"),
    "not numbers": ("a.npy", lambda p: np.save(p, np.array([["a"]])), "features must be numbers"),
    "complex": ("a.npy", lambda p: np.save(p, ROWS.astype(complex)), "features must be numbers"),
    "a vector": ("a.npy", lambda p: np.save(p, ROWS[0]), r"features must be \(N, d\), got shape \(3,\)"),
    "maps": ("a.npy", lambda p: np.save(p, np.zeros((2, 3, 4))), "flatten or pool"),
    "no rows": ("a.npy", lambda p: np.save(p, ROWS[:0]), "features are empty"),
    "labels of another length": (
        "a.npz",
        lambda p: np.savez(p, features=ROWS, labels=[1, 2]),
        "2 labels for the 7 rows",
    ),
    "labels between ids": (
        "a.npz",
        lambda p: np.savez(p, features=ROWS, labels=ROWS[:, 0]),
        "labels must be class ids",
    ),
    "labels that are cubes": ("a.npz", lambda p: np.savez(p, features=ROWS, labels=np.zeros((7, 2, 2))), "multi-hot"),
    "several candidates": ("a.npz", lambda p: np.savez(p, a=ROWS, b=ROWS), "cannot tell which of a .7, 3., b"),
    "nulls": ("a.parquet", lambda p: _parquet(p, {"embedding": [[1.0], None]}), "column 'embedding' has 1 nulls"),
    "ragged": ("a.parquet", lambda p: _parquet(p, {"embedding": [[1.0], [1.0, 2.0, 3.0]]}), "different lengths"),
    "an object": ("a.pt", lambda p: torch.save(3, p), "it holds a int"),
    "mixed fvecs": ("a.fvecs", lambda p: p.write_bytes(b"\1\0\0\0aaaa\2\0\0\0bbbb"), "different dimensions, 1 and 2"),
}


def _parquet(path, columns):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_in_one_line(tmp_path, case):
    name, write, message = BAD[case]
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        read_features(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_files_and_keys_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.npy: no such file"):
        read_features(tmp_path / "nothing.npy")
    with pytest.raises(DataError, match="the folder holds no feature files"):
        read_features(tmp_path)
    write_npz(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"no array 'z' for the features: it holds features \(7, 3\), labels \(7,\)"):
        read_features(tmp_path / "a.npz", features_key="z")
    np.savez(tmp_path / "b.npz", other=LABELS)
    with pytest.raises(DataError, match="no labels among its arrays"):
        read_labels(tmp_path / "b.npz")


def test_shards_must_fit_together(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", ROWS[:, :2])
    with pytest.raises(DataError, match="different dimensions, 2 and 3"):
        read_features(tmp_path)
    (tmp_path / "b.npy").unlink()
    np.savez(tmp_path / "b.npz", features=ROWS, labels=LABELS)
    with pytest.raises(DataError, match=r"a\.npy: has no labels, but other files"):
        read_features(tmp_path)


@pytest.mark.parametrize(("module", "suffix", "extra"), [("pyarrow", "parquet", "parquet"), ("h5py", "h5", "hdf5")])
def test_a_reader_that_is_not_installed_is_named(tmp_path, module, suffix, extra):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"x")
    code = f"import sys; sys.modules[{module!r}] = None\nfrom faiss_knn.offline.features import read_features\n"
    code += f"try: read_features({str(path)!r})\nexcept ValueError as error: print(error)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"pip install 'faiss-knn-eval[{extra}]'" in out
