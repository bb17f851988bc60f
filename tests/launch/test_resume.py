"""A run through the real launcher that was killed or stopped and then resumed has the same losses as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tiphys.dataio.collect import collect
from tiphys.launch.statuses import Status

pytestmark = pytest.mark.long
pytest.importorskip("gymnasium", reason="needs the envs extra")

RECIPE = """
name: small
data:
  mixture: [{{dataset: {data}, objective: bc}}]
  validation: 0.1
objectives: {{bc: {{context: 32, window: 4}}}}
model: {{layers: 2, hidden: 32, heads: 2, text_vocabulary: 300, moe: {{experts: 4, experts_per_token: 2}}}}
deepspeed:
  train_batch_size: 9
  zero_optimization: {{stage: 2}}
  optimizer: {{type: AdamW, params: {{lr: 1e-2}}}}
  scheduler: {{type: WarmupLR, params: {{warmup_num_steps: 5}}}}
train: {{steps: 40}}
checkpoint: {{every: 4}}
run: {{dir: {run}}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    collect("CartPole-v1", str(folder / "cartpole"), 20, processes=1, score_episodes=2)
    return folder / "cartpole"


def start(tmp_path, data, name):
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(RECIPE.format(data=data, run=tmp_path / name))
    command = [sys.executable, "-m", "tiphys", "train", str(recipe), "--processes", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "kind" not in line}


def wait_for_step(run, step, process, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, process.stdout.read()
        try:
            if any(s >= step for s in losses(run)):
                return
        except (FileNotFoundError, ValueError):
            pass
        time.sleep(0.02)
    pytest.fail(f"no step {step} within {seconds} s")


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == Status.DONE, output
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, data, "run"))
    found = losses(folder / "run")
    assert sorted(found) == list(range(1, 41))
    return found


def test_a_run_that_was_killed_gives_the_same_losses_to_the_bit_after_a_resume(tmp_path, data, whole):
    process = start(tmp_path, data, "run")
    wait_for_step(tmp_path / "run", 10, process)
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.kill()
    process.wait()
    output = finish(start(tmp_path, data, "run"))
    assert "resumed from" in output
    assert losses(tmp_path / "run") == whole


def test_a_run_that_a_signal_stops_saves_and_its_resume_gives_the_same_losses(tmp_path, data, whole):
    process = start(tmp_path, data, "run")
    wait_for_step(tmp_path / "run", 6, process)
    os.kill(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == Status.INTERRUPTED
    assert "the same command resumes" in output
    assert "launch.py" not in output  # the launcher does not call a run that was stopped and saved an error
    finish(start(tmp_path, data, "run"))
    assert losses(tmp_path / "run") == whole
