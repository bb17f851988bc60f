"""A recipe that trains in a second, on a dataset of the golden test."""

from pathlib import Path

from tests.processes import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden" / "data"
_RECIPE = """
name: small
data: {{mixture: [{{dataset: {data}, objective: bc}}], validation: 0, cache: {{memory: 32MiB}}}}
objectives: {{bc: {{context: 32, window: 4}}}}
model: {{layers: 1, hidden: 32, heads: 2, text_vocabulary: 300}}
deepspeed: {{train_batch_size: 4, gradient_clipping: 0, optimizer: {{type: AdamW, params: {{lr: {rate}}}}}}}
train: {{steps: {steps}}}
run: {{dir: run}}
"""


def small_recipe(data: str | Path = GOLDEN / "cart", *, steps: int = 2, rate: float = 1e-2) -> str:
    """The recipe as YAML. Its run's folder is `run` in the current folder."""
    return _RECIPE.format(data=data, steps=steps, rate=rate)
