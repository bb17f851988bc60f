"""A session is one history: what it answers depends on its own observations, its stream and its step, and on no other session."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.serving.serving_fixtures import policy, served
from tiphys.dataio.episode import DataError
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.serving.observed import Names
from tiphys.pretrain.serving.served import Served, Settings, Wish
from tiphys.pretrain.serving.sessions import Acted, Observed, Session, Sessions
from tiphys.recipes.sections.objective import FieldTokens

CHUNKS = {"action": FieldTokens(chunk=3)}
RNG = np.random.default_rng(0)
STEPS = RNG.normal(size=(6, 3, 5)).astype(np.float32)  # of three clients


def observed(session: Session, values: Any, **options: Any) -> Observed:
    message = values if isinstance(values, dict) else {"observation": values}
    return Observed(session, Names().sent(message), **options)


def table(answer: Acted | Exception) -> np.ndarray:
    assert isinstance(answer, Acted), answer
    return answer.table


def error(answer: Acted | Exception) -> str:
    assert isinstance(answer, DataError), answer
    return str(answer)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("options", [{}, {"scheme": "gato"}, {"horizon": 5, "chunk": 2, "head": "flow"}], ids=str)
def test_an_answer_does_not_depend_on_company(sample: bool, options: dict[str, Any]) -> None:
    of = served(settings=Settings(sessions=4, sample=sample), sample=sample, **options)
    together, alone = Sessions(lambda: of), Sessions(lambda: of)
    for number in range(3):
        one, many = Session(Wish(stream=number)), [Session(Wish(stream=i)) for i in range(3)]
        for step in STEPS:
            batch = together.act([observed(session, step[i]) for i, session in enumerate(many)])
            single = alone.act([observed(one, step[number])])
            np.testing.assert_allclose(table(batch[number]), table(single[0]), atol=1e-5)
        alone.end(one)
        for session in many:
            together.end(session)


def test_answers_are_those_of_the_policy() -> None:
    of, own = served(), policy()
    sessions, session = Sessions(lambda: of), Session()
    own.reset("arm")
    for step in STEPS:
        (answer,) = sessions.act([observed(session, step[0])])
        np.testing.assert_allclose(table(answer)[0], own.act(step[0]), atol=1e-5)


def test_episodes_have_streams_of_their_own() -> None:
    of = served(settings=Settings(sessions=4, sample=True), sample=True)
    sessions = Sessions(lambda: of)

    def draws(wish: Wish) -> list[float]:
        session, out = Session(wish), []
        for _ in range(8):
            out.append(float(table(sessions.act([observed(session, STEPS[0, 0])])[0])[0, 0]))
        sessions.end(session)
        return out

    assert draws(Wish()) != draws(Wish())
    assert draws(Wish(stream=7)) == draws(Wish(stream=7)) != draws(Wish(stream=8))


def camera(words: str = "go") -> dict[str, Any]:
    values = {
        f.name: fixtures.values(f, 1, np.random.default_rng(3))[0] for f in fixtures.CAMERA.with_role("observation")
    }
    return values | {"prompt": words}


def histories(session: Session) -> int:
    """Steps of the session's history."""
    assert session.histories is not None
    episode = session.histories.policy.history._episodes[session.row]
    return episode.number + len(episode.observations)


def test_a_reset_and_a_changed_prompt_begin_an_episode() -> None:
    of = served(fixtures.CAMERA)
    sessions, session = Sessions(lambda: of), Session()
    lengths = []
    for words in ("go", "go", "stop", "stop", "stop"):
        table(sessions.act([observed(session, camera(words))])[0])
        lengths.append(histories(session))
    assert lengths == [1, 2, 1, 2, 3]
    values = camera()
    del values["prompt"]  # it is still known
    table(sessions.act([observed(session, values)])[0])
    assert histories(session) == 4
    sessions.reset(session)
    assert "no instruction" in error(sessions.act([observed(session, values)])[0])
    sessions.reset(session, words="go")
    table(sessions.act([observed(session, values)])[0])
    assert histories(session) == 1


def test_another_task_begins_an_episode_of_it() -> None:
    of = served(fixtures.ARM, fixtures.CAMERA)
    sessions, session = Sessions(lambda: of), Session()
    table(sessions.act([observed(session, {"observation": STEPS[0, 0], "task": "arm"})])[0])
    table(sessions.act([observed(session, camera() | {"task": "camera"})])[0])
    assert session.histories is not None
    assert session.histories.needed.task == "camera"
    assert list(of._histories) == [("camera", "it", False, ())]  # those of the first task are free again


def test_a_refused_request_leaves_its_session_and_the_others_as_they_were() -> None:
    of = served(fixtures.GRID)
    both, sound = Sessions(lambda: of), Sessions(lambda: of)
    good = {
        "observation.image": np.zeros((7, 7, 3), np.uint8),
        "observation.direction": 1,
        "prompt": "go to the red ball",
    }
    bad = good | {"observation.direction": 9}  # of 4
    one, two, three = Session(), Session(), Session()
    for step in range(3):
        answers = both.act([observed(one, good), observed(two, bad if step == 1 else good)])
        (expected,) = sound.act([observed(three, good)])
        np.testing.assert_array_equal(table(answers[0]), table(expected))
        if step == 1:
            assert "observation.direction" in error(answers[1])
        else:
            table(answers[1])
    assert (histories(one), histories(two)) == (3, 2)


@pytest.mark.parametrize("options", [{"fields": CHUNKS}, {"horizon": 5, "chunk": 3, "head": "l1"}], ids=str)
def test_the_executed_actions_are_counted(options: dict[str, Any]) -> None:
    of = served(settings=Settings(sessions=2, execute=3), **options)
    sessions, session = Sessions(lambda: of), Session()
    answer = table(sessions.act([observed(session, STEPS[0, 0])])[0])
    horizon = options.get("horizon", 3)
    assert (answer.shape, of.metadata["horizon"], of.metadata["execute"]) == ((horizon, 2), horizon, 3)
    assert "`executed` is 2" in error(sessions.act([observed(session, STEPS[1, 0], executed=2)])[0])
    table(sessions.act([observed(session, STEPS[1, 0], executed=3)])[0])
    assert session.histories is not None
    recorded = session.histories.policy.history._episodes[session.row].actions
    done = np.clip(np.stack([a["action"] for a in recorded[:3]]), [-2, 0], [2, 10])
    np.testing.assert_allclose(done, answer[:3], atol=1e-6)
    assert len(recorded) == 6
    with pytest.raises(DataError, match=r"--execute 2: task 'arm'.*exactly 3 actions"):
        Served(policy(**options), Settings(execute=2))


def test_all_actions_of_the_horizon_are_absolute_ones_of_one_prediction() -> None:
    """Those that are not executed too: counted from the state of the observed step, as the others."""
    of = served(horizon=5, chunk=2, head="l1")
    layout = of.processor.layouts["it"]["arm"]
    relative_ones = (
        replace(e, to="observation", columns=(0, -1)) if e.role == "action" else e for e in layout.elements
    )
    of.processor.layouts["it"]["arm"] = replace(layout, elements=tuple(relative_ones))
    sessions, session = Sessions(lambda: of), Session()
    answer = table(sessions.act([observed(session, STEPS[0, 0])])[0])
    element = next(e for e in of.processor.layouts["it"]["arm"].elements if e.role == "action")
    own = Policy(of.model, of.processor)
    own.reset("arm")
    acting = own.history.observe([{"observation": STEPS[0, 0]}])
    (found,), _ = own._answer(acting, [0])
    relative = replace(element.codec, dtype="float64").decode(found[:, None])[0]
    wanted = np.clip(relative + np.array([STEPS[0, 0, 0], 0]), (-2, 0), (2, 10))
    assert answer.shape == (5, 2)
    np.testing.assert_allclose(answer, wanted, atol=1e-5)
    assert of.metadata["frame"] == "absolute"
    after = table(sessions.act([observed(session, STEPS[1, 0], executed=2)])[0])
    assert not np.allclose(after[:3], answer[2:], atol=1e-4)  # predicted anew


def test_a_return_is_asked_for_and_rewards_lower_it() -> None:
    of = served(paradigm="dt")
    sessions, session = Sessions(lambda: of), Session(Wish(target_return=2.0))
    sessions.act([observed(session, STEPS[0, 0])])
    table(sessions.act([observed(session, STEPS[1, 0], reward=0.5)])[0])
    assert session.histories is not None
    assert session.histories.policy.history._episodes[session.row].returns == [2.0, 1.5]
    refused = Session(Wish(target_return="q2"))
    assert "q2" in error(sessions.act([observed(refused, STEPS[0, 0])])[0])


def test_ended_sessions_free_their_places() -> None:
    of = served(settings=Settings(sessions=2))
    sessions = Sessions(lambda: of)
    for _ in range(5):
        two = [Session(), Session()]
        for answer in sessions.act([observed(session, STEPS[0, 0]) for session in two]):
            table(answer)
        assert {session.row for session in two} == {0, 1}
        for session in two:
            sessions.end(session)
    assert not of._histories
