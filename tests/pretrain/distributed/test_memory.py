"""The predicted bytes of a whole step under DeepSpeed against those that torch's allocator records on a CPU."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.comm import comm

from tests import processes
from tests.pretrain import synthetic
from tests.pretrain.model.allocator import peak_bytes, tensor_bytes
from tiphys.pretrain.distributed.layer_costs import typical_batch
from tiphys.pretrain.distributed.memory import Memory, Settings, Share, rank_memory
from tiphys.pretrain.engine import build_engine
from tiphys.pretrain.model.counting import Part, Pass, count_pass
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.transformer import DecisionModel

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "num_experts": 0,
    "vocab_size": 3000,
}
LARGE, SMALL = (6, 128), (1, 16)  # rows and positions: activations or the optimizer's step take most


class Done:
    def wait(self) -> None:
        pass


@pytest.fixture(autouse=True)
def collectives_in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one process. Gloo's thread may be the last one that holds a tensor, and the records do not see what it frees."""

    processes.alone()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: Done())
    backend: Any = comm.cdb
    for name in ("all_gather_function", "reduce_scatter_function"):
        monkeypatch.setattr(backend, name, copied)


def copied(output_tensor: torch.Tensor, input_tensor: torch.Tensor, **_: Any) -> Done:
    output_tensor.copy_(input_tensor.view_as(output_tensor))
    return Done()


@pytest.fixture(autouse=True)
def only_new_objects() -> Iterator[None]:
    """The collector looks only at what a test makes: a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def compare(stage: int, bf16: bool, accumulation: int, size: tuple[int, int], **config: Any) -> float:
    """Predicted ÷ recorded bytes of the third step, weights and optimizer included."""
    rows, length = size
    made = synthetic.config(**(SIZES | config))
    section = {
        "train_batch_size": rows * accumulation,
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    recipe = synthetic.recipe(deepspeed=section, objectives={"gato": {"context": length}})
    before = tensor_bytes()
    model = DecisionModel(made)
    trained = [p.numel() for p in model.parameters()]
    engine = build_engine(recipe, model, processes.alone())
    batch = typical_batch(made, rows * accumulation, length)
    for step in range(2):
        engine.train_step(dataclasses.replace(batch, step=step))
    steady = tensor_bytes() - before
    recorded = peak_bytes(lambda: engine.train_step(dataclasses.replace(batch, step=2)))
    engine.destroy()
    width = 2 if bf16 else 4
    share = Share(dense=sum(trained), expert=0, frozen=0, largest=max(trained), data=1, groups=1)
    settings = Settings(stage, width, sum(trained), False, False, False, accumulation, "cpu")
    part = Part(made).to(torch.bfloat16 if bf16 else torch.float32)
    micros = [to_tensors(batch.select(slice(i, i + rows))) for i in range(0, rows * accumulation, rows)]
    buckets = {"stay": stage < 2, "bucket": sum(trained) * width * (stage in (1, 2))}
    passes = max((count_pass(part, micro, **buckets) for micro in micros), key=lambda p: p.peak)
    found, between = rank_memory(share, settings, passes)
    assert between == pytest.approx(steady, rel=0.03)
    return found.total / (steady + recorded)


@pytest.mark.parametrize(
    ("stage", "bf16", "accumulation", "size"),
    [(1, True, 1, SMALL), (1, False, 2, LARGE), (2, True, 2, LARGE), (3, False, 1, LARGE)],
)
def test_a_step_takes_the_predicted_bytes(stage: int, bf16: bool, accumulation: int, size: tuple[int, int]) -> None:
    assert 0.995 <= compare(stage, bf16, accumulation, size) <= 1.03


@pytest.mark.long
@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, False), (1, True), (2, False), (2, True), (3, True)])
def test_steps_of_many_recipes(stage: int, bf16: bool, experts: int, accumulation: int, size: tuple[int, int]) -> None:
    ratio = compare(stage, bf16, accumulation, size, num_experts=experts)
    print(f"ratio {stage} {bf16} {experts} {accumulation} {size} {ratio:.4f}")
    assert 0.995 <= ratio <= 1.03


def predicted(stage: int, device: str = "cuda", data: int = 8, overlap: bool = False, in_flight: int = 1) -> Memory:
    share = Share(dense=10**9, expert=0, frozen=0, largest=10**8, data=data, groups=data)
    passes = Pass(inputs=10**6, kept=5 * 10**9, forward=6 * 10**9, peak=7 * 10**9, again=7 * 10**9, gradients=2 * 10**9)
    return rank_memory(share, Settings(stage, 2, 5 * 10**8, overlap, False, False, 4, device), passes, in_flight)[0]


def test_what_divides_weights_or_overlaps_is_seen() -> None:
    assert predicted(1).total > predicted(2).total
    assert predicted(1, data=1).masters == 8 * predicted(1).masters
    assert predicted(2, overlap=True).communication - predicted(2).communication == 2 * 5 * 10**8
    assert predicted(3).weights == 2 * 10**9 // 8
    assert predicted(3).communication >= 2 * 10**9  # gathered weights
    assert predicted(1, in_flight=3).activations - predicted(1).activations == 2 * (5 * 10**9 + 10**6)
    assert predicted(1).reserve > predicted(1, device="cpu").reserve == 0


def test_several_ranks_need_copies_for_what_they_send() -> None:
    """A step that is not held up by its activations: the end of the backward pass is the peak."""
    share = Share(dense=10**9, expert=0, frozen=0, largest=10**8, data=10, groups=10)
    small = Pass(inputs=0, kept=0, forward=0, peak=0, again=0, gradients=2 * 10**9)

    def of(stage: int, one: Share) -> Memory:
        return rank_memory(one, Settings(stage, 2, 5 * 10**8, False, False, False, 1, "cuda"), small)[0]

    assert of(2, share).activations == 2 * (5 + 5 + 1) * 10**8  # bucket, its copy, the largest gradient
    assert of(3, share).activations == 2 * (5 + 1 + 1) * 10**8  # bucket, own gradients, the largest gradient
