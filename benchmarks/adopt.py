"""Time and memory in which a language model becomes the start of a recipe.

    python -m benchmarks.adopt FOLDER

FOLDER holds config.json, model*.safetensors and a tokenizer of a family that `model.init` takes. Memory is what the process has
beside the model at its peak, as a multiple of the largest tensor: memory of its own, without the pages of files.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from tests.pretrain.token_fixtures import ARM, FakeIndex
from tiphys.pretrain.adopt.families import family_config, section
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.pretrained import begin
from tiphys.pretrain.tokens.vocabulary import Vocabulary
from tiphys.recipes.load import from_dict
from tiphys.recipes.schema import Recipe


def main() -> None:
    recipe, vocabulary = start(Path(sys.argv[1]))
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model = begin(recipe, vocabulary)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    extra = (peak[0] - before - sum(sizes)) / max(sizes)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters in {seconds:.1f} s, ", end="")
    print(f"with {extra:.2f} × the largest tensor ({max(sizes) / 1e6:.0f} MB) beside the model")


def start(folder: Path) -> tuple[Recipe, Vocabulary]:
    """A recipe that begins with the model, and the vocabulary of a robot arm with its tokenizer."""
    model = section(family_config(folder), str(folder), str(folder / "tokenizer.json"))
    mixture = [{"dataset": "fake", "objective": "dt"}]
    recipe = from_dict({"name": "adopt", "data": {"mixture": mixture}, "run": {"dir": "unused"}, "model": model})
    return recipe, Objectives(recipe, [FakeIndex([ARM])]).vocabulary  # type: ignore[list-item]


def resident() -> int:
    """Bytes of this process's own memory."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
