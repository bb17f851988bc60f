"""A published policy: written whole or not at all; acts without Tiphys installed; the same from a folder, bucket or hub."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")
pytest.importorskip("minigrid")

import tests.pretrain.acting.acting_fixtures as acting
from tests.hub import Hub
from tiphys.dataio.episode import DataError
from tiphys.dataio.storage import Store
from tiphys.pretrain import sources
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.card import model_card
from tiphys.pretrain.evaluate import evaluate
from tiphys.pretrain.hub_errors import without_secrets
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.policy_files import local_policy
from tiphys.pretrain.publish import PublishError, add_evaluation, is_policy, publish, save_policy

pytestmark = pytest.mark.envs
OBJECTIVES = acting.objectives()
RECIPE = {"name": "small", "model": {"layers": 2}, "evaluate": {"tasks": [acting.CART]}}


def save(folder: Path, seed: int = 0, **options: Any) -> Path:
    model = acting.model(OBJECTIVES, seed)
    config = DecisionConfig(**{k: v for k, v in model.config.to_dict().items() if k != "auto_map"})
    return save_policy(
        folder,
        model.state_dict(),
        config,
        OBJECTIVES.processor(),
        **{"recipe": RECIPE, "step": 7, "recipe_digest": "abc"} | options,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = save(tmp_path_factory.mktemp("published") / "policy")
    add_evaluation(path, evaluate(path, [acting.CART, acting.GRID], episodes=3, processes=1))
    return path


STRANGER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tiphys":
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Absent())
import json, gymnasium, minigrid, numpy
from transformers import AutoModel
acted = {{}}
for task in ("CartPole-v1", "BabyAI-GoToRedBallGrey-v0", "Pendulum-v1"):
    policy = AutoModel.from_pretrained({place!r}, trust_remote_code=True).policy(task)
    env = gymnasium.make(task)
    observation, _ = env.reset(seed=1)
    acted[task] = []
    for _ in range(12):
        action = policy.act(observation)
        assert env.action_space.contains(action), (task, action)
        acted[task].append(numpy.ravel(action).tolist())
        observation, reward, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
assert not any(n.split(".")[0] == "tiphys" for n in sys.modules)
print("ACTED" + json.dumps(acted))
"""


def as_a_stranger(place: str, tmp_path: Path, **environment: str) -> dict[str, list[list[float]]]:
    """The policy's actions in a process that cannot import this project, in another folder."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    kept |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-I", "-c", STRANGER.format(place=place)]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ACTED")[1])


def here(folder: Path) -> dict[str, list[list[float]]]:
    """The policy's actions in this process, which has Tiphys."""
    import gymnasium

    policy = Policy.load(folder, "cpu")
    acted: dict[str, list[list[float]]] = {}
    for task in (acting.CART, acting.GRID, acting.SWING):
        env = gymnasium.make(task)
        actions: list[Any] = []
        (observation, _), done = env.reset(seed=1), False
        policy.reset(task)
        while not done and len(actions) < 12:
            actions.append(policy.act(observation))
            observation, _, terminated, truncated, _ = env.step(actions[-1])
            done = terminated or truncated
        acted[task] = [np.ravel(a).tolist() for a in actions]
    return acted


def test_a_policy_acts_without_tiphys_installed(folder, tmp_path):
    acted = as_a_stranger(str(folder), tmp_path, HF_HUB_OFFLINE="1")
    assert acted == here(folder)
    assert all(len(actions) > 3 for actions in acted.values())


def test_contents_of_the_folder(folder):
    import yaml
    from huggingface_hub import ModelCard

    names = {p.name for p in folder.iterdir()}
    data = {"config.json", "model.safetensors", "processor.json", "recipe.yaml", "evaluation.json", "README.md"}
    assert names == data | set(sources.code_files())
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == RECIPE
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "transformer.DecisionModel"
    assert config["architectures"] == ["DecisionModel"]
    card = ModelCard.load(folder / "README.md")  # the real reader of model cards
    assert card.data.license is None  # nobody chose one
    assert "decision Transformer" not in card.text
    assert "by the paradigm" in card.text
    assert card.data.library_name == "transformers"
    evaluation = json.loads((folder / "evaluation.json").read_text())["tasks"]
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results[(acting.GRID, "success_rate")] == pytest.approx(evaluation[acting.GRID]["success_rate"], abs=1e-3)
    assert str(results[(acting.CART, "mean_reward")]).startswith(f"{evaluation[acting.CART]['mean_return']:.2f}")
    assert f"| {acting.CART} | 3 |" in card.text


@pytest.mark.parametrize("sample", [False, True])
def test_a_policy_draws_its_actions_if_its_recipe_evaluates_it_so(tmp_path, sample):
    folder = save(tmp_path / "policy", recipe=RECIPE | {"evaluate": {"sample": sample}})
    assert Policy.load(folder, "cpu").sample is sample
    assert Policy.load(folder, "cpu", sample=not sample).sample is not sample


def test_the_card_of_a_policy_that_asks_for_returns_says_how():
    def card(paradigm: str) -> str:
        processor = acting.objectives([acting.CART], paradigm, target_return="2x").processor()
        processor["best_return"] = {acting.CART: 250.0}
        config = {"num_hidden_layers": 2, "hidden_size": 32}
        return model_card(config, processor, None)

    asking = card("dt")
    assert "policy.act(observation, rewards=reward)" in asking
    assert f'`policy.reset("{acting.CART}", target_return=…)`' in asking
    assert "without it, 500 is asked for" in asking
    assert "rewards" not in card("bc")


def test_published_code_imports_nothing_of_this_project_and_few_packages():
    import ast

    allowed = {"numpy", "torch", "transformers", "tokenizers"} | set(sys.stdlib_module_names)
    files = sources.code_files()
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, (name, node.module)
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] in allowed, (name, node.module)
            elif isinstance(node, ast.Import):
                assert all(a.name.split(".")[0] in allowed for a in node.names), name


@pytest.mark.parametrize(
    "line",
    [
        "from tiphys.pretrain import engine",
        "from tiphys.pretrain.tokens import batch",
        "import tiphys.dataio.philox",
        "from . import batch",
    ],
)
def test_an_import_that_cannot_be_published_is_reported(line):
    with pytest.raises(ValueError, match=r"pretrain\.made_up, line 2.*from tiphys\.….NAME import"):
        sources.flat_source("pretrain.made_up", f'"""A module."""\n{line}\n')


def test_imports_for_type_checkers_are_removed():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tiphys.recipes.schema import Model\nx = 1\n"
    text, imported = sources.flat_source("pretrain.made_up", source)
    assert "recipes" not in text
    assert imported == set()
    assert text.endswith("x = 1\n")


def test_weights_of_another_model_are_refused_and_nothing_is_written(tmp_path):
    model = acting.model(OBJECTIVES)
    config: Any = model.config
    weights = dict(model.state_dict())
    name = next(iter(weights))
    for wrong, message in (
        ({k: v for k, v in weights.items() if k != name}, f"missing: {name}"),
        (weights | {"extra": torch.zeros(1)}, "unknown: extra"),
        (weights | {name: torch.zeros(3)}, f"another shape: {name}"),
    ):
        with pytest.raises(ValueError, match=message):
            save_policy(tmp_path / "policy", wrong, config, OBJECTIVES.processor())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    folder = save(tmp_path / "policy")
    before = here(folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space"):
            save(folder, seed=5)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert here(folder) == before
    save(folder, seed=5)
    assert here(folder) != before
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="something other than a policy"):
        save(other)
    with pytest.raises(FileExistsError, match="something other than a policy"):
        publish(folder, str(other))
    assert (other / "chapter.txt").read_text() == "years of work"


def test_publishing_to_a_folder_and_to_a_store(folder, tmp_path):
    copy = publish(folder, str(tmp_path / "copy"))
    assert is_policy(Path(copy))
    assert here(Path(copy)) == here(folder)
    with pytest.raises(ValueError, match="is not a policy"):
        publish(tmp_path, str(tmp_path / "copy"))


def test_a_store_has_one_policy_more_after_each_publication(folder):
    """Nothing is overwritten; tests/pretrain/follow has what readers see meanwhile."""
    url = "memory://bucket/policy"
    first, second = publish(folder, url), publish(folder, url)
    assert first != second
    for at in (first, second):
        assert set(Store(at).list()) == {p.name for p in folder.iterdir()} | {"manifest.json"}
    assert here(local_policy(url)) == here(folder)


PUBLISHER = """
import sys
from tiphys.pretrain.publish import publish
print(publish(sys.argv[1], sys.argv[2], private=sys.argv[3] == "private"))
"""


def from_a_process(hub: Hub, folder: Path, to: str, token: str, tmp_path: Path, visibility: str = "private") -> Any:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf"), "HF_DEBUG": "1"}
    command = [sys.executable, "-c", PUBLISHER, str(folder), to, visibility]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_publishing_to_a_hub(folder, tmp_path):
    with Hub() as hub:
        secret = "hf_owner_secret123"
        done = from_a_process(hub, folder, "hf://owner/small", secret, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("hf://owner/small@")
        repository = hub.repositories["owner/small"]
        assert repository.private
        there = {n for n in repository.files() if n != ".gitattributes" and not n.startswith("steps/")}
        assert there == {p.name for p in folder.iterdir()} | {"latest.json"}
        repository.commit(repository.files() | {"model-00002-of-00002.safetensors": b"old"})
        assert from_a_process(hub, folder, "hf://owner/small", secret, tmp_path).returncode == 0
        assert "model-00002-of-00002.safetensors" not in repository.files()

        repository.private = False
        refused = from_a_process(hub, folder, "hf://owner/small", secret, tmp_path)
        assert "already public" in refused.stderr
        nobody = from_a_process(hub, folder, "hf://owner/other", "hf_stranger_secret123", tmp_path)
        assert "403" in nobody.stderr
        for result in (done, refused, nobody):
            assert "secret123" not in result.stdout + result.stderr


@pytest.mark.long
def test_a_policy_acts_from_a_hub(folder, tmp_path):
    with Hub() as hub:
        secret = "hf_owner_secret123"
        assert from_a_process(hub, folder, "hf://owner/small", secret, tmp_path).returncode == 0
        acted = as_a_stranger("owner/small", tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=secret)
        assert acted == here(folder)


def test_errors_contain_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "quite-another-secret")
    text = without_secrets("401 for hf_abcdefghij0123 and quite-another-secret")
    assert "hf_abcdefghij0123" not in text
    assert "quite-another-secret" not in text


def test_names_of_repositories_are_checked(folder):
    with pytest.raises(ValueError, match="owner/name"):
        publish(folder, "hf://small")
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):  # tests run with the hub switched off
        publish(folder, "hf://owner/small")


@pytest.mark.parametrize("name", ["notes.json", "model-1.safetensors", "secret.py", "README.md"])
def test_what_a_link_points_at_is_never_published(folder, tmp_path, name):
    copy = Path(publish(folder, str(tmp_path / "copy")))
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "id_rsa")
    (copy / "photos").symlink_to(tmp_path)
    for to in (str(tmp_path / "new"), "memory://links"):
        if name == "notes.json":
            publish(copy, to)
        else:
            with pytest.raises(DataError, match=f"{name} is a link"):
                publish(copy, to)
    assert "PRIVATE" not in "".join(p.read_text(errors="replace") for p in (tmp_path / "new").rglob("*") if p.is_file())
    assert not list((tmp_path / "new").rglob("photos"))


def test_other_files_are_not_published(folder, tmp_path):
    copy = Path(publish(folder, str(tmp_path / "copy")))
    for name in (".env", "id_rsa", "data.csv"):
        (copy / name).write_text("mine")
    new = Path(publish(copy, str(tmp_path / "new")))
    assert {p.name for p in new.iterdir()} == {p.name for p in folder.iterdir()} | {"manifest.json"}


def changed(folder: Path, tmp_path: Path, **values: Any) -> Path:
    copy = Path(publish(folder, str(tmp_path / "copy")))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **values}))
    return copy


@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"experts_implementation": "evil/kernel"},
        {"quantization_config": {"quant_method": "evil"}},
        {"num_hidden_layers": 10**7},
        {"hidden_size": "64"},
        {"vocab_size": -1},
        {"dropout": float("nan")},
        {"ranges": [1]},
        {"embedders": {"a": {"kind": "patch"}}},
        {"num_hidden_layers": 3},
    ],
)
def test_a_config_cannot_choose_code_or_impossible_sizes(folder, tmp_path, values):
    with pytest.raises(DataError, match=r"config"):
        Policy.load(changed(folder, tmp_path, **values), "cpu")


def test_pickled_weights_are_not_loaded(folder, tmp_path):
    copy = Path(publish(folder, str(tmp_path / "copy")))
    for file in copy.glob("*.safetensors"):
        file.unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        Policy.load(copy, "cpu")


def test_the_mode_follows_the_umask(folder, tmp_path):
    old = os.umask(0o077)
    try:
        publish(folder, str(tmp_path / "new"))
    finally:
        os.umask(old)
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "new").rglob("*"))


def test_a_tasks_name_cannot_leave_the_examples_of_the_card(folder):
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "processor.json").read_text())
    name = 'x")\nimport os\n```\n<script>'
    processor["tasks"] = [{**processor["tasks"][0], "name": name, "environment": "CartPole-v1"}]
    text = model_card(config, processor, None)
    code = text.split("```python\n")[1].split("```")[0]
    assert ast.literal_eval(code.split(".policy(")[1].split("\n")[0].rstrip(")")) == name
    assert "\nimport os" not in code
