"""`python -m benchmarks.quality WHAT [--to FOLDER] [--seeds 0,1,2]`.

What is finished is not done again: start the same command again to continue.

WHAT is one of
  small      one policy over 24 tasks, and four that it never saw
  full       the same with all of Meta-World and the tasks of --agents, for a GPU
  paradigms  bc, %bc, dt, gato, unimask and tt on data of mixed quality
  moe        mixtures of experts against a dense model
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.quality.stages import Stages
from benchmarks.quality.work import Work, numbers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("small", "full", "paradigms", "moe"))
    parser.add_argument("--to", default="", help="folder (default: runs/quality-WHAT)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the trainings (default: %(default)s)")
    parser.add_argument(
        "--episodes", type=int, default=50, help="episodes of each task and seed (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=35.0, help="small, full: training time of each seed (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fraction of the demonstrations to collect (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="*", default=[], help="small, full: globs of task names (default: all)")
    parser.add_argument(
        "--agents",
        default="",
        help="full: JSON file, task -> Stable-Baselines3 zip or module:name. Its zips are opened, and may run any code "
        "(default: none)",
    )
    parser.add_argument(
        "--tflop", type=float, default=0.6, help="paradigms, moe: 10^12 operations of a training (default: %(default)s)"
    )
    parser.add_argument("--rows", default="", help="paradigms, moe: rows, separated by semicolons (default: all)")
    args = parser.parse_args(arguments)
    with Stages(args.to or f"runs/quality-{args.what}") as stages:
        work = Work(stages, args.processes)
        {"paradigms": _paradigms, "moe": _moe}.get(args.what, _policy)(work, args)
    return 0


def _policy(work: Work, args: argparse.Namespace) -> None:
    from benchmarks.quality import small

    agents = small.agents_of(args.agents)
    tasks = small.tasks_of(args.what, args.tasks, agents)
    size = small.Size(args.minutes, args.episodes, args.scale)
    print(small.report(*small.run(work, numbers(args.seeds), size, tasks, agents)))
    print(f"\n{small.cost(work)}")


def _paradigms(work: Work, args: argparse.Namespace) -> None:
    from benchmarks.quality import paradigms

    rows = tuple(args.rows.split(";")) if args.rows else tuple(paradigms.ROWS)
    found = paradigms.run(work, numbers(args.seeds), args.tflop, args.episodes, rows)
    print(paradigms.report(found, paradigms.data_scores(paradigms.collected(work))))


def _moe(work: Work, args: argparse.Namespace) -> None:
    from benchmarks.quality import moe

    models = tuple(args.rows.split(";")) if args.rows else tuple(moe.MODELS)
    seeds = numbers(args.seeds)
    found = moe.run(work, seeds, args.tflop, args.episodes, args.scale, models)
    print(moe.report(found))
    name = "4 experts, top 1"
    if name in found:
        print("\n" + moe.permutation_report(moe.permuted(work, seeds, name, args.episodes, found[name])))


if __name__ == "__main__":
    sys.exit(main())
