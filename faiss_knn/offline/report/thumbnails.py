"""Small pictures that stand inside a page, as many as a page can bear."""

import io
import struct
import warnings
from base64 import b64encode
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 96  # pixels of the longer side
_SMALL = 32  # pixels up to which an array's picture is enlarged without smoothing
_MOST_PICTURES = 800
_MOST_BYTES = 8 << 20  # of all pictures in a page
# What Pillow's readers raise on files that are damaged or no pictures.
_OF_BAD_FILES = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, LookupError, struct.error)
_SAMPLED = 64  # pictures of an array that tell which numbers are white and black


class Album:
    """Pictures of rows by number, made into thumbnails when asked for.

    Args:
        source: (N, H, W), (N, H, W, C) or (N, C, H, W) array with 1, 3 or 4 channels (whole numbers to 255, else the
            smallest number is black and the largest white); or (N,) paths.
        folder: Where paths that are not absolute begin.

    Attributes:
        broken: Numbers of the pictures that were asked for and cannot be read, in that order.

    Raises:
        ValueError: If the source is neither, or Pillow is not installed.

    Example:
        >>> album = Album(np.zeros((2, 8, 8), np.uint8))
        >>> album.thumbnail(1)[:22], album.thumbnail(5)
        ('data:image/png;base64,', None)
    """

    def __init__(self, source: Any, folder: str | Path = ".") -> None:
        if find_spec("PIL") is None:
            raise ValueError("pictures need Pillow: pip install 'faiss-knn-eval[images]'")
        self._paths, self._arrays = _paths_or_arrays(source)
        self._folder = Path(folder)
        self._range = _range_of(self._arrays) if self._arrays is not None else (0.0, 255.0)
        self._left_pictures, self._left_bytes = _MOST_PICTURES, _MOST_BYTES
        self.broken: list[int] = []

    def __len__(self) -> int:
        return len(self._paths if self._arrays is None else self._arrays)

    def thumbnail(self, number: int) -> str | None:
        """Make a row's picture as a data URI; None where it cannot be read, or the page has as many as it can bear."""
        if self._left_pictures <= 0 or self._left_bytes <= 0 or not 0 <= number < len(self):
            return None
        from PIL import Image

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd notes in a file
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                uri = _as_uri(self._picture(number))
        except (*_OF_BAD_FILES, Image.DecompressionBombError):
            if number not in self.broken:
                self.broken.append(number)
            return None
        self._left_pictures -= 1
        self._left_bytes -= len(uri)
        return uri

    def name(self, number: int) -> str:
        """Say which picture it is: by its path, or by its number in an array."""
        return f"number {number}" if self._arrays is not None else str(self._folder / self._paths[number])

    def _picture(self, number: int) -> "Image":
        from PIL import Image

        if self._arrays is not None:
            return Image.fromarray(_as_pixels(np.asarray(self._arrays[number]), *self._range))
        with Image.open(self._folder / self._paths[number]) as opened:
            opened.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # JPEG files are decoded no larger than needed
            opened.thumbnail((_SIDE, _SIDE))
            return opened.convert("RGBA" if "A" in opened.getbands() else "RGB")


def _paths_or_arrays(source: Any) -> tuple[Sequence[str], Any]:
    shape = tuple(getattr(source, "shape", ()))
    if len(shape) >= 3:
        if len(shape) > 4 or (len(shape) == 4 and not {shape[1], shape[3]} & {1, 3, 4}):
            raise ValueError(
                f"`images` must be (N, H, W), (N, H, W, C) or (N, C, H, W), C 1, 3 or 4, got shape {shape}"
            )
        return (), source
    names = list(source) if len(shape) < 2 and not isinstance(source, (str, bytes)) else [None]
    if not all(isinstance(name, (str, Path)) for name in names):
        raise ValueError("`images` must be an array of pictures, (N, H, W) or (N, H, W, C), or (N,) paths")
    return [str(name) for name in names], None


def _range_of(arrays: Any) -> tuple[float, float]:
    """Find the numbers that are black and white."""
    if np.dtype(str(arrays.dtype).removeprefix("torch.")) == np.uint8:
        return 0.0, 255.0
    sample = np.asarray(arrays[:: -(-len(arrays) // _SAMPLED)], dtype=np.float64)
    low, high = float(np.nanmin(sample)), float(np.nanmax(sample))
    if np.issubdtype(sample.dtype, np.floating) and low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def _as_pixels(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return (H, W) or (H, W, C) bytes."""
    if picture.ndim == 3 and picture.shape[2] not in (1, 3, 4):
        picture = np.moveaxis(picture, 0, 2)
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[..., 0]
    if picture.dtype == np.uint8:
        return np.ascontiguousarray(picture)
    scaled = np.nan_to_num((picture.astype(np.float64) - low) / (high - low)).clip(0, 1)
    return np.ascontiguousarray((255 * scaled).round().astype(np.uint8))


def _as_uri(picture: "Image") -> str:
    from PIL import Image

    is_small = max(picture.size) <= _SMALL
    if is_small:
        grown = _SIDE // max(picture.size)
        picture = picture.resize((picture.width * grown, picture.height * grown), Image.Resampling.NEAREST)
    picture.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    kind = "png" if is_small or picture.mode in ("RGBA", "L") else "jpeg"
    picture.save(out, kind, **({"optimize": True} if kind == "png" else {"quality": 80}))
    return f"data:image/{kind};base64,{b64encode(out.getvalue()).decode()}"
