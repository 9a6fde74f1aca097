"""Make a results folder's tables, page and plots anew from all its records, and replace them together.

What a folder holds is the concern of results_folder.py; what a report says is in content.py, and how it looks in
html.py, markdown.py and plots.py.
"""

import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt

from faiss_knn.offline.report.content import Section, overview, sections, title_of
from faiss_knn.offline.report.html import page
from faiss_knn.offline.report.markdown import markdown
from faiss_knn.offline.report.mistakes_page import mistake_sections
from faiss_knn.offline.report.results import (
    Record,
    Results,
    index_name,
    name_tasks,
    newest_of_each,
    record_key,
    task_key,
)
from faiss_knn.offline.report.results_folder import write
from faiss_knn.offline.report.tables import csv_lines, csv_text

_FILES = {"cost": "cost", "k": "accuracy_over_k", "classes": "per_class"}
_PLOT = re.compile(rf"({'|'.join(_FILES.values())})(-\d+)?\.png")


def publish(
    parts: Sequence[Results], added: Results, folder: Path, galleries: Mapping[str, Sequence[Section]] | None = None
) -> None:
    """Write all files that are made from the records, with plots if matplotlib is installed, and the kept neighbours.

    Args:
        parts: All that the folder holds, by what was evaluated.
        added: What the neighbours are taken from.
        folder: Where results.jsonl is.
        galleries: Sections with pictures of what was wrong, by `task_key`; evaluations without have tables alone.
    """
    files: dict[str, str | bytes] = {"results.csv": csv_text([record for part in parts for record in part.records])}
    parts = [replace(part, records=newest_of_each(part.records)) for part in parts]
    names = name_tasks([part.records[-1] for part in parts]) if len(parts) > 1 else [""]
    files["per_class.csv"] = csv_lines(_class_rows(names, parts))
    if parts:
        files |= _report(names, parts, galleries or {})
    if added.neighbors:
        name, content = _kept_neighbors(added, folder)
        files[name] = content
    _replace_together(files, folder)


def _replace_together(files: dict[str, str | bytes], folder: Path) -> None:
    """Put all files in place once each is written, and remove the plots that are no longer of anything."""
    partial = Path(mkdtemp(prefix=".partial-", dir=folder))
    try:
        for name, content in files.items():
            write(partial / name, content)
        for name in files:
            os.replace(partial / name, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for path in folder.iterdir():
        if _PLOT.fullmatch(path.name) and path.name not in files:
            path.unlink()


def _report(
    names: Sequence[str], parts: Sequence[Results], galleries: Mapping[str, Sequence[Section]]
) -> dict[str, str | bytes]:
    """Render the page, the Markdown and the pictures, as contents by file name."""
    shown: list[Section] = []
    pictures: dict[str, str] = {}
    drawings: dict[str, tuple[str, str]] = {}
    files: dict[str, str | bytes] = {}
    for number, (name, part) in enumerate(zip(names, parts, strict=True), 1):
        mark = "" if number == 1 else f"-{number}"
        mistakes = galleries.get(task_key(part.records[-1])) or mistake_sections(part)
        for section in sections(part, mistakes):
            title = f"{name}: {section.title}" if name else section.title
            shown.append(replace(section, title=title, plot=section.plot and section.plot + mark))
        for plot, (png, svgs) in _plots(part).items():
            pictures[plot + mark] = f"{_FILES[plot]}{mark}.png"
            drawings[plot + mark] = svgs
            files[pictures[plot + mark]] = png
    title = f"faiss-knn: {title_of(parts[0])}"
    if len(parts) > 1:
        title = f"faiss-knn: {len(parts)} evaluations"
        shown.insert(0, overview(names, parts))
    files["report.md"] = markdown(title, shown, pictures)
    files["report.html"] = page(title, shown, drawings)
    return files


def _plots(part: Results) -> dict[str, tuple[bytes, tuple[str, str]]]:
    try:
        from faiss_knn.offline.report.plots import draw, png, svgs
    except ImportError:
        return {}
    return {name: (png(plot), svgs(plot)) for name, plot in draw(part).items()}


def _class_rows(names: Sequence[str], parts: Sequence[Results]) -> Iterator[list[Any]]:
    several = len(parts) > 1
    headings = ["index", "k", "temperature", "weighting", "class", "name", "score"]
    keys = [[record_key(record) for record in part.records] for part in parts]
    known = [part.retrieval_by_class.get(key, {}) for part, own in zip(parts, keys, strict=True) for key in own]
    measures = list(dict.fromkeys(name for one in known for name in one))
    yield [*headings, *measures, *(["evaluation"] if several else [])]
    for task, part, own in zip(names, parts, keys, strict=False):
        classes = range(max((len(part.per_class.get(key, [])) for key in own), default=0))
        labels, class_names = part.class_ids or classes, part.class_names_of(classes)
        for record, key in zip(part.records, own, strict=True):
            setting = [index_name(record), record["k"], record["temperature"], record["weighting"]]
            retrieval = part.retrieval_by_class.get(key, {})
            for i, score in enumerate(part.per_class.get(key, [])):
                values = [score, *(retrieval[name][i] if name in retrieval else None for name in measures)]
                shown = ("" if value is None or value != value else value for value in values)
                row = [*setting, labels[i], class_names[i], *shown]
                yield [*row, task] if several else row


def read_kept_neighbors(folder: Path, record: Record, name: str) -> npt.NDArray[Any] | None:
    """Read (Q, K) indices that a folder holds of a record's evaluation, under an index's name; None if it has none."""
    for path in sorted(folder.glob("neighbors*.npz")):
        with np.load(path) as held:
            if f"indices/{name}" in held and str(held["evaluation"]) == task_key(record):
                indices: npt.NDArray[Any] = held[f"indices/{name}"]
                return indices
    return None


def _kept_neighbors(added: Results, folder: Path) -> tuple[str, bytes]:
    """Add neighbours of further indexes to neighbors.npz, or, of another evaluation, write a file marked as of this."""
    task = task_key(added.records[0])
    arrays: dict[str, Any] = {"evaluation": np.array(task)}
    for name in ("neighbors.npz", f"neighbors-{blake2b(task.encode(), digest_size=4).hexdigest()}.npz"):
        held = _arrays(folder / name)
        if not held or str(held.get("evaluation")) == task:
            break
    arrays |= held if str(held.get("evaluation")) == task else {}
    for index, pair in added.neighbors.items():
        arrays |= {f"{what}/{index}": array for what, array in zip(("distances", "indices"), pair, strict=True)}
    out = io.BytesIO()
    np.savez(out, **arrays)
    return name, out.getvalue()


def _arrays(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with np.load(path) as held:
        return dict(held)
