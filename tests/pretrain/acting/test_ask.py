"""What a policy is asked for: by task and objective, from command lines and recipes, with demonstrations of datasets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.acting.test_processor import processor_of
from tiphys.dataio.episode import DataError, Episode
from tiphys.dataio.shards import ShardWriter
from tiphys.pretrain.acting.ask import Asking, _split, demonstration, goal
from tiphys.pretrain.acting.processor import Processor
from tiphys.recipes.sections.results import Evaluation


@pytest.fixture(scope="module")
def processor() -> Processor:
    return processor_of(fixtures.make_each([fixtures.ARM], ["bc", "dt"], context=60))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three episodes of 6 steps with 7 observations; the second has the best return."""
    place, rng = tmp_path_factory.mktemp("ask") / "data", np.random.default_rng(0)
    with ShardWriter(str(place), [fixtures.ARM]) as writer:
        for number, reward in enumerate((1.0, 5.0, 2.0)):
            values = {f.name: fixtures.values(f, 7 if f.role == "observation" else 6, rng) for f in fixtures.ARM.fields}
            values["reward"] = np.full(6, reward, np.float32)
            writer.write(Episode(f"arm/{number:03d}", "arm", values, 6))
        writer.close()
    return str(place)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        *(("data", ("data", "")), ("data:7", ("data", "7")), ("/a/b:arm/007", ("/a/b", "arm/007"))),
        *(("s3://b/p", ("s3://b/p", "")), ("s3://b/p:x/1", ("s3://b/p", "x/1"))),
        *(("http://host:80/p", ("http://host:80/p", "")), ("http://host:80/p:3", ("http://host:80/p", "3"))),
    ],
)
def test_the_parts_of_an_address(address: str, parts: tuple[str, str]) -> None:
    assert _split(address) == parts


def test_a_demonstration_is_named_by_number_or_id_and_is_the_best_otherwise(data: str) -> None:
    for address, number in {data: 1, f"{data}:0": 0, f"{data}:arm/002": 2}.items():
        shown = demonstration(address, "arm")
        assert (shown.episode, shown.steps, shown.prompt) == (f"arm/{number:03d}", 6, True)
        assert len(shown.fields["observation"]) == len(shown.fields["action"]) == 6
    assert demonstration(data, "arm").returns_to_go.tolist() == [30, 25, 20, 15, 10, 5]
    with pytest.raises(DataError, match=r"no episode '9'; it has the numbers 0 to 2"):
        demonstration(f"{data}:9", "arm")
    with pytest.raises(DataError, match="no episode of task 'leg'"):
        demonstration(data, "leg")


def test_a_goal_is_json_or_the_last_observation_of_an_episode(data: str) -> None:
    assert goal("[1, 2.5]", "arm")["observation"].tolist() == [1, 2.5]
    assert goal('{"a": [1]}', "arm") == {"a": [1]}
    assert goal(f"{data}:0", "arm")["observation"].shape == (5,)
    with pytest.raises(DataError, match=r"not valid JSON"):
        goal("[1, ", "arm")


def test_no_words_ask_for_nothing() -> None:
    assert Asking.from_words([], [], [], []) == Asking()


def test_words_of_a_command_line_mean_what_a_recipe_means(data: str) -> None:
    evaluate = Evaluation(
        objectives=["dt", "bc"],
        target_return={"arm": "q0.9", "*": "-150"},
        target_returns=["q0.1", "best"],
        prompt={"*": f"{data}:1"},
        goal={"a*": '{"b": "x=y"}'},
    )
    asking = Asking.from_recipe(evaluate)
    given: dict[str, list[str]] = {}
    for word in asking.words():
        if word.startswith("--"):
            given[{"--objective": "objectives"}.get(word, word[2:].replace("-", "_"))] = last = []
        else:
            last.append(word)
    assert Asking.from_words(**given) == asking
    plain = Asking.from_words(target_return=["450"], prompt=["s3://b/day=3/data:7"], goal=['{"a": "b=c"}'])
    assert (plain.target_return, plain.prompt) == ({"*": "450"}, {"*": "s3://b/day=3/data:7"})
    assert plain.goal == {"*": '{"a": "b=c"}'}


def test_what_is_played_by_task_and_objective(processor: Processor, data: str) -> None:
    best = processor.best_return["arm"]
    (one,) = Asking().asks(processor, ["arm"])
    assert (one.objective, one.target_return, one.asked) == ("bc", None, None)
    asking = Asking(["dt", "bc"], {"*": "1", "arm": "3.5"}, {"arm": data}, target_returns=["q1", "0.5x"])
    dt, high, low, bc = asking.asks(processor, ["arm"])
    assert [a.objective for a in (dt, high, low, bc)] == ["dt", "dt", "dt", "bc"]
    assert [a.target_return for a in (dt, high, low)] == [3.5, pytest.approx(best), pytest.approx(best / 2)]
    assert (bc.target_return, bc.asked, high.written) == (None, None, "q1")
    assert dt.prompt is not None
    assert set(dt.prompt.fields) == {"observation", "action"}
    assert Asking(["dt"]).asks(processor, ["arm"])[0].asked == pytest.approx(best)


@pytest.mark.parametrize(
    ("asking", "reason"),
    [
        (Asking(["pdt"]), "objectives: no objective is called 'pdt'; they are bc, dt"),
        (
            Asking(target_return={"*": "3"}),
            r"target_return\.\*: no objective that is played shows the model returns.*'bc'",
        ),
        (Asking(["dt"], {"leg": "3"}), r"target_return\.leg: no task that is played is called so; they are arm"),
        (Asking(["dt"], {"*": "much"}), r"target_return\.\*: .*'much' is not a target return"),
        (Asking(target_returns=["q0.5"]), "target_returns: no objective that is played shows the model returns"),
        (Asking(["dt"], target_returns=["1e9"]), "target_returns: .*beyond what the policy can be told"),
        (Asking(goal={"*": "[1]"}), r"goal\.\*: no objective that is played acts towards a goal"),
        (Asking(prompt={"*": "/nowhere"}), r"prompt\.\*: /nowhere: there is no dataset"),
    ],
)
def test_what_cannot_be_asked_is_named_by_its_key(processor: Processor, asking: Asking, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        asking.asks(processor, ["arm"])


def test_a_goal_reaches_an_objective_that_takes_one(processor: Processor) -> None:
    values = json.loads(json.dumps(processor.to_dict()))
    values["objectives"]["bc"]["takes_goal"] = True
    (one,) = Asking(goal={"*": "[1, 2, 3, 4, 5]"}).asks(Processor.from_dict(values), ["arm"])
    assert one.goal is not None
    assert one.goal["observation"].tolist() == [1, 2, 3, 4, 5]


def test_a_prompt_of_another_task_lacks_fields(processor: Processor, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {f.name: fixtures.values(f, 4, rng) for f in fixtures.GRID.fields}
    values["observation.mission"] = "go"
    with ShardWriter(str(tmp_path / "grid"), [fixtures.GRID]) as writer:
        writer.write(Episode("one", "grid", values, 4))
        writer.close()
    with pytest.raises(DataError, match=r"episode 'one' has no field observation, which task 'arm' shows"):
        Asking(prompt={"*": f"{tmp_path / 'grid'}:0"}).asks(processor, ["arm"])


@pytest.fixture(scope="module")
def filling() -> Processor:
    """Objectives that fill in hidden parts; the second was trained for one query only. The third shows histograms."""
    made = fixtures.make_each([fixtures.ARM], ["unimask", "gdt"], context=200)
    values = json.loads(json.dumps(made.processor()))
    only = json.loads(json.dumps(values["objectives"]["unimask"]))
    for layout in only["timesteps"].values():
        layout["hiding"] = [["rc", 1.0]]
    values["objectives"] |= {"only": only}
    return Processor.from_dict(values)


def test_a_query_and_a_future_reach_the_objectives_that_take_them(filling: Processor, data: str) -> None:
    asking = Asking.from_words(["unimask", "gdt"], query=["rc"], future=[f"arm={data}:1"])
    one, other = asking.asks(filling, ["arm"])
    assert (one.query, one.future) == ("rc", None)
    assert other.query == ""
    assert other.future is not None
    assert len(other.future.fields) == 1
    assert (
        Asking.from_recipe(Evaluation(objectives=["unimask", "gdt"], query={"*": "rc"}, future={"arm": f"{data}:1"}))
        == asking
    )


@pytest.mark.parametrize(
    ("asking", "reason"),
    [
        (
            Asking(["unimask"], query={"*": "sideways"}),
            r"query\.\*: .*no query is called 'sideways'; there are bc, rc, goal",
        ),
        (Asking(["only"], query={"*": "bc"}), r"query\.\*: .*was not trained for the query 'bc', but for rc"),
        (Asking(["only"]), r"query: .*was not trained for the query 'bc'"),
        (Asking(["unimask"], query={"*": "goal"}), r"query\.\*: .*needs a goal"),
        (Asking(["unimask"], query={"arm": "rc"}, goal={"*": "[1]"}), r"query\.arm: .*takes no goal"),
        (Asking(["gdt"], query={"*": "bc"}), r"query\.\*: no objective that is played fills in hidden parts"),
        (Asking(["gdt"]), "future: .*name an episode to match"),
        (
            Asking(["unimask"], future={"*": "x"}),
            r"future\.\*: no objective that is played shows the model what is to come",
        ),
    ],
)
def test_a_query_that_was_not_learned_and_a_future_that_lacks_are_refused(
    filling: Processor, asking: Asking, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        asking.asks(filling, ["arm"])
