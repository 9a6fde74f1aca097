"""The result of an evaluation, and the folder of files that it is kept in."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faiss_knn.offline.report.content import Table, warnings_of
from faiss_knn.offline.report.html import html_table
from faiss_knn.offline.report.mistakes_page import NOTHING_SHOWN, mistake_sections
from faiss_knn.offline.report.publish import publish
from faiss_knn.offline.report.results import Record, Results, best_of, task_key
from faiss_knn.offline.report.results_folder import ResultsFolder, read_folder
from faiss_knn.offline.report.shown_rows import PLAIN, Looks, looks_of
from faiss_knn.offline.report.tables import rows_of, text_table


@dataclass
class EvalReport(Results):
    """What evaluate() found: records as data, as a table, as files.

    Attributes:
        class_names: Names by class number, or None.
        checks: What makes the numbers suspect; see `faiss_knn.offline.report.results.Checks`.
        records: One per index × k × temperature × weighting.
        per_class: The scores of each class by `record_key`: top-1, or average precision for multi-hot labels.
        neighbors: (Q, K) distances and indices by index name, if they were kept.
        class_ids: Class ids by class number, where these are not the same.
        outcomes: What became of each query by `record_key`: arrays (Q,) `prediction` (int32 class number, -1 without
            any vote; for multi-hot labels the class of highest score), `correct` (bool, whether that is the query's
            class, or one of them), `score` (float32, the prediction's share of the neighbours' weight), `row` (int64,
            the query's row as it was given), `label` (int32 class number, not for multi-hot labels) and `group` (int64,
            where groups were given). Of T few-shot draws the first three are (T, Q).
        mistakes: What was wrong under the exact setting with the most voters, of single labels; see
            `faiss_knn.offline.report.findings.Mistakes`.

    Example:
        >>> from faiss_knn import evaluate
        >>> import torch
        >>> report = evaluate(torch.eye(3), [0, 1, 2], torch.eye(3), [0, 1, 1], k=1, progress=False)
        >>> round(report.best()["top1"], 3), report.warnings[0][:25]
        (0.667, '3 queries are in the bank')
    """

    @classmethod
    def load(cls, folder: str | Path) -> "EvalReport":
        """Read what `save` or `faiss-knn eval --out` has written; kept neighbours stay in neighbors.npz.

        Raises:
            ValueError: If there are no records in the folder.
        """
        folder = Path(folder)
        results = read_folder(folder)
        if not results.records:
            raise ValueError(f"{folder}: holds no records of an evaluation: name a folder that `save` has written")
        return cls(**vars(results))

    @property
    def warnings(self) -> list[str]:
        """What makes the numbers suspect, in words."""
        return warnings_of(self)

    def best(self, by: str = "top1") -> Record:
        """Return the record with the highest value of a field; of equal ones the first.

        Raises:
            ValueError: If no record has that field.
        """
        return best_of(self.records, by)

    def to_frame(self) -> Any:
        """Return the records as a pandas DataFrame.

        Raises:
            ImportError: If pandas is not installed.
        """
        import pandas  # optional

        return pandas.DataFrame(self.records)

    def table(self) -> str:
        """Lay out one line per record, for a terminal."""
        return text_table(*rows_of(self.records))

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        return html_table(Table(*rows_of(self.records)))

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        names: Sequence[str] | None = None,
        query_names: Sequence[str] | None = None,
        images: Any = None,
        query_images: Any = None,
    ) -> Path:
        """Add to a folder: results.jsonl, outcomes.npz, results.csv, per_class.csv, report.md, report.html and plots.

        A folder only grows: its records stay, one of the same data and settings gives way to the new one, and tables,
        page and plots are made anew from all of them. Plots need matplotlib and are left out without it; neighbors.npz
        is written if they were kept.

        Args:
            folder: Made if it is not there.
            overwrite: Forget the records that are there.
            names: (N,) what to call the bank's rows beside their numbers, where the page shows what was wrong.
            query_names: (Q,) what to call the queries.
            images: Pictures of the bank's rows, which stand there beside the queries: an array (N, H, W), (N, H, W, C)
                or (N, C, H, W), or (N,) paths, or an `Album` of them. They need Pillow. The page keeps them, in
                gallery.jsonl, when the folder grows.
            query_images: The queries' pictures; with leave-one-out there are none but the bank's.

        Returns:
            The folder.

        Raises:
            ValueError: If the folder cannot be written, its results.jsonl is of something else, or there are not as
                many names or pictures as rows.
        """
        looks = self._looks(names=names, query_names=query_names, images=images, query_images=query_images)
        results_folder = ResultsFolder(folder, overwrite=overwrite)
        if results_folder.warning:
            warnings.warn(results_folder.warning, stacklevel=2)
        parts = results_folder.merge(self)
        pictured = [] if looks is PLAIN else mistake_sections(self, looks)
        publish(parts, self, results_folder.folder, results_folder.keep_gallery(task_key(self.records[0]), pictured))
        return results_folder.folder

    def _looks(self, **given: Any) -> Looks:
        """Check names and pictures, which are as many as rows were given."""
        record = self.records[0]
        if all(entries is None for entries in given.values()):
            return PLAIN
        if self.mistakes is None:
            warnings.warn(NOTHING_SHOWN, stacklevel=3)
            return PLAIN
        counts = {
            "row": record["n_bank"] + record["skipped_bank"] + self.checks.get("unlabelled_bank", 0),
            "query": record["n_queries"] + record["skipped_queries"] + self.checks.get("unlabelled_queries", 0),
        }
        return looks_of(counts | ({"query": 0} if record["leave_one_out"] else {}), **given)
