"""What the commands for policies do, from parsed arguments to an exit status.

Every function imports what it needs itself, so that a command does not load the libraries of the others.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiphys.dataio.messages import say
from tiphys.launch.progress import progress_bar
from tiphys.launch.statuses import Status

if TYPE_CHECKING:
    from tiphys.pretrain.acting.ask import Asking


def asked(args: Namespace, target_returns: Sequence[str] = ()) -> Asking:
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
        asking=asked(args, args.target_returns),
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
        asking=asked(args, args.target_returns),
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
    from tiphys.pretrain.acting.say import texts_layout
    from tiphys.pretrain.policy_files import local_policy

    policy = Policy.load(local_policy(args.policy), args.device, seed=args.seed)
    seen = about(args.observation, texts_layout(policy.processor, args.task, "", True)) if args.observation else None
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
