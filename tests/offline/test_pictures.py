"""Thumbnails are those of their rows, bounded, and no damaged file ends a page; pages are escaped and complete."""

import io
import re
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from faiss_knn import audit, evaluate
from faiss_knn.offline.cli import main
from faiss_knn.offline.report import thumbnails
from faiss_knn.offline.report.results import record_key
from faiss_knn.offline.report.thumbnails import Album
from tests.measures.lists import digits

ROWS, LABELS = digits()
ROWS, LABELS = ROWS[:200].astype(np.float32), LABELS[:200]
FAULTY = np.concatenate([ROWS, ROWS[:4]])
WRONG = np.concatenate([np.where(np.arange(200) % 20 == 3, (LABELS + 1) % 10, LABELS), LABELS[:4]])


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))))


def test_small_pictures_are_enlarged_as_they_are():
    pixels = np.arange(192, dtype=np.uint8).reshape(3, 8, 8)
    album = Album(pixels)
    for number in range(3):
        shown = decoded(album.thumbnail(number))
        assert shown.shape == (96, 96)
        assert (shown[::12, ::12] == pixels[number]).all()
    assert (len(album), album.thumbnail(3), album.thumbnail(-1)) == (3, None, None)


@pytest.mark.parametrize(("dtype", "white"), [(np.float32, 1.0), (np.float64, 16.0), (np.int64, 16)])
def test_numbers_are_scaled_to_black_and_white(dtype, white):
    pixels = np.zeros((2, 8, 8), dtype)
    pixels[1, 2, 3] = white
    shown = decoded(Album(pixels).thumbnail(1))
    assert (shown.max(), shown[2 * 12, 3 * 12], shown.sum()) == (255, 255, 255 * 144)


@pytest.mark.parametrize("shape", [(2, 9, 8, 3), (2, 3, 9, 8), (2, 9, 8, 1)])
def test_channels_may_come_first_or_last(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    last = pixels if shape[-1] in (1, 3) else np.moveaxis(pixels, 1, 3)
    shown = decoded(Album(pixels).thumbnail(0)).reshape(90, 80, -1)
    assert (shown[::10, ::10] == last[0]).all()


def test_files_are_shrunk_and_those_that_cannot_be_read_are_counted(tmp_path):
    Image.fromarray(np.full((300, 600, 3), (200, 30, 30), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    (tmp_path / "c.png").write_text("no picture")
    album = Album(["a.jpg", "b.jpg", "c.png", "missing.png"], tmp_path)
    shown = decoded(album.thumbnail(0))
    assert shown.shape == (48, 96, 3)
    assert abs(shown.mean((0, 1)) - [200, 30, 30]).max() < 8
    assert [album.thumbnail(i) for i in (1, 2, 3)] == [None, None, None]
    assert album.broken == [1, 2, 3]


def test_damaged_files_of_each_kind_are_left_out_and_mistakes_of_the_program_are_not(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 3)).astype(np.uint8))
    names = []
    for kind in ("png", "jpeg", "gif", "tiff", "bmp", "webp", "ppm"):
        picture.save(tmp_path / f"whole.{kind}")
        whole = np.frombuffer((tmp_path / f"whole.{kind}").read_bytes(), np.uint8)
        for i in range(40):
            part = whole[: rng.integers(len(whole))].copy()
            part[rng.integers(0, len(part), 3) if len(part) else []] = 255
            names.append(f"{i}.{kind}")
            part.tofile(tmp_path / names[-1])
        names.append(f"whole.{kind}")
    album = Album([*names, "a\0b.png", ""], tmp_path)
    shown = {name for i, name in enumerate(names) if album.thumbnail(i) is not None}
    assert {name for name in names if name.startswith("whole")} <= shown
    assert album.thumbnail(len(names)) is album.thumbnail(len(names) + 1) is None
    assert len(album.broken) == len(names) + 2 - len(shown) > 200
    monkeypatch.setattr(thumbnails, "_as_uri", lambda picture: picture.no_such_method())
    with pytest.raises(AttributeError):
        album.thumbnail(names.index("whole.png"))


def test_there_are_no_more_than_a_page_can_bear(monkeypatch):
    monkeypatch.setattr(thumbnails, "_MOST_PICTURES", 3)
    album = Album(np.zeros((9, 8, 8), np.uint8))
    assert sum(album.thumbnail(i) is not None for i in range(9)) == 3
    monkeypatch.setattr(thumbnails, "_MOST_BYTES", 1)
    album = Album(np.zeros((9, 8, 8), np.uint8))
    assert sum(album.thumbnail(i) is not None for i in range(9)) == 1


@pytest.mark.parametrize(
    "source", [np.zeros((2, 5)), np.zeros((2, 5, 6, 7)), np.zeros((2, 3, 4, 5, 6)), [1, 2], "picture.png"]
)
def test_what_is_no_picture_is_refused(source):
    with pytest.raises(ValueError, match="`images` must be"):
        Album(source)


@pytest.fixture(scope="module")
def report():
    return audit(FAULTY, WRONG, k=10, class_names=[f"<b>{i}</b>" for i in range(10)])


def test_the_page_shows_the_rows_of_each_finding(report, tmp_path):
    names = [f"<i>{i}</i>.png" for i in range(204)]
    report.save(tmp_path, names=names, images=FAULTY.reshape(-1, 8, 8))
    page = (tmp_path / "audit.html").read_text()
    assert '<meta name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert "<i>" not in page
    assert "<b>" not in page
    assert "&lt;i&gt;0&lt;/i&gt;.png · &lt;b&gt;" in page
    for title in ("Near-duplicates", "Labels that may be wrong", "Classes that are confused", "Farthest", "Hubs"):
        assert f"<h2>{title}" in page
    first, copy = re.findall(r'<figure><img src="([^"]*)"', page)[:2]
    assert first == copy == Album(FAULTY.reshape(-1, 8, 8)).thumbnail(report.duplicates[0][0])
    text = (tmp_path / "audit.md").read_text()
    assert "## Near-duplicates" in text
    assert "&lt;i>0&lt;/i>.png" in text


def test_without_pictures_the_names_stand_in_tables(report, tmp_path):
    report.save(tmp_path)
    page = (tmp_path / "audit.html").read_text()
    assert "<img" not in page
    assert "<figure" not in page
    assert "<td class=word>row 0, row 200</td>" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"names": ["a"]}, "`names` must have one entry per row, 204, got 1"),
        ({"images": ROWS.reshape(-1, 8, 8)}, "`images` must have one entry per row, 204, got 200"),
        ({"query_names": ["a"]}, "`query_names` must have one entry per query, 0, got 1"),
    ],
)
def test_names_and_pictures_are_as_many_as_rows(report, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        report.save(tmp_path, **given)


def test_a_thousand_classes_stay_a_page(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 2000)
    audit(rng.standard_normal((2000, 8)), labels, k=5).save(tmp_path)
    assert len((tmp_path / "audit.html").read_bytes()) < 400_000


def test_the_command_takes_an_array_or_paths(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for i, row in enumerate(FAULTY.reshape(-1, 8, 8)):
        Image.fromarray((15 * row).astype(np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "paths.txt").write_text("".join(f"pictures/{i}.png\n" for i in range(204)))
    np.savez(tmp_path / "data.npz", features=FAULTY, labels=WRONG, images=FAULTY.reshape(-1, 8, 8))
    for source, out in (("images", "a"), (str(tmp_path / "paths.txt"), "b")):
        command = ["audit", str(tmp_path / "data.npz"), "--k", "10", "--images", source, "--out", str(tmp_path / out)]
        assert main(command) == 0
        assert (tmp_path / out / "audit.html").read_text().count("<img") > 50
    assert main(["audit", str(tmp_path / "data.npz"), "--images", "photos", "--out", str(tmp_path / "c")]) == 1
    assert "no array 'photos' for the pictures, and no file of that name: it holds " in capsys.readouterr().err
    (tmp_path / "paths.txt").write_text("a.png\nb.png\n")
    command = [
        "audit",
        str(tmp_path / "data.npz"),
        "--images",
        str(tmp_path / "paths.txt"),
        "--out",
        str(tmp_path / "c"),
    ]
    assert main(command) == 1
    assert "2 pictures for the 204 rows of" in capsys.readouterr().err


MORE, MORE_LABELS = (part[200:320] for part in digits())
MORE = MORE.astype(np.float32)
PIXELS, MORE_PIXELS = FAULTY.reshape(-1, 8, 8), MORE.reshape(-1, 8, 8)


def strips(page):
    """The pictures of each strip, first those of the row that it is of."""
    return [re.findall(r'<img src="([^"]*)"', strip) for strip in page.split('<div class="strip">')[1:]]


def nearest(rows, of, count):
    cosines = (of / np.linalg.norm(of)) @ (rows / np.linalg.norm(rows, axis=1)[:, None]).T
    return np.argsort(1 - cosines.astype(np.float64), kind="stable")[:count]


def test_an_evaluation_shows_the_surest_wrong_answers_before_their_neighbours(tmp_path):
    evaluated = evaluate(FAULTY, WRONG, MORE, MORE_LABELS, k=(1, 5), class_names=[f"<script>{i}" for i in range(10)])
    evaluated.save(tmp_path, images=PIXELS, query_images=MORE_PIXELS, query_names=[f"<i>{i}" for i in range(120)])
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "<i>" not in page
    outcome = evaluated.outcomes[record_key(evaluated.best("k"))]
    wrong = [i for i in range(120) if outcome["prediction"][i] != MORE_LABELS[i]]
    surest = sorted(wrong, key=lambda i: -outcome["score"][i])[:12]
    assert f"{len(wrong)} queries of 120 taken for another class, with k = 5" in page
    seen = strips(page)
    looks, bank = Album(MORE_PIXELS), Album(PIXELS)
    for query, shown in zip(surest, seen, strict=False):
        rows = nearest(FAULTY.astype(np.float64), MORE[query].astype(np.float64), 5)
        assert shown == [looks.thumbnail(query), *map(bank.thumbnail, rows)]
        assert f"&lt;i&gt;{query} · &lt;script&gt;{MORE_LABELS[query]}" in page
    pairs = {(MORE_LABELS[i], outcome["prediction"][i]) for i in wrong}
    assert len(seen) == len(surest) + min(12, len(pairs))
    for label, taken in pairs:
        assert f"&lt;script&gt;{label} taken for &lt;script&gt;{taken}" in page


def test_pictures_stay_when_the_folder_grows_and_go_when_it_is_overwritten(tmp_path):
    arguments = FAULTY, WRONG, MORE, MORE_LABELS
    evaluate(*arguments, k=5).save(tmp_path, images=PIXELS, query_images=MORE_PIXELS)
    with_pictures = strips((tmp_path / "report.html").read_text())
    evaluate(*arguments, k=3, index="IVF4,Flat").save(tmp_path)
    assert strips((tmp_path / "report.html").read_text()) == with_pictures
    evaluate(*arguments, k=5).save(tmp_path, overwrite=True)
    page = (tmp_path / "report.html").read_text()
    assert (strips(page), page.count("<h2>The surest wrong answers")) == ([], 1)
    (tmp_path / "gallery.jsonl").write_text("no gallery")
    with pytest.raises(ValueError, match=r"gallery\.jsonl: cannot be read"):
        evaluate(*arguments, k=5).save(tmp_path)


def test_rows_are_shown_by_the_numbers_that_they_were_given_with(tmp_path):
    labels, rows = np.insert(WRONG, 0, -1), np.insert(FAULTY, 0, np.nan, axis=0)
    rows[0], rows[1] = 1, 0  # the first has no label, the second cannot be compared
    labels[1] = 3
    evaluated = evaluate(rows, labels, k=5, leave_one_out=True, skip_bad_rows=True)
    with pytest.raises(ValueError, match="`images` must have one entry per row, 205, got 204"):
        evaluated.save(tmp_path, images=PIXELS)
    evaluated.save(tmp_path, names=[f"n{i}" for i in range(205)])
    page = (tmp_path / "report.html").read_text()
    outcome = next(iter(evaluated.outcomes.values()))
    wrong = [i for i in range(len(outcome["row"])) if not outcome["correct"][i]]
    first = int(outcome["row"][sorted(wrong, key=lambda i: -outcome["score"][i])[0]])
    assert re.search(r"<td class=word>(n\d+)</td>", page).group(1) == f"n{first}"
    for query, near in zip(evaluated.mistakes.surest, evaluated.mistakes.near, strict=False):
        assert not {row for row, _ in near} & {0, 1, query.row}
        assert [label for _, label in near] == labels[[row for row, _ in near]].tolist()


def test_where_single_queries_are_not_known_none_is_shown(tmp_path):
    few = evaluate(ROWS, LABELS, MORE, MORE_LABELS, k=1, per_class=2, tries=2)
    with pytest.warns(UserWarning, match="no query is shown by its name or picture"):
        few.save(tmp_path, images=ROWS.reshape(-1, 8, 8))
    assert "<h2>The surest wrong" not in (tmp_path / "report.html").read_text()


def test_a_thousand_confused_classes_stay_a_page_of_an_evaluation(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 3000)
    rows, pixels = rng.standard_normal((3000, 8)), rng.integers(0, 256, (3000, 32, 32, 3)).astype(np.uint8)
    evaluate(rows, labels, leave_one_out=True, k=20).save(tmp_path, images=pixels)
    page = (tmp_path / "report.html").read_text()
    assert 100 < page.count("<img") < 250
    assert len((tmp_path / "report.md").read_text().splitlines()) < 200


def test_eval_takes_pictures_of_both_sides(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for i, row in enumerate(MORE_PIXELS):
        Image.fromarray((15 * row).astype(np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "paths.txt").write_text("".join(f"pictures/{i}.png\n" for i in range(120)))
    np.savez(tmp_path / "bank.npz", features=FAULTY, labels=WRONG, images=PIXELS)
    np.savez(tmp_path / "both.npz", features=MORE, labels=MORE_LABELS, images=MORE_PIXELS)
    np.savez(tmp_path / "plain.npz", features=MORE, labels=MORE_LABELS)
    start = ["eval", str(tmp_path / "bank.npz"), "--k", "5", "--images=images"]
    counts = {}
    for name, more in {
        "key": ["both.npz"],
        "bank": ["plain.npz"],
        "file": ["plain.npz", "--query-images", "paths.txt"],
        "own": ["--leave-one-out"],
    }.items():
        files = [str(tmp_path / word) if "." in word else word for word in more]
        command = [*start[:2], *files, *start[2:], "--out", str(tmp_path / name)]
        assert main(command) == 0
        counts[name] = [len(strip) for strip in strips((tmp_path / name / "report.html").read_text())]
    assert counts["key"] == counts["file"]
    assert counts["key"][0] == counts["own"][0] == 6
    assert counts["bank"][0] == 5
    assert (tmp_path / "key" / "gallery.jsonl").exists()
    files = [str(tmp_path / name) for name in ("bank.npz", "plain.npz", "few")]
    assert main(["eval", *files[:2], "--per-class", "2", "--images", "images", "--out", files[2]]) == 0
    assert "no query is shown by its name or picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "images", "--out", "x"], "--images are of the rows of BANK"),
        (["a.npz", "b.npz", "--images", "images"], "--images needs --out, where they are shown"),
        (["a.npz", "--leave-one-out", "--query-images", "images", "--out", "x"], "--query-images needs QUERIES"),
        (["a.npz", "b.npz", "--explain", "0.5", "--names", "n", "--out", "x"], "--names does not go with --explain"),
        (["a.npz", "b.npz", "--relevance", "r", "--images", "n"], "--images does not go with --relevance"),
    ],
)
def test_looks_go_with_what_shows_them(capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["eval", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "audit"])
@pytest.mark.parametrize("missing", [0, 1, 300])
def test_pictures_that_cannot_be_read_are_said_once_with_the_first_of_them(tmp_path, capsys, command, missing):
    rows, labels = digits()
    (tmp_path / "pictures").mkdir()
    for number, row in enumerate(rows[missing:300], missing):
        Image.fromarray((16 * row).clip(max=255).astype(np.uint8).reshape(8, 8)).save(
            tmp_path / f"pictures/{number}.png"
        )
    names = [f"pictures/{number}.png" for number in range(300)]
    odd = np.where(np.arange(300) == 0, (labels[0] + 1) % 10, labels[:300])  # row 0 is shown by either
    np.savez(tmp_path / "rows.npz", features=rows[:300], labels=odd, paths=np.array(names))
    options = ["--leave-one-out", "--k", "5"] if command == "eval" else []
    out = ["--images", "paths", "--out", str(tmp_path / "out")]
    assert main([command, str(tmp_path / "rows.npz"), *options, *out]) == 0
    said = re.findall(
        r"faiss-knn: warning: (\d+) pictures? could not be read, the first: (.*)", capsys.readouterr().err
    )
    assert len(said) == (missing > 0)
    if missing == 1:
        assert said == [("1", str(tmp_path / "pictures/0.png"))]
    if missing == 300:
        page = (tmp_path / "out" / ("report.html" if command == "eval" else "audit.html")).read_text()
        assert f"{said[0][0]} pictures could not be read" in page
