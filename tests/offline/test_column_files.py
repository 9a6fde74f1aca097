"""Tables: which columns are the features, what else they may hold, and what is refused."""

import json

import numpy as np
import pandas
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from faiss_knn import evaluate
from faiss_knn.offline.features import read_features, read_labels
from faiss_knn.offline.formats import DataError

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((12, 11)).astype(np.float32)
LABELS = np.arange(12) % 3
NAMES = ["ant", "bee", "cow"]


def frame(prefix="emb_", **columns):
    return pandas.DataFrame(ROWS, columns=[f"{prefix}{i}" for i in range(11)]).assign(label=LABELS, **columns)


def list_table(**columns):
    return pa.table({"embedding": list(ROWS), "label": LABELS} | columns)


def write_json_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_arrow(path, table, stream):
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


WIDE = {
    "a.parquet": lambda path, table: table.to_parquet(path),
    "a.feather": lambda path, table: table.to_feather(path),
    "a.csv": lambda path, table: table.to_csv(path, index=False),
    "b.csv": lambda path, table: table.to_csv(path),  # with the index as a nameless first column
    "c.csv": lambda path, table: table.to_csv(path, index=False, sep=";"),
    "a.tsv": lambda path, table: table.to_csv(path, index=False, sep="\t"),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("prefix", ["emb_", "f", "feature.", "", "Größe "])
def test_numbered_columns_are_the_features_and_no_others(tmp_path, name, prefix):
    """Also in another order than that of their numbers; beside them are ids, splits and text."""
    table = frame(prefix, image_id=np.arange(12), source="web", split="train", fold=LABELS + 0.0)
    WIDE[name](tmp_path / name, table[sorted(table.columns)])
    found = read_features(tmp_path / name)
    np.testing.assert_allclose(found.rows[0:12], ROWS, rtol=1e-6)
    np.testing.assert_array_equal(found.labels, LABELS)


LISTS = {
    "a.parquet": lambda path: parquet.write_table(list_table(), path, row_group_size=5),
    "b.parquet": lambda path: parquet.write_table(list_table(score=ROWS[:, 0], f0=ROWS[:, 0]), path),
    "a.feather": lambda path: feather.write_feather(list_table(), path),
    "b.feather": lambda path: feather.write_feather(list_table(), path, compression="uncompressed"),
    "a.arrow": lambda path: write_arrow(path, list_table(), stream=False),
    "b.arrow": lambda path: write_arrow(path, list_table(), stream=True),
    "a.jsonl": lambda path: write_json_lines(path, list_table().to_pylist()),
    "b.jsonl": lambda path: write_json_lines(path, [{"embedding": [0] * 11, "label": 0}, *list_table().to_pylist()]),
    "a.ndjson": lambda path: write_json_lines(path, [{"id": "x"} | record for record in list_table().to_pylist()]),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_column_of_lists_is_the_features(tmp_path, name):
    LISTS[name](tmp_path / name)
    found = read_features(tmp_path / name)
    np.testing.assert_allclose(found.rows[-12 + len(found.rows) : len(found.rows)], ROWS, rtol=1e-6)
    np.testing.assert_array_equal(found.labels[-12:], LABELS)


def test_sliced_chunked_and_large_lists_are_read_whole(tmp_path):
    large = pa.array(list(ROWS), pa.large_list(pa.float32()))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(ROWS.ravel()), 11)
    for kind in (large, fixed, pa.array(list(ROWS))):
        chunked = pa.chunked_array([kind[:1], kind[1:1], kind[1:8], kind[8:]])
        write_arrow(tmp_path / "a.arrow", pa.table({"vector": chunked, "label": LABELS}), stream=True)
        np.testing.assert_array_equal(read_features(tmp_path / "a.arrow").rows, ROWS)


UNASKED = {
    "nulls": [None] * 11 + [1.0],
    "ragged": [[1.0] * i for i in range(12)],
    "deep": [[[1, 2], [3]]] * 12,
    "mixed": [{"a": i} for i in range(12)],
    "words": ["a", None] * 6,
}


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.jsonl"])
def test_columns_nobody_asked_for_do_not_matter(tmp_path, name):
    table = list_table(**UNASKED)
    if name == "a.parquet":
        parquet.write_table(table, tmp_path / name)
    elif name == "a.feather":
        feather.write_feather(table, tmp_path / name)
    else:
        write_json_lines(tmp_path / name, table.to_pylist())
    found = read_features(tmp_path / name)
    np.testing.assert_allclose(found.rows, ROWS, rtol=1e-6)
    np.testing.assert_array_equal(found.labels, LABELS)
    if name == "a.jsonl":  # its first line has no number there
        with pytest.raises(DataError, match=r"Column\(/nulls\) changed"):
            read_features(tmp_path / name, labels_key="nulls")
    else:
        assert read_features(tmp_path / name, labels_key="nulls").labels.tolist() == [-1] * 11 + [1]


@pytest.mark.parametrize(
    ("key", "columns"),
    [("other_", range(2)), ("other", range(2)), ("other_*", range(2)), ("emb_0,emb_3", [0, 3]), ("score", None)],
)
def test_a_key_names_a_prefix_or_columns(tmp_path, key, columns):
    table = frame(other_0=ROWS[:, 0], other_1=ROWS[:, 1], score=list(ROWS))
    table.to_parquet(tmp_path / "a.parquet")
    found = read_features(tmp_path / "a.parquet", features_key=key)
    np.testing.assert_array_equal(found.rows, ROWS if columns is None else ROWS[:, list(columns)])


def scalar_frame():
    return pandas.DataFrame({"height": ROWS[:, 0], "width": ROWS[:, 1], "label": LABELS + 0.0})


def labels_among_numbers():
    return pandas.DataFrame(np.column_stack([ROWS, LABELS])).rename(columns=str)


DOUBTFUL = {
    "columns that nothing joins": (scalar_frame, r"cannot tell which of height \(.*, width \(.*, label \(.* list them"),
    "two groups": (lambda: frame("f", g0=ROWS[:, 0], g1=ROWS[:, 0]), r"cannot tell which of .*f\* .*g\* "),
    "a group and a list": (lambda: frame("f", vec=list(ROWS)), "cannot tell which of"),
    "a gap": (lambda: frame().drop(columns="emb_4"), "columns emb_0 to emb_10 lack number 4"),
    "other numbers": (
        lambda: frame("V", Amount=ROWS[:, 0], Time=np.arange(12)),
        r"11 columns V\* are numbered, but there are 2 other columns of numbers, Amount, Time: .*(a,b,c)",
    ),
    "other numbers of a usual name": (
        lambda: frame("x", y_fraction=ROWS[:, 0]),
        r"11 columns x\* are numbered, but there are 1 other columns of numbers, y_fraction",
    ),
    "letters and numbers": (lambda: frame("f", fa=ROWS[:, 0], fb=ROWS[:, 1]), "2 other columns of numbers, fa, fb"),
    "labels among the numbers": (labels_among_numbers, "column '11' holds whole numbers, unlike others"),
}


@pytest.mark.parametrize("case", DOUBTFUL)
@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_what_is_doubtful_is_refused(tmp_path, case, name):
    make, message = DOUBTFUL[case]
    if "list" in case and name == "a.csv":
        pytest.skip("text holds no lists")
    WIDE[name](tmp_path / name, make())
    with pytest.raises(DataError, match=message) as caught:
        read_features(tmp_path / name)
    assert "--features-key" in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_whole_numbers_are_features_where_labels_have_a_name(tmp_path, name):
    """Pixels under the names that pandas gives."""
    pixels = pandas.DataFrame(np.abs(ROWS * 9).round()).rename(columns=str)
    WIDE[name](tmp_path / name, pixels.assign(label=LABELS * 100.0))
    found = read_features(tmp_path / name)
    np.testing.assert_array_equal(found.rows, pixels)
    np.testing.assert_array_equal(found.labels, LABELS * 100)
    WIDE[name](tmp_path / name, pixels)
    with pytest.raises(DataError, match="hold whole numbers alone, labels may be among them"):
        read_features(tmp_path / name)


def test_what_is_doubtful_can_be_asked_for(tmp_path):
    scalar_frame().to_parquet(tmp_path / "a.parquet")
    found = read_features(tmp_path / "a.parquet", features_key="height,width")
    np.testing.assert_array_equal(found.rows, ROWS[:, :2])
    np.testing.assert_array_equal(found.labels, LABELS)
    frame("V", Amount=ROWS[:, 0], digit=LABELS).drop(columns="label").to_parquet(tmp_path / "c.parquet")
    for key, width in (("V", 11), ("V0,V3,Amount", 3)):
        assert read_features(tmp_path / "c.parquet", features_key=key, labels_key="digit").rows.shape == (12, width)
    frame("V", digit=LABELS).drop(columns="label").to_parquet(tmp_path / "d.parquet")
    assert read_features(tmp_path / "d.parquet", labels_key="digit").rows.shape == (12, 11)
    frame().drop(columns="emb_4").to_parquet(tmp_path / "b.parquet")
    assert read_features(tmp_path / "b.parquet", features_key="emb_").rows.shape == (12, 10)


def test_text_without_names(tmp_path):
    np.savetxt(tmp_path / "a.csv", ROWS, delimiter=",")
    np.testing.assert_allclose(read_features(tmp_path / "a.csv").rows, ROWS, rtol=1e-6)
    np.savetxt(tmp_path / "b.csv", np.column_stack([LABELS, ROWS]), delimiter=",")
    with pytest.raises(DataError, match="column 'f0' holds whole numbers, unlike others: it may be labels"):
        read_features(tmp_path / "b.csv")
    np.savetxt(tmp_path / "c.csv", np.abs(ROWS * 99).round(), "%d", delimiter=",")
    with pytest.raises(DataError, match="hold whole numbers alone, labels may be among them"):
        read_features(tmp_path / "c.csv")
    assert read_features(tmp_path / "c.csv", features_key="f").rows.shape == (12, 11)
    relu = np.where(np.arange(11) == 4, 0, ROWS)  # a unit that is always 0 is no label
    np.savetxt(tmp_path / "d.csv", relu, delimiter=",")
    np.testing.assert_allclose(read_features(tmp_path / "d.csv").rows, relu, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3\n-1\n7\n", [3, -1, 7]),
        ("label\n3\n4\n", [3, 4]),
        ("cat\ndog\n", ["cat", "dog"]),
        ("label\ncat\n猫\n", ["cat", "猫"]),
        ("class_id\n3\n4\n", [3, 4]),
        ("file,label\na.png,1.0\nb.png,2.0\n", [1, 2]),
        ('file,label\n"a,b.png",007\nc.png,x\n', ["007", "x"]),
        ("\ufefflabel,file\n5,a\n", [5]),
    ],
)
def test_labels_in_text(tmp_path, text, expected):
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    assert read_labels(tmp_path / "labels.csv").tolist() == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([1, None, 0] * 4), [1, -1, 0] * 4),
        (pa.array(["a", None, "b"] * 4), ["a", None, "b"] * 4),
        (pa.array(["a", None, "b"] * 4).dictionary_encode(), ["a", None, "b"] * 4),
        (pa.array([1.0, None, 0.0] * 4), [1, -1, 0] * 4),
    ],
)
def test_labels_that_are_null_are_unlabelled_and_counted(tmp_path, labels, expected):
    parquet.write_table(list_table(label=labels), tmp_path / "a.parquet")
    found = read_features(tmp_path / "a.parquet")
    assert found.labels.tolist() == expected
    report = evaluate(found.rows, found.labels, leave_one_out=True, k=1)
    assert report.checks["unlabelled_bank"] == 4
    assert any("Left out for want of a label" in warning for warning in report.warnings)


BAD = {
    "a null vector": (
        "a.parquet",
        list_table(embedding=[[1.0], None, *[[1.0]] * 10]),
        "column 'embedding' has 1 nulls, in rows 1",
    ),
    "a null within": (
        "a.parquet",
        list_table(embedding=[[1.0, 2.0], [None, 2.0], *[[1.0, 1.0]] * 10]),
        "column 'embedding' has nulls within 1 vectors, in rows 1",
    ),
    "ragged": (
        "a.parquet",
        list_table(embedding=[[1.0, 2.0], [2.0], [2.0, 2.0, 2.0], *[[1.0, 1.0]] * 9]),
        "different lengths, 2 in row 0, but not in 1",
    ),
    "lists of words": ("a.parquet", list_table(embedding=[["a"]] * 12), "lists of string, not of numbers"),
    "a hole": ("a.csv", "f0,f1,label\n1.5,2.5,0\n,2.5,1\n", "column 'f0' has 1 nulls, in rows 1"),
    "a word": ("a.csv", "f0,f1,f2,label\n1.5,2.5,1.5,0\n1.5,x,2.5,1\n", "columns f0 to f2 lack number 1"),
    "a short line": ("a.csv", "f0,f1,label\n1.5,2.5,0\n2.5,1\n", "Expected 3 columns, got 2"),
    "no label": ("a.csv", "f0,f1,label\n1.5,2.5,0\n1.5,2.5,\n", "column 'label' has 1 empty entries, in rows 1"),
    "no file": ("a.csv", "", "cannot be read as .csv"),
    "no object": ("a.jsonl", "[1, 2]\n", "each line must be a JSON object, the first is a list"),
    "no json": ("a.jsonl", "x\n", "cannot be read as .jsonl"),
    "another length": (
        "a.jsonl",
        '{"embedding": [1.5, 2], "label": 1}\n{"embedding": [1.5], "label": 1}\n',
        "different lengths, 2 in row 0, but not in 1",
    ),
    "a missing key": (
        "a.jsonl",
        '{"embedding": [1.5, 2], "label": 1}\n{"label": 1}\n',
        "column 'embedding' has 1 nulls, in rows 1",
    ),
    "words for ids": (
        "a.jsonl",
        '{"embedding": [1.5, 2], "label": 1}\n{"embedding": [1.5, 2], "label": "x"}\n',
        "cannot be read as .jsonl",
    ),
    "no arrow": ("a.arrow", "ARROW1 and no more", "cannot be read as .arrow"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_named_in_one_line(tmp_path, case):
    name, content, message = BAD[case]
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        parquet.write_table(content, tmp_path / name)
    with pytest.raises(DataError, match=message) as caught:
        read_features(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_categories_and_names_are_labels(tmp_path):
    words = pandas.Series(pandas.Categorical([NAMES[i] for i in LABELS]))
    for label in (words, words.astype(str), LABELS.astype(np.uint8), LABELS.astype(np.int16), LABELS == 1):
        frame().assign(label=label).to_parquet(tmp_path / "a.parquet")
        assert read_features(tmp_path / "a.parquet").labels.tolist() == list(label)


def noted(names):
    """The head that the `datasets` library writes to its tables."""
    features = {"label": {"names": names, "_type": "ClassLabel"}, "embedding": {"_type": "List"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_class_names_that_a_table_notes_are_used(tmp_path):
    table = list_table().replace_schema_metadata(noted(NAMES))
    parquet.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table, stream=True)
    for name in ("a.parquet", "a.arrow"):
        assert read_features(tmp_path / name).class_names == NAMES
    parquet.write_table(table.append_column("kind", pa.array(LABELS)), tmp_path / "b.parquet")
    assert read_features(tmp_path / "b.parquet", labels_key="kind").class_names is None
