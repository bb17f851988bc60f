"""How fast a device computes and moves bytes: a table for known GPUs, or what `layout_calibration.py` measured here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiphys.dataio.atomic import write_json

MOVED = 28  # bytes that AdamW moves for each parameter: four float32 are read, three written


@dataclass(frozen=True)
class Rates:
    """Of one device.

    flops       operations a second by which the passes of larger micro-batches take longer
    memory      bytes a second that the optimizer's step moves
    link        bytes a second between two devices
    basis       where the numbers come from
    start       seconds that a layer takes for a micro-batch, forward and backward, whatever its size: the time to start kernels
    recomputed  `flops` and `start` with `model.checkpointing`; None: a third more is computed
    handling    ZeRO stage, as JSON has it -> seconds a parameter that a step takes beside passes, optimizer and traffic: with one
                micro-batch, and with each further one
    exchange    seconds that the tokens of a micro-batch take to experts on other ranks and back, beside their bytes: of a layer
    hop         seconds that a micro-batch takes to the next pipeline stage, beside its bytes
    """

    flops: float
    memory: float
    link: float
    basis: str
    start: float = 0.0
    recomputed: tuple[float, float] | None = None
    handling: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    exchange: float = 0.0
    hop: float = 0.0

    def passes(self, checkpointing: bool) -> tuple[float, float]:
        """`flops` and `start`."""
        if not checkpointing:
            return self.flops, self.start
        flops, start = self.recomputed or (self.flops * 3 / 4, self.start * 4 / 3)
        return flops, start

    def handled(self, stage: int, parameters: int, accumulation: int) -> float:
        """Seconds that a step takes beside passes, optimizer and traffic. A stage that was not measured takes none."""
        first, further = self.handling.get(str(stage), (0.0, 0.0))
        return parameters * (first + further * (accumulation - 1))


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
    basis = f"data sheet of {name}, {REACHED:.0%} of its peak; without the time to start kernels, so a small model takes longer"
    return Rates(REACHED * peak, 0.7 * memory, 0.7 * link, basis)


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


def _machine(width: int) -> str:
    import platform

    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{platform.node()} / {name} / {'bfloat16' if width == 2 else 'float32'}"


def keep(width: int, found: Rates) -> None:
    file, known = rates_file(), dict[str, Any]()
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**known, _machine(width): asdict(found)})
