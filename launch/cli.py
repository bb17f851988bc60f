"""The command `tiphys`: its words. What each does stands in `launch/commands.py`, imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = _parse(parser, list(sys.argv[1:] if argv is None else argv))
    name: str | None = getattr(args, "command", None)
    if name is None:
        parser.print_help()
        return 2
    from tiphys.launch import commands

    try:
        command: Callable[[argparse.Namespace], int] = getattr(commands, name)
        return command(args)
    except KeyboardInterrupt:
        print("tiphys: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError, ImportError, LookupError) as error:
        # Errors of users' input; anything else is a defect of ours and keeps its traceback.
        if args.traceback:
            raise
        print(f"tiphys: {error}", file=sys.stderr)
        return 1


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Overrides may stand before or after options, which argparse alone refuses for subcommands."""
    args, rest = parser.parse_known_args(words)
    if rest and hasattr(args, "overrides") and all("=" in word and not word.startswith("-") for word in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tiphys", description="Pre-train decision models, from episodes to a policy.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", metavar="")
    for add in (_run_commands, _data_commands, _policy_commands):
        add(commands)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with Tiphys")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the recipe, e.g. train.steps=100")


def _run_commands(commands: Any) -> None:
    p = commands.add_parser("quickstart", help="demonstrations, training, evaluation, policy, report: the whole way")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="laid over the recipe `quickstart`")
    p.add_argument("--datasets", default="datasets/quickstart", help="folder for the demonstrations")
    p.add_argument("--scale", type=float, default=1.0, help="share of the demonstrations to collect")
    p.add_argument("--processes", type=int, default=0, help="ranks; 0: one a device, 2 without one")
    p.set_defaults(command="quickstart")

    p = commands.add_parser("train", help="train a recipe with the DeepSpeed launcher")
    _recipe_arguments(p)
    p.add_argument("--processes", type=int, default=0, help="ranks on each host; 0: one a device, 2 without one")
    p.add_argument("--hostfile", default="", help="DeepSpeed's hostfile, for several hosts")
    p.add_argument("--port", type=int, default=0, help="of the rendezvous; 0: a free one")
    p.add_argument("--launcher", default="", help="further options of `deepspeed`, in one string")
    p.set_defaults(command="train")

    p = commands.add_parser("check", help="name every error of a recipe")
    _recipe_arguments(p)
    p.add_argument("--world", type=int, default=0, help="number of processes that it is meant for")
    p.add_argument("--no-data", action="store_true", help="do not open the datasets")
    p.set_defaults(command="check")

    p = commands.add_parser("mixture", help="change a run's mixture while it trains")
    p.add_argument("run", help="the run's folder")
    p.add_argument("action", choices=("show", "set"))
    p.add_argument("weights", nargs="*", metavar="dataset=weight", help="line of the mixture (number or dataset)")
    p.add_argument("--at", type=int, default=0, help="first step that uses them; 0: as soon as every rank can")
    p.set_defaults(command="mixture")

    p = commands.add_parser("report", help="write report.html of a run")
    p.add_argument("run", help="the run's folder")
    p.set_defaults(command="report")

    p = commands.add_parser("objectives", help="the table of paradigms")
    p.set_defaults(command="objectives")

    p = commands.add_parser("tokens", help="show one training row, decoded")
    _recipe_arguments(p)
    p.add_argument("--step", type=int, default=0)
    p.add_argument("--row", type=int, default=0)
    p.add_argument("--html", default="", help="write the table to this file too, as a page with the row's pictures")
    p.set_defaults(command="tokens")


def _data_commands(commands: Any) -> None:
    p = commands.add_parser("collect", help="let an expert act in environments, and keep its episodes")
    p.add_argument("tasks", nargs="+", help="e.g. BabyAI-GoToRedBallGrey-v0 metaworld/reach-v3 CartPole-v1")
    p.add_argument("--to", required=True, help="the dataset: a folder or URL")
    p.add_argument("--episodes", type=int, default=1000, help="of each task")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--noise", type=float, default=-1.0, help="of the executed action; -1: the family's own")
    p.add_argument("--processes", type=int, default=0, help="0: as many as cores")
    p.add_argument("--policy", default="", help="a Stable-Baselines3 agent (zip) or a Tiphys policy as the expert")
    p.add_argument("--trust-policy", action="store_true", help="a zip contains pickles, which can run code: allow it")
    p.set_defaults(command="collect")

    p = commands.add_parser("environments", help="names of the environments that are installed")
    p.add_argument("contains", nargs="?", default="", help="only names that contain this")
    p.set_defaults(command="environments")

    p = commands.add_parser("convert", help="data of another format -> a dataset")
    p.add_argument("source")
    p.add_argument("destination")
    p.add_argument("--from", dest="format", default="", help="the format; recognised when not given")
    p.add_argument("--map", dest="mapping", default="", help="YAML that renames fields, sets roles, tasks, bounds")
    p.add_argument("--skip-bad", action="store_true", help="leave malformed episodes out, and list them")
    p.add_argument("--processes", type=int, default=0)
    p.add_argument("--on", choices=("local", "ray"), default="local")
    p.set_defaults(command="convert")

    p = commands.add_parser("export", help="a dataset -> Minari HDF5, LeRobot v3 or NPZ")
    p.add_argument("dataset")
    p.add_argument("destination")
    p.add_argument("--to", dest="format", required=True, choices=("minari", "lerobot", "npz"))
    p.set_defaults(command="export")

    p = commands.add_parser("inspect", help="tasks, fields, lengths, returns of a dataset")
    p.add_argument("dataset")
    p.add_argument("--json", action="store_true")
    p.add_argument("--episode", type=int, default=-1, help="show one episode")
    p.add_argument("--picture", default="", help="with --episode: write its frames to this .png or .gif")
    p.set_defaults(command="inspect")

    p = commands.add_parser("verify", help="check every byte of a dataset")
    p.add_argument("dataset")
    p.add_argument("--repair", action="store_true", help="drop broken episodes from the index, rebuild a missing one")
    p.set_defaults(command="verify")

    p = commands.add_parser("index", help="make WebDataset tars of others a dataset, without rewriting them")
    p.add_argument("dataset")
    p.set_defaults(command="index")

    _dataset_commands(commands.add_parser("dataset", help="merge, split, filter, append datasets"))

    p = commands.add_parser("loader-bench", help="where a loader's time and bytes go, beside the theoretical bound")
    p.add_argument("dataset")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--rows", type=int, default=64)
    p.add_argument("--window", type=int, default=20)
    p.add_argument("--cache", default="256MiB")
    p.add_argument("--json", action="store_true")
    p.set_defaults(command="loader_bench")


def _dataset_commands(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="", required=True)
    p = actions.add_parser("merge", help="several datasets as one; no shard is rewritten")
    p.add_argument("destination")
    p.add_argument("datasets", nargs="+")
    p.set_defaults(command="merge")
    p = actions.add_parser("append", help="add a dataset's episodes to another")
    p.add_argument("dataset")
    p.add_argument("more")
    p.set_defaults(command="append")
    p = actions.add_parser("split", help="one dataset as two, by a hash of the episode's id")
    p.add_argument("dataset")
    p.add_argument("first")
    p.add_argument("second")
    p.add_argument("--share", type=float, default=0.1, help="of the episodes that go into the second")
    p.set_defaults(command="split")
    p = actions.add_parser("filter", help="keep some episodes")
    p.add_argument("dataset")
    p.add_argument("destination")
    p.add_argument("--tasks", nargs="*", default=[])
    p.add_argument("--min-return", type=float, default=None)
    p.add_argument("--top", type=float, default=None, help="share of each task with the highest returns")
    p.add_argument("--success", action="store_true")
    p.add_argument("--min-steps", type=int, default=None)
    p.set_defaults(command="filter")


def _policy_commands(commands: Any) -> None:
    p = commands.add_parser("evaluate", help="let a policy act in its environments")
    p.add_argument("policy", help="a run's folder, a policy's folder, or hf://org/name")
    p.add_argument("--tasks", nargs="*", default=[], help="default: every task of the policy that has an environment")
    p.add_argument("--episodes", type=int, default=40)
    p.add_argument("--seed", type=int, default=1_000_000)
    p.add_argument("--processes", type=int, default=0)
    p.add_argument("--sample", action="store_true", help="draw actions instead of taking the most probable")
    p.add_argument("--out", default="", help="evaluation.json to write; default: beside the policy")
    p.set_defaults(command="evaluate")

    p = commands.add_parser("publish", help="a run's policy -> a folder, a bucket or a hub")
    p.add_argument("run", help="a run's or a policy's folder")
    p.add_argument("to", help="folder, s3://bucket/path, hf://org/name")
    p.add_argument("--public", action="store_true", help="hubs: private unless this is given")
    p.set_defaults(command="publish")
