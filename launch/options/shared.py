"""Options that several commands have."""

from __future__ import annotations

import argparse


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="path of a YAML file, or the name of a recipe that comes with Tiphys")
    override_argument(parser)


def override_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a recipe key, e.g. train.steps=100")


def slurm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, help="Slurm: number of nodes (default: %(default)s)")
    parser.add_argument(
        "--slurm",
        default="",
        help="Slurm: further options of `sbatch`, in one string, e.g. '--partition=gpu --gpus-per-node=8 --time=24:00:00' "
        "(default: none)",
    )
    parser.add_argument("--dry-run", action="store_true", help="Slurm: print the script, and submit nothing")


def verbose_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="also show DeepSpeed's own log lines and harmless warnings"
    )


def sample_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sample",
        action=argparse.BooleanOptionalAction,
        help="draw actions at random instead of taking the most probable one (default: as the policy's recipe says)",
    )


def asking_arguments(parser: argparse.ArgumentParser) -> None:
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
