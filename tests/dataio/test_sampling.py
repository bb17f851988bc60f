"""The sampling plan: a pure function whose draws have the stated distribution."""

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from tests.dataio.plan.plans import columns, entry, mixture, plan
from tiphys.dataio.episode import DataError
from tiphys.dataio.plan.buckets import choose_buckets
from tiphys.dataio.plan.entries import OWN
from tiphys.dataio.plan.log import PlanLog
from tiphys.dataio.plan.preferences import preference
from tiphys.dataio.sampling import SamplingPlan

WORST = 1e-4  # least p-value of a chi-square test at a fixed seed


def equal(a, b):
    return all((x == y).all() and len(x) == len(y) for x, y in zip(a, b))


@pytest.mark.parametrize("replacement", [True, False])
def test_a_row_is_the_same_alone_and_with_all_others(replacement):
    whole = plan(replacement=replacement).many(range(40), [np.arange(32)] * 40)
    fresh = plan(replacement=replacement)
    for step, row in [(39, 5), (0, 31), (17, 0), (3, 3), (39, 6)]:
        alone = fresh.windows(step, [row])
        there = whole[step].row == row
        assert equal(alone, [c[there] for c in whole[step]])
    assert all(equal(fresh.windows(s), whole[s]) for s in (38, 2))


@pytest.mark.parametrize("replacement", [True, False])
def test_windows_fit_their_episodes_and_rows_fit_their_budget(replacement):
    entries = mixture()
    all_ = columns(plan(entries, replacement=replacement), range(60))
    units = np.where(all_["entry"] == 0, *(e.lengths.units[all_["episode"] % e.index.episodes] for e in entries))
    assert (all_["units"] > 0).all()
    assert (all_["start"] >= 0).all()
    assert (all_["start"] + all_["units"] <= units).all()
    tokens = np.bincount(all_["step"] * 32 + all_["row"], all_["tokens"], 60 * 32)
    assert tokens.max() <= 1024
    assert tokens.min() > 0
    assert tokens.mean() > 0.9 * 1024
    order = (all_["step"] * 32 + all_["row"]) << 16 | all_["slot"]
    assert (np.diff(order) > 0).all()
    assert ((all_["slot"] == 0) == all_["prompt"]).all()
    for i, e in enumerate(entries):
        mine = all_["entry"] == i
        assert (e.index.task[all_["episode"][mine]] == all_["task"][mine]).all()
        each = np.array([c.elements[0][0] for c in e.lengths.costs])
        cost = all_["units"][mine] * each[all_["task"][mine]]
        fixed = np.where(all_["prompt"][mine], 0, e.lengths.fixed[all_["episode"][mine]])
        assert (all_["tokens"][mine] == cost + fixed).all()


def test_all_windows_of_a_row_come_from_its_bucket():
    entries = mixture()
    p = plan(entries, buckets=16)
    for step in range(10):
        position, bucket = p.row_buckets(step)
        assert (np.diff(position) > 0).all()
        assert 0 <= position[0] < position[-1] < 1
        w = p.windows(step)
        hashes = np.array([entries[e].index.hash[i] for e, i in zip(w.entry, w.episode)])
        assert (hashes % np.uint64(16) == bucket[w.row]).all()


@pytest.mark.parametrize("unit", ["windows", "tokens"])
def test_delivered_shares_of_entries_equal_their_weights(unit):
    all_ = columns(plan(mixture(), weight_unit=unit), range(1500))
    drawn = ~all_["prompt"]
    for i, share in enumerate((0.6, 0.4)):
        amount = drawn.astype(float) if unit == "windows" else all_["tokens"] * drawn
        got = amount[all_["entry"] == i].sum() / amount.sum()
        assert got == pytest.approx(share, rel=0.01), (unit, i)


@pytest.mark.parametrize("buckets", [1, 32])
def test_every_full_window_is_equally_likely(buckets):
    """With `starts: windows`. Rows, buckets and prompts make no difference."""
    entries = mixture(fixed=0)
    all_ = columns(plan(entries, buckets=buckets, starts="windows"), range(1200))
    for i, e in enumerate(entries):
        windows = np.maximum(e.lengths.units - e.lengths.window[e.index.task] + 1, 1)
        mine = (all_["entry"] == i) & ~all_["prompt"]
        drawn = np.bincount(all_["episode"][mine], minlength=e.index.episodes)
        # Episodes with few expected draws are pooled with their neighbours.
        group = np.unique((np.cumsum(windows) / windows.sum() * (mine.sum() / 25)).astype(int), return_inverse=True)[1]
        seen, expected = np.bincount(group, drawn), np.bincount(group, windows)
        assert chisquare(seen, expected / expected.sum() * seen.sum()).pvalue > WORST
        long = mine & (windows[np.minimum(all_["episode"], e.index.episodes - 1)] > 20)
        place = (all_["start"][long] + 0.5) / windows[all_["episode"][long]]
        assert chisquare(np.bincount((place * 10).astype(int), minlength=10)).pvalue > WORST


# -- prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [True, False])
def test_prompts(replacement):
    entries = [entry("a", 3000, 3, 1.0, prompt=0.25, fixed=12)]
    p = plan(entries, buckets=8, replacement=replacement)
    all_ = columns(p, range(300))
    prompts = all_["prompt"]
    n = 300 * 32
    assert abs(prompts.sum() / n - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    where = np.flatnonzero(prompts)
    after = where + 1  # the row's first window
    assert (all_["row"][where] == all_["row"][after]).all()
    assert (all_["slot"][after] == 1).all()
    assert (all_["task"][where] == all_["task"][after]).all()
    assert (all_["episode"][where] != all_["episode"][after]).all()
    last = entries[0].lengths.units[all_["episode"]] - all_["units"]
    long = where[last[where] > 20]
    ends = (all_["start"] == last)[long].mean()
    assert 0.5 < ends < 0.56  # half of them on purpose, and a few of the others by chance
    uniform = long[all_["start"][long] != last[long]]
    assert chisquare(np.bincount((all_["start"][uniform] * 8 // last[uniform]).astype(int), minlength=8)).pvalue > WORST


def test_a_prompt_of_a_task_with_one_episode_is_another_part_of_it():
    lonely = entry("a", 1, 1, window=5, per_unit=(10,), prompt=1.0, steps=300)
    p = plan([lonely], budget=100)
    drawn = columns(p, range(20))
    at = np.flatnonzero(drawn["prompt"])
    assert len(at) == 20 * 32
    start, end = drawn["start"], drawn["start"] + drawn["units"]
    assert ((end[at] <= start[at + 1]) | (start[at] >= end[at + 1])).all()
    assert p.describe()["same_episode_prompts"] == {"cells": 1, "share": 1.0}


def test_a_window_that_shows_the_only_episode_completely_has_no_prompt():
    lonely = entry("a", 1, 1, window=50, per_unit=(2,), prompt=1.0, length=[3])
    drawn = columns(plan([lonely], budget=100), range(5))
    whole = (drawn["slot"] > 0) & (drawn["units"] == 3)
    assert whole.any()
    rows = drawn["step"] * 32 + drawn["row"]
    firsts = np.unique(rows[~drawn["prompt"]], return_index=True)[1]
    whole_first = rows[~drawn["prompt"]][firsts[drawn["units"][~drawn["prompt"]][firsts] == 3]]
    assert not np.isin(whole_first, rows[drawn["prompt"]]).any()


def test_prompts_never_show_the_window_before_or_after_a_redraw():
    """Few episodes, many tasks, and quarantine."""
    few = entry("a", 200, 100, per_unit=(10,), prompt=0.5, steps=15)
    log = PlanLog(events=[{"step": 0, "kind": "quarantine", "entry": "a", "episode": e} for e in range(0, 200, 5)])
    for p in (plan([few]), plan([few], log=log)):
        drawn = columns(p, range(200))
        at = np.flatnonzero(drawn["prompt"])
        assert len(at) > 1000
        assert (drawn["row"][at] == drawn["row"][at + 1]).all()
        assert (drawn["task"][at] == drawn["task"][at + 1]).all()
        same = drawn["episode"][at] == drawn["episode"][at + 1]
        start, end = drawn["start"], drawn["start"] + drawn["units"]
        apart = (end[at] <= start[at + 1]) | (start[at] >= end[at + 1])
        assert (apart | ~same).all()


def with_own_prompts(few, every, ends=0.5):
    """The entry, whose windows have a prompt each, with room for it in their fixed tokens."""
    tasks = len(few.tasks)
    room = few.lengths.prompt_units.max() * max(c.elements[0][0] for c in few.lengths.costs)
    shares = {"every": np.full(tasks, every, np.float32), "ends": np.full(tasks, ends, np.float32)}
    return replace(few, lengths=replace(few.lengths, fixed=few.lengths.fixed + room, **shares))


@pytest.mark.parametrize("replacement", [True, False])
def test_every_window_has_its_own_prompt_before_and_after_redraws(replacement):
    few = with_own_prompts(
        entry("a", 200, 20, window=10, per_unit=(10,), prompt_units=3, fixed=4, steps=15), 1.0, ends=0.0
    )
    log = PlanLog(events=[{"step": 0, "kind": "quarantine", "entry": "a", "episode": e} for e in range(0, 200, 5)])
    attempts = {(3, 1): 2, (4, OWN + 1): 1}
    for p, again in (
        (plan([few], replacement=replacement), {}),
        (plan([few], log=log, replacement=replacement), attempts),
    ):
        for step in range(20):
            drawn = p.windows(step, attempts=again)
            prompts = np.flatnonzero(drawn.prompt)
            windows = np.flatnonzero(~drawn.prompt)
            own = drawn.slot[prompts] - OWN
            assert (drawn.slot[prompts + 1] == own).all()
            for name in ("row", "task", "entry"):
                assert (getattr(drawn, name)[prompts] == getattr(drawn, name)[prompts + 1]).all()
            alone = np.setdiff1d(windows, prompts + 1)
            assert len(alone) < 0.1 * len(windows)  # those whose task has no other readable episode
            same = drawn.episode[prompts] == drawn.episode[prompts + 1]
            start, end = drawn.start, drawn.start + drawn.units
            apart = (end[prompts] <= start[prompts + 1]) | (start[prompts] >= end[prompts + 1])
            assert (apart | ~same).all()
            assert (drawn.units[prompts] <= 3).all()
            assert np.bincount(drawn.row[windows], drawn.tokens[windows]).max() <= p.budget
            assert (drawn.tokens[prompts] <= 30).all()
            if again:
                assert not np.isin(drawn.episode, np.arange(0, 200, 5)).any()


def test_own_prompts_change_no_window_and_are_drawn_by_their_share():
    plain = entry("a", 3000, 3, window=10, per_unit=(10,), prompt_units=3)
    some = with_own_prompts(plain, 0.25)
    none = replace(some, lengths=replace(some.lengths, every=None, ends=None))
    p, without = plan([some], buckets=1), plan([none], buckets=1)
    share, ends = [], []
    for step in range(40):
        drawn, bare = p.windows(step), without.windows(step)
        windows = ~drawn.prompt
        for name in ("row", "slot", "episode", "start", "units", "tokens"):
            assert np.array_equal(getattr(drawn, name)[windows], getattr(bare, name))
        share.append(drawn.prompt.sum() / windows.sum())
        last = some.lengths.units[drawn.episode] - drawn.units
        ends += (drawn.start == last)[drawn.prompt & (last > 20)].tolist()
    assert 0.22 < np.mean(share) < 0.28
    assert 0.45 < np.mean(ends) < 0.6
    assert p.windows(3, [5]).slot.tolist() == p.windows(3).slot[p.windows(3).row == 5].tolist()


# -- changes -------------------------------------------------------------------------------------------------------------


def test_weights_change_at_their_step():
    p, before = plan(), plan()
    p.log.append({"step": 50, "kind": "weights", "weights": {"a": 1, "b": 9}})
    assert all(equal(p.windows(s), before.windows(s)) for s in (0, 49))
    drawn = columns(p, range(50, 250))
    share = (drawn["entry"][~drawn["prompt"]] == 1).mean()
    assert abs(share - 0.9) < 4 * np.sqrt(0.09 / len(drawn["row"]))
    assert equal(plan(log=PlanLog(events=p.log.events)).windows(60), p.windows(60))
    with pytest.raises(DataError, match="nobody"):
        plan(log=PlanLog(events=[{"step": 1, "kind": "weights", "weights": {"nobody": 1}}])).windows(2)


def test_skipped_steps_are_never_drawn():
    p, before = plan(), plan()
    p.log.append({"step": 10, "kind": "skip", "steps": 5})
    assert equal(p.windows(9), before.windows(9))
    assert equal(p.windows(10), before.windows(15))
    p.log.append({"step": 12, "kind": "skip", "steps": 1})
    assert equal(p.windows(12), before.windows(18))


def test_priorities_by_rule_and_by_file(tmp_path):
    entries = [entry("a", 2000, 3)]
    index = entries[0].index
    p = plan(entries, seed=1)
    p.log.append({"step": 1, "kind": "priority", "entry": "a", "prefer": "top", "top": 0.1})
    best = preference(index, "top", 0.1)
    assert best.sum() == sum(round(0.1 * (index.task == t).sum()) for t in range(3))
    for t in range(3):
        chosen = index.total_return[(index.task == t) & (best == 1)]
        assert chosen.min() > index.total_return[(index.task == t) & (best == 0)].max()
    assert (best[p.windows(1).episode] == 1).all()
    assert not (best[p.windows(0).episode] == 1).all()

    some = np.random.default_rng(0).integers(0, 4, 2000).astype(np.float32)
    np.save(tmp_path / "p.npy", some)
    event = {"step": 2, "kind": "priority", "entry": "a", "file": str(tmp_path / "p.npy")}
    p.log.append(event | {"digest": hashlib.sha256((tmp_path / "p.npy").read_bytes()).hexdigest()})
    drawn = columns(p, range(2, 400))
    windows = ((entries[0].lengths.units - 1) / 20 + 1) * some
    assert (some[drawn["episode"]] > 0).all()
    seen, expected = (
        np.bincount(some[drawn["episode"]].astype(int), minlength=4)[1:],
        np.bincount(some.astype(int), windows)[1:],
    )
    assert chisquare(seen, expected / expected.sum() * seen.sum()).pvalue > WORST
    with pytest.raises(DataError, match="SHA-256"):
        plan(entries, log=PlanLog(events=[event | {"digest": "0"}])).windows(2)


def assert_like_percent_bc(index, best, share):
    """The rule of %BC, episode by episode: from the best return down, as long as the steps are within the share."""
    for t in np.unique(index.task):
        mine = np.flatnonzero(index.task == t)
        left, chosen = share * index.steps[mine].sum(), set()
        for e in sorted(mine.tolist(), key=lambda e: -index.total_return[e]):
            if chosen and index.steps[e] > left:
                break
            left -= index.steps[e]
            chosen.add(e)
        assert set(mine[best[mine] == 1].tolist()) == chosen


def test_preferences_by_return_and_by_success():
    index = entry("a", 500, 2).index
    for share in (0.001, 0.3, 1.0):
        best = preference(index, "top", share, "steps")
        assert_like_percent_bc(index, best, share)
    rank = preference(index, "return")
    for t in range(2):
        mine = index.task == t
        assert (np.argsort(rank[mine], kind="stable") == np.argsort(index.total_return[mine], kind="stable")).all()
        assert rank[mine].max() == 1.0
        assert rank[mine].min() > 0
    assert (preference(index, "success") == (index.success == 1)).all()
    assert preference(index, "uniform") is None
    with pytest.raises(DataError, match="none of"):
        preference(index, "best")


@pytest.mark.parametrize("replacement", [True, False])
def test_quarantine_gives_the_same_windows_as_a_failed_attempt(replacement):
    p, before = plan(replacement=replacement), plan(replacement=replacement)
    w = before.windows(30)
    i = len(w.row) // 2
    bad = {"entry": "ab"[w.entry[i]], "episode": int(w.episode[i])}
    found = before.windows(30, attempts={(int(w.row[i]), int(w.slot[i])): 1})
    p.log.append({"step": 30, "kind": "quarantine", "id": "x", "reason": "CRC", **bad})
    logged = p.windows(30)
    assert equal(p.windows(29), before.windows(29))
    others = np.arange(len(w.row)) != i
    hit = (w.entry == w.entry[i]) & (w.episode == w.episode[i])
    for got in (found, logged):
        assert equal([c[~hit] for c in got], [c[~hit] for c in w])
        assert got.episode[i] != w.episode[i]
        assert (got.task[i], got.entry[i]) == (w.task[i], w.entry[i])
        assert got.tokens[i] <= w.tokens[i]
        assert got.attempt[i] >= 1
    assert [int(c[i]) for c in found] == [int(c[i]) for c in logged]
    assert others.sum() + 1 == len(logged.row)
    drawn = columns(p, range(30, 200))
    assert not ((drawn["entry"] == w.entry[i]) & (drawn["episode"] == w.episode[i])).any()


def test_each_further_attempt_gives_another_window():
    p = plan()
    w = p.windows(3)
    key = (int(w.row[4]), int(w.slot[4]))
    seen, attempt = {(int(w.episode[4]), int(w.start[4]))}, 0
    for _ in range(5):
        again = p.windows(3, [key[0]], attempts={key: attempt + 1})
        i = int(np.flatnonzero(again.slot == key[1])[0])
        assert again.attempt[i] > attempt
        attempt = int(again.attempt[i])
        seen.add((int(again.episode[i]), int(again.start[i])))
    assert len(seen) == 6


def test_quarantine_of_all_episodes_of_an_entry_is_an_error():
    p = plan([entry("a", 3, 1)])
    for episode in range(3):
        p.log.append({"step": 0, "kind": "quarantine", "entry": "a", "episode": episode})
    with pytest.raises(DataError, match="'a' has no episode left"):
        p.windows(0)


def test_if_all_episodes_of_a_cell_are_quarantined_other_tasks_replace_it():
    """One of three tasks has two episodes, and both are quarantined. Every row has a prompt."""
    random = np.random.default_rng(0)
    e = entry("a", 2000, 3, per_unit=(10,), prompt=1.0)
    task = random.integers(0, 2, 2000)
    task[:2], task[2] = 2, 1
    e.index.task[:] = task
    p, before = plan([e], buckets=1), plan([e], buckets=1)
    p.log.append({"step": 0, "kind": "quarantine", "entry": "a", "episode": 0})
    p.log.append({"step": 0, "kind": "quarantine", "entry": "a", "episode": 1})
    drawn, whole = columns(p, range(2000)), columns(before, range(2000))
    assert (whole["task"] == 2).any()
    assert not (drawn["task"] == 2).any()
    assert len(drawn["row"]) > 0.99 * len(whole["row"])


def test_a_dataset_joins():
    new = entry("c", 300, 1, seed=7)
    event = {"step": 5, "kind": "dataset", "entry": "c", "dataset": "runs/generated", "like": "a", "weight": 1.0}
    event["digest"] = new.index.fingerprint
    p = plan(open_entry=lambda event: new)
    p.log.append(event)
    assert [e.name for e in p.entries] == ["a", "b", "c"]
    assert set(p.windows(4).entry) <= {0, 1}
    drawn = columns(p, range(5, 200))
    share = (drawn["entry"][~drawn["prompt"]] == 2).mean()
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / len(drawn["row"]))
    assert equal(pickle.loads(pickle.dumps(p)).windows(30), p.windows(30))
    with pytest.raises(DataError, match=r"generated.*open_entry"):
        plan(log=PlanLog(events=p.log.events)).windows(0)
    for wrong, message in (
        ({"digest": "other"}, "changed since"),
        ({"like": "x"}, "like entry 'x'"),
        ({"entry": "a"}, "another name"),
    ):
        with pytest.raises(DataError, match=message):
            plan(open_entry=lambda event: new, log=PlanLog(events=[event | wrong])).windows(0)


# -- held out, state, errors ---------------------------------------------------------------------------------------------


def test_held_out_episodes_are_drawn_only_for_validation():
    entries = mixture()
    train, held = plan(entries, validation=0.1), plan(entries, validation=0.1, held_out=True)
    for p, expected in ((train, False), (held, True)):
        drawn = columns(p, range(50))
        for i, e in enumerate(entries):
            out = e.index.held_out(0.1)
            assert (out[drawn["episode"][drawn["entry"] == i]] == expected).all()


def test_resumed_and_pickled_plans_draw_the_same():
    p = plan()
    p.log.append({"step": 3, "kind": "weights", "weights": {"b": 5}})
    p.step = 7
    resumed = plan()
    resumed.load_state_dict(p.state_dict())
    assert resumed.step == 7
    copy = pickle.loads(pickle.dumps(p))
    for other in (resumed, copy):
        assert equal(other.windows(7), p.windows(7))
    assert plan(seed=4).fingerprint != p.fingerprint
    for different in (plan(seed=4), plan(buckets=4), plan(mixture(prompt=0.0))):
        with pytest.raises(ValueError, match="plan"):
            different.load_state_dict(p.state_dict())
    old = {k: v for k, v in p.state_dict().items() if k != "version"}
    with pytest.raises(ValueError, match="version 1 of the sampling plan"):
        plan().load_state_dict(old)


def test_a_memory_mapped_index_draws_the_same(tmp_path):
    built = plan(cache_dir=str(tmp_path))
    mapped = plan(cache_dir=str(tmp_path))
    assert isinstance(mapped._ready(0).index.mass, np.memmap)
    assert len(list(tmp_path.iterdir())) == 1
    assert equal(built.windows(5), plan().windows(5))
    assert equal(mapped.windows(5), plan().windows(5))


@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_the_search_of_large_indexes_equals_bisection(monkeypatch, spread):
    random = np.random.default_rng(0)
    priority = np.exp(spread * random.standard_normal(2000)).astype(
        np.float32
    )  # spread 12: a few episodes have most of the mass
    index = plan([entry("a", priority=priority)])._ready(0).index
    near = np.maximum(index.mass - 0.5, 0.0)
    points = np.concatenate([random.random(5000) * index.mass[-1], index.mass, near])
    expected = index.find(points)
    monkeypatch.setattr("tiphys.dataio.plan.index._MANY", 0)
    monkeypatch.setattr("tiphys.dataio.plan.index._LARGE", 0)
    assert (index.find(points) == expected).all()


def test_errors_name_what_cannot_be_drawn():
    with pytest.raises(DataError, match="'b'"):
        plan([entry("a"), entry("b", priority=np.zeros(2000, np.float32))])
    with pytest.raises(DataError, match="do not fit rows of 16 tokens"):
        plan([entry("a")], budget=16)
    with pytest.raises(ValueError, match="weight_unit"):
        plan(weight_unit="rows")
    with pytest.raises(ValueError, match="starts"):
        plan(starts="rows")
    with pytest.raises(DataError, match="no entries"):
        SamplingPlan([], rows=1, budget=1, seed=0)


def test_episodes_too_long_for_a_row_are_left_out_and_counted():
    e = entry("a", 500, 1, per_unit=(10,), fixed=200)
    p = plan([e], budget=100)
    drawn = columns(p, range(100))
    assert (e.lengths.fixed[drawn["episode"]] <= 90).all()
    assert p.describe()["too_long"] == {"a": int((e.lengths.fixed > 90).sum())}


def test_number_of_buckets():
    assert choose_buckets(10**6, 512) == 512
    assert choose_buckets(10**6, 500) == 256  # at most as many as rows
    assert choose_buckets(10**5, 512) == 128  # 400 episodes in a bucket
    assert choose_buckets(10**5, 512, prompted=20000) == 16  # 1,000 of a task with prompts
    assert choose_buckets(100, 512) == 1


def test_only_drawable_episodes_decide_the_number_of_buckets():
    """The smallest task decides. Episodes of priority 0, held-out episodes and entries of weight 0 do not count."""
    top = np.zeros(51200, np.float32)
    top[:512] = 1
    assert plan([entry("a", 51200, 1)]).buckets == 32
    assert plan([entry("a", 51200, 1, priority=top)]).buckets == 1
    assert plan([entry("a", 51200, 1), entry("b", 500, 1, seed=1)]).buckets == 1
    assert plan([entry("a", 51200, 1), entry("b", 500, 1, seed=1, weight=0.0)]).buckets == 32
    assert plan([entry("a", 6400, 1)], validation=0.6).buckets == 4


def test_describe_equals_what_is_delivered():
    p = plan(buckets=4)
    told, drawn = p.describe(), columns(p, range(600))
    windows = ~drawn["prompt"]
    tokens = drawn["tokens"] * windows
    assert told["buckets"] == 4
    assert told["windows_per_row"] == pytest.approx(windows.sum() / (600 * 32), rel=0.01)
    assert told["fill"] == pytest.approx(tokens.sum() / (600 * 32 * 1024), rel=0.01)
    for i, name in enumerate("ab"):
        mine = drawn["entry"] == i
        assert told["entries"][name]["windows"] == pytest.approx(mine[windows].mean(), rel=0.02)
        assert told["entries"][name]["tokens"] == pytest.approx(tokens[mine].sum() / tokens.sum(), rel=0.02)
    rows = (drawn["step"] * 32 + drawn["row"])[windows]
    key = rows * 10000 + drawn["entry"][windows] * 5000 + drawn["episode"][windows]
    counts = np.unique(key, return_counts=True)[1]
    assert told["pairs_in_row"] == pytest.approx((counts * (counts - 1) / 2).sum() / windows.sum(), abs=0.003)
    assert all(rates == pytest.approx((1.0, 1.0)) for tasks in told["step_rates"].values() for rates in tasks.values())


@pytest.mark.parametrize("replacement", [True, False])
def test_consecutive_windows_show_as_many_episodes_as_independent_draws(replacement):
    """Distinct episodes in 256 consecutive windows, divided by the number that independent draws by mass give."""
    e = entry("a", 20000, 3)
    p = plan([e], rows=64, replacement=replacement)
    assert p.buckets == 16
    drawn = columns(p, range(1500 if replacement else 450))
    episode = drawn["episode"][~drawn["prompt"]]
    if not replacement:  # a tile that is cut at the end of a row counts once
        tile = episode * 100 + drawn["start"][~drawn["prompt"]] // 20
        episode = episode[np.append(True, np.diff(tile) != 0)]
    spans = episode[: len(episode) // 256 * 256].reshape(-1, 256)
    assert len(spans) > (1000 if replacement else 250)
    distinct = np.mean([len(np.unique(s)) for s in spans])
    units, window = e.lengths.units, 20
    mass = (units - 1) / window + 1 if replacement else -(-units // window)
    expected = (1 - (1 - mass / mass.sum()) ** 256).sum()
    assert distinct / expected > 0.97
