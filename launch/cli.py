"""The command `tiphys`. `options/` has the options of its subcommands; `commands/`, imported last, has what each one does."""

# No `from __future__`: with an empty entry in PYTHONPATH it could come from the current folder.
import os
import sys

from tiphys.dataio.python_path import leave_current_folder

if os.path.basename(sys.argv[0]) == "tiphys":  # this is the main module of the command
    leave_current_folder()

import argparse
import difflib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tiphys.dataio.messages import say
from tiphys.launch import statuses
from tiphys.launch.options import data, policies, runs
from tiphys.launch.statuses import Status
from tiphys.paths import expand

# Arguments that are paths or URLs. A shell leaves `~` as it is in `--to=~/data`.
_PATHS = frozenset(
    """recipe run runs dataset datasets source destination to first second more mapping policy demonstrations out pictures picture
    html hostfile api_key_file""".split()
)

_TRACEBACK = "show the full Python traceback of an error"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns a `Status`, or the status of the DeepSpeed launcher."""
    parser = _parser()
    args = _parse(parser, list(sys.argv[1:] if argv is None else argv))
    name: str | None = getattr(args, "command", None)
    if name is None:
        parser.print_help()
        return Status.USAGE
    try:
        module, _, function = name.partition(".")
        command: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(f"tiphys.launch.commands.{module}"), function
        )
        return command(args)
    except KeyboardInterrupt:
        say("tiphys: stopped", error=True)
        return Status.INTERRUPTED
    except BrokenPipeError:
        return Status.BROKEN_PIPE
    except Exception as error:
        from tiphys.launch.refusals import show, status_of

        status = status_of(error)
        show(error, status, with_traceback=args.traceback)
        return status


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse, and allow overrides both before and after options: by itself argparse refuses this for subcommands."""
    words = list(words)
    for i in range(len(words) - 2, -1, -1):
        if words[i] in (
            "--launcher",
            "--slurm",
        ):  # its value begins with a dash, so argparse would take it for an option of ours
            words[i : i + 2] = [f"{words[i]}={words[i + 1]}"]
    args, rest = parser.parse_known_args(words)
    if rest and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        for name in _PATHS & vars(args).keys():
            value = getattr(args, name)
            setattr(args, name, [expand(v) for v in value] if isinstance(value, list) else expand(value))
    except ValueError as error:
        parser.error(str(error))
    return args


class _Parser(argparse.ArgumentParser):
    """A parser that names the nearest command or action for one that does not exist."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(str(value), action.choices, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(action.choices)}."
            self.error(f"{value!r} is not a command of {self.prog!r}. {hint}")
        super()._check_value(action, value)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tiphys",
        usage="tiphys [-h] [--traceback] COMMAND ...",
        description="Pre-train decision models: from recorded episodes to a policy. `tiphys COMMAND --help` explains a command.",
        epilog=f"exit statuses:\n{statuses.table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help=_TRACEBACK)
    commands = parser.add_subparsers(title="commands", metavar="", prog="tiphys")
    for group in (runs, data, policies):
        group.add(commands)
    for command in _subparsers(parser):
        command.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=_TRACEBACK)
    return parser


def _subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands and of their actions."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield below
                yield from _subparsers(below)
