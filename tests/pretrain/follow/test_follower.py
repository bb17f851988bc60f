"""A follower has the old weights or the new ones, verified, whatever happens to what it reads and to those who write."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto", reason="needs the dev extra")

from tests.pretrain.follow.publishing import digest, fetched, policy, publish_all
from tests.servers import moto_server, s3_environment
from tiphys.dataio.storage import Store
from tiphys.pretrain.follow import follower as following
from tiphys.pretrain.follow import writer
from tiphys.pretrain.follow.chain import Pointer, parse_pointer
from tiphys.pretrain.follow.follower import Follower, FollowError
from tiphys.pretrain.publish import How, publish, say_final

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with moto_server() as endpoint, s3_environment(endpoint):
        yield


@pytest.fixture(params=["file", "s3", "memory"])
def to(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    places = {"file": str(tmp_path / "to"), "s3": f"s3://bucket/{next(NUMBERS)}", "memory": f"memory://{tmp_path.name}"}
    return places[request.param]


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    return [policy(tmp_path, step) for step in (1, 2, 3, 4)]


def kinds(to: str) -> list[str]:
    """The kinds of the steps that are there, by sequence."""
    store = Store(to)
    found = [json.loads(store.read(path)) for path in store.list("steps") if path.endswith("manifest.json")]
    return [one["kind"] for one in sorted(found, key=lambda one: one["sequence"])]


def test_a_follower_takes_each_step_and_reads_only_what_changed(to: str, steps: list[Path]) -> None:
    publish(steps[0], to, how=How())
    follower = Follower(to)
    assert digest(follower.fetch()) == digest(steps[0])
    for before, step in itertools.pairwise(steps):
        publish(step, to, how=How(before))
        traffic = follower._place._store.traffic  # type: ignore[attr-defined]
        start = traffic.bytes
        new = follower.poll()
        assert new is not None
        assert new.digest == follower.digest == digest(step)
        assert traffic.bytes - start < 0.6 * new.bytes
        start = traffic.bytes
        assert follower.poll() is None
        assert traffic.bytes - start <= 1024
        assert fetched(to) == (new.step, new.digest)
    assert kinds(to)[:2] == ["keyframe", "delta"]
    follower.close()


def test_keyframes_come_when_the_chain_is_long_or_heavy(tmp_path: Path) -> None:
    same = [policy(tmp_path / str(i), i, seed=0, noise=0) for i in range(1, 14)]
    to = str(tmp_path / "light")
    publish_all(same, to)
    assert kinds(to) == ["keyframe", *["delta"] * 9, "keyframe", "delta", "delta"]
    heavy = [policy(tmp_path, i, noise=10.0) for i in range(1, 5)]
    to = str(tmp_path / "heavy")
    publish_all(heavy, to)
    assert kinds(to) == ["keyframe", "delta", "keyframe", "delta"] or kinds(to) == ["keyframe"] * 4
    assert fetched(to)[0] == 4


def test_a_follower_that_slept_takes_the_deltas_of_all_steps(to: str, steps: list[Path]) -> None:
    publish_all(steps[:2], to)
    follower = Follower(to)
    follower.fetch()
    publish(steps[2], to, how=How(steps[1]))
    publish(steps[3], to, how=How(steps[2]))
    new = follower.poll()
    assert new is not None
    assert new.digest == digest(steps[3])
    follower.close()


def test_after_a_rollback_the_sequence_rises_and_the_step_falls(to: str, tmp_path: Path, steps: list[Path]) -> None:
    publish_all(steps[:3], to)
    with Follower(to) as follower:
        follower.fetch()
        again = policy(tmp_path, 2, seed=99)
        publish(again, to, how=How(steps[2]))
        assert follower.poll() is not None
        assert (follower.step, follower.sequence, follower.digest) == (2, 4, digest(again))


def files_of(to: str) -> dict[str, bytes]:
    store = Store(to)
    return {path: store.read(path) for path in store.list()}


@pytest.mark.parametrize("fault", ["missing", "flipped", "cut", "wrong base"])
def test_a_bad_delta_is_replaced_by_the_keyframe(
    fault: str, to: str, tmp_path: Path, steps: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(steps[0], to, how=How())
    follower = Follower(to)
    follower.fetch()
    monkeypatch.setattr(writer, "HEAVIEST_CHAIN", 0.0)  # a keyframe that has a delta too
    publish(steps[1], to, how=How(steps[0]))
    store = Store(to)
    (path,) = [path for path in store.list() if path.endswith(".delta")]
    data = store.read(path)
    if fault == "missing":
        store.delete(path)
    elif fault == "flipped":
        store.write(path, data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif fault == "cut":
        store.write(path, data[:-1])
    else:  # the file is as its manifest says, but the follower's weights only claim to be the base
        follower._weights = following.Weights.load(policy(tmp_path, 7))
        follower._weights.__dict__["digest"] = digest(steps[0])
    new = follower.poll()
    assert new is not None
    assert new.digest == digest(steps[1])
    follower.close()


def test_weights_that_cannot_be_verified_are_never_given(to: str, steps: list[Path]) -> None:
    publish_all(steps[:2], to)
    follower = Follower(to)
    follower.fetch()
    publish(steps[2], to, how=How(steps[1]))
    store = Store(to)
    whole = files_of(to)
    for path in whole:
        if path.endswith((".delta", ".safetensors")):
            store.write(path, whole[path][:-9] + bytes([whole[path][-9] ^ 1]) + whole[path][-8:])
    for _ in range(2):
        with pytest.raises(FollowError, match="cannot be verified"):
            follower.poll()
        assert follower.digest == digest(steps[1])
    for path, data in whole.items():
        store.write(path, data)
    new = follower.poll()
    assert new is not None
    assert new.digest == digest(steps[2])
    follower.close()


def test_documents_that_are_damaged_or_newer_are_named(to: str, steps: list[Path]) -> None:
    publish(steps[0], to)
    store = Store(to)
    pointer = json.loads(store.read("latest.json"))
    for change, reason in (
        ({"version": 2}, "update Tiphys"),
        ({"manifest": "../x/manifest.json"}, "no file of a published policy"),
        ({"manifest": "steps/../../manifest.json"}, "no file of a published policy"),
        ({"sha256": "0" * 64}, "manifest does not have the SHA-256"),
        ({"step": "7"}, "step is '7'"),
        ({"more": 1}, "'more' is no key"),
    ):
        store.write("latest.json", json.dumps(pointer | change).encode())
        with pytest.raises(ValueError, match=reason):
            Follower(to).poll()
    store.write("latest.json", b"{")
    with pytest.raises(ValueError, match=r"latest.json: is not valid JSON"):
        Follower(to).poll()


def test_another_model_is_not_taken_over(to: str, tmp_path: Path, steps: list[Path]) -> None:
    publish(steps[0], to, how=How())
    with Follower(to) as follower:
        follower.fetch()
        publish(policy(tmp_path, 9, hidden=4), to, how=How(steps[0]))
        with pytest.raises(FollowError, match="load it anew"):
            follower.poll()
        assert follower.step == 1


def test_nothing_there_is_a_sentence(to: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing that can be followed .* latest.json"):
        Follower(to).fetch()


# -- writers ----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


def crashing(monkeypatch: pytest.MonkeyPatch, at: int, after: bool) -> Callable[[], int]:
    """Make the writer crash before or after its n-th write or removal. Gives a function that counts them."""
    count = 0

    def wrap(name: str) -> None:
        real = getattr(Store, name)

        def maybe(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at and not after:
                raise Crash
            done = real(*arguments, **options)
            if count == at:
                raise Crash
            return done

        monkeypatch.setattr(Store, name, maybe)

    for name in ("write", "upload", "replace", "delete"):
        wrap(name)
    return lambda: count


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_object_leaves_the_old_or_the_new(
    after: bool, to: str, tmp_path: Path, steps: list[Path]
) -> None:
    publish_all(steps[:2], to, grace=0.0, score=1.0)
    old, new = (2, digest(steps[1])), (3, digest(steps[2]))
    for at in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "HEAVIEST_CHAIN", 0.0)  # keyframes, so that old ones are removed
            counted = crashing(patch, at, after)
            with contextlib.suppress(Crash):
                publish(steps[2], to, how=How(steps[1], grace=0.0, score=2.0))
            total = counted()
        found = fetched(to)
        assert found in (old, new)
        with Follower(to) as follower:  # and a later publication is not hindered
            follower.fetch()
            back = publish(steps[1], to, how=How(grace=0.0, score=3.0 + at))
            assert follower.poll() is not None
            assert fetched(to) == old, back
        if total < at:
            return
    raise AssertionError


def test_the_best_policy_can_be_followed(to: str, steps: list[Path]) -> None:
    publish(steps[0], to, how=How(score=1.0))
    with Follower(to, best=True) as follower:
        assert digest(follower.fetch()) == digest(steps[0])
        publish(steps[1], to, how=How(steps[0], score=0.5))
        assert follower.poll() is None
        publish(steps[2], to, how=How(steps[1], score=2.0))
        new = follower.poll()
        assert new is not None
        assert (new.step, new.digest) == (3, digest(steps[2]))
    assert fetched(to) == (3, digest(steps[2]))


def test_two_writers_at_once_are_refused(to: str, steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(steps[0], to)
    real, others = Store.write, []

    def write(self: Store, path: str, data: bytes) -> None:
        real(self, path, data)
        if path.endswith("manifest.json") and not others:
            others.append(1)
            publish(steps[1], to)  # another one is faster

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(FollowError, match="somebody else published there"):
        publish(steps[2], to)
    assert fetched(to) == (2, digest(steps[1]))
    assert len({path.split("/")[1] for path in Store(to).list("steps")}) == 2  # the refused one left nothing


def test_a_place_belongs_to_one_run(to: str, steps: list[Path]) -> None:
    """Two runs that publish in turn would give followers the weights of one and the other."""
    publish(steps[0], to, how=How(run="a1", name="arm", score=9.0))
    for other in (How(run="b2"), How(final=True)):  # another run, and somebody by hand
        with pytest.raises(FollowError, match=r"the run 'arm' \(a1\) publishes there, last its step 1; .*take_over"):
            publish(steps[1], to, how=other)
    say_final(to, "b2")
    assert not pointer_of(to).final
    assert fetched(to) == (1, digest(steps[0]))
    publish(steps[1], to, how=How(steps[0], run="a1", name="arm"))  # it was resumed
    publish(steps[2], to, how=How(run="b2", name="leg", score=1.0, take_over=True))
    assert fetched(to) == (3, digest(steps[2]))
    assert parse_pointer(Store(to).read("best.json"), "best").run == "b2"  # scores of two runs are not compared
    with pytest.raises(FollowError, match="'leg'"):
        publish(steps[3], to, how=How(run="a1", name="arm"))
    say_final(to, "b2")
    assert pointer_of(to).final


def test_what_was_published_by_hand_belongs_to_nobody(tmp_path: Path, steps: list[Path]) -> None:
    to = str(tmp_path / "to")
    publish(steps[0], to)
    publish(steps[1], to, how=How(run="a1"))
    assert pointer_of(to).run == "a1"


def pointer_of(to: str) -> Pointer:
    return parse_pointer(Store(to).read("latest.json"), to)


def test_first_writers_at_once_are_refused_too(to: str, steps: list[Path]) -> None:
    store = Store(to)
    store.replace("latest.json", b"1", "")
    with pytest.raises(OSError, match="somebody else"):
        store.replace("latest.json", b"2", "")
    store.replace("latest.json", b"1", "")  # a try of ours whose answer was lost
    version = store.read_new("latest.json")
    assert version is not None
    store.replace("latest.json", b"3", version[1])
    with pytest.raises(OSError, match="somebody else"):
        store.replace("latest.json", b"4", version[1])
    assert store.read("latest.json") == b"3"


def test_a_reader_beside_a_writer_sees_old_or_new(to: str, steps: list[Path]) -> None:
    """The reader polls all the time. Grace is what keeps its files alive."""
    publish(steps[0], to, how=How())
    known, seen, problems = {digest(step) for step in steps}, [], []
    stop = threading.Event()

    def read() -> None:
        try:
            with Follower(to) as follower:
                seen.append(digest(follower.fetch()))
                while not stop.wait(0.005):
                    new = follower.poll()
                    if new is not None:
                        seen.append(new.digest)
        except Exception as error:
            problems.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for before, step in itertools.pairwise(steps * 3):
            publish(step, to, how=How(before))
    finally:
        stop.set()
        reader.join()
    assert not problems
    assert set(seen) <= known
    assert seen


# -- collection -------------------------------------------------------------------------------------------------------


def test_collection_keeps_what_pointers_need_and_what_is_young(to: str, steps: list[Path]) -> None:
    publish(steps[0], to, how=How(score=9.0))
    publish_all(steps[1:], to, score=1.0)
    store = Store(to)
    before = store.list()
    assert writer.collect(store, 3600) == []
    assert store.list() == before
    removed = writer.collect(store, 0.0)
    left = {path.rsplit("/", 1)[0] for path in store.list("steps")}
    assert not left & set(removed)
    best = parse_pointer(store.read("best.json"), "best.json")
    assert best.step == 1
    assert store.exists(best.manifest)
    assert fetched(to) == (4, digest(steps[3]))


def test_a_slow_reader_is_not_overtaken_by_collection(
    to: str, steps: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a follower downloads a step that was the newest for hours, a newer one is published, and old ones are collected."""
    publish(steps[0], to, how=How())
    times = Store.times

    def hours_ago(self: Store, prefix: str = "") -> dict[str, float]:
        found = times(self, prefix)
        return {path: time - (7200 if path.startswith("steps/00000001-") else 0) for path, time in found.items()}

    monkeypatch.setattr(Store, "times", hours_ago)
    follower = Follower(to)
    real, once = follower._place.download, []

    def slow(file: Any, path: Path) -> None:
        if file.path.endswith(".safetensors") and not once:
            once.append(publish(steps[1], to, how=How(grace=3600.0)))
        real(file, path)

    monkeypatch.setattr(follower._place, "download", slow)
    follower.poll()
    assert follower.digest == digest(steps[0])
    follower.poll()
    assert follower.digest == digest(steps[1])
    follower.close()


def test_a_reader_whose_step_was_removed_takes_the_newest(
    to: str, steps: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(steps[0], to, how=How())
    follower = Follower(to)
    real, once = follower._place.download, []

    def slow(file: Any, path: Path) -> None:
        if not once:
            once.append(publish(steps[1], to, how=How()))
            writer.collect(Store(to), -1.0)
        real(file, path)

    monkeypatch.setattr(follower._place, "download", slow)
    follower.poll()
    assert follower.digest == digest(steps[1])
    follower.close()


def test_a_policy_of_the_older_form_is_replaced(tmp_path: Path, steps: list[Path]) -> None:
    to = tmp_path / "to"
    shutil.copytree(steps[0], to)
    publish(steps[1], str(to))
    assert {p.name for p in to.iterdir()} == {"steps", "latest.json"}
    assert fetched(str(to)) == (2, digest(steps[1]))


def test_a_rate_is_kept(tmp_path: Path, steps: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from tiphys.dataio.stores import files

    slept: list[float] = []
    monkeypatch.setattr(files.time, "sleep", slept.append)
    publish(steps[0], str(tmp_path / "to"), how=How(rate=1000))
    size = sum(p.stat().st_size for p in steps[0].iterdir())
    assert sum(slept) == pytest.approx(size / 1000, rel=0.2)


def test_followers_need_neither_deepspeed_nor_the_trainer() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "import tiphys.pretrain.follow.following\n"
        "assert not {'tiphys.pretrain.trainer', 'tiphys.pretrain.engine'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
