"""Arguments of any command: the values they take, a parser that complains in one line, options from a file."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from faiss_knn import names

T = TypeVar("T")

DISTANCES = ("cosine", *(name for name in names.DISTANCES if name != "cosine"))  # the default first

_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32


class Parser(argparse.ArgumentParser):
    """Reads a command line; one that cannot be used ends the program with status 2 and one line on stderr."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line that says what is wrong."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """Read a whole number, also 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def whole(text: str) -> int:
    """Read a whole number, also a negative one."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def temperature(text: str) -> float:
    """Read a number above 0 that float32 holds."""
    value = number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    if not _SMALLEST <= value <= _LARGEST:
        raise argparse.ArgumentTypeError(f"must be from {_SMALLEST:g} to {_LARGEST:g}, as float32 is, got {text!r}")
    return value


def share(text: str) -> float:
    """Read a number in (0, 1]."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return value


def accuracy(text: str) -> float:
    """Read an accuracy, as a share or, above 1, in percent."""
    value = number(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"must be an accuracy in (0, 1], or in percent up to 100, got {text!r}")
    return value if value <= 1 else value / 100


def inner_share(text: str) -> float:
    """Read a number in (0, 1)."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1), got {text!r}")
    return value


def number(text: str) -> float:
    """Read any number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None


def distance(text: str) -> float:
    """Read a distance: a number that is 0 or more."""
    value = number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a distance, 0 or more, got {text!r}")
    return value


def sweep(text: str) -> tuple[str, list[int]]:
    """Read a search parameter and its values, such as nprobe=1,4,16."""
    name, _, values = text.partition("=")
    if name not in ("nprobe", "k_factor") or not values:
        raise argparse.ArgumentTypeError(f"must be nprobe=1,4,16 or k_factor=1,2,5, got {text!r}")
    return name, [positive(value) for value in values.split(",")]


def device_named(name: str) -> str | None:
    """Return the device to search on: under "auto" this process's GPU, or None where there is none."""
    import torch  # slow to import: only where something is searched

    if name == "auto":
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        return f"cuda:{local_rank % gpus}" if gpus else None
    return name


def location(text: str) -> Path | str:
    """Read the path of a file or folder, or its URL."""
    return text if "://" in text else Path(text)


def dims(text: str) -> int | str:
    """Read a number of dimensions, such as 64 or pca64."""
    from faiss_knn.offline.compression import as_dims  # torch, only if it is asked for

    return _of_usage(as_dims, text)


def spec(text: str) -> str:
    """Read an index: one by name, or a factory string that FAISS can parse."""
    if text in names.SPECS:
        return text
    from faiss_knn.search.index import KNNIndex  # torch, only for a factory string
    from faiss_knn.search.inputs import named_as_index

    return _of_usage(named_as_index()(lambda given: KNNIndex(given).spec), text)


def storage(text: str) -> str:
    """Read how rows are stored, such as int8."""
    from faiss_knn.offline.compression import as_storage  # torch, only if it is asked for

    return _of_usage(as_storage, text)


def _of_usage(check: Callable[[str], T], text: str) -> T:
    try:
        return check(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def config_options(parser: argparse.ArgumentParser, path: Path) -> tuple[list[str], dict[str, str]]:
    """Read the options of a YAML file as arguments for the same parser, and beside them its BANK and QUERIES."""
    import yaml  # only if there is a file to read

    if path.exists() and not path.is_file():
        parser.error(f"--config {path}: is no regular file")
    try:
        options_by_name = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: {' '.join(str(error).split())}")
    if not isinstance(options_by_name, dict):
        parser.error(f"--config {path}: must hold options by name, got a {type(options_by_name).__name__}")
    files = {name: str(options_by_name.pop(name)) for name in ("bank", "queries") if name in options_by_name}
    options: list[str] = []
    for name, value in options_by_name.items():
        flag = "--" + str(name).replace("_", "-")
        if isinstance(value, bool):
            options.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            options += [flag, *(f"{key}={','.join(map(str, _listed(one)))}" for key, one in value.items())]
        elif value is not None:
            options += [flag, *map(str, _listed(value))]
    return options, files


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
