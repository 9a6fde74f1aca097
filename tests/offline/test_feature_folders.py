"""Folders: the order of shards, labels beside features, and the layouts that other tools write."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from faiss_knn.offline.features import read_features
from faiss_knn.offline.formats import DataError

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((12, 3)).astype(np.float32)
LABELS = np.arange(12) % 5
QUERIES, THEIRS = -ROWS[:4], LABELS[:4][::-1].copy()


def assert_sides(folder, bank=(ROWS, LABELS), queries=(QUERIES, THEIRS)):
    for role, (rows, labels) in (("bank", bank), ("queries", queries)):
        found = read_features(folder, role)
        np.testing.assert_array_equal(found.rows[0:99], rows)
        np.testing.assert_array_equal(found.labels, labels)


@pytest.mark.parametrize("pattern", ["features_{}.npy", "{}.npy", "part-{}-of-12.npy", "v2_{}_feats.npy"])
@pytest.mark.parametrize("labels", ["one file", "shards", "outside"])
def test_shards_are_read_in_the_order_of_their_numbers(tmp_path, logged, pattern, labels):
    folder = tmp_path / "f"
    folder.mkdir()
    for i in range(12):
        np.save(folder / pattern.format(i), ROWS[i : i + 1])
        if labels == "shards":
            np.save(folder / f"labels_{i}.npy", LABELS[i : i + 1])
    if labels != "shards":
        np.save((folder if labels == "one file" else tmp_path) / "labels.npy", LABELS)
    found = read_features(folder, labels=tmp_path / "labels.npy" if labels == "outside" else None)
    np.testing.assert_array_equal(found.rows[0:12], ROWS)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert len(logged) == 1
    assert "files are read in the order of their numbers (" in logged[0]
    assert f" before {pattern.format(10)}), which is not the order of their names" in logged[0]


def test_nothing_is_said_where_both_orders_agree(tmp_path, logged):
    for i in range(12):
        np.save(tmp_path / f"features_{i:03d}.npy", ROWS[i : i + 1])
    np.testing.assert_array_equal(read_features(tmp_path).rows[0:12], ROWS)
    assert logged == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "features_2.npy and labels_3.npy have different numbers"),
        ([0, 1], "2 files such as labels_0.npy for 3 files of features"),
        ([0, 1, 2, 3], "4 files such as labels_0.npy for 3 files of features"),
    ],
)
def test_labels_of_other_shards_are_refused(tmp_path, labels, message):
    for i in range(3):
        np.save(tmp_path / f"features_{i}.npy", ROWS[4 * i : 4 * i + 4])
    for i in labels:
        np.save(tmp_path / f"labels_{i}.npy", np.resize(LABELS, 12 // len(labels)))
    with pytest.raises(DataError, match=message):
        read_features(tmp_path)


def test_lengths_that_even_out_are_refused(tmp_path):
    for i, (rows, labels) in enumerate([(5, 4), (3, 4)]):
        np.save(tmp_path / f"features_{i}.npy", ROWS[:rows])
        np.save(tmp_path / f"labels_{i}.npy", LABELS[:labels])
    with pytest.raises(DataError, match=r"labels_0\.npy: 4 labels for the 5 rows of .*features_0\.npy"):
        read_features(tmp_path)


def dino(folder):
    for side, rows, labels in (("train", ROWS, LABELS), ("test", QUERIES, THEIRS)):
        torch.save(torch.from_numpy(rows), folder / f"{side}feat.pth")
        torch.save(torch.from_numpy(labels), folder / f"{side}labels.pth")


def capital_x(folder):
    np.save(folder / "X_train.npy", ROWS)
    np.save(folder / "X_test.npy", QUERIES)
    np.save(folder / "y_train.npy", LABELS)
    np.save(folder / "y_test.npy", THEIRS)


def splits(folder):
    np.savez(folder / "train.npz", features=ROWS, labels=LABELS)
    np.savez(folder / "val.npz", features=QUERIES, labels=THEIRS)


def gallery(folder):
    np.save(folder / "gallery_embeds.npy", ROWS)
    np.save(folder / "query_embeds.npy", QUERIES)
    (folder / "gallery_labels.txt").write_text("\n".join(map(str, LABELS)))
    (folder / "query_targets.txt").write_text("\n".join(map(str, THEIRS)))


def vissl(folder, layer="heads"):
    """Two ranks, each with every other sample; the second repeats the first sample, as samplers pad."""
    for side, rows, labels in (("train", ROWS, LABELS), ("test", QUERIES, THEIRS)):
        for rank in range(2):
            ids = np.arange(rank, len(rows), 2)
            ids = np.append(ids, 0) if rank else ids
            for name, array in (("features", rows[ids]), ("targets", labels[ids][:, None]), ("inds", ids)):
                np.save(folder / f"rank{rank}_chunk0_{side}_{layer}_{name}.npy", array)


@pytest.mark.parametrize("write", [dino, capital_x, splits, gallery, vissl])
def test_layouts_of_other_tools_hold_both_sides(tmp_path, write):
    write(tmp_path)
    assert_sides(tmp_path)


def test_one_side_serves_both_roles(tmp_path):
    np.save(tmp_path / "X.npy", ROWS)
    np.save(tmp_path / "y.npy", LABELS)
    (tmp_path / "metadata.csv").write_text("file\na.png\n")
    assert_sides(tmp_path, queries=(ROWS, LABELS))


def test_layers_and_sides_that_cannot_be_told_are_refused(tmp_path):
    vissl(tmp_path)
    vissl(tmp_path, "res5")
    with pytest.raises(DataError, match=r"features of several layers, \['heads', 'res5'\]"):
        read_features(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "train_features.npy", ROWS)
    np.save(other / "gallery_features.npy", ROWS)
    with pytest.raises(DataError, match="is named for the queries"):
        read_features(other, "queries")


def save_to_disk(folder, rows, labels, names=("a", "b", "c", "d", "e"), shards=11):
    """What `datasets.Dataset.save_to_disk` writes: tables as streams, their order in state.json."""
    folder.mkdir(parents=True)
    parts = np.array_split(np.arange(len(rows)), shards)
    files = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        table = pa.table({"image": [{"bytes": b"", "path": "x"}] * len(part), "label": labels[part],
                          "embedding": list(rows[part])}).slice(0)  # fmt: skip
        with pa.ipc.new_stream(str(folder / file), table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": file} for file in files], "_split": None}
    features = {"label": {"names": list(names), "_type": "ClassLabel"}, "embedding": {"_type": "List"}}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def test_saved_datasets_give_rows_labels_and_class_names(tmp_path):
    save_to_disk(tmp_path / "one", ROWS, LABELS)
    found = read_features(tmp_path / "one")
    np.testing.assert_array_equal(found.rows[0:12], ROWS)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.class_names == list("abcde")
    save_to_disk(tmp_path / "both" / "train", ROWS, LABELS)
    save_to_disk(tmp_path / "both" / "validation", QUERIES, THEIRS, shards=1)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert_sides(tmp_path / "both")
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["en", "fr"]}')
    with pytest.raises(DataError, match=r"none of its splits \['en', 'fr'\] is known to hold the bank"):
        read_features(tmp_path / "both")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("state.json", '{"_data_files": [{"filename": "../../secret.arrow"}]}', "names no files of the folder"),
        ("state.json", "[]", "not an object"),
        ("state.json", "x", "cannot be read"),
        ("dataset_info.json", "x", "cannot be read"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, file, text, message):
    save_to_disk(tmp_path / "f", ROWS, LABELS)
    (tmp_path / "f" / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_features(tmp_path / "f")
