"""The small parts against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from tiphys.pretrain.model.layers import gated


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_gated_unit_equals_its_formula(rows, dtype):
    x = torch.randn(rows, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(rows, 6, dtype=dtype)
    gate, up = x.chunk(2, -1)
    expected = F.silu(gate) * up
    assert torch.equal(gated(x), expected)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (gated(x), expected))
    torch.testing.assert_close(ours, theirs)
    if dtype == torch.float64 and rows:
        assert torch.autograd.gradcheck(gated, x)
