"""The command `tiphys`: its subcommands and options. `launch/commands.py` holds what each one does and is imported last."""

# No `from __future__`: with an empty entry in PYTHONPATH it could come from the current folder.
import os
import sys

from tiphys.dataio.python_path import leave_current_folder

if os.path.basename(sys.argv[0]) == "tiphys":  # this is the main module of the command
    leave_current_folder()

import argparse
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tiphys.dataio.messages import say
from tiphys.launch import statuses
from tiphys.launch.layout_rates import DEVICES
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
    from tiphys.launch import commands

    try:
        command: Callable[[argparse.Namespace], int] = getattr(commands, name)
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
    for add in (_run_commands, _data_commands, _policy_commands):
        add(commands)
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


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="path of a YAML file, or the name of a recipe that comes with Tiphys")
    _override_argument(parser)


def _override_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a recipe key, e.g. train.steps=100")


def _slurm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, help="Slurm: number of nodes (default: %(default)s)")
    parser.add_argument(
        "--slurm",
        default="",
        help="Slurm: further options of `sbatch`, in one string, e.g. '--partition=gpu --gpus-per-node=8 --time=24:00:00' "
        "(default: none)",
    )
    parser.add_argument("--dry-run", action="store_true", help="Slurm: print the script, and submit nothing")


def _verbose_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="also show DeepSpeed's own log lines and harmless warnings"
    )


def _sample_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        help="draw actions at random instead of taking the most probable one (default: as the policy's recipe says)",
    )


def _asking_arguments(parser: argparse.ArgumentParser) -> None:
    """What a policy is asked for. `Asking.from_words` reads the values."""
    asked = parser.add_argument_group("what the policy is asked for, for every task or for TASK (a name or a glob)")
    asked.add_argument(
        "--objective",
        nargs="*",
        default=[],
        metavar="NAME",
        help="objectives to act with, each in the tasks that were trained with it (default: the first of each task)",
    )
    asked.add_argument(
        "--target-return",
        nargs="*",
        default=[],
        metavar="[TASK=]R",
        help="return to ask for: 450 (rewards), 1.2x (of the best in the data), q0.9 (a quantile of the data's returns) "
        "(default: as the recipe said)",
    )
    asked.add_argument(
        "--prompt",
        nargs="*",
        default=[],
        metavar="[TASK=]DATASET[:EPISODE]",
        help="demonstration to show before each episode, by its number or id (default: none; without EPISODE: the one with the "
        "highest return)",
    )
    asked.add_argument(
        "--goal",
        nargs="*",
        default=[],
        metavar="[TASK=]GOAL",
        help="observation to reach, as JSON, or as DATASET:EPISODE, whose last one is meant (default: none)",
    )
    asked.add_argument(
        "--query",
        nargs="*",
        default=[],
        metavar="[TASK=]QUERY",
        help="what an objective that fills in hidden parts is asked: bc, rc or goal (default: as the recipe said, or goal with a "
        "--goal)",
    )
    asked.add_argument(
        "--future",
        nargs="*",
        default=[],
        metavar="[TASK=]DATASET[:EPISODE]",
        help="episode to be matched (gdt) or imitated (bdt), for objectives that show what is to come (default: none)",
    )


def _run_commands(commands: Any) -> None:
    p = commands.add_parser("quickstart", help="all steps once: demonstrations, training, evaluation, policy, report")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the recipe `quickstart`")
    p.add_argument(
        "--datasets", default="datasets/quickstart", help="folder for the demonstrations (default: %(default)s)"
    )
    p.add_argument(
        "--scale", type=float, default=1.0, help="fraction of the demonstrations to collect (default: %(default)s)"
    )
    p.add_argument(
        "--processes", type=int, default=0, help="number of ranks (default: one per GPU, or 2 if there is no GPU)"
    )
    _verbose_argument(p)
    p.set_defaults(command="quickstart")

    p = commands.add_parser("train", help="train a recipe with the DeepSpeed launcher, or resume its run")
    _recipe_arguments(p)
    p.add_argument(
        "--processes",
        type=int,
        default=0,
        help="number of ranks on each host (default: one per GPU, or 2 if there is no GPU)",
    )
    p.add_argument("--hostfile", default="", help="DeepSpeed hostfile, to train on several hosts (default: this host)")
    p.add_argument("--port", type=int, default=0, help="TCP port where the ranks meet (default: a free one)")
    p.add_argument(
        "--launcher", default="", help="further options of the `deepspeed` command, in one string (default: none)"
    )
    p.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="resume although datasets have changed since the run began, if only values were corrected: tasks, fields, episodes "
        "and their lengths must be the same. An event in plan.jsonl records it (default: such a run is refused)",
    )
    _verbose_argument(p)
    p.add_argument(
        "--on",
        choices=("local", "slurm"),
        default="local",
        help="start it here, or submit it as a Slurm job like `tiphys submit` (default: local)",
    )
    _slurm_arguments(p)
    p.set_defaults(command="train")

    p = commands.add_parser(
        "submit", help="train as a Slurm job, which is queued again after a time limit or a lost node"
    )
    _recipe_arguments(p)
    p.add_argument(
        "--processes",
        type=int,
        default=0,
        help="number of ranks on each node (default: one per GPU that Slurm gives, or 2 if there is none)",
    )
    _slurm_arguments(p)
    p.set_defaults(command="submit_job")

    p = commands.add_parser("check", help="list every error of a recipe without training")
    _recipe_arguments(p)
    p.add_argument(
        "--world", type=int, default=0, help="total number of ranks to check the layout for (default: not checked)"
    )
    p.add_argument("--no-data", action="store_true", help="do not open the datasets")
    p.set_defaults(command="check")

    p = commands.add_parser("layout", help="show the memory, traffic and time that a recipe will need, without a GPU")
    _recipe_arguments(p)
    p.add_argument("--gpus", type=int, default=1, help="number of devices, one process each (default: %(default)s)")
    p.add_argument(
        "--memory",
        default="80GiB",
        help="memory of one device; exit status 3 if it is not enough (default: %(default)s)",
    )
    p.add_argument(
        "--device",
        choices=("", "cpu", *DEVICES),
        default="",
        metavar="KIND",
        help=f"kind of device, for the time of a step: cpu, {', '.join(DEVICES)} (default: a GPU, as fast as this machine was "
        "measured)",
    )
    p.add_argument(
        "--calibrate",
        action="store_true",
        help="first measure the speed of this machine with the recipe's model, and keep it",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(command="layout")

    p = commands.add_parser("mixture", help="show or change the mixture of a run while it trains")
    p.add_argument("run", help="folder of the run")
    p.add_argument(
        "action", choices=("show", "set", "add"), help="print the weights, ask the run for new ones, or add datasets"
    )
    p.add_argument(
        "weights",
        nargs="*",
        metavar="entry=weight",
        help="set: mixture entry (its number or its dataset) and its new weight; add: dataset and its weight",
    )
    p.add_argument(
        "--like",
        default="0",
        help="add: mixture entry whose objective is learned on the datasets (default: %(default)s)",
    )
    p.add_argument(
        "--at", type=int, default=0, help="first training step that uses them (default: as soon as every rank can)"
    )
    p.set_defaults(command="mixture")

    p = commands.add_parser("report", help="write report.html of a run, or one page that compares several runs")
    p.add_argument("runs", nargs="+", metavar="run", help="folder of a run")
    p.add_argument(
        "--out", default="", help="file (default: report.html in the run; comparison.html here for several runs)"
    )
    p.set_defaults(command="report")

    p = commands.add_parser("checkpoint", help="list, verify or inspect the checkpoints of a run")
    p.add_argument("action", choices=("list", "verify", "inspect"), help="show all, check every byte, or show one")
    p.add_argument("run", help="folder of the run, or of one checkpoint")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(command="checkpoint")

    p = commands.add_parser("objectives", help="show the table of paradigms")
    p.add_argument(
        "name", nargs="?", default="", help="show everything about this paradigm (default: a summary of all)"
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(command="objectives")

    p = commands.add_parser("tokens", help="show one row of a training batch, decoded")
    _recipe_arguments(p)
    p.add_argument("--step", type=int, default=0, help="training step of the batch, from 0 (default: %(default)s)")
    p.add_argument("--row", type=int, default=0, help="row of the batch, from 0 (default: %(default)s)")
    p.add_argument(
        "--html",
        default="",
        help="also write the table to this file, as a page with the row's pictures (default: no file)",
    )
    p.set_defaults(command="tokens")


def _data_commands(commands: Any) -> None:
    p = commands.add_parser("collect", help="let an expert act in environments and record its episodes as a dataset")
    p.add_argument(
        "tasks",
        nargs="+",
        help="environments, e.g. BabyAI-GoToRedBallGrey-v0 CartPole-v1, or module:EnvId for one of your own",
    )
    p.add_argument("--to", required=True, help="folder or URL of the new dataset (required)")
    p.add_argument("--episodes", type=int, default=1000, help="number of episodes of each task (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="seed of the first episode of each task (default: %(default)s)")
    p.add_argument(
        "--noise",
        type=float,
        default=-1.0,
        help="largest disturbance of the executed action; each episode draws its own between 0 and this. Continuous actions: "
        "standard deviation in half-ranges; discrete ones: probability of a random action. 0: none; "
        "-1: the usual value of the environment family (default: -1)",
    )
    p.add_argument(
        "--record",
        choices=("intended", "executed"),
        default="intended",
        help="intended: record the action that the expert chose, so that a policy learns to correct errors. executed: record the "
        "disturbed one, so that episodes differ in quality and returns are those of the recorded actions; for objectives that "
        "read returns, or the effects of actions (default: %(default)s)",
    )
    p.add_argument("--processes", type=int, default=0, help="number of processes (default: one per core)")
    p.add_argument(
        "--policy",
        default="",
        help="expert to use: folder of a Tiphys policy, zip of a Stable-Baselines3 agent, or module:name of a function of the "
        "observation or of a class with act(observation) (default: the expert of the environment family)",
    )
    p.add_argument(
        "--trust-policy",
        action="store_true",
        help="open the zip of --policy: it contains pickles, which can run any code",
    )
    _asking_arguments(p)
    p.set_defaults(command="collect")

    p = commands.add_parser("environments", help="list the environments that are installed")
    p.add_argument("contains", nargs="?", default="", help="list only names that contain this text")
    p.set_defaults(command="environments")

    p = commands.add_parser("convert", help="convert data of another format into a dataset")
    p.add_argument("source", help="path or URL of a file or folder")
    p.add_argument("destination", help="folder or URL of the new dataset")
    p.add_argument("--from", dest="format", default="", help="format of the source (default: detected)")
    p.add_argument(
        "--map",
        dest="mapping",
        default="",
        help="mapping file (YAML) that renames fields and sets roles, tasks and bounds (default: none)",
    )
    p.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out malformed episodes and count them by reason, instead of stopping",
    )
    p.add_argument("--processes", type=int, default=0, help="parts converted at the same time (default: one per core)")
    p.add_argument(
        "--on",
        choices=("local", "ray"),
        default="local",
        help="convert on this machine or on a Ray cluster (default: local)",
    )
    p.set_defaults(command="convert")

    p = commands.add_parser("export", help="write a dataset as Minari HDF5, LeRobot v3 or NPZ")
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument("destination", help="new or empty folder or URL")
    p.add_argument(
        "--to", dest="format", required=True, choices=("minari", "lerobot", "npz"), help="format to write (required)"
    )
    p.set_defaults(command="export")

    p = commands.add_parser("inspect", help="show tasks, fields, lengths and returns of a dataset")
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    p.add_argument("--episode", type=int, default=-1, help="show this episode, from 0 (default: the whole dataset)")
    p.add_argument(
        "--picture", default="", help="with --episode: also write its frames to this .png or .gif (default: none)"
    )
    p.set_defaults(command="inspect")

    p = commands.add_parser("verify", help="check every byte of a dataset")
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument(
        "--repair",
        action="store_true",
        help="remove broken episodes from the index; rebuild the index if it is damaged",
    )
    p.add_argument("--full", action="store_true", help="also decode every picture, video and text")
    p.set_defaults(command="verify")

    p = commands.add_parser(
        "index",
        help="use a LeRobot dataset, or WebDataset image-text tars, as a dataset, without rewriting its videos or tars",
    )
    p.add_argument("dataset", help="folder or URL of the LeRobot dataset or of the tars, or hf://datasets/OWNER/NAME")
    p.add_argument(
        "destination",
        nargs="?",
        default="",
        help="new folder or URL of the index (default: for tars, beside them; for LeRobot, NAME.tiphys beside the folder, or a "
        "folder of the cache)",
    )
    p.add_argument(
        "--crc", action="store_true", help="LeRobot: read all video and store checksums, so that damage is noticed"
    )
    p.add_argument(
        "--tolerance",
        type=float,
        default=None,
        help="LeRobot: seconds between the time of a row and of its picture (default: 0.0001)",
    )
    p.add_argument("--skip-bad", action="store_true", help="LeRobot: leave out malformed episodes and list them")
    p.set_defaults(command="index")

    _dataset_commands(commands.add_parser("dataset", help="merge, split, filter or append datasets"))

    p = commands.add_parser(
        "loader-bench", help="measure where a loader's time and bytes go, beside the theoretical bound"
    )
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument("--steps", type=int, default=200, help="number of batches to load (default: %(default)s)")
    p.add_argument("--rows", type=int, default=64, help="rows of a batch, one window each (default: %(default)s)")
    p.add_argument("--window", type=int, default=20, help="episode steps of a window (default: %(default)s)")
    p.add_argument("--cache", default="256MiB", help="memory of the loader's cache (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(command="loader_bench")


def _dataset_commands(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="", required=True)
    p = actions.add_parser("merge", help="one dataset out of several; no shard is copied")
    p.add_argument("destination", help="folder or URL of the new dataset")
    p.add_argument("datasets", nargs="+", help="datasets to merge; they must stay where they are")
    p.set_defaults(command="merge")
    p = actions.add_parser("append", help="add the episodes of other datasets to a dataset; no shard is copied")
    p.add_argument("dataset", help="dataset to extend")
    p.add_argument("more", nargs="+", help="datasets to add; they must stay where they are")
    p.set_defaults(command="append")
    p = actions.add_parser("split", help="two datasets out of one, by a hash of the episode ids; no shard is copied")
    p.add_argument("dataset", help="dataset to split; it must stay where it is")
    p.add_argument("first", help="folder or URL of the first new dataset")
    p.add_argument("second", help="folder or URL of the second new dataset")
    p.add_argument(
        "--share",
        type=float,
        default=0.1,
        help="fraction of the episodes that go to the second, about, because a hash of its id decides for each episode "
        "(default: %(default)s)",
    )
    p.set_defaults(command="split")
    p = actions.add_parser(
        "lengths", help="count the tokens of texts that change from step to step, so that plans know them"
    )
    p.add_argument(
        "recipe", help="recipe whose datasets and tokenizer are meant; the counts are written beside the datasets"
    )
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values to use instead of the recipe's")
    p.set_defaults(command="lengths")
    p = actions.add_parser(
        "filter", help="a dataset of the episodes that meet every given condition; no shard is copied"
    )
    p.add_argument("dataset", help="dataset to choose from; it must stay where it is")
    p.add_argument("destination", help="folder or URL of the new dataset")
    p.add_argument("--tasks", nargs="*", default=[], help="task names; * and ? match any text (default: all tasks)")
    p.add_argument("--min-return", type=float, default=None, help="smallest undiscounted return (default: no limit)")
    p.add_argument(
        "--top",
        type=float,
        default=None,
        help="fraction of each task with the highest returns, after the other conditions (default: all)",
    )
    p.add_argument("--success", action="store_true", help="only episodes that are known to have succeeded")
    p.add_argument("--min-steps", type=int, default=None, help="smallest number of actions (default: no limit)")
    p.set_defaults(command="filter")


def _serve_command(commands: Any) -> None:
    p = commands.add_parser("serve", help="let robots and benchmarks use a policy over a WebSocket (openpi, vla-eval)")
    p.add_argument("policy", help="folder of a run, folder of a policy, s3://bucket/path or hf://org/name")
    p.add_argument("--task", default="", help="task of clients that name none (default: the one whose fields fit)")
    p.add_argument(
        "--map",
        dest="renamed",
        nargs="*",
        default=[],
        metavar="CLIENT=FIELD",
        help="names of clients and the fields that they mean, e.g. observation/image=observation.images.top (default: none)",
    )
    p.add_argument(
        "--execute",
        type=int,
        default=0,
        help="actions of a chunk that clients carry out before the next observation (default: all that the policy allows)",
    )
    p.add_argument(
        "--follow",
        action="store_true",
        help="let new episodes act with the newest weights that are published there, by a run that still trains",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    p.add_argument("--port", type=int, default=8000, help="TCP port; 0: a free one (default: %(default)s)")
    p.add_argument("--api-key-file", default="", help="file with the key that clients must send (default: no key)")
    p.add_argument("--open", action="store_true", help="allow another --host without a key: who reaches it may use it")
    p.add_argument("--sessions", type=int, default=64, help="most clients at once (default: %(default)s)")
    p.add_argument("--batch", type=int, default=32, help="most requests of a forward pass (default: %(default)s)")
    p.add_argument(
        "--wait",
        default="5ms",
        help="longest time that a request waits for those of other clients, e.g. 500us, 5ms, 1s (default: %(default)s)",
    )
    _sample_argument(p)
    p.add_argument("--seed", type=int, default=0, help="with --sample: seed of the draws (default: %(default)s)")
    p.add_argument(
        "--device", default="", help="torch device, or auto to use all GPUs (default: a GPU if there is one)"
    )
    p.set_defaults(command="serve")


def _policy_commands(commands: Any) -> None:
    p = commands.add_parser("evaluate", help="let a policy act in its environments and score it")
    p.add_argument("policy", help="folder of a run, folder of a policy, s3://bucket/path or hf://org/name")
    p.add_argument(
        "--tasks",
        nargs="*",
        default=[],
        help="tasks to play (default: every task of the policy that has an environment)",
    )
    p.add_argument("--episodes", type=int, default=40, help="number of episodes of each task (default: %(default)s)")
    p.add_argument(
        "--seed", type=int, default=1_000_000, help="seed of the first episode of each task (default: %(default)s)"
    )
    p.add_argument("--processes", type=int, default=0, help="number of processes (default: one per core)")
    _sample_argument(p)
    _asking_arguments(p)
    p.add_argument(
        "--target-returns",
        nargs="*",
        default=[],
        metavar="R",
        help="further returns to ask for in turn, with as many episodes for each (default: none)",
    )
    p.add_argument(
        "--out",
        default="",
        help="JSON file for the result (default: evaluation.json beside the policy; none for a bucket or a hub)",
    )
    p.add_argument(
        "--pictures", default="", help="folder for film strips of the first episodes (default: none are made)"
    )
    p.add_argument(
        "--videos",
        type=int,
        default=1,
        help="with --pictures: number of film strips of each task (default: %(default)s)",
    )
    p.add_argument(
        "--demonstrations",
        nargs="*",
        default=[],
        help="datasets that the policy learned from: also report the share of states that they contain (default: none)",
    )
    p.add_argument(
        "--modules",
        nargs="*",
        default=[],
        help="Python modules that environments named module:EnvId may import (default: those of --tasks)",
    )
    p.add_argument(
        "--device", default="", help="torch device, or auto to use all GPUs (default: a GPU if there is one)"
    )
    p.add_argument(
        "--server",
        default="",
        metavar="URL",
        help="ws://HOST:PORT of a `tiphys serve` that serves this policy: it chooses the actions (default: this machine does)",
    )
    p.add_argument("--api-key-file", default="", help="with --server: file with the server's API key (default: none)")
    p.add_argument(
        "--follow",
        action="store_true",
        help="evaluate each step that a run publishes there, until it ends; --out gets a line of JSON for each",
    )
    p.add_argument(
        "--every", type=float, default=10.0, help="with --follow: seconds between two polls (default: %(default)s)"
    )
    p.set_defaults(command="evaluate")

    _serve_command(commands)

    p = commands.add_parser("label", help="write a dataset with the actions that a policy infers for episodes without")
    p.add_argument(
        "policy", help="policy with an objective that labels (paradigm idm): folder of a run or of a policy, or URL"
    )
    p.add_argument("dataset", help="dataset whose episodes are labelled")
    p.add_argument("to", help="folder or URL of the new dataset")
    p.add_argument("--device", default="", help="torch device (default: a GPU if there is one)")
    p.set_defaults(command="label")

    p = commands.add_parser("bootstrap", help="write a dataset of transitions that a policy draws and is confident of")
    p.add_argument(
        "policy", help="policy that predicts whole steps (paradigm boot or tt): folder of a run or of a policy, or URL"
    )
    p.add_argument("dataset", help="dataset that the policy was trained on")
    p.add_argument("to", help="folder or URL of the new dataset")
    p.add_argument(
        "--keep", type=float, default=0.1, help="share of the drawn transitions that is kept (default: %(default)s)"
    )
    p.add_argument("--draws", type=int, default=4, help="draws of each window's last transition (default: %(default)s)")
    p.add_argument("--windows", type=int, default=1, help="windows of each episode (default: %(default)s)")
    p.add_argument(
        "--validation", type=float, help="share of episodes that are held out and not used (default: that of the run)"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the windows and draws (default: %(default)s)")
    p.add_argument("--device", default="", help="torch device (default: a GPU if there is one)")
    p.set_defaults(command="bootstrap")

    p = commands.add_parser("say", help="let a policy that has learned texts continue one")
    p.add_argument("policy", help="folder of a run, folder of a policy, s3://bucket/path or hf://org/name")
    p.add_argument("prompt", help="how the text begins")
    p.add_argument("--task", default="", help="task whose texts are meant (default: the first that fits)")
    p.add_argument(
        "--observation",
        default="",
        help="what a caption is about: a picture, DATASET:EPISODE (its last observation) or JSON (default: nothing, a document)",
    )
    p.add_argument("--tokens", type=int, default=128, help="most tokens of the answer (default: %(default)s)")
    p.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the most probable token (default: %(default)s)"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the most probable tokens that together have this probability (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default: %(default)s)")
    p.add_argument("--device", default="", help="torch device (default: a GPU if there is one)")
    p.set_defaults(command="say_job")

    p = commands.add_parser("publish", help="publish the policy of a run to a folder, a bucket or a model hub")
    p.add_argument("run", help="folder of a run or of a policy, s3://bucket/path or hf://org/name")
    p.add_argument("to", help="folder, s3://bucket/path, or hf://org/name")
    p.add_argument(
        "--public", action="store_true", help="on a hub: create a public repository instead of a private one"
    )
    p.add_argument("--take-over", action="store_true", help="publish there although another run does")
    p.set_defaults(command="publish")
