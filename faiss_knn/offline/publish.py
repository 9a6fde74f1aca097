"""A report's files beside its results.jsonl."""

import csv
from pathlib import Path

import numpy as np

from faiss_knn.offline.document import sections, title_of
from faiss_knn.offline.html import page
from faiss_knn.offline.markdown import markdown
from faiss_knn.offline.report import EvalReport, csv_text, index_name, record_key

_FILES = {"cost": "cost.png", "k": "accuracy_over_k.png", "classes": "per_class.png"}


def publish(report: EvalReport, folder: Path) -> None:
    """Write what is made from the records: tables, page, plots where matplotlib is there, and kept neighbours."""
    (folder / "results.csv").write_text(csv_text(report.records))
    _write_classes(report, folder / "per_class.csv")
    try:
        from faiss_knn.offline.figures import draw, png, svgs  # matplotlib is an extra
    except ImportError:
        plots = {}
    else:
        plots = draw(report)
    for name, plot in plots.items():
        (folder / _FILES[name]).write_bytes(png(plot))
    title, parts = f"faiss-knn: {title_of(report)}", sections(report)
    (folder / "report.md").write_text(markdown(title, parts, {name: _FILES[name] for name in plots}))
    (folder / "report.html").write_text(page(title, parts, {name: svgs(plot) for name, plot in plots.items()}))
    if report.neighbors:
        arrays = {f"{what}/{name}": array for name, pair in report.neighbors.items()
                  for what, array in zip(("distances", "indices"), pair, strict=True)}  # fmt: skip
        np.savez(folder / "neighbors.npz", **arrays)  # type: ignore[arg-type]


def _write_classes(report: EvalReport, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "k", "temperature", "weighting", "class", "name", "score"])
        for record in report.records:
            setting = [index_name(record), record["k"], record["temperature"], record["weighting"]]
            for i, score in enumerate(report.per_class.get(record_key(record), [])):
                label = report.class_ids[i] if report.class_ids else i
                name = report.class_names[i] if report.class_names else label
                writer.writerow([*setting, label, name, "" if score is None or score != score else score])
