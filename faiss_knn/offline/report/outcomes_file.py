"""outcomes.npz: what became of each query, for all records of a folder.

| array | what it holds |
|---|---|
| `records` | (R,) the records, each by its `record_key` |
| `{i}/prediction` | (Q,) int32 class numbers that record i answered with, -1 without any vote |
| `{i}/correct` | (Q,) bool, whether that was right |
| `{i}/score` | (Q,) float32 share of the neighbours' weight that the answer had |
| `{i}/queries` | number j of the queries that record i is of |
| `queries/{j}/row` | (Q,) int64 row numbers of the queries as they were given |
| `queries/{j}/label` | (Q,) int32 class numbers of the queries; none for multi-hot labels |
| `queries/{j}/group` | (Q,) int64 groups of the queries, where they were given |

The first three of record i are (T, Q) where T few-shot banks were drawn.

Compressed, without pickles: `numpy.load` reads it.
"""

import io
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from zipfile import BadZipFile, is_zipfile

import numpy as np

from faiss_knn.offline.report.results import Outcome

OUTCOMES = "outcomes.npz"

_OF_QUERIES = ("row", "label", "group")  # the same arrays for all records of the same queries


def check_outcomes(folder: Path) -> None:
    """Look, without reading it, whether a folder's outcomes.npz can be one.

    Raises:
        ValueError: If the file is something else.
    """
    path = folder / OUTCOMES
    if path.exists() and not is_zipfile(path):
        raise ValueError(f"{path}: is no file of outcomes: remove it, or choose another folder")


def part_path(folder: Path, key: str) -> Path:
    """Name the file that holds a record's outcome until it is merged into outcomes.npz."""
    return folder / f"outcomes-{blake2b(key.encode(), digest_size=8).hexdigest()}.npz"


def part_paths(folder: Path) -> list[Path]:
    """Find the files of single outcomes that a run has left, if it was cut off or is not done."""
    return sorted(folder.glob("outcomes-*.npz"))


def read_outcomes(folder: Path) -> dict[str, Outcome]:
    """Read the outcomes that a folder holds by `record_key`, none if it has no such file.

    Raises:
        ValueError: If a file is something else.
    """
    whole = [folder / OUTCOMES] if (folder / OUTCOMES).exists() else []
    return {key: outcome for path in [*whole, *part_paths(folder)] for key, outcome in _read(path).items()}


def _read(path: Path) -> dict[str, Outcome]:
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = dict(held)
        return {str(key): _outcome(arrays, i) for i, key in enumerate(arrays["records"])}
    except (ValueError, KeyError, BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}): remove it, or choose another folder") from error


def _outcome(arrays: Mapping[str, np.ndarray], number: int) -> Outcome:
    queries = f"queries/{int(arrays[f'{number}/queries'])}/"
    shared = {name: arrays[queries + name] for name in _OF_QUERIES if queries + name in arrays}
    return {name: arrays[f"{number}/{name}"] for name in ("prediction", "correct", "score")} | shared


def pack_outcomes(outcomes: Mapping[str, Outcome], *, compress: bool = True) -> bytes:
    """Write outcomes by `record_key` as the content of outcomes.npz.

    Example:
        >>> one = {"prediction": np.array([2]), "correct": np.array([True]), "score": np.array([0.5], np.float32)}
        >>> with np.load(io.BytesIO(pack_outcomes({"[1]": one | {"row": np.array([7])}}))) as file:
        ...     sorted(file)
        ['0/correct', '0/prediction', '0/queries', '0/score', 'queries/0/row', 'records']
    """
    arrays: dict[str, np.ndarray] = {"records": np.array(list(outcomes), dtype=np.str_)}
    numbers: dict[bytes, int] = {}
    for i, outcome in enumerate(outcomes.values()):
        shared = {name: outcome[name] for name in _OF_QUERIES if name in outcome}
        number = numbers.setdefault(_digest(shared), len(numbers))
        arrays |= {f"{i}/{name}": array for name, array in outcome.items() if name not in shared}
        arrays |= {f"queries/{number}/{name}": array for name, array in shared.items()}
        arrays[f"{i}/queries"] = np.array(number)
    out = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


def _digest(arrays: Outcome) -> bytes:
    digest = blake2b(digest_size=16)
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
