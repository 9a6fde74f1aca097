"""What a label is: a class id, a multi-hot row, shares of classes, a name, or none at all.

Inside the package labels are one of

- (N,) int64 class ids, -1 where unlabelled;
- (N, C) integer multi-hot of 0 and 1, a row with a -1 unlabelled;
- (N, C) float shares of each class ("soft", as MixUp gives them), each row in [0, 1] with sum 1.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.search.inputs import as_count, as_integer, check_dense, shown

Names = npt.NDArray[np.str_] | npt.NDArray[np.object_]  # of dtype object with None where a row is unlabelled, else str

UNLABELLED = -1
_FILL = "fill what is missing with -1, which leaves the row out"
_NAME_OR_NONE = "give every row a name (str), or None where it has no label"
_TOO_LARGE = "must be below 2^63, got larger ones: renumber the classes"
_MOST_CLASSES = 2**31 - 1
_SHARE_SUM_TOLERANCE = 1e-2  # bfloat16 shares add up to 1 within 2^-8
NUMBERS_HINT = "numbers that are no classes are scored by FeatureBank(task='regression')"
_EXACT_BELOW = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}


def as_labels(values: Any, what: str, *, float_ids: bool = False, ignore_index: int | None = None) -> Tensor:
    """Read labels in one of the three forms above.

    Args:
        values: Tensor, ndarray, list, pandas Series or Categorical: (N,) or (N, 1) class ids of any integer dtype or
            bool, (N, C) multi-hot, or (N, C) float shares.
        what: Names the values in errors, such as "`labels`".
        float_ids: Whether floats that are whole numbers are class ids: for values that Lightning has cast.
        ignore_index: A value that means "unlabelled", beside -1.

    Raises:
        ValueError: For other shapes and types, for names, and for floats that may have been rounded.

    Example:
        >>> as_labels(np.array([3, 255, 0], np.uint8), "`labels`", ignore_index=255)
        tensor([ 3, -1,  0])
    """
    read = as_labels_or_names(values, what, float_ids=float_ids, ignore_index=ignore_index)
    if not isinstance(read, Tensor):
        raise ValueError(f"{what} must be class ids, got names such as {first_name(read)!r}: number them first")  # noqa: TRY004
    return read


def as_labels_or_names(
    values: Any, what: str, *, float_ids: bool = False, ignore_index: int | None = None
) -> Tensor | Names:
    """Read labels as `as_labels` does, or (N,) names of classes.

    A name that is missing as Python, numpy and pandas say it (None, NaN, NaT, NA, a masked entry, an empty place of a
    Categorical), or -1 among names, is None.

    Raises:
        ValueError: As `as_labels`, but not for names.
    """
    tensor = _from_tensor(values, what) if isinstance(values, Tensor) else _from_array(values, what)
    if not isinstance(tensor, Tensor):
        return tensor
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim not in (1, 2):
        raise ValueError(f"{what} must be (N,) class ids or (N, C) multi-hot labels, got shape {tuple(tensor.shape)}")
    if tensor.is_floating_point():
        tensor = _from_floats(tensor, what, float_ids)
    elif tensor.ndim == 1 or ignore_index is not None:
        tensor = tensor.long()
    return tensor if ignore_index is None else _without(tensor, as_integer(ignore_index, "`ignore_index`"))


def check_labels(labels: Tensor, what: str) -> None:
    """Check the values of labels that were read; a GPU is waited for.

    Raises:
        ValueError: If there are none, a class id is negative and not -1, a multi-hot entry is neither 0 nor 1 (nor
            -1), or every row is unlabelled.
    """
    if labels.numel() == 0:
        raise ValueError(f"{what} is empty: at least one labelled row is needed")
    if labels.is_floating_point():
        return
    least, most = (int(bound) for bound in labels.aminmax())
    if least < UNLABELLED:
        raise ValueError(f"{what} must be class ids from 0, or -1 for unlabelled rows, got {least}")
    if labels.ndim == 2 and most > 1:
        raise ValueError(f"multi-hot {what} must be 0 and 1, got {most}: -1 marks a row without labels")
    if most < 0 or not is_labelled(labels).any():
        raise ValueError(f"every row of {what} is -1: at least one labelled row is needed")


def is_labelled(labels: Tensor) -> Tensor:
    """Tell which rows of (N,) or (N, C) labels hold no -1."""
    return labels >= 0 if labels.ndim == 1 else (labels >= 0).all(dim=1)


def width_of(labels: Tensor) -> int:
    """Count the classes that the labels need: the largest class id + 1, or the columns; 0 without labels."""
    if labels.ndim == 2:
        return labels.shape[1]
    return int(labels.max()) + 1 if len(labels) else 0


def is_soft(labels: Tensor) -> bool:
    """Tell whether labels are shares of classes."""
    return labels.is_floating_point()


def one_hot_ids(labels: Tensor) -> Tensor | None:
    """Return (N,) int64 class ids of (N, C) labels of which every labelled row is one-hot, None for all others.

    Where a row may have but one class (metrics of the Multiclass kind), this is what such rows mean.

    Example:
        >>> one_hot_ids(torch.tensor([[0, 1, 0], [1, 0, 0], [-1, -1, -1]]))
        tensor([ 1,  0, -1])
        >>> one_hot_ids(torch.tensor([[0, 1, 1]]))
    """
    if labels.ndim != 2 or labels.shape[1] == 0:
        return None
    rows = is_labelled(labels)
    ones = (labels == 1).sum(1) == 1
    rest = (labels == 0).sum(1) == labels.shape[1] - 1
    if not ((ones & rest) | ~rows).all():
        return None
    return torch.where(rows, (labels == 1).int().argmax(1), UNLABELLED)


def most_likely(labels: Tensor) -> Tensor:
    """Return (N,) int64 ids of the classes with the largest share, the lowest id among equals; -1 if unlabelled."""
    return torch.where(is_labelled(labels), labels.argmax(1), UNLABELLED)


def number_classes(*labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Number the class ids that occur from 0, in ascending order, so that memory follows their number, not their size.

    Args:
        *labels: (N,) int64 class ids, -1 where unlabelled, all on one device.

    Returns:
        (C,) int64 ids by number, and each of the labels with numbers for ids; -1 stays.

    Example:
        >>> number_classes(torch.tensor([2**40, 7, -1]), torch.tensor([7]))
        (tensor([            7, 1099511627776]), [tensor([ 1,  0, -1]), tensor([0])])
    """
    classes = torch.unique(torch.cat([part[part >= 0] for part in labels]))
    return classes, [torch.where(part < 0, UNLABELLED, torch.searchsorted(classes, part)) for part in labels]


def number_names(names: Names) -> tuple[Names, Tensor]:
    """Return the (C,) different names in sorted order, and (N,) int64 numbers for the (N,) names, -1 for None.

    Example:
        >>> number_names(np.array(["dog", None, "cat", "dog"], object))
        (array(['cat', 'dog'], dtype='<U3'), tensor([ 1, -1,  0,  1]))
    """
    named = is_named(names)
    classes, places = np.unique(names[named].astype(str), return_inverse=True)
    numbers = np.full(len(names), UNLABELLED, np.int64)
    numbers[named] = places
    return classes, torch.from_numpy(numbers)


def is_named(names: Names) -> npt.NDArray[np.bool_]:
    """Tell which of (N,) names are not None."""
    return np.fromiter((name is not None for name in names), bool, len(names))


def first_name(names: Names) -> str:
    """Find the first name that is not None, for messages."""
    return str(names[is_named(names)][0])


def as_class_count(num_classes: Any) -> int:
    """Return `num_classes` as an int.

    Raises:
        ValueError: If it is not a positive integer, or more than scores can have columns.
    """
    if isinstance(num_classes, int) and num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    count = as_count(num_classes, "num_classes")
    if count > _MOST_CLASSES:
        raise ValueError(f"num_classes must be at most {_MOST_CLASSES}, got {count}: renumber the classes from 0")
    return count


def as_dense(values: Any, what: str) -> Tensor:
    """Return a tensor or array of real numbers as a dense tensor without gradient.

    Raises:
        ValueError: If it is something else, which could not be read, or not without losing a part (a mask).
    """
    read = _from_tensor(values, what) if isinstance(values, Tensor) else _from_array(values, what)
    if not isinstance(read, Tensor):
        raise ValueError(f"{what} must be numbers, got text such as {first_name(read)!r}")  # noqa: TRY004
    return read


def _from_tensor(values: Tensor, what: str) -> Tensor:
    check_dense(values, what)
    if values.is_complex() or (values.is_floating_point() and values.dtype not in _EXACT_BELOW):
        raise ValueError(f"{what} must be real numbers of an ordinary dtype, got {values.dtype}")
    return _comparable(values.detach(), what)


def _from_array(values: Any, what: str) -> Tensor | Names:
    array = _plain(values, what)
    if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind in "UO":
        array = array[:, 0]
    if array.dtype.kind in "UO":  # objects are names, some of them None
        if array.ndim != 1 or not len(array):
            raise ValueError(f"{what} must be (N,) class ids or names, got {array.dtype} of shape {array.shape}")
        return array
    if array.dtype.kind not in "iubf" or array.dtype.itemsize > 8:
        raise ValueError(f"{what} must be integers or names, got {array.dtype}")
    if array.dtype.kind == "u":
        if array.dtype.itemsize == 8 and (array > np.iinfo(np.int64).max).any():
            raise ValueError(f"{what} {_TOO_LARGE}")
        array = array.astype(np.int64)
    # In native byte order, and without negative strides: torch holds nothing else.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def _plain(values: Any, what: str) -> npt.NDArray[Any]:
    if np.ma.is_masked(values) and values.dtype.kind in "UO":
        names = values.data.astype(object)
        names[np.ma.getmaskarray(values)] = None
        return _from_objects(names, what)
    if np.ma.is_masked(values):
        raise ValueError(f"{what} must not have masked entries: fill them with -1, which leaves those rows out")
    if (coded := _with_empty_places(values)) is not None:
        return coded
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what} must be one array, got {type(values).__name__}: {reason}") from error
    if array.dtype.kind == "U" and isinstance(values, (list, tuple)):
        array = np.array(values, dtype=object)  # numpy turns a number among names into a name
    return _from_objects(array, what) if array.dtype.kind == "O" else array


def _from_objects(array: npt.NDArray[Any], what: str) -> npt.NDArray[Any]:
    """Read labels of dtype object, as pandas gives names and nullable integers, in a dtype of their own."""
    if all(isinstance(value, str) for value in array.flat):
        return array.astype(str)
    if isinstance(next((value for value in array.flat if not _is_missing(value)), None), str):
        return _from_names(array, what)
    kind = (int, np.integer, np.bool_)
    for row, value in enumerate(array.flat):
        if not isinstance(value, kind):
            raise ValueError(  # noqa: TRY004
                f"{what} must be all integers or all names, got {shown(value)} at place {row}: {_FILL}"
            )
    try:
        return array.astype(np.int64)
    except OverflowError as error:
        raise ValueError(f"{what} {_TOO_LARGE}") from error


def _from_names(array: npt.NDArray[Any], what: str) -> npt.NDArray[np.object_]:
    """Read names, with None where one is missing."""
    names = np.empty(array.shape, object)
    for row, value in enumerate(array.flat):
        if isinstance(value, str):
            names.flat[row] = str(value)
        elif not _is_missing(value):
            raise ValueError(
                f"{what} must be all integers or all names, got {shown(value)} at place {row}: {_NAME_OR_NONE}"
            )
    return names


def _is_missing(value: Any) -> bool:
    """Tell whether a value among names says that there is none: None, NaN, NaT and NA of pandas, or -1."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, (float, np.floating)):
        return bool(np.isnan(value))
    return isinstance(value, (int, np.integer)) and int(value) == UNLABELLED


def _with_empty_places(values: Any) -> npt.NDArray[np.int64] | None:
    """Read the class ids of a pandas Categorical, also in a Series, with empty places; None for everything else."""
    categorical = getattr(values, "array", values)
    codes = getattr(categorical, "codes", None)
    if not isinstance(codes, np.ndarray) or not hasattr(categorical, "categories") or not (codes < 0).any():
        return None
    categories = np.asarray(categorical.categories)
    return np.where(codes < 0, UNLABELLED, categories[codes]) if categories.dtype.kind == "i" else None


def _from_floats(values: Tensor, what: str, float_ids: bool) -> Tensor:
    if values.ndim == 1:
        if (missing := values.isnan()).any():
            dtype, place = str(values.dtype).removeprefix("torch."), int(missing.nonzero()[0])
            raise ValueError(f"{what} must be integers, got {dtype} with NaN at place {place}: {_FILL}")
        if not float_ids:
            name = str(values.dtype).removeprefix("torch.")
            if not (values == values.round()).all():
                raise ValueError(f"{what} must be class ids, whole numbers, got {name} with fractions: {NUMBERS_HINT}")
            raise ValueError(
                f"{what} must be integers, got {values.dtype}: cast them with .long(), as {name} may round"
            )
        return _whole(values, what)
    if ((values == 0) | (values == 1) | (values == UNLABELLED)).all():
        return values.long()
    is_share = ((values >= 0) & (values <= 1)).all(1) & ((values.double().sum(1) - 1).abs() <= _SHARE_SUM_TOLERANCE)
    if not (is_share | (values == UNLABELLED).all(1)).all():
        raise ValueError(
            f"{what} must hold class ids or 0/1 labels, or shares of classes in [0, 1] that add up to 1 in each row, "
            f"got {values.dtype} with fractions or NaN" + ("" if float_ids else f": {NUMBERS_HINT}")
        )
    return values


def _whole(values: Tensor, what: str) -> Tensor:
    if not (values == values.round()).all():
        raise ValueError(f"{what} must hold class ids or 0/1 labels, got {values.dtype} with fractions or NaN")
    bound = _EXACT_BELOW[values.dtype]
    if (values.abs() >= bound).any():
        raise ValueError(
            f"{what} must be integers, got {values.dtype} of {bound} and more, which that dtype may have rounded to "
            "another class: keep class ids as integers"
        )
    return values.long()


def _comparable(values: Tensor, what: str) -> Tensor:
    """Return the values as int64 where torch can do little with the dtype they came in."""
    if values.dtype not in (torch.uint16, torch.uint32, torch.uint64):
        return values
    ids = values.long()
    if values.dtype == torch.uint64 and (ids < 0).any():
        raise ValueError(f"{what} {_TOO_LARGE}")
    return ids


def _without(labels: Tensor, ignore_index: int) -> Tensor:
    """Put -1 for `ignore_index`; a multi-hot row that holds it is unlabelled as a whole."""
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"`ignore_index` must be a label, below 2^63, got {shown(ignore_index)}")
    ignored = labels == ignore_index
    return labels.masked_fill(ignored if labels.ndim == 1 else ignored.any(1, keepdim=True), UNLABELLED)
