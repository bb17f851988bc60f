"""Documents: windows of consecutive tokens, perplexity, and texts that a policy continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.acting import acting_fixtures as acting
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec, Window
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter
from tiphys.launch.plan import loader_arguments, make_plan
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.acting.say import choose
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.publish import save_policy
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import TimestepLayout
from tiphys.recipes.schema import Recipe, Run
from tiphys.recipes.sections.data import Data, Entry
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import Objective

CONTEXT = 16
TEXTS = ["", "ab", "the cat sat on the mat and the dog sat on the log. " * 9, "öffne die Tür " * 3]


def written(place: Path) -> EpisodeIndex:
    task = TaskSpec("book", (FieldSpec("text", "text", "text", "str", per="episode"),))
    with ShardWriter(str(place), [task]) as writer:
        for i, text in enumerate(TEXTS):
            writer.write(Episode(f"{i}", "book", {"text": text}, 0))
        writer.close()
    return EpisodeIndex.open(str(place))


def recipe_of(place: Path, **data: object) -> Recipe:
    return Recipe(
        name="t",
        run=Run(dir="runs/t"),
        data=Data(mixture=(Entry(str(place), objective="gato"),), **data),  # type: ignore[arg-type]
        objectives={"gato": Objective(context=CONTEXT, window=2)},
        model=Model(layers=1, hidden=32, heads=2, text_vocabulary=300),
        deepspeed={"train_batch_size": 8},
    )


def drawn(
    recipe: Recipe, index: EpisodeIndex, steps: int
) -> tuple[Objectives, list[TokenBatch], list[tuple[int, int, int]]]:
    """The batches of some steps, and (episode, start, units) of their windows."""
    from tiphys.dataio.loader import TrajectoryLoader
    from tiphys.dataio.placement import Home

    objectives = Objectives(recipe, [index])
    plan, batches = make_plan(recipe, [index], objectives), []
    planned = [plan.windows(step) for step in range(steps)]
    with TrajectoryLoader(plan, Home(0, 1), **loader_arguments(recipe, objectives), stop=steps) as loader:
        for loaded in loader:
            batches.append(TokenBatch.from_arrays({n: a.copy() for n, a in loaded.arrays.items()}))
            loaded.release()
    windows = [(int(e), int(s), int(u)) for p in planned for e, s, u in zip(p.episode, p.start, p.units, strict=True)]
    return objectives, batches, windows


@pytest.mark.parametrize("replacement", [True, False])
def test_windows_predict_the_tokens_that_the_plan_says(tmp_path: Path, replacement: bool) -> None:
    index = written(tmp_path)
    objectives, batches, windows = drawn(recipe_of(tmp_path, replacement=replacement), index, 4)
    ids = [[*i.tolist(), objectives.vocabulary.end_of_text] for i in objectives.text.encode(TEXTS)]
    said = [t for b in batches for t in b.target[b.target >= 0].tolist()]
    assert said == [i for e, s, u in windows for i in ids[e][s + 1 : s + u + 1]]
    shown = [t for b in batches for t in b.tokens[b.segment > 0].tolist()]
    assert shown == [i for e, s, u in windows for i in ids[e][s : s + u + 1]]
    assert {e for e, _, _ in windows} == {1, 2, 3}  # an empty text is never drawn
    assert max(u for _, _, u in windows) in (CONTEXT - 2, CONTEXT - 1)


def test_windows_are_uniform_over_the_tokens_of_a_document(tmp_path: Path) -> None:
    index = written(tmp_path)
    recipe = recipe_of(tmp_path)
    objectives = Objectives(recipe, [index])
    plan = make_plan(recipe, [index], objectives)
    (long,) = [len(i) for i in objectives.text.encode(TEXTS[2:3])]
    seen = np.zeros((len(TEXTS), long))
    for step in range(300):
        p = plan.windows(step)
        for e, s, u in zip(p.episode, p.start, p.units, strict=True):
            seen[e, s : s + u] += 1
    rates = seen[2] / seen[2].mean()
    assert rates.min() > 0.75
    assert rates.max() < 1.25
    assert seen[1, 0] / seen[2].mean() == pytest.approx(1, abs=0.25)


def test_the_end_of_a_long_text_is_shown(tmp_path: Path) -> None:
    text = "x" * ((1 << 20) + 5) + "end"
    tokenizer = fixtures.make_each([fixtures.CAPTION], ["gato"]).text
    assert tokenizer.decode(tokenizer.encode([text])[0]) == text
    assert tokenizer.count(["a", text]) == [1, len(tokenizer.encode([text])[0])]


def test_ids_stand_for_all_bytes_of_a_text() -> None:
    tokenizer = fixtures.make_each([fixtures.CAPTION], ["gato"]).text
    sizes = tokenizer.sizes()
    for text in [*TEXTS, "\u2581 <0x41> 東京"]:
        assert sizes[tokenizer.encode([text])[0]].sum() == len(text.encode())
    assert not len(TextTokenizer("").sizes())


def policy_of(index: EpisodeIndex, place: Path, seed: int = 0) -> Policy:
    objectives = Objectives(recipe_of(place), [index])
    processor = Processor.from_dict(json.loads(json.dumps(objectives.processor())))
    return Policy(acting.model(objectives, seed=4), processor, seed=seed)


def test_a_text_is_continued_as_whole_windows_would_say(tmp_path: Path) -> None:
    policy = policy_of(written(tmp_path), tmp_path)
    prompts = ["the cat", "ab", "the dog sat on the log. the dog sat on"]
    said = policy.say(prompts, tokens=40, temperature=0.0)
    for prompt, found in zip(prompts, said, strict=True):
        assert found == slow(policy, prompt, 40)
        assert policy.say(prompt, tokens=40, temperature=0.0) == found


def slow(policy: Policy, prompt: str, tokens: int) -> str:
    """The most probable continuation, with the whole window computed for each token."""
    layout = policy.processor.layouts["gato"]["book"]
    ids = policy.processor.text.encode([prompt])[0].tolist()
    new: list[int] = []
    shown = ids if len(ids) < CONTEXT else ids[-CONTEXT + 1 :]
    end = policy.processor.vocabulary.end_of_text
    for _ in range(tokens):
        if len(shown) > CONTEXT:
            shown = shown[-(CONTEXT // 2) :]
        batch = TokenBatch.empty(0, len(shown), 1)
        batch.row[:], batch.tokens[:], batch.modality[:], batch.segment[:], batch.causal[:] = 0, shown, 1, 1, True
        batch.position[:] = batch.local[:] = np.arange(len(shown))
        batch.task[:] = layout.number
        with torch.no_grad():
            hidden = policy.model(to_tensors(batch)).hidden[-1:]
        logits = policy.model.logits(hidden)[0]
        text = policy.processor.text.size
        one = int(logits[:text].argmax()) if logits[:text].max() >= logits[end] else end
        if one == end:
            break
        new.append(one)
        shown = [*shown, one]
    return policy.processor.text.decode([*ids, *new])[len(prompt) :]


def test_draws_of_a_text_depend_on_its_seed_and_number_only(tmp_path: Path) -> None:
    index = written(tmp_path)
    policy = policy_of(index, tmp_path, seed=1)
    two = policy.say(["the cat", "the cat"], tokens=20)
    assert policy.say("the cat", tokens=20) == two[0] != two[1]
    assert policy_of(index, tmp_path, seed=2).say("the cat", tokens=20) != two[0]


STRANGER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tiphys":
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Absent())
import json
from transformers import AutoModel
policy = AutoModel.from_pretrained({place!r}, trust_remote_code=True).policy(seed=3)
print("SAID" + json.dumps(policy.say(["the cat", "ab"], tokens=30, top_p=0.9)))
"""


def test_a_published_policy_says_texts_without_tiphys(tmp_path: Path) -> None:
    objectives = Objectives(recipe_of(tmp_path), [written(tmp_path)])
    model = acting.model(objectives, seed=4)
    config = DecisionConfig(**{k: v for k, v in model.config.to_dict().items() if k != "auto_map"})
    place = save_policy(
        tmp_path / "policy", model.state_dict(), config, objectives.processor(), recipe={}, step=1, recipe_digest="a"
    )
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    kept |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", STRANGER.format(place=str(place))]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = Policy.load(place, "cpu", seed=3).say(["the cat", "ab"], tokens=30, top_p=0.9)
    assert json.loads(done.stdout.split("SAID")[1]) == here


def test_top_p_keeps_the_most_probable() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)).repeat(1000, 1)
    uniform = (np.arange(1000) + 0.5) / 1000
    assert np.bincount(choose(logits, 1.0, 1.0, uniform)).tolist() == [500, 300, 200]
    assert np.bincount(choose(logits, 1.0, 0.6, uniform)).tolist() == [625, 375]
    assert set(choose(logits, 1.0, 0.5, uniform)) == {0}
    assert set(choose(logits, 0.0, 1.0, uniform)) == {0}


def test_what_cannot_be_said_is_refused(tmp_path: Path) -> None:
    policy = policy_of(written(tmp_path), tmp_path)
    for wrong, message in (
        ({"prompt": ""}, "at least one word"),
        ({"prompt": "a", "tokens": 0}, "tokens: 0"),
        ({"prompt": "a", "top_p": 1.5}, r"top_p: 1\.5"),
        ({"prompt": "a", "observation": np.zeros(3)}, "takes no observation"),
    ):
        with pytest.raises(DataError, match=message):
            policy.say(**wrong)
    with pytest.raises(KeyError, match="was not trained on task 'film'"):
        policy.say("a", task="film")


def test_a_caption_is_said_about_its_picture() -> None:
    objectives = fixtures.make_each([fixtures.CAPTION], ["gato"], context=40)
    policy = Policy(acting.model(objectives, seed=1), Processor.from_dict(objectives.processor()))
    rng = np.random.default_rng(0)
    pictures = [{"image": rng.integers(0, 255, (16, 16, 3), np.uint8)} for _ in range(2)]
    said = policy.say(["", "go to"], pictures, tokens=60, temperature=0.0)
    assert [policy.say(p, o, tokens=60, temperature=0.0) for p, o in zip(["", "go to"], pictures, strict=True)] == said
    layout = policy.processor.layouts["gato"]["caption"]
    for text, picture, found in zip(["", "go to"], pictures, said, strict=True):
        assert found == slow_caption(policy, layout, text, picture, 60)
    with pytest.raises(DataError, match="needs the observation"):
        policy.say("go")


def slow_caption(policy: Policy, layout: TimestepLayout, text: str, picture: dict[str, np.ndarray], tokens: int) -> str:
    """The most probable continuation: the caption so far is laid out anew for each token, as in training."""
    tokenizer, end = policy.processor.text, policy.processor.vocabulary.end_of_text
    known = tokenizer.encode([text])[0].tolist()
    for number in range(min(tokens, layout.text_limit - len(known))):
        name = f"caption {number}"
        tokenizer._ids[name] = np.array(known, np.int32)  # a text with these ids
        window = Window(
            entry=0,
            task=0,
            episode="",
            start=0,
            steps=1,
            episode_steps=0,
            fields={"image": picture["image"][None], "caption": name},
            step=np.zeros(1, np.int64),
            returns_to_go=np.zeros(1, np.float32),
            valid=np.zeros(1, bool),
        )
        with torch.no_grad():
            hidden = policy.model(to_tensors(policy.processor.encode(layout, [[window]]))).hidden[-2:-1]
        logits = policy.model.logits(hidden)[0]
        said = logits[: tokenizer.size]
        if logits[end] > said.max():
            break
        known.append(int(said.argmax()))
    return tokenizer.decode(known)[len(text) :]
