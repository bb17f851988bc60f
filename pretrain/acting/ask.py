"""What a policy is asked for when it plays: objective, target return, prompt, goal, query and future, by task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, Episode, TaskSpec, Window
from tiphys.dataio.format.rows import returns_to_go
from tiphys.paths import expand
from tiphys.pretrain.acting.demand import shows_histogram
from tiphys.pretrain.acting.fill import query_of
from tiphys.pretrain.tokens.derived import source_of

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.pretrain.acting.policy import Policy
    from tiphys.pretrain.acting.processor import Processor
    from tiphys.pretrain.serving.client import RemotePolicy
    from tiphys.recipes.sections.results import Evaluation

KEYS = ("target_return", "prompt", "goal", "query", "future")
_ABLE = {  # what an objective does that can take each
    "target_return": "shows the model returns",
    "goal": "acts towards a goal",
    "query": "fills in hidden parts",
    "future": "shows the model what is to come",
}


@dataclass(frozen=True)
class Ask:
    """What a policy is asked for in some episodes of a task.

    objective, target_return, prompt, goal, query, future
               arguments of `Policy.reset`
    asked      the return that is then asked for, in rewards; None: the objective shows none
    written    for one of `Asking.target_returns`: how it was written
    """

    task: str
    objective: str = ""
    target_return: float | None = None
    prompt: Window | None = None
    goal: Mapping[str, Any] | None = None
    query: str = ""
    future: Window | None = None
    asked: float | None = None
    written: str = ""

    def reset(self, policy: Policy | RemotePolicy, environments: int = 1) -> None:
        """Begin new episodes with a policy."""
        policy.reset(
            self.task,
            environments,
            objective=self.objective,
            target_return=self.target_return,
            prompt=self.prompt,
            goal=self.goal,
            query=self.query,
            future=self.future,
        )


@dataclass(frozen=True)
class Asking:
    """What is asked for, by task. The mappings go from the name of a task, or a glob of names, to a value; `*` is every task.

    Attributes
    ----------
    objectives : sequence of str
        Objectives to act with, each in the tasks that were trained with it; empty: the first that a task was trained with.
    target_return : mapping of str to str
        Returns to ask for, as `TargetReturn.parse` reads them.
    prompt : mapping of str to str
        Demonstrations, ``DATASET`` or ``DATASET:EPISODE``, see `demonstration`.
    goal : mapping of str to str
        Observations to reach: JSON, or ``DATASET:EPISODE``, whose last observation is meant.
    query : mapping of str to str
        What objectives that fill in hidden parts are asked: keys of `hiding.QUERIES`.
    future : mapping of str to str
        Whole episodes that are to be matched or imitated, ``DATASET`` or ``DATASET:EPISODE``.
    target_returns : sequence of str
        Further returns to ask for in turn, of every objective that shows returns.
    """

    objectives: Sequence[str] = ()
    target_return: Mapping[str, str] = field(default_factory=dict)
    prompt: Mapping[str, str] = field(default_factory=dict)
    goal: Mapping[str, str] = field(default_factory=dict)
    target_returns: Sequence[str] = ()
    query: Mapping[str, str] = field(default_factory=dict)
    future: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_words(
        cls,
        objectives: Sequence[str] = (),
        target_return: Sequence[str] = (),
        prompt: Sequence[str] = (),
        goal: Sequence[str] = (),
        target_returns: Sequence[str] = (),
        query: Sequence[str] = (),
        future: Sequence[str] = (),
    ) -> Asking:
        """From the words of a command line: ``VALUE`` for every task, or ``TASK=VALUE``."""
        given = {"target_return": target_return, "prompt": prompt, "goal": goal, "query": query, "future": future}
        by_task = {k: dict(map(_by_task, words)) for k, words in given.items()}
        return cls(tuple(objectives), **by_task, target_returns=tuple(target_returns))

    @classmethod
    def from_recipe(cls, evaluate: Evaluation) -> Asking:
        """What the section `evaluate` of a recipe asks."""
        e = evaluate
        return cls(
            tuple(e.objectives),
            e.target_return,
            e.prompt,
            e.goal,
            tuple(e.target_returns),
            query=e.query,
            future=e.future,
        )

    def words(self) -> list[str]:
        """The inverse of `from_words`, with the options of `tiphys evaluate`."""
        out = ["--objective", *self.objectives] if self.objectives else []
        for key in KEYS:
            if found := getattr(self, key):
                out += [f"--{key.replace('_', '-')}", *(f"{task}={value}" for task, value in found.items())]
        return [*out, "--target-returns", *map(str, self.target_returns)] if self.target_returns else out

    def asks(self, processor: Processor, tasks: Sequence[str]) -> list[Ask]:
        """What to play, by task and objective; after each that shows returns, the same with each of `target_returns`.

        Raises
        ------
        DataError
            With everything that `problems` finds.
        """
        if found := list(self.problems(processor, tasks)):
            raise DataError("; ".join(f"{key}: {reason}" for key, reason in found))
        out = []
        for task, name in self.plays(processor, tasks):
            one = self._ask(processor, task, name)
            out.append(one)
            for written in self.target_returns if _shows_returns(processor, task, name) else ():
                asked = processor.asked(task, name, written)
                out.append(replace(one, target_return=asked, asked=asked, written=str(written)))
        return out

    def plays(self, processor: Processor, tasks: Sequence[str]) -> list[tuple[str, str]]:
        """(task, objective) of everything that is played."""
        return [(task, name) for task in tasks for name in self._objectives(processor, task)]

    def problems(self, processor: Processor, tasks: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(key, reason) of everything that cannot be asked of a policy in these tasks."""
        plays = self.plays(processor, tasks)
        for name in self.objectives:
            if name not in processor.layouts:
                yield "objectives", f"no objective is called {name!r}; they are {', '.join(processor.layouts)}"
        for task in tasks:
            if not self._objectives(processor, task) and not set(self.objectives) - set(processor.layouts):
                yield "objectives", f"task {task!r} was not trained with {' or '.join(self.objectives)}"
        for key in KEYS:
            for pattern, value in getattr(self, key).items():
                mine = [(t, n) for t, n in plays if _chosen(getattr(self, key), t) == pattern]
                if not mine and any(fnmatchcase(task, pattern) for task in tasks):
                    continue  # another value is meant for each of its tasks
                if not mine:
                    yield f"{key}.{pattern}", f"no task that is played is called so; they are {', '.join(tasks)}"
                    continue
                able = [(t, n) for t, n in mine if key == "prompt" or _takes(processor, t, n, key)]
                if not able:
                    names = ", ".join(f"{n!r} (task {t!r})" for t, n in mine)
                    yield f"{key}.{pattern}", f"no objective that is played {_ABLE[key]}, so none can take it: {names}"
                for task, name in able:
                    try:
                        _value(processor, task, name, key, value)
                    except (ValueError, OSError) as error:
                        yield f"{key}.{pattern}", str(error)
        yield from self._unfit(processor, plays)
        shown = [(t, n) for t, n in plays if _shows_returns(processor, t, n)]
        if self.target_returns and plays and not shown:
            yield "target_returns", "no objective that is played shows the model returns, so none can be asked for"
        for written in self.target_returns:
            for task, name in shown:
                try:
                    processor.asked(task, name, written)
                except DataError as error:
                    yield "target_returns", str(error)

    def _unfit(self, processor: Processor, plays: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Queries that do not fit the objective or the goal, and objectives that lack the future that they need."""
        for task, name in plays:
            where = f"task {task!r}, objective {name!r}"
            pattern = _chosen(self.query, task)
            if _takes(processor, task, name, "query"):
                aim = None if _chosen(self.goal, task) is None else self.goal
                stated = str(processor.rule(name)[1].get("query", "bc"))
                hiding = processor.layouts[name][task].hiding
                try:
                    query_of(stated, "" if pattern is None else self.query[pattern], aim, hiding, where)
                except DataError as error:
                    yield "query" if pattern is None else f"query.{pattern}", str(error)
            if _takes(processor, task, name, "future") and _chosen(self.future, task) is None:
                yield "future", f"{where}: it acts on what is to come; name an episode to match, as DATASET:EPISODE"

    def _objectives(self, processor: Processor, task: str) -> list[str]:
        if not self.objectives:
            return [processor.objective(task)]
        return [name for name in dict.fromkeys(self.objectives) if task in processor.layouts.get(name, {})]

    def _ask(self, processor: Processor, task: str, name: str) -> Ask:
        values: dict[str, Any] = {}
        for key in KEYS:
            pattern = _chosen(getattr(self, key), task)
            if pattern is not None and (key == "prompt" or _takes(processor, task, name, key)):
                values[key] = _value(processor, task, name, key, getattr(self, key)[pattern])
        asked = values.get("target_return")
        if asked is None and _shows_returns(processor, task, name):
            asked = processor.asked(task, name)
        return Ask(task, name, asked=asked, **values)


def _by_task(word: str) -> tuple[str, str]:
    task, found, value = word.partition("=")
    if not found or "://" in task or task.lstrip()[:1] in ("{", "["):  # an address or a goal that contains the sign
        task, value = "*", word
    return task, value


def _chosen(by_task: Mapping[str, Any], task: str) -> str | None:
    """The key that is meant for a task: its name, else the first glob that matches it."""
    if task in by_task:
        return task
    return next((pattern for pattern in by_task if fnmatchcase(task, pattern)), None)


def _shows_returns(processor: Processor, task: str, objective: str) -> bool:
    return any(e.role == "return" for e in processor.layouts[objective][task].elements)


def _takes(processor: Processor, task: str, objective: str, key: str) -> bool:
    if key == "goal":
        return processor.takes_goal(objective)
    if key == "query":
        return processor.rule(objective)[0] == "fill"
    if key == "future":
        return processor.takes_future(task, objective)
    return _shows_returns(processor, task, objective)


def _value(processor: Processor, task: str, objective: str, key: str, given: Any) -> Any:
    if key == "target_return":
        return processor.asked(task, objective, given)
    if key == "goal":
        return goal(given, task)
    if key == "query":
        return given
    shown = demonstration(given, task)
    needed = processor.used_fields(task, objective)
    if key == "future":
        elements = [e for e in processor.layouts[objective][task].elements if shows_histogram(e)]
        needed = frozenset(source_of(e.rule)[1] for e in elements) if elements else needed
    if missing := sorted(needed - set(shown.fields)):
        raise DataError(
            f"{given}: its episode {shown.episode!r} has no field {', '.join(missing)}, which task {task!r} shows"
        )
    shown.fields = {name: shown.fields[name] for name in needed}  # it goes to other processes
    return shown if key == "future" else processor.prompt(task, objective, shown)


def demonstration(address: str, task: str) -> Window:
    """A whole episode of a dataset, as a prompt.

    Parameters
    ----------
    address : str
        ``DATASET:EPISODE`` with the episode's number or id, or ``DATASET``: its best episode of the task, by return.
    task : str
        Name of the task that is played.

    Raises
    ------
    DataError
        If the dataset has no such episode.
    OSError
        If there is no dataset.
    """
    spec, episode = _episode(address, task)
    count = episode.steps
    once = {f.name for f in spec.fields if f.per == "episode"}
    fields = {n: v if n in once else v[:count] for n, v in episode.fields.items()}
    return Window(
        entry=0,
        task=0,
        episode=episode.id,
        start=0,
        steps=count,
        episode_steps=count,
        fields=fields,
        step=np.arange(count),
        returns_to_go=returns_to_go(episode, count).astype(np.float32),
        valid=np.ones(count, bool),
        prompt=True,
    )


def goal(given: Any, task: str) -> Mapping[str, Any]:
    """An observation to reach: from JSON as the environment gives it, or the last observation of ``DATASET:EPISODE``.

    Raises
    ------
    DataError, OSError
        As `demonstration`, or if the text is JSON that is not valid.
    """
    if not isinstance(given, str):
        return given if isinstance(given, Mapping) else {"observation": np.asarray(given)}
    if given.lstrip()[:1] in ("{", "["):
        try:
            found = json.loads(given)
        except ValueError as error:
            raise DataError(f"the goal {given!r} is not valid JSON: {error}") from None
        return found if isinstance(found, Mapping) else {"observation": np.asarray(found)}
    return {name: value for name, value in last_step(given, task).items() if name.split(".")[0] == "observation"}


def last_step(address: str, task: str) -> dict[str, Any]:
    """The last value of each field of ``DATASET:EPISODE``. Raises DataError or OSError as `demonstration`."""
    spec, episode = _episode(address, task)
    known = [f for f in spec.fields if f.name in episode.fields and (f.per == "episode" or len(episode.fields[f.name]))]
    return {f.name: episode.fields[f.name] if f.per == "episode" else episode.fields[f.name][-1] for f in known}


def _episode(address: str, task: str) -> tuple[TaskSpec, Episode]:
    from tiphys.dataio.dataset import read_episode
    from tiphys.dataio.index import EpisodeIndex

    url, wanted = _split(address)
    index = EpisodeIndex.open(expand(url))
    number = _number(index, wanted, task)
    return index.tasks[int(index.task[number])], read_episode(index, number)


def _split(address: str) -> tuple[str, str]:
    """``DATASET:EPISODE`` -> (dataset, episode); the colons of ``s3://`` and of a port belong to the dataset."""
    scheme, found, rest = address.rpartition("://")
    host, slash, path = rest.partition("/") if found else ("", "", rest)
    path, _, episode = path.partition(":")
    return f"{scheme}{found}{host}{slash}{path}", episode


def _number(index: EpisodeIndex, wanted: str, task: str) -> int:
    if not wanted:
        mine = [i for i, t in enumerate(index.tasks) if t.name == task]
        episodes = np.flatnonzero(np.isin(index.task, mine) & (np.asarray(index.steps) > 0))
        if not len(episodes):
            raise DataError(f"{index.url}: it has no episode of task {task!r}; name one with DATASET:EPISODE")
        returns = np.nan_to_num(np.asarray(index.total_return, np.float64)[episodes], nan=-np.inf)
        return int(episodes[int(returns.argmax())])
    from tiphys.dataio.format.table import hash_id

    if wanted.isdecimal() and int(wanted) < index.episodes:
        return int(wanted)
    for episode in np.flatnonzero(np.asarray(index.hash) == np.uint64(hash_id(wanted))):
        if index.id(int(episode)) == wanted:
            return int(episode)
    raise DataError(
        f"{index.url}: it has no episode {wanted!r}; it has the numbers 0 to {index.episodes - 1}, and their ids"
    )
