"""The result of an audit, and the files that it is written as."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faiss_knn.offline.report.audit_page import audit_sections, audit_title
from faiss_knn.offline.report.audit_text import audit_lines, audit_summary, audit_warnings
from faiss_knn.offline.report.findings import Findings
from faiss_knn.offline.report.html import page
from faiss_knn.offline.report.markdown import markdown
from faiss_knn.offline.report.results_folder import write_into
from faiss_knn.offline.report.shown_rows import Rows, looks_of
from faiss_knn.offline.report.tables import csv_lines

__all__ = ["AuditReport"]


@dataclass(frozen=True)
class AuditReport(Findings):
    """What `audit` found; its attributes are those of `Findings`."""

    __doc__ = Findings.__doc__

    @property
    def warnings(self) -> list[str]:
        """What makes a number from these data suspect, a sentence each."""
        return audit_warnings(self)

    def summary(self) -> str:
        """Say the findings in a few lines, for a terminal."""
        return audit_summary(self)

    def __str__(self) -> str:
        return self.summary()

    def save(
        self,
        folder: str | Path,
        *,
        names: Sequence[str] | None = None,
        query_names: Sequence[str] | None = None,
        images: Any = None,
        query_images: Any = None,
    ) -> Path:
        """Write audit.jsonl and audit.csv, a line per finding; audit_novelty.csv; audit.md and audit.html to look at.

        Args:
            folder: Made if it is not there; what an earlier audit wrote is replaced.
            names: (N,) what to call the rows beside their numbers.
            query_names: (Q,) what to call the queries.
            images: Pictures of the rows, which the page shows: an array (N, H, W), (N, H, W, C) or (N, C, H, W), or
                (N,) paths, or an `Album` of them. They need Pillow.
            query_images: The queries' pictures.

        Returns:
            The folder.

        Raises:
            ValueError: If the folder cannot be written, or there are not as many names or pictures as rows.
        """
        counts = {"row": self.facts["rows"], "query": self.facts["queries"] or 0}
        looks = looks_of(counts, names=names, query_names=query_names, images=images, query_images=query_images)
        shown = audit_sections(self, Rows(self, looks))
        lines = list(audit_lines(self, names, query_names))
        files = {
            "audit.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
            "audit.csv": _csv(lines),
            "audit_novelty.csv": csv_lines([[self.facts["side"], "novelty"], *enumerate(self.novelty.tolist())]),
            "audit.md": markdown(audit_title(self), shown, {}),
            "audit.html": page(audit_title(self), shown, {}),
        }
        return write_into(folder, files)


def _csv(lines: list[dict[str, Any]]) -> str:
    """Write all findings as CSV, one column per value, lists as JSON."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    return csv_lines([columns, *([_flat(line.get(name)) for name in columns] for line in lines)])


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
