"""The files of a report: complete, escaped, self-contained, and readable in a real browser."""

import base64
import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from faiss_knn import evaluate
from faiss_knn.offline.report.content import Table, sections
from faiss_knn.offline.report.html import html_table
from faiss_knn.offline.report.results import Classes, index_name, pareto_front, pareto_names
from faiss_knn.offline.report.results_folder import ResultsFolder
from faiss_knn.offline.report.tables import text_table

NASTY = ['<script>alert("a")</script>', "b|c", "d & e", "f_g*h `i` [j]", "$k$"]


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 8))
    bank_labels, query_labels = rng.integers(0, 5, 300), rng.integers(0, 5, 80)
    bank, queries = (centres[y] + rng.standard_normal((len(y), 8)) for y in (bank_labels, query_labels))
    queries[0] = bank[0]
    return evaluate(
        bank, bank_labels, queries, query_labels, k=(1, 5, 20), weighting=("inverse", "softmax", "uniform"),
        temperature=(0.07, 0.5), index=("flat", "IVF8,Flat", "HNSW8"), sweep={"nprobe": [1, 2, 4]}, class_names=NASTY,
        metrics=["MulticlassF1Score"], latency=5, keep_neighbors=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    return report.save(tmp_path_factory.mktemp("report"))


def test_every_file_is_there(folder):
    assert {path.name for path in folder.iterdir()} == {
        "results.jsonl", "per_class.jsonl", "results.csv", "per_class.csv", "report.md", "report.html", "neighbors.npz",
        "outcomes.npz",
        "cost.png", "accuracy_over_k.png", "per_class.png",
    }  # fmt: skip


def test_records_are_kept_whole(report, folder):
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert lines == report.records
    assert len(lines) == (1 + 3 + 1) * 3 * 2 * 3
    needed = "spec exact k temperature weighting distance_metric num_classes n_bank n_queries dim top1 top5 macro_top1 "
    needed += "recall accuracy_loss build_s search_s qps bytes device backend versions seed"
    assert set(needed.split()) <= set(lines[0])


def test_the_csv_has_the_same_numbers(report, folder):
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [float(row["top1"]) for row in rows] == [record["top1"] for record in report.records]
    # Which indexes are on the front depends on how fast this machine is.
    assert [row["pareto"] for row in rows] == [
        str(index_name(record) in pareto_front(report.records)) for record in report.records
    ]
    assert json.loads(rows[0]["versions"])["faiss-knn"]


def test_the_class_table_averages_to_macro_top1(report, folder):
    rows = list(csv.DictReader((folder / "per_class.csv").read_text().splitlines()))
    assert {row["name"] for row in rows} == set(NASTY)
    first = [float(row["score"]) for row in rows[:5]]
    assert np.mean(first) == pytest.approx(report.records[0]["macro_top1"])


def test_kept_neighbours_are_saved_by_index(report, folder):
    saved = np.load(folder / "neighbors.npz")
    np.testing.assert_array_equal(saved["indices/IVF8,Flat nprobe=2"], report.neighbors["IVF8,Flat nprobe=2"][1])
    assert saved["distances/flat"].shape == (80, 20)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]


def test_the_page_fetches_nothing_and_runs_nothing(folder):
    text = (folder / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert len(page.links) == 2 * 3
    assert "url(" not in text
    assert "@import" not in text
    for link in page.links:
        kind, _, data = link.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data).decode()
        assert not re.findall(r"(?:href|src)=\"(?!#|data:)", svg)
        assert "<script" not in svg


def test_names_are_escaped(folder):
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "&lt;script&gt;alert(&quot;a&quot;)&lt;/script&gt;" in page
    assert "d &amp; e" in page
    assert "<script>" not in text
    assert "b\\|c" in text
    assert "f\\_g\\*h \\`i\\` \\[j\\]" in text


def test_markdown_tables_are_whole(folder):
    blocks = re.findall(r"(?:^\|.*\|\n)+", (folder / "report.md").read_text(), re.MULTILINE)
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_report_opens_with_what_makes_it_suspect(folder):
    text = (folder / "report.md").read_text()
    assert (
        text.index("1 queries are in the bank")
        < text.index("## What each index costs")
        < text.index("## Every setting")
    )


def test_without_matplotlib_the_rest_is_written(report, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "faiss_knn.offline.report.plots", raising=False)
    report.save(tmp_path)
    assert not list(tmp_path.glob("*.png"))
    assert "<picture>" not in (tmp_path / "report.html").read_text()


def test_report_in_a_notebook_and_as_a_frame(report):
    assert report._repr_html_().count("<tr>") == 1 + len(report.records)
    assert list(report.to_frame()["top1"]) == [record["top1"] for record in report.records]
    assert report.best()["top1"] == max(record["top1"] for record in report.records)
    assert report.best("MulticlassF1Score")["MulticlassF1Score"] > 0
    assert len(str(report).splitlines()) == 1 + len(report.records)
    with pytest.raises(ValueError, match="`by` must be a field of the records with a value, got 'map'"):
        report.best("map")


def test_accuracy_comes_with_its_interval(report, folder):
    best = report.best()
    shown = f"{100 * best['top1_low']:.2f}–{100 * best['top1_high']:.2f}"
    assert shown in report.table()
    assert f"95 % interval {shown}" in (folder / "report.md").read_text()


def test_records_made_without_an_interval_are_still_shown(report):
    before = [{name: v for name, v in record.items() if "top1_" not in name or name.endswith(("_se", "_std"))}
              for record in report.records]  # fmt: skip
    older = replace(report, records=before)
    assert "–" in older.table()
    assert "interval" not in sections(older)[0].text[0]


def test_pareto_front():
    points = {"slow": (1.0, 1.0), "fast": (0.5, 9.0), "beaten": (0.4, 8.0), "twin": (0.5, 9.0)}
    assert pareto_names(points) == {"slow", "fast", "twin"}


def test_text_table_aligns_words_left_and_numbers_right():
    assert text_table(["name", "n"], [["a", "5"], ["bcdef", "10"]]) == "name    n\na       5\nbcdef  10"


def test_a_results_folder_survives_a_cut(report, tmp_path):
    results_folder = ResultsFolder(tmp_path)
    for record in report.records[:3]:
        results_folder.add(record, Classes([0.5, float("nan")], {"retrieval_map": [0.25, float("nan")]}))
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('null\n[1]\n{"spec": "fl')
    again = ResultsFolder(tmp_path, resume=True)
    assert again.done == report.records[:3]
    assert "3 lines are no whole records" in again.warning
    again.add(report.records[3], Classes([], {}))
    assert ResultsFolder(tmp_path, resume=True).done == report.records[:4]
    assert ResultsFolder(tmp_path).done == []  # without resume all are made again, and none is lost
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_a_folder_only_grows_until_it_is_told_otherwise(tmp_path):
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((90, 8)), rng.standard_normal((30, 8))
    of = np.arange(90) % 3, np.arange(30) % 3
    evaluate(bank, of[0], queries, of[1], k=(1, 5)).save(tmp_path)
    further = evaluate(bank, of[0], queries, of[1], k=(1, 9), index="IVF4,Flat")
    for record in further.records:
        record["qps"] = 1e12  # on the front, and perhaps at none of the settings that the plots show
    further.save(tmp_path)
    evaluate(bank[::-1].copy(), of[0], queries, of[1], k=1).save(tmp_path)  # another bank
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(records) == 2 + 2 + 1
    assert {record["k"] for record in records} == {1, 5, 9}
    assert len({record["data"] for record in records}) == 2


def test_a_results_folder_refuses_a_file_that_is_none_of_its(tmp_path):
    (tmp_path / "results.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="not a results file"):
        ResultsFolder(tmp_path, resume=True)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images];
  parent.postMessage(JSON.stringify({
    overflow: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
    images: images.map(i => i.complete && i.naturalWidth > 0 && i.clientWidth <= innerWidth),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(document.body).backgroundColor,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    smallest: Math.min(...[...document.querySelectorAll("p, td, th, li")].map(
      e => parseFloat(getComputedStyle(e).fontSize))),
  }), "*") })</script>"""
FRAME = """<!doctype html><script>addEventListener("message", e => document.title = e.data)</script>
<iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_in_a_browser(folder, tmp_path, width, dark):
    (tmp_path / "page.html").write_text((folder / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    outer = tmp_path / "outer.html"  # a window cannot be as narrow as a phone, a frame can
    outer.write_text(FRAME.format(width=width))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'}"
    flags += " --window-size=1300,900 --virtual-time-budget=3000"
    flags += f" --blink-settings=preferredColorScheme={0 if dark else 1}"
    done = subprocess.run(
        [BROWSER, *flags.split(), "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=90
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr
    seen = json.loads(title[1])
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["images"] == [True] * 3
    assert seen["fetched"] == []
    assert seen["smallest"] >= 14
    assert seen["dark"] == dark
    assert seen["paper"] == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")


def test_a_long_name_has_room_in_the_page():
    name = "x" * 80
    shown = html_table(Table(["row", "votes"], [[name, "1"], ["cat", "2"]]))
    assert f'<td class="word prose">{name}</td>' in shown
    assert "<td class=word>cat</td>" in shown
