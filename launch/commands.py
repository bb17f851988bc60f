"""What each subcommand of `tiphys` does, from parsed arguments to an exit status.

Every function imports what it needs itself, so that a command does not load the libraries of the others.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.messages import say
from tiphys.launch.statuses import Status

if TYPE_CHECKING:
    from tiphys.pretrain.acting.ask import Asking

# -- runs -------------------------------------------------------------------------------------------------------------


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


# -- data -------------------------------------------------------------------------------------------------------------


def environments(args: Namespace) -> int:
    from tiphys.dataio.environments import names

    say("\n".join(n for n in names() if args.contains.lower() in n.lower()))
    return Status.DONE


def collect(args: Namespace) -> int:
    from tiphys.dataio.collect import collect
    from tiphys.dataio.environments import family
    from tiphys.dataio.episode import DataError
    from tiphys.pretrain.acting.ask import Asking

    policy: Any = None
    asking = _asked(args)
    if "://" in args.policy or (args.policy and Path(args.policy).is_dir()):
        from tiphys.pretrain.acting.play import PolicyExpert
        from tiphys.pretrain.policy_files import local_policy

        policy = PolicyExpert(str(local_policy(args.policy)), asking)
    elif asking != Asking():
        raise DataError(
            "--objective, --target-return, --prompt, --goal, --query and --future ask something of a policy of Tiphys; give its "
            "folder with --policy"
        )
    elif args.policy:
        from tiphys.dataio.environments.agents import agent

        policy = agent(args.policy, trusted=args.trust_policy)
    index = collect(
        args.tasks,
        args.to,
        args.episodes,
        seed=args.seed,
        noise=args.noise if args.noise >= 0 else None,
        record=args.record,
        processes=args.processes,
        policy=policy,
        progress=progress_lines(),
    )
    say(f"{args.to}: {index.episodes} episodes, {int(index.steps.sum())} steps")
    noises = [args.noise if args.noise >= 0 else family(task.name).noise for task in index.tasks]
    if args.record == "intended" and any(noises):
        say("  recorded: the actions that the expert chose, not the disturbed ones that were executed (see --record)")
    for task in index.tasks:
        say(f"  {task.name}: {task.normalise} of the expert {task.expert:.3f}, of random actions {task.random:.3f}")
    return Status.DONE


def convert(args: Namespace) -> int:
    from tiphys.dataio.convert import convert

    done = convert(
        args.source,
        args.destination,
        format=args.format or None,
        mapping=args.mapping or None,
        skip_bad=args.skip_bad,
        processes=args.processes,
        on=args.on,
        progress=progress_bar("converting"),
    )
    say(done)
    return Status.DONE


def export(args: Namespace) -> int:
    from tiphys.dataio.export import export

    say(export(args.dataset, args.destination, format=args.format))
    return Status.DONE


def inspect(args: Namespace) -> int:
    from tiphys.dataio.dataset import inspect

    if args.episode >= 0:
        from tiphys.launch.display import episode

        say(episode(args.dataset, args.episode, args.picture))
        return Status.DONE
    found = inspect(args.dataset)
    if args.json:
        from tiphys.dataio.atomic import to_json

        say(to_json(found, indent=1))
    else:
        from tiphys.launch.display import summary

        say(summary(found))
    return Status.DONE


def verify(args: Namespace) -> int:
    from tiphys.dataio.dataset import verify

    found = verify(args.dataset, repair=args.repair, full=args.full)
    say(found)
    return Status.DONE if found.ok else Status.REFUSED


def index(args: Namespace) -> int:
    from tiphys.dataio.inplace.build import IndexOptions, index_lerobot
    from tiphys.dataio.inplace.place import is_lerobot, location
    from tiphys.dataio.storage import Store
    from tiphys.dataio.upkeep.foreign import index_foreign

    if is_lerobot(Store(args.dataset)):
        tolerance = {} if args.tolerance is None else {"tolerance": args.tolerance}
        options = IndexOptions(crc=args.crc, skip_bad=args.skip_bad, **tolerance)
        destination = args.destination or location(args.dataset)
        made = index_lerobot(args.dataset, destination, options, progress_bar("indexing"))
        what = f"{made.episodes} episodes indexed in place at {destination}"
    elif args.crc or args.skip_bad or args.tolerance is not None:
        raise ValueError(
            f"{args.dataset}: --crc, --tolerance and --skip-bad are for LeRobot datasets, and this is none"
        )
    else:
        made = index_foreign(args.dataset, args.destination)
        what = f"{made.episodes} samples indexed in place"
    skipped, notes = made.document.get("skipped", 0), made.document.get("notes", [])
    left_out = f", {skipped} left out" if skipped else ""
    say(f"{args.dataset}: {what}{left_out}")
    for note in notes[:20]:
        say(f"  {note}")
    if len(notes) > 20:
        say(f"  … and {len(notes) - 20} more in dataset.json")
    return Status.DONE


def merge(args: Namespace) -> int:
    from tiphys.dataio.dataset import merge

    return _made(args.destination, merge(args.datasets, args.destination))


def append(args: Namespace) -> int:
    from tiphys.dataio.dataset import append

    return _made(args.dataset, append(args.dataset, args.more))


def split(args: Namespace) -> int:
    from tiphys.dataio.dataset import split

    for url, made in zip((args.first, args.second), split(args.dataset, args.first, args.second, args.share)):
        _made(url, made)
    return Status.DONE


def lengths(args: Namespace) -> int:
    from tiphys.dataio import step_counts
    from tiphys.launch.plan import open_datasets, uncounted_texts
    from tiphys.pretrain.objectives import Objectives
    from tiphys.recipes.load import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    objectives = Objectives(recipe, open_datasets(recipe))
    text, uncounted = objectives.text, list(uncounted_texts(objectives))
    if not uncounted:
        say("no dataset of the recipe has a text field whose tokens are still to be counted")
    for field, index in uncounted:
        path = step_counts.write(index, field, text.definition, lambda texts: [len(ids) for ids in text.encode(texts)])
        say(f"{index.url}/{path}: tokens of the field {field!r}")
    return Status.DONE


def filter(args: Namespace) -> int:
    from tiphys.dataio.dataset import filter

    made = filter(
        args.dataset,
        args.destination,
        tasks=args.tasks,
        min_return=args.min_return,
        top=args.top,
        success=args.success,
        min_steps=args.min_steps,
    )
    return _made(args.destination, made)


def _made(url: str, made: Any) -> int:
    say(f"{url}: {made.episodes} episodes, {int(made.steps.sum())} steps, {len(made.tasks)} tasks")
    return Status.DONE


def loader_bench(args: Namespace) -> int:
    from tiphys.dataio.atomic import to_json
    from tiphys.launch.loader_bench import bench, format_result

    found = bench(args.dataset, steps=args.steps, rows=args.rows, window=args.window, cache=args.cache)
    say(to_json(found, indent=1) if args.json else format_result(found))
    return Status.DONE


# -- policies ---------------------------------------------------------------------------------------------------------


def _asked(args: Namespace, target_returns: Sequence[str] = ()) -> Asking:
    """What the options of a command ask of a policy."""
    from tiphys.pretrain.acting.ask import Asking

    return Asking.from_words(
        args.objective,
        args.target_return,
        args.prompt,
        args.goal,
        target_returns,
        query=args.query,
        future=args.future,
    )


def evaluate(args: Namespace) -> int:
    from tiphys.dataio.episode import DataError
    from tiphys.launch.display import scores
    from tiphys.pretrain.evaluate import evaluate
    from tiphys.pretrain.policy_files import local_policy

    if args.follow and args.server:
        raise DataError("--server does not go with --follow: each step is evaluated with its own weights")
    if args.follow:
        return _evaluate_steps(args)
    folder = local_policy(args.policy)
    elsewhere = "://" in args.policy
    found = evaluate(
        folder,
        args.tasks or None,
        episodes=args.episodes,
        seed=args.seed,
        processes=args.processes,
        sample=args.sample,
        asking=_asked(args, args.target_returns),
        out=args.out or ("" if elsewhere else folder.parent / "evaluation.json"),
        pictures=args.pictures,
        videos=args.videos,
        demonstrations=args.demonstrations,
        modules=args.modules,
        device=args.device,
        server=args.server,
        api_key_file=args.api_key_file,
    )
    say(scores(found))
    return Status.DONE


def serve(args: Namespace) -> int:
    from tiphys.launch.serve import serve

    return serve(
        args.policy,
        task=args.task,
        renamed=args.renamed,
        execute=args.execute,
        host=args.host,
        port=args.port,
        api_key_file=args.api_key_file,
        open=args.open,
        sessions=args.sessions,
        batch=args.batch,
        wait=args.wait,
        sample=args.sample,
        seed=args.seed,
        device=args.device,
        follow=args.follow,
    )


def _evaluate_steps(args: Namespace) -> int:
    from tiphys.launch.display import scores
    from tiphys.pretrain.follow.scored import scored_steps

    found = scored_steps(
        args.policy,
        args.tasks or None,
        every=args.every,
        out=args.out,
        episodes=args.episodes,
        seed=args.seed,
        processes=args.processes,
        sample=args.sample,
        asking=_asked(args, args.target_returns),
        pictures=args.pictures,
        videos=args.videos,
        demonstrations=args.demonstrations,
        modules=args.modules,
        device=args.device,
    )
    for one in found:
        say(f"step {one['step']}\n{scores(one)}")
    return Status.DONE


def label(args: Namespace) -> int:
    from tiphys.pretrain.label import label
    from tiphys.pretrain.policy_files import local_policy

    say(label(local_policy(args.policy), args.dataset, args.to, device=args.device, progress=progress_bar("labelled")))
    return Status.DONE


def bootstrap(args: Namespace) -> int:
    from tiphys.paths import expand
    from tiphys.pretrain.bootstrap import Drawing, bootstrap
    from tiphys.pretrain.policy_files import local_policy
    from tiphys.recipes.load import load_recipe

    recipe, share = Path(expand(args.policy)) / "recipe.yaml", args.validation
    if share is None and not recipe.is_file():
        raise ValueError(
            f"{args.policy} is not the folder of a run, so nothing says which episodes are held out; give --validation "
            "SHARE, the `data.validation` of its recipe"
        )
    share = load_recipe(recipe).data.validation if share is None else share
    how = Drawing(args.keep, args.draws, args.windows, share, args.seed)
    found = bootstrap(
        local_policy(args.policy), args.dataset, args.to, how, device=args.device, progress=progress_bar("drawn")
    )
    say(f"{found}\nto learn from them while the run goes on: tiphys mixture RUN add {args.to}=WEIGHT --like ENTRY")
    return Status.DONE


def say_job(args: Namespace) -> int:
    from tiphys.pretrain.acting.about import about
    from tiphys.pretrain.acting.policy import Policy
    from tiphys.pretrain.policy_files import local_policy

    policy = Policy.load(local_policy(args.policy), args.device, seed=args.seed)
    seen = about(args.observation, policy.texts_layout(args.task, "", True)) if args.observation else None
    how = {"tokens": args.tokens, "temperature": args.temperature, "top_p": args.top_p}
    said = policy.say(args.prompt, seen, task=args.task, **how)
    say(args.prompt + said)
    return Status.DONE


def publish(args: Namespace) -> int:
    from tiphys.launch.finish import published
    from tiphys.paths import expand
    from tiphys.pretrain.policy_files import whole_policy
    from tiphys.pretrain.publish import How, publish

    run = "" if "://" in args.run else published(expand(args.run)).run
    how = How(final=True, run=run, take_over=args.take_over)
    say(publish(whole_policy(args.run), args.to, private=not args.public, how=how))
    return Status.DONE


# -- progress ---------------------------------------------------------------------------------------------------------


def progress_lines() -> Callable[[str, int, int], None]:
    """A function (name, done, total). On a terminal it updates one line per name; elsewhere it prints one when a name is done."""
    terminal = sys.stderr.isatty()

    def show(name: str, done: int, whole: int) -> None:
        if terminal:
            say(f"{name}: {done}/{whole}", start="\r", end="\n" if done == whole else "", error=True)
        elif done == whole:
            say(f"{name}: {done} episodes", error=True)

    return show


def progress_bar(what: str) -> Callable[[int, int], None]:
    """A function (done, total). On a terminal it shows a bar with the time left; elsewhere it prints a line every ten seconds."""
    import time

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        bar = Progress(console=Console(stderr=True))
        task = bar.add_task(what, total=None)
        bar.start()

        def show(done: int, whole: int) -> None:
            bar.update(task, completed=done, total=whole)
            if done >= whole:
                bar.stop()

        return show
    began = last = time.monotonic()

    def tell(done: int, whole: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10 or done >= whole:
            last, rate = now, done / max(now - began, 1e-9)
            left = f"{(whole - done) / rate:.0f} s left" if rate else "no rate yet"
            say(f"{what}: {done}/{whole}  {rate:.1f}/s  {left}", error=True)

    return tell
