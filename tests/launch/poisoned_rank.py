"""`launch/train.py` whose rank 1 draws a batch with a NaN loss in step 9, for tests: poisoned_rank.py RECIPE [key=value …]"""

from __future__ import annotations

import os
import sys

from tests.launch.poison import Poison
from tiphys.launch import rollback, train
from tiphys.pretrain import engine, health

health.TRUST = rollback.TRUST = 3
if os.environ["RANK"] == "1":
    poison = Poison((8,))
    engine.Engine.train_step = lambda self, batch: poison(self, batch)  # type: ignore[method-assign]
sys.exit(train.main(sys.argv[1:]))
