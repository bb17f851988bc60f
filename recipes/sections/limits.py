"""The largest numbers of a recipe, far above what anybody trains.

They keep a slip of the pen from being a run that hangs or fills the memory.
"""

from __future__ import annotations

SEEDS = 2**63 - 1  # the largest seed
STEPS = 10**12
POSITIONS = 2**24  # tokens or steps of one window
