"""Numerics have not changed. golden.py says how to write the golden values again."""

import json

import numpy as np
import pytest

from tests.golden import golden

KNOWN = json.loads(golden.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("objective", golden.OBJECTIVES)
def test_tokens_of_given_windows_are_unchanged(objective):
    assert golden.tokens(objective) == KNOWN[objective]["tokens"]


@pytest.mark.parametrize("objective", golden.OBJECTIVES)
def test_draws_of_the_plan_are_unchanged(objective):
    assert golden.draws(objective) == KNOWN[objective]["draws"]


@pytest.mark.parametrize("objective", golden.OBJECTIVES)
def test_losses_of_twenty_steps_are_unchanged(objective, tmp_path):
    # Another processor or BLAS adds numbers in another order, so losses are equal to the bit only on similar machines.
    losses, _ = golden.train(objective, str(tmp_path))
    np.testing.assert_allclose(losses, KNOWN[objective]["losses"], rtol=1e-4)
