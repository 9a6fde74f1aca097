"""Features named by URL: paths on any file system that fsspec knows, and rows of theirs, read by ranges of bytes."""

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from faiss_knn.search.inputs import as_path

_RANGE_BYTES = 16 << 20  # asked for at once, so that a store that answers many requests together can
_URL = re.compile(r"([a-z][a-z0-9+.-]+)(::|://)")


class RemotePath:
    """A path on a file system of fsspec, as far as reading needs `pathlib.Path`.

    Args:
        url: Such as "s3://bucket/train" or "hf://datasets/name/train.npy".

    Raises:
        ImportError: If fsspec, or what it needs for this kind of URL, is not installed.
        ValueError: If it knows no such kind.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # an extra

        self.url = url.rstrip("/")
        self.system, self.key = url_to_fs(self.url)
        self._pure = PurePosixPath(self.key)

    @property
    def name(self) -> str:
        """The last part."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The ending."""
        return self._pure.suffix

    @property
    def parent(self) -> "RemotePath":
        """The folder that it is in."""
        return RemotePath(self.url.rpartition("/")[0])

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    def exists(self) -> bool:
        """Tell whether there is such a file or folder."""
        return bool(self.system.exists(self.key))

    def is_file(self) -> bool:
        """Tell whether it is a file."""
        return bool(self.system.isfile(self.key))

    def is_dir(self) -> bool:
        """Tell whether it is a folder."""
        return bool(self.system.isdir(self.key))

    def iterdir(self) -> Iterator["RemotePath"]:
        """Yield what is in the folder."""
        names = {PurePosixPath(str(entry)).name for entry in self.system.ls(self.key, detail=False)}
        yield from (self / name for name in sorted(names - {"", self.name}))

    def open(self, mode: str = "rb", **options: Any) -> IO[Any]:
        """Open the file."""
        opened: IO[Any] = self.system.open(self.key, mode, **options)
        return opened

    def read_text(self, encoding: str = "utf-8") -> str:
        """Read the whole file as text."""
        return str(self.system.cat_file(self.key).decode(encoding))

    def size(self) -> int:
        """Return the file's size in bytes."""
        return int(self.system.size(self.key))

    def ranges(self, starts: list[int], stops: list[int]) -> list[bytes]:
        """Read parts of the file, all asked for together.

        Raises:
            OSError: If one of them is not there.
        """
        parts = self.system.cat_ranges([self.key] * len(starts), starts, stops, on_error="raise")
        for part, start, stop in zip(parts, starts, stops, strict=True):
            if len(part) != stop - start:
                raise OSError(f"{self}: ends within bytes {start} to {stop}: it was replaced while it was read")
        return list(parts)


FilePath = Path | RemotePath


def is_url(text: object) -> bool:
    """Tell whether this is a URL, and no path of this machine.

    Example:
        >>> is_url("s3://bucket/bank.npy"), is_url("bank.npy"), is_url("C:/bank.npy")
        (True, False, False)
    """
    return isinstance(text, str) and _URL.match(text) is not None


def as_location(value: Any, argument: str) -> FilePath:
    """Return the path of a file or folder, on this machine or elsewhere.

    Raises:
        ValueError: If it is neither a path nor a URL of a kind that can be read here.
    """
    if isinstance(value, RemotePath):
        return value
    if not is_url(value):
        return as_path(value, argument)
    if value.startswith("file://"):
        return Path(unquote(urlsplit(value).path))
    try:
        return RemotePath(value)
    except ImportError as error:
        needed = "pip install 'faiss-knn-eval[remote]'" if error.name == "fsspec" else str(error).strip()
        raise ValueError(f"{value}: cannot be read: {needed}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{value}: cannot be read: {str(error).splitlines()[0]}") from error


class RemoteRows:
    """Rows of one width in a file elsewhere, read by the ranges of bytes that are asked for.

    Args:
        path: The file.
        shape: (N, d).
        dtype: Of the numbers.
        offset: Where the first row begins.
        skipped: Bytes before the numbers of each row.
    """

    def __init__(
        self, path: RemotePath, shape: tuple[int, int], dtype: np.dtype[Any], offset: int, skipped: int = 0
    ) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._offset, self._skipped = offset, skipped
        self._width = skipped + shape[1] * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.integer]) -> npt.NDArray[Any]:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            return self._span(start, max(start, stop))[::step]
        numbers = np.asarray(rows)
        if not len(numbers):
            return self._span(0, 0)
        starts = (self._offset + numbers * self._width).tolist()
        return self._parsed(self.path.ranges(starts, [start + self._width for start in starts]))

    def _span(self, start: int, stop: int) -> npt.NDArray[Any]:
        first, last = self._offset + start * self._width, self._offset + stop * self._width
        starts = list(range(first, last, _RANGE_BYTES))
        return self._parsed(self.path.ranges(starts, [*starts[1:], last]) if starts else [])

    def _parsed(self, parts: list[bytes]) -> npt.NDArray[Any]:
        raw = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, self._width)
        return np.ascontiguousarray(raw[:, self._skipped :]).view(self.dtype)


def on_this_machine(path: FilePath) -> Path:
    """Return the file's path here: of one that lies elsewhere, that of a copy which is removed at the end."""
    return path if isinstance(path, Path) else _copied(path)


@cache
def _copied(path: RemotePath) -> Path:
    copy = Path(tempfile.mkdtemp(dir=_copies())) / path.name
    path.system.get_file(path.key, str(copy))
    return copy


@cache
def _copies() -> str:
    folder = tempfile.mkdtemp(prefix="faiss-knn-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
