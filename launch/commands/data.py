"""What the commands for datasets do, from parsed arguments to an exit status.

Every function imports what it needs itself, so that a command does not load the libraries of the others.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from tiphys.dataio.messages import counted, say
from tiphys.launch.commands.policies import asked
from tiphys.launch.progress import progress_bar, progress_lines
from tiphys.launch.statuses import Status


def environments(args: Namespace) -> int:
    from tiphys.dataio.environments import names

    say("\n".join(n for n in names() if args.contains.lower() in n.lower()))
    return Status.DONE


def collect(args: Namespace) -> int:
    from tiphys.dataio.collect import collect
    from tiphys.dataio.environments import family
    from tiphys.dataio.episode import DataError
    from tiphys.pretrain.acting.ask import Asking

    asking = asked(args)
    if asking != Asking() and not _is_policy(args.policy):
        raise DataError(
            "--objective, --target-return, --prompt, --goal, --query and --future ask something of a policy of Tiphys; give its "
            "folder with --policy"
        )
    index = collect(
        args.tasks,
        args.to,
        args.episodes,
        seed=args.seed,
        noise=args.noise if args.noise >= 0 else None,
        record=args.record,
        processes=args.processes,
        policy=_expert(args, asking),
        progress=progress_lines(),
    )
    say(f"{args.to}: {counted(index.episodes, 'episode')}, {counted(int(index.steps.sum()), 'step')}")
    noises = [args.noise if args.noise >= 0 else family(task.name).noise for task in index.tasks]
    if args.record == "intended" and any(noises):
        say("  recorded: the actions that the expert chose, not the disturbed ones that were executed (see --record)")
    for task in index.tasks:
        say(f"  {task.name}: {task.normalise} of the expert {task.expert:.3f}, of random actions {task.random:.3f}")
    return Status.DONE


def _is_policy(name: str) -> bool:
    return "://" in name or bool(name and Path(name).is_dir())


def _expert(args: Namespace, asking: Any) -> Any:
    """What makes the expert that --policy names; None: the environment's own."""
    if _is_policy(args.policy):
        from tiphys.pretrain.acting.play import PolicyExpert
        from tiphys.pretrain.policy_files import local_policy

        return PolicyExpert(str(local_policy(args.policy)), asking)
    if args.policy:
        from tiphys.dataio.environments.agents import agent

        return agent(args.policy, trusted=args.trust_policy)
    return None


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
    _say_bad_values(args.destination)
    return Status.DONE


def _say_bad_values(url: str) -> None:
    """Say which values of a dataset cannot be learned from, right after it was made."""
    from tiphys.dataio.format.document import DATASET, parse
    from tiphys.dataio.statistics import FieldStatistics
    from tiphys.dataio.storage import Store
    from tiphys.launch.display import bad_values

    document = parse(Store(url).read(DATASET), f"{url}/{DATASET}")
    said = False
    for task, by_field in document["statistics"].items():
        for field, stored in by_field.items():
            found = FieldStatistics.from_dict(stored)
            if found.bad():
                say(bad_values(task, field, found.bad(), found.first_bad))
                said = True
    if said:
        say("  Training refuses them, or leaves their episodes out with data.on_bad_value=quarantine")


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
        what = f"{counted(made.episodes, 'episode')} indexed in place at {destination}"
    elif args.crc or args.skip_bad or args.tolerance is not None:
        raise ValueError(
            f"{args.dataset}: --crc, --tolerance and --skip-bad are for LeRobot datasets, and this is none"
        )
    else:
        made = index_foreign(args.dataset, args.destination)
        what = f"{counted(made.episodes, 'sample')} indexed in place"
    skipped, notes = made.document.get("skipped", 0), made.document.get("notes", [])
    left_out = f", {skipped} left out" if skipped else ""
    say(f"{args.dataset}: {what}{left_out}")
    for note in notes[:20]:
        say(f"  {note}")
    if len(notes) > 20:
        say(f"  … and {len(notes) - 20} more in dataset.json")
    _say_bad_values(made.url)
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


def scores(args: Namespace) -> int:
    from tiphys.dataio.task_scores import measure
    from tiphys.pretrain.acting.ask import Asking

    found = measure(
        args.dataset,
        args.tasks,
        episodes=args.episodes,
        policy=_expert(args, Asking()),
        modules=args.modules,
        processes=args.processes,
        progress=lambda task: say(f"{task}: {counted(args.episodes, 'episode')} of each score", error=True),
    )
    say(f"{args.dataset}: scores of {counted(len(found), 'task')} are stored")
    for one in found:
        task = one.task
        expert = "not known" if task.expert is None else f"{task.expert:.3f}"
        say(f"  {task.name}: {task.normalise} of the expert {expert}, of random actions {task.random:.3f}")
        if one.no_expert:
            say(f"    the expert was not measured: {one.no_expert}")
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
    parts = (made.episodes, "episode"), (int(made.steps.sum()), "step"), (len(made.tasks), "task")
    say(f"{url}: {', '.join(counted(*part) for part in parts)}")
    return Status.DONE


def loader_bench(args: Namespace) -> int:
    from tiphys.dataio.atomic import to_json
    from tiphys.launch.loader_bench import bench, format_result

    found = bench(args.dataset, steps=args.steps, rows=args.rows, window=args.window, cache=args.cache)
    say(to_json(found, indent=1) if args.json else format_result(found))
    return Status.DONE
