"""Measures the random and the expert score of a dataset's tasks in their environments, and stores them in the dataset.

`tiphys collect` measures the scores of what it records. Converted data have them only if their mapping file states them.
"""

from __future__ import annotations

import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiphys.dataio import environments
from tiphys.dataio.atomic import to_json
from tiphys.dataio.collect import ExpertFactory, Players
from tiphys.dataio.environments import NoExpert, allow
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.dataio.format.document import DATASET, INDEX, fetch, parse, sha256
from tiphys.dataio.format.table import Part, combine
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.inplace.place import resolve
from tiphys.dataio.storage import Store


@dataclass(frozen=True)
class Measured:
    """A task with its scores.

    task        as it is stored now
    no_expert   why the expert's score was not measured; "": it was
    """

    task: TaskSpec
    no_expert: str = ""


def measure(
    url: str,
    tasks: Sequence[str] = (),
    *,
    episodes: int = 30,
    policy: ExpertFactory | None = None,
    modules: Iterable[str] = (),
    processes: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Measured]:
    """Measure the scores of tasks and write them into the dataset's index. Its episodes and statistics stay as they are.

    tasks       names or globs; (): all tasks that have an environment
    episodes    number of episodes of each score; their seeds are those that `collect` uses for scores
    policy      makes the expert for a task and its environment; None: the environment's own expert. If there is none, only the
                random score is measured, and an expert score that is stored already stays
    modules     modules that environments named `module:EnvId` may import
    processes   0: one for each core
    progress    called with the name of each task before it is measured

    Raises DataError if a name matches no task, if a task has no environment, or if the environment does not report a success that
    the task is scored by; UnknownEnvironment, MissingExtra, EnvironmentFault, or an error of the store. Nothing is written then.
    """
    url = resolve(url)
    index = EpisodeIndex.open(url)
    chosen = _chosen(index, tasks)
    allow(modules)
    found: list[Measured] = []
    with Players(processes or os.cpu_count() or 1, policy) as players:
        for spec in chosen:
            if progress:
                progress(spec.name)
            missing = "" if policy is not None else _no_expert(spec.environment)
            found.append(Measured(players.scored(spec, episodes, expert=not missing), missing))
    _store(url, {one.task.name: one.task for one in found})
    return found


def _chosen(index: EpisodeIndex, patterns: Sequence[str]) -> list[TaskSpec]:
    for pattern in patterns:
        if not fnmatch.filter([t.name for t in index.tasks], pattern):
            raise DataError(
                f"{index.url}: no task matches {pattern!r}; it has {', '.join(t.name for t in index.tasks)}"
            )
    chosen = [t for t in index.tasks if not patterns or any(fnmatch.fnmatchcase(t.name, p) for p in patterns)]
    without = [t.name for t in chosen if not t.environment]
    if without and (patterns or len(without) == len(chosen)):
        raise DataError(
            f"{index.url}: {', '.join(without[:20])} {'has' if len(without) == 1 else 'have'} no environment to be measured in; "
            "name one with `environment` in a mapping file and convert again"
        )
    return [t for t in chosen if t.environment]


def _no_expert(environment: str) -> str:
    """Why an environment has no expert of its own; "": it has one."""
    env = environments.make(environment)
    try:
        environments.expert(environment, env)
    except NoExpert as error:
        return str(error)
    finally:
        env.close()
    return ""


def _store(url: str, scored: dict[str, TaskSpec]) -> None:
    """Replace tasks in the index and in dataset.json. Everything else in both stays."""
    store = Store(url)
    document = parse(store.read(DATASET), f"{url}/{DATASET}")
    with tempfile.TemporaryDirectory(prefix="tiphys-scores-") as folder:
        old, new = Path(folder) / "old.parquet", Path(folder) / INDEX
        if fetch(store, INDEX, old) != document["digests"].get(INDEX):
            raise DataError(
                f"{url}/{INDEX} does not have the SHA-256 that {DATASET} names; run `tiphys verify --repair`"
            )
        tasks = [scored.get(task.name, task) for task in document["tasks"]]
        combine([Part(old)], new, tasks, document["shards"])
        document |= {
            "tasks": [task.to_dict() for task in tasks],
            "shards": [shard.to_list() for shard in document["shards"]],
            "digests": {**document["digests"], INDEX: sha256(new)},
        }
        store.upload(INDEX, str(new))
        store.write(DATASET, to_json(document, indent=1, ensure_ascii=False).encode())
