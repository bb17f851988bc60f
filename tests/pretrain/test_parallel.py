"""The grid of a launch against DeepSpeed's topology, and a single process without a launcher."""

from __future__ import annotations

import pytest

from tests import processes
from tiphys.pretrain.parallel import Grid


@pytest.mark.parametrize(
    "world, pipeline, expert", [(1, 1, 1), (4, 1, 2), (4, 2, 1), (4, 2, 2), (8, 2, 2), (8, 4, 1), (6, 3, 2)]
)
def test_the_grid_equals_deepspeeds_topology(world: int, pipeline: int, expert: int) -> None:
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    topology = PipeDataParallelTopology(num_pp=pipeline, num_dp=world // pipeline)
    for rank in range(world):
        grid = Grid(rank, world, pipeline, expert)
        place = topology.get_coord(rank)
        assert (grid.stage, grid.replica) == (place.pipe, place.data)
        assert grid.is_first_stage == (place.pipe == 0)
        assert grid.is_last_stage == (place.pipe == pipeline - 1)
        # an expert group has consecutive ranks of one stage
        assert grid.expert_rank == rank % expert


def test_one_process_needs_no_launcher() -> None:
    world = processes.alone()
    assert (world.rank, world.world, world.data, world.stage) == (0, 1, 1, 0)
    assert world.sum([1.5, 2]).result() == [1.5, 2.0]
    assert world.gather("x") == ["x"]
    assert (world.home.process, world.home.processes) == (0, 1)
    world.barrier()
