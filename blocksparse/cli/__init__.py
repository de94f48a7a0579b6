"""The command line: `blocksparse info | verify | run | bench | ...`, one module per command.

It needs no training library. Exit status: 0, done, and what was checked is sound; 1, the file is
not sound or the work failed; 2, the command cannot be used as it was typed; 130, interrupted. An
error is one line on standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from blocksparse.cli import bench, info, machine, profile, results, run, verify, what_if
from blocksparse.cli.console import CommandError, UsageError, error_console, one_line

EXAMPLES = """\
examples:
  blocksparse info   model.bsr.safetensors              what is in it, layer by layer
  blocksparse verify model.bsr.safetensors              is it sound, do both engines agree
  blocksparse run    model.bsr.safetensors cat.jpg      predict (also: a folder, a .npy array)
  blocksparse bench  model.bsr.safetensors --batch 1,8  milliseconds, images/s, GFLOP/s
  blocksparse profile model.bsr.safetensors             where the time goes, layer by layer
  blocksparse what-if resnet50                          what sparsity would bring here
  blocksparse machine                                   what this machine can do at most
  blocksparse results runs                              finished runs of train.py, compared

exit status: 0 sound and done; 1 the file is not sound, or the work failed; 2 wrong command line;
130 interrupted

`blocksparse COMMAND --help` says more about each command."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="blocksparse",
        description="Look into, check, run and time an exported model file (*.bsr.safetensors), "
        "and compare finished runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for module in (info, verify, run, bench, profile, what_if, machine, results):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        The exit status, 0, 1, 2 or 130. (argparse itself leaves with 2 on a wrong command line.)
    """
    # who closed them wants to hear nothing: `blocksparse verify FILE >&-`
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None and not arguments.version:
        parser.print_help()
        return 2
    try:
        if arguments.version:
            return _print_version()
        return arguments.run(arguments)
    except UsageError as error:
        return _complain(error, 2)
    except BrokenPipeError:  # `blocksparse info FILE | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, ValueError, RuntimeError, OSError) as error:
        return _complain(error, 1)
    except MemoryError as error:
        return _complain(f"not enough memory: {error}", 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)


def _print_version() -> int:
    from importlib.metadata import version

    sys.stdout.write(f"blocksparse {version('blocksparse')}\n")
    sys.stdout.flush()  # an error of it is one of this command
    return 0


def _complain(error: Exception | str, status: int) -> int:
    error_console().print(f"blocksparse: error: {one_line(str(error))}", soft_wrap=True)
    return status
