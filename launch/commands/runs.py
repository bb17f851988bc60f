"""What the commands that train, and those that show recipes and runs, do, from parsed arguments to an exit status.

Every function imports what it needs itself, so that a command does not load the libraries of the others.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from tiphys.dataio.messages import say
from tiphys.launch.statuses import Status


def quickstart(args: Namespace) -> int:
    from tiphys.launch.quickstart import quickstart

    return quickstart(
        args.overrides, args.datasets, args.scale, args.processes, verbose=args.verbose, with_traceback=args.traceback
    )


def train(args: Namespace) -> int:
    import shlex

    from tiphys.launch.submit import ACCEPT_CHANGED_DATA, submit, world_of

    if args.on == "slurm":
        return submit_job(args)
    try:
        extra = shlex.split(args.launcher)
    except ValueError as error:
        raise ValueError(f"--launcher {args.launcher!r}: {error}") from None
    chosen = _chosen(args, lambda: world_of(args.processes, args.hostfile, extra))
    return submit(
        args.recipe,
        [*args.overrides, *chosen],
        processes=args.processes,
        port=args.port,
        hostfile=args.hostfile,
        extra=extra,
        verbose=args.verbose,
        options=[ACCEPT_CHANGED_DATA] if args.accept_changed_data else [],
        with_traceback=args.traceback,
    )


def _chosen(args: Namespace, world: Callable[[], int]) -> list[str]:
    """Overrides for the keys that the recipe leaves to `parallel.auto`. Errors of the recipe are left to its check."""
    from tiphys.recipes.automatic import open_keys
    from tiphys.recipes.load import RecipeError, examine

    try:
        keys = open_keys(examine(args.recipe, args.overrides).written)
    except (RecipeError, OSError):
        return []
    if not keys:
        return []
    from tiphys.launch.layout_command import chosen_overrides

    return chosen_overrides(args.recipe, args.overrides, world())


def submit_job(args: Namespace) -> int:
    import shlex

    from tiphys.launch import slurm
    from tiphys.launch.check import check

    recipe = check(args.recipe, args.overrides, world=args.nodes * args.processes, environments=False)
    words = [args.recipe, *args.overrides]
    try:
        options = shlex.split(args.slurm)
    except ValueError as error:
        raise ValueError(f"--slurm {args.slurm!r}: {error}") from None
    text = slurm.script(recipe.name, recipe.run.dir, words, nodes=args.nodes, processes=args.processes, options=options)
    say(text if args.dry_run else slurm.submit(recipe.run.dir, text))
    return Status.DONE


def check(args: Namespace) -> int:
    from tiphys.launch.check import check

    recipe = check(args.recipe, args.overrides, world=args.world, data=not args.no_data)
    say(f"{args.recipe}: recipe {recipe.name!r} is valid")
    if not args.no_data:
        from tiphys.dataio.inplace.prepare import cost_line, is_waiting
        from tiphys.launch.checks.data import bad_fields
        from tiphys.launch.plan import make_plan, notes, open_datasets
        from tiphys.pretrain.objectives import Objectives
        from tiphys.pretrain.pretrained import begin, start_lines

        waiting = [d for d in dict.fromkeys(entry.dataset for entry in recipe.data.mixture) if is_waiting(d)]
        if waiting:
            say("\n".join(cost_line(dataset) for dataset in waiting))
            return Status.DONE
        indexes = open_datasets(recipe)
        objectives = Objectives(recipe, indexes)
        if recipe.model.init:
            say("\n".join(start_lines(begin(recipe, objectives.vocabulary, divided=True))))
        for found in bad_fields(recipe, indexes, objectives):  # there are none unless the recipe quarantines them
            say(f"{found}; training leaves such episodes out")
        plan = make_plan(recipe, indexes, objectives)
        say("\n".join(notes(recipe, indexes, objectives, plan)))
    return Status.DONE


def layout(args: Namespace) -> int:
    from tiphys.launch.layout_command import layout

    if args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus}: at least one device is needed")
    return layout(
        args.recipe,
        args.overrides,
        args.gpus,
        args.memory,
        device=args.device,
        calibrated=args.calibrate,
        as_json=args.json,
    )


def mixture(args: Namespace) -> int:
    from tiphys.launch.mixture import add, request, show

    if args.action == "show":
        say(show(args.run))
    elif args.action == "add":
        say(add(args.run, args.weights, args.like, args.at))
    else:
        say(request(args.run, args.weights, args.at))
    return Status.DONE


def report(args: Namespace) -> int:
    from tiphys.launch.report import write_comparison, write_report

    if len(args.runs) > 1:
        say(write_comparison(args.runs, args.out or "comparison.html"))
    else:
        say(write_report(args.runs[0], args.out))
    return Status.DONE


def checkpoint(args: Namespace) -> int:
    from tiphys.dataio.atomic import to_json
    from tiphys.launch import checkpoints

    if args.action == "inspect":
        found = checkpoints.inspected(args.run)
        say(to_json(found, indent=1) if args.json else checkpoints.shown(found))
        return Status.DONE
    if args.action == "list":
        rows = checkpoints.listed(args.run)
        say(to_json(rows, indent=1) if args.json else checkpoints.table(rows))
        return Status.DONE
    damaged = 0
    for folder, why in checkpoints.verified(args.run):
        damaged += bool(why)
        line = {"folder": str(folder), "damaged": why}
        say(to_json(line) if args.json else f"{folder}: {why or 'every byte is as it was saved'}")
    return Status.REFUSED if damaged else Status.DONE


def objectives(args: Namespace) -> int:
    from tiphys.dataio.atomic import to_json
    from tiphys.dataio.episode import DataError
    from tiphys.launch.display import paradigm_lines
    from tiphys.pretrain.tokens.paradigms import paradigm_errors, table

    for _, reason in paradigm_errors(args.name) if args.name else ():
        raise DataError(reason)
    rows = [row for row in table() if args.name in ("", row["name"])]
    say(to_json(rows, indent=1) if args.json else paradigm_lines(rows, whole=bool(args.name)))
    return Status.DONE


def tokens(args: Namespace) -> int:
    from tiphys.launch.tokens import show_row

    say(show_row(args.recipe, args.overrides, args.step, args.row, args.html))
    return Status.DONE
