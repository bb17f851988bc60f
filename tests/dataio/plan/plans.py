"""Simulated indexes and mixtures for tests of the sampling plan."""

from __future__ import annotations

import numpy as np

from tiphys.dataio.sampling import EntryLengths, PlanEntry, SamplingPlan


class SimulatedIndex:
    """The part of an EpisodeIndex that a plan uses, with random episodes."""

    def __init__(self, steps, task, seed=0, name="simulated"):
        random = np.random.default_rng([seed, 1])
        self.steps, self.task = np.asarray(steps, np.int32), np.asarray(task, np.int32)
        self.episodes = len(self.steps)
        self.hash = random.integers(0, 2**64, self.episodes, np.uint64)
        self.total_return = random.normal(size=self.episodes).astype(np.float32)
        self.success = random.integers(-1, 2, self.episodes).astype(np.int8)
        self.url, self.fingerprint = name, f"{name}-{seed}-{self.episodes}"

    def held_out(self, share):
        return self.hash < np.uint64(min(int(share * 2.0**64), 2**64 - 1))

    def id(self, episode):
        return f"{self.url}/{episode}"


def entry(
    name="a",
    episodes=2000,
    tasks=3,
    weight=1.0,
    window=20,
    per_unit=(10, 20, 30),
    fixed=0,
    prompt=0.0,
    prompt_units=5,
    seed=0,
    steps=60,
    priority=None,
    context=1 << 30,
    length=None,
):
    """An entry over simulated episodes; `length`: their lengths, None: lognormal. `fixed`: most tokens of an instruction."""
    random = np.random.default_rng([seed, 2])
    drawn = np.clip(np.exp(random.normal(np.log(steps), 0.8, episodes)), 1, 400).astype(np.int64)
    length = drawn if length is None else np.asarray(length, np.int64)
    episodes = len(length)
    index = SimulatedIndex(length, random.integers(0, tasks, episodes), seed, name)
    lengths = EntryLengths.plain(
        length,
        window,
        np.resize(np.array(per_unit), tasks),
        tasks=tasks,
        fixed=random.integers(0, fixed + 1, episodes),
        context=context,
        prompt=prompt,
        prompt_units=prompt_units,
    )
    return PlanEntry(index, lengths, weight, name, tuple(range(tasks)), priority)


def mixture(prompt=0.25, fixed=12):
    """Two different datasets: full windows of 48 to 704 tokens, and instructions and prompts in the first."""
    first = entry("a", 3000, 3, 0.6, per_unit=(10, 20, 30), fixed=fixed, prompt=prompt)
    second = entry("b", 800, 2, 0.4, window=16, per_unit=(3, 44), seed=1)
    return [first, second]


def plan(entries=None, **options):
    options = {"rows": 32, "budget": 1024, "seed": 3, **options}
    return SamplingPlan(entries if entries is not None else mixture(), **options)


def columns(sampling_plan, steps):
    """All planned windows of some steps, as arrays; `step`: the step of each window."""
    parts = sampling_plan.many(list(steps), [np.arange(sampling_plan.rows)] * len(steps))
    out = {name: np.concatenate([getattr(p, name) for p in parts]) for name in parts[0]._fields}
    out["step"] = np.repeat(np.array(list(steps)), [len(p.row) for p in parts])
    return out
