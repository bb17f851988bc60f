"""How small published differences of real AdamW runs are, how fast they are encoded and applied, how long they hold `act`.

python -m benchmarks.follow [--size 64]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tiphys.dataio.messages import say
from tiphys.pretrain.follow.encode import BLOCK, apply, encode, encode_block
from tiphys.pretrain.follow.weights import Weights, raw, swap


def published(model: nn.Module) -> Weights:
    """Its weights as they are published, in bf16."""
    return Weights({name: raw(p.detach().bfloat16()) for name, p in sorted(model.state_dict().items())})


def trained(rate: float, gaps: list[int], warm: int = 40, hidden: int = 128) -> dict[int, tuple[Weights, Weights]]:
    """Gap -> weights of a small Transformer before and after so many steps of AdamW, on sequences that can be learned."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(256, hidden), nn.TransformerEncoder(layer, 2), nn.Linear(hidden, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    found, start = {}, None
    for step in range(warm + max(gaps) + 1):
        if step == warm:
            start = published(model)
        if step - warm in gaps and start is not None:
            found[step - warm] = (start, published(model))
        first, stride = torch.randint(256, (8, 1)), torch.randint(1, 7, (8, 1))
        tokens = (first + stride * torch.arange(33)) % 256
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def whole_bytes(weights: Weights) -> int:
    """Bytes of all tensors as compressed byte planes."""
    return sum(
        len(part)
        for tensor in weights.tensors.values()
        for start in range(0, len(tensor.elements()), BLOCK)
        for part in encode_block("whole", tensor, tensor, start)
    )


def rate_of(weights: Weights, call: Callable[[], object], clock: Callable[[], float]) -> float:
    """MB of raw weights a second."""
    began = clock()
    call()
    return weights.bytes / 1e6 / (clock() - began)


def shares(folder: Path) -> None:
    say("| lr | gap | delta ÷ raw | delta ÷ whole by planes |\n|---|---|---|---|")
    for rate in (1e-3, 1e-4, 1e-5):
        for gap, (base, new) in trained(rate, [1, 10, 100]).items():
            size = encode(base, new, folder / "delta")
            if apply(base, folder / "delta").digest != new.digest:
                raise AssertionError("not lossless")
            say(f"| {rate:g} | {gap} | {size / new.bytes:.3f} | {size / whole_bytes(new):.3f} |")


def speeds(folder: Path, millions: int) -> None:
    """A model of so many million parameters, whose change is like that of 100 steps at a learning rate of 1e-4."""
    drawn = torch.Generator().manual_seed(0)
    shapes = [(1024, 1024)] * max(1, millions * 1_000_000 >> 20)
    model = nn.ParameterDict({f"w{i}": nn.Parameter(torch.empty(shape)) for i, shape in enumerate(shapes)})
    for p in model.parameters():
        p.data.normal_(0, 0.02, generator=drawn)
    base = published(model)
    for p in model.parameters():
        p.data += torch.empty_like(p).normal_(0, 2e-3, generator=drawn)
    new, file = published(model), folder / "delta"
    for threads in (1, 2):
        clock = time.process_time if threads == 1 else time.perf_counter
        kind = "a core (CPU time)" if threads == 1 else "two threads (wall)"
        say(f"encode, {kind}: {rate_of(new, lambda: encode(base, new, file, threads), clock):.0f} MB/s")  # noqa: B023
        say(f"apply, {kind}: {rate_of(new, lambda: apply(base, file, 0, threads), clock):.0f} MB/s")  # noqa: B023
    fresh = Weights(dict(new.tensors))
    say(f"digest (CPU time): {rate_of(new, lambda: fresh.digest, time.process_time):.0f} MB/s")
    began = time.perf_counter()
    ready = new.prepare(model)
    prepared = time.perf_counter()
    old = swap(model, ready)  # kept until it was timed, as a thread keeps it
    swapped = time.perf_counter()
    say(f"prepare {1e3 * (prepared - began):.0f} ms in the thread")
    say(f"swap {1e3 * (swapped - prepared):.2f} ms in act, of {len(old)} tensors")


def windows(folder: Path) -> None:
    """A policy of 59M parameters: an action, and the first one after new weights, for which the window is read again."""
    from benchmarks.act import TASKS, observations, policies
    from tiphys.recipes.sections.model import Model

    for context in (64, 256, 1024):
        sizes = Model(layers=12, hidden=640, heads=10, text_vocabulary=300)
        policy, _ = policies("gato", context, folder / str(context), sizes)
        task, rng = TASKS["gato"], np.random.default_rng(0)
        policy.reset(task.name, 1)
        took = []
        for _ in range(policy.history.layout.steps(0, context) - policy.history.reserve):
            seen = observations(task, 1, rng)
            began = time.perf_counter()
            policy.act(seen, [0.0])
            took.append(time.perf_counter() - began)
        policy.forget()
        seen, began = observations(task, 1, rng), time.perf_counter()
        policy.act(seen, [0.0])
        again = time.perf_counter() - began
        say(f"context {context}: act {1e3 * statistics.median(took):.1f} ms, after new weights {1e3 * again:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64, help="million parameters of the model whose speed is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        speeds(Path(folder), args.size)
        windows(Path(folder))
        shares(Path(folder))


if __name__ == "__main__":
    main()
