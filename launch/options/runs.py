"""Options of the commands that train, and of those that show recipes and runs."""

from __future__ import annotations

from typing import Any

from tiphys.launch.layout_rates import DEVICES
from tiphys.launch.options.shared import recipe_arguments, slurm_arguments, verbose_argument


def add(commands: Any) -> None:
    """Add these commands to the parser of `tiphys`."""
    for command in (
        _quickstart,
        _train,
        _submit,
        _check,
        _layout,
        _mixture,
        _report,
        _checkpoint,
        _objectives,
        _tokens,
    ):
        command(commands)


def _quickstart(commands: Any) -> None:
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
    verbose_argument(p)
    p.set_defaults(command="runs.quickstart")


def _train(commands: Any) -> None:
    p = commands.add_parser("train", help="train a recipe with the DeepSpeed launcher, or resume its run")
    recipe_arguments(p)
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
    verbose_argument(p)
    p.add_argument(
        "--on",
        choices=("local", "slurm"),
        default="local",
        help="start it here, or submit it as a Slurm job like `tiphys submit` (default: local)",
    )
    slurm_arguments(p)
    p.set_defaults(command="runs.train")


def _submit(commands: Any) -> None:
    p = commands.add_parser(
        "submit", help="train as a Slurm job, which is queued again after a time limit or a lost node"
    )
    recipe_arguments(p)
    p.add_argument(
        "--processes",
        type=int,
        default=0,
        help="number of ranks on each node (default: one per GPU that Slurm gives, or 2 if there is none)",
    )
    slurm_arguments(p)
    p.set_defaults(command="runs.submit_job")


def _check(commands: Any) -> None:
    p = commands.add_parser("check", help="list every error of a recipe without training")
    recipe_arguments(p)
    p.add_argument(
        "--world", type=int, default=0, help="total number of ranks to check the layout for (default: not checked)"
    )
    p.add_argument("--no-data", action="store_true", help="do not open the datasets")
    p.set_defaults(command="runs.check")


def _layout(commands: Any) -> None:
    p = commands.add_parser("layout", help="show the memory, traffic and time that a recipe will need, without a GPU")
    recipe_arguments(p)
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
    p.set_defaults(command="runs.layout")


def _mixture(commands: Any) -> None:
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
    p.set_defaults(command="runs.mixture")


def _report(commands: Any) -> None:
    p = commands.add_parser("report", help="write report.html of a run, or one page that compares several runs")
    p.add_argument("runs", nargs="+", metavar="run", help="folder of a run")
    p.add_argument(
        "--out", default="", help="file (default: report.html in the run; comparison.html here for several runs)"
    )
    p.set_defaults(command="runs.report")


def _checkpoint(commands: Any) -> None:
    p = commands.add_parser("checkpoint", help="list, verify or inspect the checkpoints of a run")
    p.add_argument("action", choices=("list", "verify", "inspect"), help="show all, check every byte, or show one")
    p.add_argument("run", help="folder of the run, or of one checkpoint")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(command="runs.checkpoint")


def _objectives(commands: Any) -> None:
    p = commands.add_parser("objectives", help="show the table of paradigms")
    p.add_argument(
        "name", nargs="?", default="", help="show everything about this paradigm (default: a summary of all)"
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(command="runs.objectives")


def _tokens(commands: Any) -> None:
    p = commands.add_parser("tokens", help="show one row of a training batch, decoded")
    recipe_arguments(p)
    p.add_argument("--step", type=int, default=0, help="training step of the batch, from 0 (default: %(default)s)")
    p.add_argument("--row", type=int, default=0, help="row of the batch, from 0 (default: %(default)s)")
    p.add_argument(
        "--html",
        default="",
        help="also write the table to this file, as a page with the row's pictures (default: no file)",
    )
    p.set_defaults(command="runs.tokens")
