"""`tiphys quickstart`: all steps from nothing to a policy: demonstrations, training, evaluation, report.

Every step prints the command that does the same by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiphys.dataio.messages import counted, say
from tiphys.launch.progress import progress_lines
from tiphys.launch.submit import submit
from tiphys.recipes.load import load_recipe

# dataset -> task -> demonstrations
DEMONSTRATIONS: dict[str, dict[str, int]] = {
    "babyai": {"BabyAI-GoToRedBallGrey-v0": 3000, "BabyAI-GoToLocal-v0": 10000},
    "metaworld": {
        "metaworld/reach-v3": 300,
        "metaworld/push-v3": 300,
        "metaworld/drawer-close-v3": 150,
        "metaworld/door-open-v3": 200,
    },
    "classic": {"CartPole-v1": 60, "Pendulum-v1": 150, "LunarLander-v3": 200},
}
RECIPE = "quickstart"


def quickstart(
    overrides: Sequence[str],
    datasets: str,
    scale: float,
    processes: int,
    *,
    verbose: bool = False,
    with_traceback: bool = False,
) -> int:
    """Returns a `Status`; DONE means that the policy, its evaluation and the report exist. Existing demonstrations are reused."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"--scale {scale:g}: the fraction of the demonstrations must be above 0")
    began = time.monotonic()
    for name, tasks in DEMONSTRATIONS.items():
        counts = {task: max(10, round(n * scale)) for task, n in tasks.items()}
        _collect(f"{datasets}/{name}", counts, scored=max(3, round(20 * scale)))
    changes = [*_moved(datasets), *overrides]
    say(f"\n$ tiphys train {' '.join([RECIPE, *changes])}")
    status = submit(RECIPE, changes, processes=processes, verbose=verbose, with_traceback=with_traceback)
    say(f"\n{(time.monotonic() - began) / 60:.1f} minutes in total")
    return status


def _moved(datasets: str) -> list[str]:
    """Overrides that make the mixture entries of the recipe use another folder."""
    entries = enumerate(load_recipe(RECIPE).data.mixture)
    return [
        f"data.mixture[{i}].dataset={datasets}/{Path(entry.dataset).name}"
        for i, entry in entries
        if entry.dataset != f"{datasets}/{Path(entry.dataset).name}"
    ]


def _collect(url: str, tasks: Mapping[str, int], scored: int) -> None:
    """Collect a dataset, unless it exists.

    tasks   task -> number of demonstrations
    scored  episodes that measure the random and the expert score of each task

    Raises FileExistsError if the folder holds other demonstrations.
    """
    from tiphys.dataio.collect import collect
    from tiphys.dataio.index import EpisodeIndex

    if (Path(url) / "dataset.json").is_file():
        have = EpisodeIndex.open(url)
        counts = {t.name: int((have.task == i).sum()) for i, t in enumerate(have.tasks)}
        if counts == dict(tasks):
            say(f"{url}: {counted(have.episodes, 'episode')} exist already")
            return
        raise FileExistsError(
            f"{url} holds other demonstrations ({json.dumps(counts)}) than this command needs ({json.dumps(dict(tasks))}); "
            "remove it, or choose another folder with --datasets"
        )
    for task, count in tasks.items():
        say(f"$ tiphys collect {task} --episodes {count} --to {url}")
    began = time.monotonic()
    index = collect(tasks, url, score_episodes=scored, progress=progress_lines())
    say(
        f"{url}: {counted(index.episodes, 'episode')}, {counted(int(index.steps.sum()), 'step')} "
        f"in {time.monotonic() - began:.0f} s"
    )
