"""A rank that prints at which addresses it listens, and what it gathered. `test_submit.py` starts two."""

import psutil

from tiphys.pretrain.parallel import ParallelDims
from tiphys.recipes.sections.training import Parallel

world = ParallelDims(Parallel())
gathered = world.gather({"rank": world.rank, "text": "é" * world.rank})
connections = psutil.Process().net_connections()
print("listens at", sorted({c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}))
print("gathered", gathered)
world.barrier()
world.close()
