"""A short `tiphys quickstart`: every step from nothing to a policy that acts."""

import json
import subprocess
import sys

import pytest

from tiphys.launch.statuses import Status

pytest.importorskip("minigrid", reason="needs the envs extra")
pytest.importorskip("metaworld", reason="needs the envs extra")

TASKS = ["BabyAI-GoToRedBallGrey-v0", "metaworld/drawer-close-v3", "CartPole-v1"]
ACT = """
import sys
import gymnasium, minigrid
from transformers import AutoModel

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dataio", "pretrain", "recipes", "launch"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocked())
policy = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).policy("BabyAI-GoToRedBallGrey-v0")
env = gymnasium.make("BabyAI-GoToRedBallGrey-v0"); observation, _ = env.reset(seed=7); steps = 0; done = False
while not done and steps < 5:
    observation, reward, terminated, truncated, _ = env.step(policy.act(observation)); steps += 1; done = terminated or truncated
print("acted", steps)
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    command = [
        *(sys.executable, "-m", "tiphys", "quickstart", "--scale", "0.01", "--datasets", str(folder / "data")),
        *(
            f"run.dir={folder / 'run'}",
            "train.steps=6",
            "checkpoint.every=3",
            "checkpoint.minutes=0",
            "evaluate.episodes=2",
        ),
        *("model.hidden=32", "data.validation=0.1", f"evaluate.tasks=[{','.join(TASKS)}]"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder, done.stdout


def test_it_leaves_everything_that_it_promises(quickstart):
    folder, output = quickstart
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "kind" not in line]
    assert steps[-1] == 6
    assert all(line["loss"] > 0 for line in lines if "kind" not in line)
    assert any(line.get("kind") == "validation" for line in lines)
    found = json.loads((run / "evaluation.json").read_text())["tasks"]
    assert list(found) == TASKS
    for task in found.values():
        assert task["episodes"] == 2
        assert {"mean_return", "success_rate", "random", "expert", "expert_normalized"} <= task.keys()
    assert (run / "report.html").read_text().count("data:image/png") == len(TASKS)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert list((run / "tensorboard").iterdir())
    for name in ("config.json", "model.safetensors", "processor.json", "recipe.yaml", "evaluation.json", "README.md"):
        assert (run / "policy" / name).is_file(), name
    assert "ETA" in output
    assert "[INFO]" not in output  # the lines of the launcher


def test_its_policy_acts_without_tiphys(quickstart, tmp_path):
    folder, _ = quickstart
    script = tmp_path / "act.py"
    script.write_text(ACT)
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(folder / "run" / "policy")],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "acted 5" in done.stdout


def test_the_run_folder_of_another_recipe_is_refused_with_the_keys_that_differ(quickstart):
    folder, _ = quickstart
    overrides = [f"data.mixture[{i}].dataset={folder / 'data'}/{d}" for i, d in enumerate(DATASETS)]
    command = [sys.executable, "-m", "tiphys", "train", "quickstart", *overrides, f"run.dir={folder / 'run'}"]
    done = subprocess.run([*command, "model.hidden=64"], capture_output=True, text=True, timeout=200, cwd=folder)
    assert done.returncode == Status.REFUSED
    assert "model.hidden" in done.stderr
    assert "Traceback" not in done.stderr


DATASETS = ["babyai"] * 2 + ["classic"] * 3 + ["metaworld"] * 4  # one for each mixture entry of the recipe
