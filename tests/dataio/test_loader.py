"""TrajectoryLoader: batches are those of the plan, on any number of homes and after any interruption; nothing is left behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.dataio.loading_fixtures import CONTROL, PICTURES, copied, dataset, digest_batch, window_text
from tests.processes import REPOSITORY
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import Needs, Window
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import CacheBudget, Joined, LoadedBatch, LoaderSettings, TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.dataio.sampling import EntryLengths, PlanEntry, SamplingPlan

NEEDS = (
    Needs(("observation", "action", "reward", "instruction"), after=2),
    Needs(("observation.image", "observation.wrist", "observation.state", "action")),
)
SETTINGS = LoaderSettings(cache=CacheBudget(memory=4 << 20))
ONE = Home(0, 1)


def lengths(index: Any, window: int) -> EntryLengths:
    tasks = len(index.tasks)
    fixed = np.full(index.episodes, 4)
    return EntryLengths.plain(index.steps, window, 3, tasks=tasks, fixed=fixed, prompt=0.25, prompt_units=4)


def make_plan(index: Any, **more: Any) -> SamplingPlan:
    entries = [
        PlanEntry(index=index, lengths=lengths(index, 10), weight=0.7, name="control", tasks=[0], priority=None),
        PlanEntry(index=index, lengths=lengths(index, 6), weight=0.3, name="pictures", tasks=[1], priority=None),
    ]
    return SamplingPlan(entries, rows=12, budget=64, seed=5, **more)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dataset(str(tmp_path_factory.mktemp("data") / "set"))


def load(index: Any, home: Home = ONE, start: int = 0, stop: int = 6, **more: Any) -> list[LoadedBatch]:
    """All batches, copied out of shared memory."""
    with TrajectoryLoader(
        make_plan(index), home, digest_batch, NEEDS, settings=SETTINGS, start=start, stop=stop, **more
    ) as loader:
        return [copied(batch) for batch in loader]


def rows_of(batches: list[LoadedBatch]) -> dict[tuple[int, int], bytes]:
    """(step, row) -> the row's digest. Each row must be there once."""
    out: dict[tuple[int, int], bytes] = {}
    for batch in batches:
        for row, digest in zip(batch.arrays["row"].tolist(), batch.arrays["digest"], strict=True):
            assert (batch.step, row) not in out
            out[batch.step, row] = digest.tobytes()
    return out


@pytest.fixture(scope="module")
def reference(index: Any) -> dict[tuple[int, int], bytes]:
    return rows_of(load(index))


def oracle(index: Any, step: int, row: int) -> list[Window]:
    """A row's windows, cut from whole episodes."""
    plan, out = make_plan(index), []
    p = plan.windows(step, np.array([row]))
    for i in range(len(p.row)):
        entry, number = int(p.entry[i]), int(p.episode[i])
        episode, needs = read_episode(index, number), NEEDS[int(p.entry[i])]
        start, units = int(p.start[i]), int(p.units[i])
        rows = min(units + needs.after, int(index.rows[number]) - start)
        reward = np.append(np.cumsum(episode.fields["reward"].astype(np.float64)[::-1])[::-1], 0.0)
        fields: dict[str, Any] = {}
        for name in needs.fields:
            spec = next(f for f in (CONTROL, PICTURES)[int(p.task[i])].fields if f.name == name)
            value = episode.fields[name]
            if spec.per == "step":
                cut = value[start : start + rows]
                fields[name] = np.concatenate([cut, np.zeros((rows - len(cut), *spec.shape), cut.dtype)])
            else:
                fields[name] = value
        step_of = np.arange(start, start + rows)
        out.append(
            Window(
                entry=entry,
                task=int(p.task[i]),
                episode=episode.id,
                start=start,
                steps=units,
                episode_steps=episode.steps,
                fields=fields,
                step=step_of,
                returns_to_go=reward[start : start + rows].astype(np.float32),
                valid=step_of < episode.steps,
                prompt=bool(p.prompt[i]),
                tokens=int(p.tokens[i]),
            )
        )
    return out


def test_every_window_equals_the_slice_of_its_episode(index: Any, reference: dict[tuple[int, int], bytes]) -> None:
    assert set(reference) == {(s, r) for s in range(6) for r in range(12)}
    for (step, row), digest in reference.items():
        expected = digest_batch(step, np.array([row]), [oracle(index, step, row)])
        assert digest == expected["digest"].tobytes(), "".join(map(window_text, oracle(index, step, row)))


@pytest.mark.parametrize("processes", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 4, 7))])
def test_any_number_of_homes_sees_the_same_batches(
    index: Any, processes: int, reference: dict[tuple[int, int], bytes]
) -> None:
    together: dict[tuple[int, int], bytes] = {}
    for process in range(processes):
        mine = rows_of(load(index, Home(process, processes)))
        assert not set(mine) & set(together)
        together |= mine
    assert together == reference


def test_resuming_at_any_step_on_another_number_of_homes(index: Any, reference: dict[tuple[int, int], bytes]) -> None:
    with TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=SETTINGS) as loader:
        for _ in range(3):
            next(loader).release()
        state = loader.state_dict()
    together = {}
    for process in range(2):
        plan = make_plan(index)
        with TrajectoryLoader(plan, Home(process, 2), digest_batch, NEEDS, settings=SETTINGS, stop=6) as loader:
            loader.load_state_dict(state)
            for batch in loader:
                together |= rows_of([batch])
                batch.release()
    assert together == {k: v for k, v in reference.items() if k[0] >= 3}


@pytest.mark.parametrize("memory", [1 << 20, 64 << 20])
def test_the_size_of_the_cache_changes_no_batch(
    index: Any, memory: int, reference: dict[tuple[int, int], bytes]
) -> None:
    settings = LoaderSettings(cache=CacheBudget(memory=memory))
    with TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=settings, stop=6) as loader:
        assert rows_of([copied(batch) for batch in loader]) == reference


@pytest.mark.parametrize("unit_rows", [1, 7])
def test_the_rows_of_a_unit_change_no_batch(
    index: Any, unit_rows: int, reference: dict[tuple[int, int], bytes]
) -> None:
    settings = dataclasses.replace(SETTINGS, unit_rows=unit_rows, requests=3, timeout=5.0, attempts=2)
    with TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=settings, stop=6) as loader:
        steps = [rows for name, rows in loader.cache_plan()["unit_rows"].items() if name.endswith("steps.npy")]
        assert steps == [unit_rows]
        assert rows_of([copied(batch) for batch in loader]) == reference


def big_batch(step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
    return {"step": np.full((step % 7 + 1, 100_000), step, np.int64), "empty": np.zeros((0, 3), np.float32)}


def test_batches_of_any_size_stay_within_the_bytes_allowed_and_are_valid_until_released(index: Any) -> None:
    settings = dataclasses.replace(SETTINGS, prefetch=20 << 20)
    with TrajectoryLoader(make_plan(index), ONE, big_batch, NEEDS, settings=settings, stop=15) as loader:
        held = []
        for batch in loader:
            held.append(batch)
            if len(held) == 2:
                time.sleep(0.05)  # time for the loader to overwrite what it must not
                first = held.pop(0)
                assert (first.arrays["step"] == first.step).all()
                assert first.arrays["step"].shape == (first.step % 7 + 1, 100_000)
                assert first.arrays["empty"].shape == (0, 3)
                first.release()
                assert shared_bytes(loader.pid) <= 21 << 20


def shared_bytes(pid: int | None) -> int:
    return sum(m.rss for m in psutil.Process(pid).memory_maps() if "tiphys-batches" in m.path)


def test_the_memory_of_each_slot_is_pinned_once(index: Any) -> None:
    seen: list[int] = []
    with TrajectoryLoader(
        make_plan(index), ONE, digest_batch, NEEDS, settings=dataclasses.replace(SETTINGS, prefetch=1 << 17), stop=20,
        on_memory=lambda memory: seen.append(memory.ctypes.data),
    ) as loader:  # fmt: skip
        for batch in loader:
            batch.release()
    assert 1 <= len(seen) == len(set(seen)) <= 2


def test_the_cache_plan_says_what_is_kept_and_the_best_possible_hit_rate(index: Any) -> None:
    few, many = (LoaderSettings(cache=CacheBudget(memory=memory)) for memory in (100 << 10, 64 << 20))
    small = TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=few)
    large = TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=many)
    epoch_plan = make_plan(index, replacement=False, buckets=16)
    epochs = TrajectoryLoader(epoch_plan, Home(1, 2), digest_batch, NEEDS, settings=few)
    assert 0 < small.cache_plan()["hit_bound"] < 1 == large.cache_plan()["hit_bound"]
    rows = {name.split()[-1]: count for name, count in small.cache_plan()["unit_rows"].items()}
    assert set(rows) == {"steps.npy", "observation.image", "observation.wrist"}
    assert all(count < whole for count, whole in zip(rows.values(), large.cache_plan()["unit_rows"].values()))
    assert 0.4 < epochs.cache_plan()["home_bytes"] / epochs.cache_plan()["data_bytes"] < 0.7
    assert small.cache_plan()["home_bytes"] == small.cache_plan()["data_bytes"]
    assert "once an epoch" in epochs.cache_plan()["policy"]
    assert large.pid is None


# Events and errors


def test_a_change_of_the_plan_reaches_batches_that_were_made_ahead(
    index: Any, reference: dict[tuple[int, int], bytes]
) -> None:
    def run(wait: float) -> dict[tuple[int, int], bytes]:
        out = {}
        with TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=SETTINGS, stop=8) as loader:
            for batch in loader:
                out |= rows_of([batch])
                batch.release()
                if batch.step == 2:
                    time.sleep(wait)  # so that the loader is ahead, or is not
                    loader.append([{"step": 4, "kind": "weights", "weights": {"control": 0.1, "pictures": 0.9}}])
        return out

    late, early = run(0.5), run(0.0)
    assert late == early != reference
    plan = make_plan(index)
    plan.log.append({"step": 4, "kind": "weights", "weights": {"control": 0.1, "pictures": 0.9}})
    known = {}
    with TrajectoryLoader(plan, ONE, digest_batch, NEEDS, settings=SETTINGS, stop=8) as loader:
        for batch in loader:
            known |= rows_of([batch])
            batch.release()
    assert late == known


def joined(entries: Any) -> Joined:
    """Every dataset that joins is a control dataset."""
    return Joined(needs=[NEEDS[0]] * len(entries), tasks=[np.array([0, -1])] * len(entries), make_batch=digest_batch)


def open_more(event: Any) -> PlanEntry:
    index = EpisodeIndex.open(event["dataset"])
    return PlanEntry(index=index, lengths=lengths(index, 6), weight=event["weight"], name=event["entry"], tasks=[0])


def test_a_dataset_joins_a_running_loader(index: Any, tmp_path: Path) -> None:
    """The steps before it stay; those from its step on equal the ones of a loader that knew of it from the start."""
    more = dataset(str(tmp_path / "more"), 20, seed=9)
    event = {"step": 4, "kind": "dataset", "entry": "more", "dataset": more.url, "digest": more.fingerprint}
    event |= {"like": "control", "weight": 1.0}

    def run(early: bool, late: bool) -> dict[tuple[int, int], Any]:
        plan, out = make_plan(index, open_entry=open_more), {}
        if early:
            plan.log.append(event)
        settings = {"settings": SETTINGS, "tasks": [np.arange(2)] * 2, "join": joined, "stop": 8}
        with TrajectoryLoader(plan, ONE, digest_batch, NEEDS, **settings) as loader:
            for batch in loader:
                out |= rows_of([batch])
                batch.release()
                if late and batch.step == 2:
                    loader.append([event])
        return out

    known, told, without = run(True, False), run(False, True), run(False, False)
    assert known == told
    assert {key for key in told if told[key] != without[key]} <= {key for key in told if key[0] >= 4}
    assert known != without


def fails_at_step_2(step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
    if step == 2:
        raise KeyError("no such thing")
    return digest_batch(step, rows, windows)


def test_an_error_in_the_loader_process_is_raised_at_its_step_with_its_traceback(index: Any) -> None:
    with TrajectoryLoader(make_plan(index), ONE, fails_at_step_2, NEEDS, settings=SETTINGS) as loader:
        assert [next(loader).step, next(loader).step] == [0, 1]
        with pytest.raises(KeyError, match="no such thing") as caught:
            next(loader)
    assert "fails_at_step_2" in "".join(caught.value.__notes__)


def objects(step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
    return {"x": np.array([object()])}


def test_arrays_that_are_not_plain_memory_are_refused(index: Any) -> None:
    with (
        TrajectoryLoader(make_plan(index), ONE, objects, NEEDS, settings=SETTINGS) as loader,
        pytest.raises(TypeError, match="'x' has dtype object"),
    ):
        next(loader)


def test_an_event_cannot_add_a_dataset_to_a_loader_that_cannot_join_it(index: Any) -> None:
    loader = TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=SETTINGS)
    event = {"step": 3, "kind": "dataset", "entry": "more", "dataset": index.url, "digest": "d", "like": "control"}
    with pytest.raises(ValueError, match="without `join`"):
        loader.append([{**event, "weight": 1.0}])
    assert len(loader.plan.log) == 0


# Processes


def test_the_loader_process_imports_no_torch_and_stays_small(index: Any) -> None:
    with TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=SETTINGS, stop=3) as loader:
        for batch in loader:
            batch.release()
        process = psutil.Process(loader.pid)
        assert not any("torch" in m.path for m in process.memory_maps())
        assert process.memory_info().rss < 200 << 20


@pytest.mark.parametrize("when", [pytest.param(0, marks=pytest.mark.long), 3])
def test_a_killed_loader_process_is_started_again_at_the_same_step(
    index: Any, when: int, reference: dict[tuple[int, int], bytes]
) -> None:
    out: dict[tuple[int, int], bytes] = {}
    with TrajectoryLoader(make_plan(index), ONE, digest_batch, NEEDS, settings=SETTINGS, stop=6) as loader:
        loader.start()
        for _ in range(6):
            if len(out) == 12 * when:
                os.kill(loader.pid, signal.SIGKILL)  # type: ignore[arg-type]
            batch = next(loader)
            out |= rows_of([batch])
            batch.release()
    assert out == reference


def dies(step: int, rows: np.ndarray, windows: list[list[Window]]) -> dict[str, np.ndarray]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_loader_process_that_dies_again_and_again_is_an_error(index: Any) -> None:
    with (
        TrajectoryLoader(make_plan(index), ONE, dies, NEEDS, settings=SETTINGS) as loader,
        pytest.raises(RuntimeError, match="by signal 9 4 times in a row at step 0"),
    ):
        next(loader)


TRAINER = """
    import os, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
    sys.path[:0] = {paths!r}
    from tests.dataio.test_loader import *
    loader = TrajectoryLoader(make_plan(EpisodeIndex.open({url!r})), ONE, digest_batch, NEEDS, settings=SETTINGS)
    next(loader).release()
    print(loader.pid, flush=True)
    {then}
"""


@pytest.fixture
def trainer(index: Any, tmp_path: Path) -> Iterator[Any]:
    started: list[subprocess.Popen[str]] = []

    def start(then: str) -> tuple[subprocess.Popen[str], psutil.Process]:
        paths = [str(REPOSITORY)]
        code = textwrap.dedent(TRAINER).format(paths=paths, url=index.url, then=then)
        code = code.replace(
            "from tests.dataio.test_loader import *",
            "from tests.dataio.test_loader import *; from tiphys.dataio.index import EpisodeIndex",
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        return process, psutil.Process(int(process.stdout.readline()))

    yield start
    for process in started:
        process.kill()
        process.wait()


def gone(process: psutil.Process, seconds: float = 5.0) -> bool:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return False
    return True


IDLE, BUSY = "next(loader); time.sleep(60)", "[next(loader).release() for _ in range(10**9)]"


@pytest.mark.parametrize("number,then", [(signal.SIGKILL, BUSY), (signal.SIGTERM, IDLE), (signal.SIGINT, IDLE)])
def test_the_loader_process_ends_with_the_trainer(trainer: Any, number: int, then: str) -> None:
    process, child = trainer(then)
    process.send_signal(number)
    assert process.wait(10) != 0
    assert gone(child)


def test_ctrl_c_reaches_the_whole_group_and_ends_it(trainer: Any) -> None:
    process, child = trainer(BUSY)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) != 0
    assert gone(child)


def test_a_normal_exit_without_close_leaves_no_process(trainer: Any) -> None:
    process, child = trainer("batch = next(loader)")
    assert process.wait(20) == 0
    assert gone(child)


def test_the_loader_process_ends_even_if_another_child_holds_its_connection(trainer: Any) -> None:
    process, child = trainer("os.fork() or time.sleep(5); time.sleep(60)")
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert gone(child)


def test_no_shared_memory_is_left(index: Any) -> None:
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    load(index, stop=2)
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert after <= before
