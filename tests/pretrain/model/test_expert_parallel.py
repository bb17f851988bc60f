"""Experts divided among processes against all experts in one process."""

import os
import socket
import subprocess
import sys

import pytest

from tests.processes import REPOSITORY


def one_rank() -> None:
    """Each of two ranks has half of the experts and other rows. Sums over the ranks equal those of the whole model."""
    import deepspeed.ops
    import torch
    import torch.distributed as dist

    from tests.pretrain.model.model_fakes import make_batch, make_config
    from tiphys.pretrain.model.expert_parallel import ShardedExperts, shard_experts
    from tiphys.pretrain.model.inputs import to_tensors
    from tiphys.pretrain.model.moe import mixtures, step_counts
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.tokens.batch import TokenBatch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    rank, size = dist.get_rank(), dist.get_world_size()
    for k, favourite in ((2, None), (1, 0), (1, 3)):
        config = make_config(num_experts_per_tok=k, balance=0.3)
        whole, part = (DecisionModel(config, seed=5).train() for _ in range(2))
        for model in (whole, part):
            for moe in mixtures(model):
                if favourite is not None:
                    torch.nn.init.constant_(moe.router.modality[:, favourite], 40.0)
        shard_experts(part, config, rank, size)
        for module in part.modules():
            if isinstance(module, ShardedExperts):
                module.set_deepspeed_parallelism()
        batches = [make_batch(rows=3, seed=k), make_batch(rows=1, seed=9) if k > 1 else TokenBatch.empty(7, 40, 2)]
        targets, tokens = sum(b.targets for b in batches), sum(b.real_tokens for b in batches)
        losses = torch.zeros(2)
        for batch in batches:
            out = whole(to_tensors(batch), targets, tokens)
            out.loss.backward()
            losses[0] += out.loss.detach()
        out = part(to_tensors(batches[rank]), targets, tokens)
        out.loss.backward()
        losses[1] = out.loss.detach()
        dist.all_reduce(losses[1])
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
        for name, parameter in part.named_parameters():
            expected = whole.get_parameter(name).grad
            gradient = parameter.grad.clone()
            if getattr(parameter, "allreduce", True):
                dist.all_reduce(gradient)
            else:
                assert parameter.shape[0] == config.num_experts // size
                expected = expected.chunk(size)[rank]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)
        counts = step_counts(part)[0]
        dist.all_reduce(counts)
        assert torch.equal(counts, step_counts(whole)[0])
    dist.destroy_process_group()


@pytest.mark.long
def test_experts_divided_among_ranks_equal_the_whole_model():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    base = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**base, "PYTHONPATH": str(REPOSITORY), "RANK": str(r), "LOCAL_RANK": str(r), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [p.communicate(timeout=500)[0] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(t[-3000:] for t in outputs)


if __name__ == "__main__":
    one_rank()
