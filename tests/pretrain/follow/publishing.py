"""Tiny policies that differ in their weights, without a real model: files with the names of a policy's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tiphys.pretrain.follow.follower import Follower
from tiphys.pretrain.follow.weights import Weights
from tiphys.pretrain.publish import How, publish


def policy(folder: Path, step: int, *, hidden: int = 8, seed: int = -1, noise: float = 1e-4) -> Path:
    """The policy of a step. Steps differ by small changes of the same random weights."""
    folder = folder / f"policy-{step}-{seed}"
    folder.mkdir(parents=True)
    start, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(step if seed < 0 else seed)
    tensors = {
        name: (torch.randn(shape, generator=start) + noise * torch.randn(shape, generator=drawn)).bfloat16()
        for name, shape in (("a.weight", (hidden, 3000)), ("b.weight", (5,)))
    }
    save_file({**tensors, "steps": torch.arange(4)}, folder / "model.safetensors")
    config = {"model_type": "tiphys", "hidden_size": hidden, "tiphys": {"step": step}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor.json").write_text(json.dumps({"version": 1}))
    (folder / "policy.py").write_text("raise SystemExit('code of a followed folder was run')\n")
    return folder


def digest(folder: Path) -> str:
    return Weights.load(folder).digest


def publish_all(folders: list[Path], to: str, **how: object) -> list[str]:
    """Publish steps of a run, each with the one before at hand."""
    bases = [None, *folders[:-1]]
    return [publish(folder, to, how=How(base, **how)) for folder, base in zip(folders, bases, strict=True)]  # type: ignore[arg-type]


def fetched(url: str) -> tuple[int, str]:
    """Step and digest of what a new follower finds, which is checked against its folder."""
    with Follower(url) as follower:
        folder = follower.fetch()
        assert json.loads((folder / "config.json").read_text())["tiphys"]["step"] == follower.step
        assert not list(folder.glob("*.py"))
        assert digest(folder) == follower.digest
        return follower.step, follower.digest
