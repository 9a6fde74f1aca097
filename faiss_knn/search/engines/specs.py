"""Factory strings of FAISS: which it can be asked for, as some end the process instead of raising an error."""

import os
import re
import subprocess
import sys
from functools import lru_cache

from faiss_knn.names import SPECS
from faiss_knn.search.inputs import shown

_MOST_LINKS = 512  # of a graph's node; each takes memory
_SECONDS = 60.0
_LONGEST = 200
# Built and searched so often that nobody needs to try them first.
_CODES = r"(Flat|SQ8|SQ6|SQ4|SQfp16|PQ\d+(x\d+)?(np)?(fs)?)"
_PROVEN = {
    "METRIC_L2": re.compile(rf"((PCAR?|OPQ)\d+(_\d+)?,)?(IVF\d+,)?{_CODES}(,RFlat)?|HNSW\d+(,Flat)?"),
    "METRIC_INNER_PRODUCT": re.compile(r"(IVF\d+,)?Flat|HNSW\d+(,Flat)?"),
    "METRIC_L1": re.compile(r"(IVF\d+,)?Flat|HNSW\d+(,Flat)?"),
}
_TRIAL = (
    "import sys; from faiss_knn.search.engines.faiss_library import try_index; "
    "try_index(sys.argv[1], int(sys.argv[2]), sys.argv[3])"
)


def check_numbers(spec: str) -> None:
    """Check the numbers in a factory string, of which FAISS would die, hang, or take all memory.

    Raises:
        ValueError: Naming the part of it.

    Example:
        >>> check_numbers("IVF64_HNSW32,PQ8x4fs,RFlat")
    """
    if spec in SPECS:
        return
    if len(spec) > _LONGEST:
        raise ValueError(f"`spec` must be a FAISS factory string of at most {_LONGEST} characters, got {shown(spec)}")
    for part in re.findall(r"[A-Za-z]+[\d_x]*\d", spec):
        name = re.match(r"[A-Za-z]+", part)
        numbers = [int(number) for number in re.findall(r"\d+", part)]
        graph = name is not None and name[0] in ("HNSW", "NSG")
        if 0 in numbers or (graph and numbers[0] < 2):
            raise ValueError(f"`spec` must have numbers above {1 if graph else 0} in {part!r}, got {spec!r}")
        if graph and numbers[0] > _MOST_LINKS:
            raise ValueError(f"`spec` must have at most {_MOST_LINKS} links a node in {part!r}, got {spec!r}")
    if re.match(r"IDMap", spec):
        raise ValueError(f"`spec` must do without IDMap, got {spec!r}: rows are numbered already, leave it out")


def check_alive(spec: str, dim: int, metric: str) -> None:
    """Try a factory string that is not known to work on a few rows of this width, in a process of its own.

    Args:
        spec: The string.
        dim: Width of the rows.
        metric: Name of FAISS's metric, such as "METRIC_L1".

    Raises:
        ValueError: If that process dies or does not end.
    """
    proven = _PROVEN.get(metric)
    if spec in SPECS or (proven is not None and proven.fullmatch(spec)):
        return
    trouble = _trouble(spec, dim, metric)
    if trouble:
        raise ValueError(
            f"`spec` must be an index that FAISS can build and search by {metric.removeprefix('METRIC_')}, got "
            f"{spec!r}, with which it {trouble}: choose another"
        )


@lru_cache(256)
def _trouble(spec: str, dim: int, metric: str) -> str:
    # Few rows cannot train many lists; how many there are makes no difference to what is tried.
    few_lists = re.sub(r"IVF\d+", "IVF2", spec)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _TRIAL, few_lists, str(dim), metric]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "never ends"
    return "ends the whole process" if done.returncode < 0 or done.returncode > 1 else ""
