"""What is read of files with several arrays, and what a file may not do."""

import collections
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from faiss_knn.offline.commands.eval_arguments import EPILOG
from faiss_knn.offline.features import read_class_names, read_features, read_labels
from faiss_knn.offline.formats import OPENERS, DataError

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((7, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2, -1])
HUGE = (1 << 40, 1 << 10)


def tensors(*arrays):
    return [torch.from_numpy(np.array(array)) for array in arrays]


PICKLED = {
    "numpy": {"features": ROWS, "labels": LABELS},
    "numpy of all kinds": {"features": ROWS.astype(">f8"), "labels": LABELS.astype(np.int8), "epoch": np.float64(3.5)},
    "a numpy pair": (ROWS, LABELS),
    "batches": {"features": tensors(ROWS[:3], ROWS[3:4], ROWS[4:]), "labels": tensors(LABELS[:3], LABELS[3:])},
    "vectors": {"features": tensors(*ROWS), "labels": LABELS.tolist()},
    "pairs": [tuple(tensors(ROWS[i : i + 3], LABELS[i : i + 3])) for i in (0, 3, 6)],
    "two pairs": [tuple(tensors(ROWS[i : i + 4], LABELS[i : i + 4])) for i in (0, 4)],
    "a pair of lists": (tensors(ROWS[:4], ROWS[4:]), tensors(LABELS[:4], LABELS[4:])),
    "nested": {"model": {"features": torch.from_numpy(ROWS)}, "labels": tensors(*LABELS[:, None]), "args": {"lr": 0.1}},
    "ordered": collections.OrderedDict(embeds=torch.from_numpy(ROWS), targets=torch.from_numpy(LABELS)),
    "a parameter": {"features": torch.nn.Parameter(torch.from_numpy(ROWS)), "labels": torch.from_numpy(LABELS)},
    "names": {"features": ROWS, "labels": [f"class {i}" for i in LABELS]},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", PICKLED)
def test_what_torch_saves_is_read(tmp_path, case, legacy):
    torch.save(PICKLED[case], tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    found = read_features(tmp_path / "a.pt")
    np.testing.assert_array_equal(found.rows, ROWS)
    expected = [f"class {i}" for i in LABELS] if case == "names" else LABELS.tolist()
    assert found.labels.tolist() == expected


def test_two_batches_are_no_pair(tmp_path):
    torch.save(tensors(ROWS[:4], ROWS[4:]), tmp_path / "a.pt")
    found = read_features(tmp_path / "a.pt")
    np.testing.assert_array_equal(found.rows, ROWS)
    assert found.labels is None


def write_nested(path):
    if path.suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["student/features"], file["student/labels"] = -ROWS, LABELS[::-1]
            file["teacher/last/features"], file["teacher/last/labels"] = ROWS, LABELS
    else:
        both = {"features": -ROWS, "labels": LABELS[::-1].copy()}, {"last": {"features": ROWS, "labels": LABELS}}
        torch.save(dict(zip(("student", "teacher"), both, strict=True)), path)


@pytest.mark.parametrize("name", ["a.h5", "a.pt"])
@pytest.mark.parametrize("key", ["teacher/last/features", "teacher.last.features"])
def test_nested_arrays_are_named_by_their_path_and_labels_are_those_beside(tmp_path, name, key):
    write_nested(tmp_path / name)
    with pytest.raises(DataError, match=r"cannot tell which of .*(student|teacher.last).features is meant"):
        read_features(tmp_path / name)
    found = read_features(tmp_path / name, features_key=key)
    np.testing.assert_array_equal(found.rows[0:7], ROWS)
    np.testing.assert_array_equal(found.labels, LABELS)
    other = read_features(tmp_path / name, features_key=key, labels_key="student/labels")
    np.testing.assert_array_equal(other.labels, LABELS[::-1])


SIDES = [("train", "test"), ("train", "val"), ("gallery", "query"), ("bank", "queries")]


@pytest.mark.parametrize(("bank", "queries"), SIDES)
@pytest.mark.parametrize("pattern", ["{side}_{name}", "{name}_{side}", "{side}/{name}"])
@pytest.mark.parametrize("names", [("features", "labels"), ("X", "y"), ("embeds", "targets")])
def test_names_of_both_sides(tmp_path, bank, queries, pattern, names):
    arrays = {pattern.format(side=bank, name=name): a for name, a in zip(names, (ROWS, LABELS), strict=True)}
    arrays |= {pattern.format(side=queries, name=name): a[:4] for name, a in zip(names, (-ROWS, LABELS), strict=True)}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    np.savez(tmp_path / "a.npz", **{name.replace("/", "_"): array for name, array in arrays.items()})
    for file in ("a.h5", "a.npz"):
        for role, rows, labels in (("bank", ROWS, LABELS), ("queries", -ROWS[:4], LABELS[:4])):
            found = read_features(tmp_path / file, role)
            np.testing.assert_array_equal(found.rows[0:7], rows)
            np.testing.assert_array_equal(found.labels, labels)


def test_labels_of_the_other_side_are_not_taken(tmp_path):
    np.savez(tmp_path / "a.npz", test_features=ROWS, val_features=ROWS, val_labels=LABELS)
    found = read_features(tmp_path / "a.npz", "queries")
    assert found.labels is None


def test_labels_by_key_from_a_file_of_their_own(tmp_path):
    np.savez(tmp_path / "a.npz", features=ROWS, labels=LABELS)
    np.savez(tmp_path / "b.npz", fine=LABELS + 1, coarse=LABELS * 0, labels=LABELS)
    found = read_features(tmp_path / "a.npz", labels=tmp_path / "b.npz", labels_key="fine")
    np.testing.assert_array_equal(found.labels, LABELS + 1)
    with pytest.raises(DataError, match=r"b\.npz: no array 'other' for the labels: it holds fine"):
        read_features(tmp_path / "a.npz", labels=tmp_path / "b.npz", labels_key="other")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.uint64, ">i4", bool])
def test_labels_of_every_integer_dtype(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.abs(LABELS).astype(dtype))
    labels = read_labels(tmp_path / "a.npy")
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, np.abs(LABELS).astype(dtype))


@pytest.mark.parametrize(
    "array",
    [
        np.array([2**63], np.uint64),
        np.array([2049.0], np.float16),
        torch.tensor([300.0]).bfloat16(),
        np.array([2.0**25], np.float32),
        np.array([0.5]),
        np.array([np.nan]),
    ],
)
def test_labels_that_may_have_been_rounded_or_are_none_are_refused(tmp_path, array):
    torch.save({"labels": array}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt: .*(labels must|may have been rounded)"):
        read_labels(tmp_path / "a.pt")


def huge_member(path, method):
    """An archive of a few bytes whose member says that it is large."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, array in (("features", ROWS), ("labels", LABELS)):
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array)
        with archive.open("other.npy", "w") as stream:
            head = {"descr": "<f4", "fortran_order": False, "shape": HUGE}
            np.lib.format.write_array_header_1_0(stream, head)
            stream.write(bytes(100))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_nobody_asked_for_are_not_read_and_no_head_is_believed(tmp_path, method):
    huge_member(tmp_path / "a.npz", method)
    np.testing.assert_array_equal(read_features(tmp_path / "a.npz").rows, ROWS)
    with pytest.raises(DataError, match=r"other\.npy tells of shape \(1099511627776, 1024\), float32, which \d+ bytes"):
        read_features(tmp_path / "a.npz", features_key="other")
    with pytest.raises(DataError, match=r"other\.npy tells of shape"):
        read_features(tmp_path / "a.npz", labels_key="other")


def test_what_was_not_asked_for_may_be_pickled_or_broken(tmp_path):
    np.savez(tmp_path / "a.npz", features=ROWS, labels=LABELS, paths=np.array([Path("x")]))
    np.testing.assert_array_equal(read_features(tmp_path / "a.npz").labels, LABELS)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as \.npz: Object arrays cannot be loaded"):
        read_features(tmp_path / "a.npz", labels_key="paths")


def test_an_hdf5_file_may_hold_what_does_not_fit_in_memory(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"], file["labels"] = ROWS, LABELS
        huge = file.create_dataset("other", HUGE, "f4", chunks=(1024, 1024))
        huge[:2, :2] = 1
        names = file.create_dataset("names", (1 << 40,), "S4", chunks=(1024,))
        names[:2] = b"ab"
    np.testing.assert_array_equal(read_features(tmp_path / "a.h5").rows[0:7], ROWS)
    for key in ("other", "names"):
        with pytest.raises(DataError, match=r"needs .* GiB of memory|was not written to its end"):
            read_features(tmp_path / "a.h5", labels_key=key)


def test_a_damaged_part_is_told_when_it_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("features", data=np.tile(ROWS, (100, 1)), chunks=(70, 3), compression="gzip")
        offset = file["features"].id.get_chunk_info(3).byte_offset
    with open(tmp_path / "a.h5", "r+b") as file:
        file.seek(offset)
        file.write(bytes(64))
    rows = read_features(tmp_path / "a.h5").rows
    np.testing.assert_array_equal(rows[0:210], np.tile(ROWS, (30, 1)))
    with pytest.raises(DataError, match=r"a\.h5: cannot be read as \.h5: Can't .*read data"):
        _ = rows[200:220]


def elsewhere(path):
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["secret"] = ROWS
    path.with_name("secret.bin").write_bytes(ROWS.tobytes())


def external_link(path, file):
    file["features"] = h5py.ExternalLink("other.h5", "/secret")


def soft_link_through_an_external_one(path, file):
    file["out"] = h5py.ExternalLink("other.h5", "/")
    file["features"] = h5py.SoftLink("/out/secret")


def external_storage(path, file):
    file.create_dataset("features", (7, 3), "f4", external=[(str(path.with_name("secret.bin")), 0, 84)])


def virtual(path, file):
    layout = h5py.VirtualLayout((7, 3), "f4")
    layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "secret", (7, 3))
    file.create_virtual_dataset("features", layout)


def dangling(path, file):
    file["features"] = h5py.SoftLink("/nothing")


def half_written(path, file):
    file.create_dataset("features", (7, 3), "f4", chunks=(2, 3))[:4] = ROWS[:4]


def never_written(path, file):
    file.create_dataset("features", (7, 3), "f4")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (external_link, "'features' is a link to what is not in this file"),
        (soft_link_through_an_external_one, "'features' is a link to what is not in this file"),
        (dangling, "'features' is a link to what is not in this file"),
        (external_storage, "'features' is kept in other files"),
        (virtual, "'features' is kept in other files"),
        (half_written, "'features' was not written to its end"),
        (never_written, "'features' was not written to its end"),
    ],
)
def test_hdf5_files_hold_their_own_data_whole(tmp_path, write, message):
    path = tmp_path / "a.h5"
    elsewhere(path)
    with h5py.File(path, "w") as file:
        write(path, file)
        file["labels"] = LABELS
    with pytest.raises(DataError, match=message):
        read_features(path)
    with h5py.File(path, "a") as file:
        file["good"] = ROWS
    np.testing.assert_array_equal(read_features(path, features_key="good").labels, LABELS)


def test_links_within_a_file_and_between_files_are_followed(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["run/rows"], file["run/ids"] = ROWS, LABELS
        file["features"], file["run/again"] = h5py.SoftLink("/run/rows"), h5py.SoftLink("..")
        file["labels"], file["run/self"] = file["run/ids"], file["run"]
    (tmp_path / "b.h5").symlink_to(tmp_path / "a.h5")
    found = read_features(tmp_path / "b.h5")
    np.testing.assert_array_equal(found.rows[0:7], ROWS)
    np.testing.assert_array_equal(found.labels, LABELS)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".h5", ".parquet", ".csv", ".jsonl", ".txt", ".fbin"])
def test_a_pipe_is_refused_at_once(tmp_path, suffix):
    pipe = tmp_path / f"a{suffix}"
    os.mkfifo(pipe)
    np.save(tmp_path / "b.npy", ROWS)
    for read in (lambda: read_features(pipe), lambda: read_features(tmp_path / "b.npy", labels=pipe)):
        with pytest.raises(DataError, match="is no regular file"):
            read()
    with pytest.raises(DataError, match="is no regular file"):
        read_class_names(pipe)
    (tmp_path / f"c{suffix}").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="is no regular file"):
        read_features(tmp_path / f"c{suffix}")


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["EVIL"])),)


@pytest.mark.parametrize("name", ["a.pt", "a.npy", "a.npz"])
def test_no_file_runs_code(tmp_path, monkeypatch, name):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    held = np.array([Evil()], dtype=object)
    if name == "a.pt":
        torch.save({"features": ROWS, "labels": held}, tmp_path / name)
    elif name == "a.npy":
        np.save(tmp_path / name, held)
    else:
        np.savez(tmp_path / name, features=ROWS, labels=held)
    with pytest.raises(DataError, match="cannot be read as"):
        read_features(tmp_path / name)
    assert not (tmp_path / "evil").exists()


def test_a_torch_that_may_run_code_reads_no_file(tmp_path, monkeypatch):
    torch.save({"features": ROWS}, tmp_path / "a.pt")
    for version, is_safe in (("2.4.1", False), ("2.9.1+cu128", False), ("2.10.0", True), ("2.13.0+cpu", True)):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        if is_safe:
            np.testing.assert_array_equal(read_features(tmp_path / "a.pt").rows, ROWS)
        else:
            with pytest.raises(DataError, match=r"may run code that a file holds .*: install torch 2\.10 or later"):
                read_features(tmp_path / "a.pt")


def test_several_arrays_in_one_file_are_refused(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.save(file, ROWS)
        np.save(file, ROWS)
    with pytest.raises(DataError, match="212 bytes follow its array: several arrays in one file are not read"):
        read_features(tmp_path / "a.npy")


def test_text_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "labels.txt").write_text("猫\nсобака\n", encoding="utf-8")
    (tmp_path / "names.json").write_text('["猫", "собака"]', encoding="utf-8")
    code = (
        "import sys; from faiss_knn.offline.features import read_class_names, read_labels; from pathlib import Path\n"
    )
    code += "folder = Path(sys.argv[1]); labels = read_labels(folder / 'labels.txt').tolist()\n"
    code += "assert labels == read_class_names(folder / 'names.json') and len(labels[0]) == 1, labels"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)


@pytest.mark.parametrize("where", ["docs/offline.md", "eval --help", "read_features"])
def test_every_format_is_named_where_formats_are_listed(where):
    page = (Path(__file__).parents[2] / "docs/offline.md").read_text()
    text = {
        "docs/offline.md": page.split("## Which files are read")[1].split("\n\n")[1],
        "eval --help": EPILOG,
        "read_features": read_features.__doc__,
    }[where]
    named = set(re.findall(r"(?<![\w`])\.[a-z]\w+", text))
    assert named >= set(OPENERS)
    if where == "docs/offline.md":
        assert named == set(OPENERS)
