"""A few pictures of an epoch's queries, those that the vote got most wrong, with what their neighbours are."""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from faiss_knn.search.inputs import as_count, as_key, shown

ROWS, _MOST_ROWS = 8, 64
_MOST_PIXELS = 128  # along the longer side
_NEIGHBORS = 5  # that a caption tells of


class GalleryOptions(NamedTuple):
    """What is shown.

    Attributes:
        key: Of the images in the outputs or the batch.
        rows: How many of an epoch's queries.
    """

    key: str
    rows: int


class Picture(NamedTuple):
    """A query.

    Attributes:
        image: (3, height, width) float32 in [0, 1] on the CPU.
        caption: Its label, what the vote says, and its neighbours' labels.
        wrongness: By how much the best wrong class outvotes its own, in [-1, 1]: above 0, the vote is wrong.
    """

    image: Tensor
    caption: str
    wrongness: float


def gallery_options(gallery: Any) -> GalleryOptions | None:
    """Read `gallery`: None, the images' key, or {"key": ..., "rows": ...}.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> gallery_options("image")
        GalleryOptions(key='image', rows=8)
    """
    if gallery is None:
        return None
    parts = dict(gallery) if isinstance(gallery, Mapping) else {"key": gallery}
    if "key" not in parts or set(parts) - {"key", "rows"}:
        raise ValueError(
            f'`gallery` must be None, the key of the images, or {{"key": "image", "rows": {ROWS}}}, got '
            f"{shown(gallery)} with {', '.join(map(str, parts)) or 'nothing'}"
        )
    rows = as_count(parts.get("rows", ROWS), "`gallery` rows")
    if rows > _MOST_ROWS:
        raise ValueError(f"`gallery` rows must be at most {_MOST_ROWS}, got {rows}: it is to be looked at")
    return GalleryOptions(as_key(parts["key"], "`gallery` key"), rows)


class Gallery:
    """Keeps the pictures of an epoch's most wrongly voted queries, and of no others.

    Args:
        rows: How many.
    """

    def __init__(self, rows: int) -> None:
        self._rows, self._seen = rows, 0
        self._kept: list[tuple[float, int, Picture]] = []  # a heap, the least wrong first

    def look(self, images: Tensor, shares: Tensor, labels: Tensor, neighbor_labels: Tensor, distances: Tensor) -> None:
        """Look through a batch.

        Args:
            images: (B, height, width), (B, channels, height, width) or (B, height, width, channels).
            shares: (B, C) of the votes.
            labels: (B,) class ids, -1 for rows that do not count.
            neighbor_labels: (B, k) of the nearest, -1 where missing.
            distances: (B, k) of them.
        """
        own = labels.clamp(min=0)[:, None]
        right = shares.gather(1, own)[:, 0]
        best_other, other = shares.scatter(1, own, -1.0).max(1)
        wrongness = (best_other - right).masked_fill(labels < 0, -torch.inf)
        for row in wrongness.topk(min(self._rows, len(wrongness))).indices.tolist():
            value = float(wrongness[row])
            if value == -float("inf") or (len(self._kept) == self._rows and value <= self._kept[0][0]):
                break
            voted = int(other[row]) if value > 0 else int(labels[row])
            caption = _caption(int(labels[row]), voted, shares[row], neighbor_labels[row], distances[row])
            entry = value, -self._seen - row, Picture(as_picture(images[row]), caption, value)
            (heapq.heappush if len(self._kept) < self._rows else heapq.heapreplace)(self._kept, entry)
        self._seen += len(labels)

    def pictures(self) -> list[Picture]:
        """Return what was kept, the most wrong first; of equals the first seen."""
        return [picture for *_, picture in sorted(self._kept, key=lambda entry: entry[:2], reverse=True)]


def check_images(images: Tensor, rows: int) -> None:
    """Check that there is an image for each of a batch's rows.

    Raises:
        ValueError: If not.
    """
    if images.ndim not in (3, 4) or len(images) != rows:
        raise ValueError(
            f"`gallery` needs an image for each of {rows} rows, (B, channels, height, width) or (B, height, width), "
            f"got shape {tuple(images.shape)}"
        )


def _caption(label: int, voted: int, shares: Tensor, neighbor_labels: Tensor, distances: Tensor) -> str:
    near = [
        f"{neighbor} ({distance:.3g})"
        for neighbor, distance in zip(neighbor_labels.tolist(), distances.tolist(), strict=True)
        if neighbor >= 0
    ]
    return f"label {label}, voted {voted} ({float(shares[voted]):.2f}), nearest {', '.join(near[:_NEIGHBORS])}"


def as_picture(image: Tensor) -> Tensor:
    """Return an image as (3, height, width) float32 in [0, 1] on the CPU, its longer side 128 pixels at most.

    Whole numbers are taken as 0 to 255. Floats are stretched from their least to their largest, since what they were
    normalised by is not known. Of other than 1 or 3 channels the first is shown.

    Example:
        >>> as_picture(torch.tensor([[[0, 255]]], dtype=torch.uint8))[:, 0].tolist()
        [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    """
    whole = not image.is_floating_point()
    pixels = image.detach().cpu().float()
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.shape[0] not in (1, 3) and pixels.shape[-1] in (1, 3):
        pixels = pixels.permute(2, 0, 1)
    pixels = pixels if len(pixels) == 3 else pixels[:1].expand(3, -1, -1)
    pixels = torch.nan_to_num(pixels, posinf=0.0, neginf=0.0)
    if whole:
        pixels = pixels.clamp(0, 255) / 255
    else:
        least, most = pixels.min(), pixels.max()
        pixels = (pixels - least) / (most - least).clamp(min=torch.finfo(torch.float32).tiny)
    longest = max(pixels.shape[1:])
    if longest > _MOST_PIXELS:
        size = [max(1, side * _MOST_PIXELS // longest) for side in pixels.shape[1:]]
        pixels = interpolate(pixels[None], size, mode="area")[0]
    return pixels.contiguous()


def hand_to_loggers(loggers: Sequence[Any], key: str, pictures: Sequence[Picture], step: int) -> None:
    """Give pictures to those of Lightning's loggers that take any, as W&B's and TensorBoard's do.

    Args:
        loggers: A trainer's.
        key: What they are logged under.
        pictures: At least one.
        step: The trainer's global step.
    """
    for logger in loggers:
        if hasattr(logger, "log_image"):
            images = [picture.image for picture in pictures]
            logger.log_image(key=key, images=images, step=step, caption=[picture.caption for picture in pictures])
        elif hasattr(logger.experiment, "add_image"):
            for number, picture in enumerate(pictures):
                logger.experiment.add_image(f"{key}/{number}", picture.image, step)
            lines = [f"{number}. {picture.caption}" for number, picture in enumerate(pictures)]
            logger.experiment.add_text(key, "\n".join(lines), step)
