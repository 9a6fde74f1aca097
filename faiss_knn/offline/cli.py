"""The command line: the `faiss-knn` program, which finds the command, and what holds for all of them."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

from faiss_knn import __version__
from faiss_knn.offline.commands import audit as audit_command
from faiss_knn.offline.commands import compare as compare_command
from faiss_knn.offline.commands import eval as eval_command
from faiss_knn.offline.commands import neighbors as neighbors_command
from faiss_knn.offline.commands import protocols as protocols_command
from faiss_knn.offline.commands import verify as verify_command
from faiss_knn.offline.commands.arguments import Parser, config_options
from faiss_knn.offline.commands.eval_arguments import EPILOG, add_arguments, check_combination


class _Command(NamedTuple):
    """One of the program's commands: what its help says, and its functions.

    Attributes:
        run: Does what the arguments say, and returns the exit status. `first` says whether this process writes and
            prints: one of each group does. A ValueError or OSError is bad data, told in one line.
        help: Its line in the program's own help.
        description: How its help begins.
        epilog: How its help ends.
        add_arguments: Adds its arguments to its parser.
        check: Ends the program where its arguments do not go together.
    """

    run: Callable[..., int]
    help: str
    description: str
    epilog: str | None = None
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] | None = None


_COMMANDS = {
    "eval": _Command(
        eval_command.run,
        "accuracy, retrieval metrics and the cost of approximate indexes, from saved features",
        "Find each query's neighbours once per index; report every k, temperature and weighting.",
        EPILOG,
        add_arguments,
        check_combination,
    ),
    "compare": _Command(
        compare_command.run,
        "which differences between runs are more than chance",
        "Compare two or more evaluations of the same queries, setting by setting.",
        compare_command.EPILOG,
        compare_command.add_arguments,
        compare_command.check_combination,
    ),
    "neighbors": _Command(
        neighbors_command.run,
        "the exact neighbours themselves, in a file that other programs read",
        "Find each query's k nearest rows exactly, and write them.",
        neighbors_command.EPILOG,
        neighbors_command.add_arguments,
        neighbors_command.check_combination,
    ),
    "verify": _Command(
        verify_command.run,
        "how right the neighbours are that any program found",
        "Compare lists of neighbours with the exact ones.",
        verify_command.EPILOG,
        verify_command.add_arguments,
    ),
    "audit": _Command(
        audit_command.run,
        "near-duplicates, leaks, wrong labels, outliers, hubs and confused classes of saved features",
        "Look through features by their neighbours, from one exact search.",
        audit_command.EPILOG,
        audit_command.add_arguments,
        audit_command.check_combination,
    ),
    "protocols": _Command(
        protocols_command.run,
        "settings of other libraries by name, for eval --protocol",
        "List the protocols: what each library counts as a k-NN number.",
    ),
}


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Make the parser of these arguments: of all commands, and of the arguments of a command that is among them."""
    parser = Parser(prog="faiss-knn", description="Judge features by their nearest neighbours.")
    _add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, command in _COMMANDS.items():
        own = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_version(own)
        if name in arguments and command.add_arguments is not None:
            command.add_arguments(own)
    return parser


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"faiss-knn {__version__}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line, and before it the options of `--config`, which it overrides.

    Exits with status 2 and one line on stderr if they cannot be used.
    """
    parser = make_parser(arguments)
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        Parser(prog=f"{parser.prog} {given.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
    if given.command == "eval" and given.config is not None:
        options, files = config_options(parser, given.config)
        given = parser.parse_args(["eval", *options, *arguments[1:]])
        for name, path in files.items():
            if getattr(given, name) is None:
                setattr(given, name, Path(path))
    check = _COMMANDS[given.command].check
    if check is not None:
        check(parser, given)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Returns:
        0, or 1 if the data cannot be used, with one line on stderr; bad usage exits with 2.
    """
    _print_what_can_be_printed()
    given = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with _ranks():
            return _flushed(_COMMANDS[given.command].run(given, first=_is_first()))
    except BrokenPipeError:  # the reader, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError as error:
        return _failed(f"not enough memory: {error}")
    except (ValueError, OSError) as error:
        return _failed(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"faiss-knn: stopped{_kept(given)}", file=sys.stderr)
        return 130


def _flushed(status: int) -> int:
    """Show what was printed now, while a reader that has gone is no error."""
    sys.stdout.flush()
    return status


def _kept(given: argparse.Namespace) -> str:
    """Say what a run that was stopped has left."""
    if given.command == "neighbors" and neighbors_command.pieces_folder(given.out).is_dir():
        return f": {neighbors_command.pieces_folder(given.out)} has what was found, the same command goes on"
    records = given.out / "results.jsonl" if given.command == "eval" and given.out is not None else None
    is_begun = records is not None and records.is_file() and records.stat().st_size > 0
    return f": {records} has what was done, --resume goes on" if is_begun else ""


def _print_what_can_be_printed() -> None:
    """Print a question mark where a locale has no letter for a character, instead of ending."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _failed(reason: str) -> int:
    if _is_first():
        print(f"faiss-knn: error: {reason}", file=sys.stderr)
    return 1


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _ranks() -> Iterator[None]:
    """Under torchrun, take part in the group of its processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")  # also where each process searches on a GPU of its own: little travels
    try:
        yield
    finally:
        dist.destroy_process_group()
