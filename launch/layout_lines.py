"""What a layout needs, in words."""

from __future__ import annotations

from tiphys.dataio.messages import counted
from tiphys.launch.display import human_bytes
from tiphys.launch.layout import Needs


def lines(found: Needs, memory: int = 0) -> list[str]:
    """What a layout needs, for people. `memory`: bytes of one device; 0: not known."""
    grid, d = found.grid, found.derived
    out = [
        f"layout       {counted(grid.world, 'device')} = {grid.pipeline} pipeline × {grid.data} data, {grid.expert} expert; "
        f"ZeRO-{d.stage}, "
        f"{'bf16' if d.bf16 else 'fp32'}; {d.accumulation} × {d.micro_batch} rows a rank"
        + (", checkpointing" if found.checkpointing else ""),
        f"model        {found.parameters / 1e6:,.2f}M parameters",
    ]
    for stage in found.stages:
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in vars(stage.peak).items() if size)
        even = "" if stage.even == stage.peak else f"; {human_bytes(stage.even.total)} if all experts are used alike"
        name = "every rank" if stage.name == "all" else f"{stage.name} stage"
        between = f"{human_bytes(stage.between)} between steps"
        out.append(f"memory       {name}: {human_bytes(stage.peak.total)} at most, {between}{even}")
        out.append(f"             {parts}")
    out.append(f"host         {', '.join(f'{name} {human_bytes(size)}' for name, size in found.host.items() if size)}")
    sent = ", ".join(f"{name} {human_bytes(size)}" for name, size in found.traffic.items() if size)
    out.append(f"traffic      {sent or 'none'} a step and rank")
    if grid.pipeline > 1:
        out.append(f"bubble       {found.bubble:.1%} of the passes")
    if not found.cut:
        out.append(
            "stages       cut by operations; the run cuts them by measured times and may move layers (parallel.measure)"
        )
    if found.seconds is not None:
        out.append(
            f"time         {found.seconds:.3g} s a step, {found.tokens / found.seconds:,.0f} tokens/s, loader "
            f"{human_bytes(found.loader)}/s a rank ({found.basis})"
        )
    else:
        out.append(
            "time         not known: run `tiphys layout --calibrate` on the machine, or name its device with --device"
        )
    if memory:
        fits = found.peak <= memory
        out.append(f"{'fits' if fits else 'does not fit'}: needs {_gib(found.peak)} of {_gib(memory)} GiB")
    return out


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}" if size < 2**30 else f"{size / 2**30:.1f}"


def line(found: Needs, steps: int) -> str:
    """One line for the beginning of a run. `steps`: of its plan, whose largest rows were taken."""
    most = max(found.stages, key=lambda s: s.peak.total)
    between = f"{human_bytes(most.between)} between steps"
    rows = f"for the largest rows of {steps} steps, of all kinds of tokens"
    return f"{human_bytes(most.peak.total)} a rank at most, {between} ({rows})"
