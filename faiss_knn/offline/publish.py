"""A report's files beside its results.jsonl."""

from pathlib import Path

from faiss_knn.offline.report import EvalReport, csv_text


def publish(report: EvalReport, folder: Path) -> None:
    """Write what is made from the records."""
    (folder / "results.csv").write_text(csv_text(report.records))
