"""Whether a policy of other tasks is worth something for a new one: few demonstrations, from it and from scratch.

    python -m benchmarks.transfer [--episodes 60] [--demonstrations 20] [--steps 400] [--base 400] [--scored 20] [--to FOLDER]

A policy of the quickstart's size learns four tasks of Meta-World. A further task has few demonstrations. They are learned from
scratch in `--steps` steps, and in a quarter of these from scratch and from that policy (`model.init`). The mark: in a quarter of
the steps, the policy's successor reaches the score of scratch. Scores are shares of episodes that succeed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.ideas.training import publish, train
from tiphys.dataio.collect import collect
from tiphys.pretrain.evaluate import evaluate

KNOWN = [f"metaworld/{name}-v3" for name in ("reach", "push", "drawer-close", "door-open")]
NEW = "metaworld/window-open-v3"
OBJECTIVE = {"paradigm": "bc", "scheme": "compact", "context": 64, "window": 1, "discretise": "no"}
MODEL = {"layers": 3, "hidden": 128, "heads": 4, "text_vocabulary": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("episodes", 60), ("demonstrations", 20), ("steps", 400), ("base", 400), ("scored", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--to", default="", help="keep datasets and policies here, and use those that are there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        compare(Path(args.to or scratch), args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    for name, tasks, count in (("known", KNOWN, args.episodes), ("new", [NEW], args.demonstrations)):
        if not (folder / name).is_dir():
            with timed(f"{count} demonstrations of {', '.join(tasks)}"):
                collect(tasks, str(folder / name), episodes=count, processes=1, score_episodes=3)
    base = folder / "base"
    if not base.is_dir():
        with timed(f"the policy of the known tasks, {args.base} steps"):
            learnt(folder / "known", args.base, base)
    print("| start | steps | success |\n|---|---|---|", flush=True)
    for start, steps, init in (
        ("scratch", args.steps, None),
        ("scratch", args.steps // 4, None),
        ("the policy", args.steps // 4, base),
    ):
        to = folder / f"{start.replace(' ', '-')}-{steps}"
        learnt(folder / "new", steps, to, **({"init": str(init)} if init else {}))
        scores = evaluate(to, [NEW], episodes=args.scored, processes=1)["tasks"][NEW]
        print(f"| {start} | {steps} | {scores['success_rate']:.2f} |", flush=True)


def learnt(dataset: Path, steps: int, to: Path, **model: Any) -> None:
    """Train on a dataset, and write the policy's folder."""
    mixture = [{"dataset": str(dataset), "loss_weight": 10}]
    publish(train(mixture, OBJECTIVE, steps=steps, rows=16, rate=1e-3, model={**MODEL, **model}, sample=False), to)


class timed:
    """Say how long a block took."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        print(f"{self.what}: {time.monotonic() - self.began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
