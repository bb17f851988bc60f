"""On a hub each step is one commit, whose root is a whole policy; followers read from one commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Hub, Repository
from tests.pretrain.follow.publishing import digest, policy
from tiphys.pretrain.follow import hub as on_hub
from tiphys.pretrain.follow.follower import Follower, FollowError
from tiphys.pretrain.hub_errors import FetchError
from tiphys.pretrain.publish import How, PublishError, publish

URL = "hf://owner/small"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with Hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_owner_secret123")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield hub


def repository(hub: Hub) -> Repository:
    return hub.repositories["owner/small"]


def test_each_step_is_one_commit_with_a_whole_policy_at_the_root(hub: Hub, tmp_path: Path) -> None:
    steps = [policy(tmp_path, step) for step in (1, 2, 3)]
    publish(steps[0], URL, how=How())
    with Follower(URL) as follower:
        assert digest(follower.fetch()) == digest(steps[0])
        count = len(repository(hub).commits)
        for before, step in ((steps[0], steps[1]), (steps[1], steps[2])):
            assert publish(step, URL, how=How(before)).startswith(f"{URL}@")
            count += 1
            assert len(repository(hub).commits) == count
            files = repository(hub).files()
            for file in step.iterdir():
                assert files[file.name] == file.read_bytes()
        hub.requests.clear()
        new = follower.poll()  # two steps at once, by their deltas
        assert new is not None
        assert new.digest == digest(steps[2])
        read = [path for method, path, _ in hub.requests if method == "GET"]
        assert any(".delta" in path for path in read)
        assert not any(".safetensors" in path for path in read)
        hub.requests.clear()
        assert follower.poll() is None
        assert [method for method, _, _ in hub.requests] == ["HEAD"]


def test_old_history_is_squashed_unless_people_committed_too(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_hub, "SQUASHED", 2)
    steps = [policy(tmp_path, step) for step in (1, 2, 3, 4)]
    with_follower = Follower(URL)
    for step in steps[:2]:
        publish(step, URL, how=How())
    assert len(repository(hub).commits) == 1
    assert digest(with_follower.fetch()) == digest(steps[1])
    repository(hub).commit(repository(hub).files() | {"NOTES.txt": b"mine"}, "My notes")
    for step in steps[2:]:
        publish(step, URL, how=How())
    assert len(repository(hub).commits) == 4
    assert repository(hub).files()["NOTES.txt"] == b"mine"
    assert with_follower.poll() is not None
    with_follower.close()


def test_a_commit_meanwhile_is_refused(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(policy(tmp_path, 1), URL)
    real = on_hub.plan

    def slow(*arguments: object, **options: object) -> object:
        repository(hub).commit(repository(hub).files())
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(on_hub, "plan", slow)
    with pytest.raises(PublishError, match="A commit has happened since"):
        publish(policy(tmp_path, 2), URL)


def test_a_repository_belongs_to_one_run(hub: Hub, tmp_path: Path) -> None:
    steps = [policy(tmp_path, step) for step in (1, 2)]
    publish(steps[0], URL, how=How(run="a1", name="arm"))
    with pytest.raises(FollowError, match=r"the run 'arm' \(a1\) publishes there, last its step 1"):
        publish(steps[1], URL, how=How(run="b2"))
    publish(steps[1], URL, how=How(steps[0], run="a1"))


def test_the_best_policy_stays_whole_while_later_ones_replace_the_root(hub: Hub, tmp_path: Path) -> None:
    steps = [policy(tmp_path, step) for step in range(1, 5)]
    scores = (0.5, 0.4, 0.7, None)
    with Follower(URL, best=True) as best:
        for number, (step, score, expected) in enumerate(zip(steps, scores, (0, None, 2, None), strict=True)):
            before = steps[number - 1] if number else None
            publish(step, URL, how=How(before, score=score))
            new = best.poll()
            assert (None if new is None else new.digest) == (None if expected is None else digest(steps[expected]))
        assert best.step == 3
        assert digest(best.fetch()) == digest(steps[2])
    with Follower(URL, best=True) as late, Follower(URL) as newest:
        assert digest(late.fetch()) == digest(steps[2])
        assert digest(newest.fetch()) == digest(steps[3])
    kept = {path.rsplit("/", 1)[0] for path in repository(hub).files() if path.startswith("steps/best-")}
    assert len(kept) == 1  # the earlier best is gone


def test_a_bad_delta_is_replaced_by_the_root(hub: Hub, tmp_path: Path) -> None:
    steps = [policy(tmp_path, step) for step in (1, 2)]
    publish(steps[0], URL, how=How())
    with Follower(URL) as follower:
        follower.fetch()
        publish(steps[1], URL, how=How(steps[0]))
        files = repository(hub).files()
        (path,) = [path for path in files if path.endswith(".delta")]
        repository(hub).commit(files | {path: files[path][:-1] + b"x"})
        new = follower.poll()
        assert new is not None
        assert new.digest == digest(steps[1])
        name = "model.safetensors"
        repository(hub).commit(files | {path: b"", name: files[name][:-1] + b"x", "latest.json": files["latest.json"]})
        follower._weights, follower._pointer = None, ""
        with pytest.raises(FollowError, match="cannot be verified"):
            follower.poll()


def test_what_a_hub_answers_is_a_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(policy(tmp_path, 1), URL)
    monkeypatch.setenv("HF_TOKEN", "hf_stranger_secret123")
    with pytest.raises(FetchError, match=URL) as caught:
        Follower(URL).poll()
    assert "secret123" not in str(caught.value)
