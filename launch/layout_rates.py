"""How fast a device computes and moves bytes: a table for known GPUs, or what `tiphys layout --calibrate` measured here."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import write_json

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.tokens.batch import TokenBatch


@dataclass(frozen=True)
class Rates:
    """Of one device.

    flops   operations a second that the model's passes reach
    memory  bytes a second that the optimizer's step moves
    link    bytes a second between two devices
    basis   where the numbers come from
    """

    flops: float
    memory: float
    link: float
    basis: str


REACHED = 0.4  # share of the peak that the passes of a large model usually reach
# Peaks of bfloat16 without sparsity, memory and NVLink (or PCIe) of one direction, from the vendors' data sheets.
_TABLE = {
    "A100": (312e12, 2.0e12, 300e9),
    "H100": (989e12, 3.35e12, 450e9),
    "H200": (989e12, 4.8e12, 450e9),
    "B200": (2250e12, 8.0e12, 900e9),
    "L40S": (362e12, 0.86e12, 32e9),
}
DEVICES = tuple(_TABLE)


def table_rates(name: str) -> Rates:
    peak, memory, link = _TABLE[name]
    return Rates(REACHED * peak, 0.7 * memory, 0.7 * link, f"data sheet of {name}, {REACHED:.0%} of its peak")


def rates_file() -> Path:
    from tiphys.dataio.format.document import cache_folder

    return cache_folder() / "rates.json"


def measured_rates(width: int) -> Rates | None:
    """What was measured on this machine for weights of `width` bytes; None: nothing was."""
    try:
        found = json.loads(rates_file().read_text(encoding="utf-8"))[_machine(width)]
        return Rates(**found)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def calibrate(config: DecisionConfig, batch: TokenBatch, width: int) -> Rates:
    """Measure this machine with a model and one micro-batch of it, and keep the result for later commands."""
    import torch

    from tiphys.pretrain.model.flops import flops_per_batch
    from tiphys.pretrain.model.inputs import to_tensors
    from tiphys.pretrain.model.transformer import DecisionModel

    dtype = torch.bfloat16 if width == 2 else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: torch.nn.Module = DecisionModel(config).train()
    model.to(device, dtype)
    inputs = to_tensors(batch, device)

    def passes() -> None:
        model(inputs).loss.backward()

    seconds = _fastest(passes, device)
    weights = torch.nn.Parameter(torch.zeros(1 << 22, device=device))
    weights.grad = torch.zeros_like(weights)
    adam = torch.optim.AdamW([weights])
    step = _fastest(adam.step, device)
    source = torch.zeros(1 << 24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _fastest(lambda: target.copy_(source), device)
    again = 4 / 3 if config.checkpointing else 1.0
    found = Rates(
        flops=again * flops_per_batch(config, batch) / seconds,
        memory=MOVED * weights.numel() / step,
        link=source.numel() / copy / 2,
        basis=f"measured on this machine ({time.strftime('%Y-%m-%d')})",
    )
    _keep(width, found)
    return found


MOVED = 28  # bytes that AdamW moves for each parameter: four float32 are read, three written


def _fastest(work: Any, device: Any, rounds: int = 4) -> float:
    import torch

    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _machine(width: int) -> str:
    import platform

    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{platform.node()} / {name} / {'bfloat16' if width == 2 else 'float32'}"


def _keep(width: int, found: Rates) -> None:
    file, known = rates_file(), dict[str, Any]()
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**known, _machine(width): asdict(found)})
