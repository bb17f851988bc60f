"""Spikes are found, noise is not, and the verdict does not depend on resumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tiphys.pretrain.health import ROW, TRUST, WINDOW, Health, Spike


def noisy(steps: int, seed: int = 0) -> np.ndarray:
    """Losses that fall, with noise of heavy tails."""
    rng = np.random.default_rng(seed)
    return 1.0 + 3.0 * np.exp(-np.arange(steps) / 2000) + 0.05 * rng.standard_t(3, steps)


def first_spike(losses: np.ndarray, health: Health | None = None, start: int = 1) -> Spike | None:
    health = health or Health()
    spikes = (health.observe(step, float(loss), 1.0) for step, loss in enumerate(losses, start))
    return next((spike for spike in spikes if spike), None)


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_healthy_noisy_steps_have_no_spike(seed: int) -> None:
    health = Health()
    assert first_spike(noisy(10_000, seed), health) is None
    assert health.proven > 9000


def test_three_steps_in_a_row_far_above_are_a_spike_with_the_step_before() -> None:
    losses = noisy(400)
    losses[300] += 5  # one alone is none
    losses[350:] += 5
    spike = first_spike(losses)
    assert spike is not None
    assert (spike.first, spike.last) == (350, 350 + ROW)
    assert "3 steps in a row above" in spike.why


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_not_finite_is_a_spike_even_in_the_warm_up(value: float) -> None:
    health = Health(warmup=100)
    assert health.observe(1, 2.0, 1.0) is None
    found = health.observe(2, value, 1.0, {0: (1.0, 4), 3: (value, 4)})
    assert found is not None
    assert (found.first, found.last, found.tasks) == (2, 2, (3,))
    norm = Health().observe(1, 1.0, value)
    assert norm is not None
    assert "gradient norm" in norm.why


def test_a_value_that_is_not_finite_does_not_disable_the_rule() -> None:
    """It does not enter the window: a NaN there would make every later limit NaN."""
    health, losses = Health(), noisy(400)
    first_spike(losses[:200], health)
    assert health.observe(201, math.nan, 1.0) is not None
    losses[300:] += 5
    assert first_spike(losses[201:], health, 202) is not None


def test_the_warm_up_and_a_change_of_the_mixture_are_exempt() -> None:
    losses = noisy(400)
    losses[300:] += 5
    assert first_spike(losses, Health(warmup=1000)) is None
    health = Health()
    assert first_spike(losses[:300], health) is None
    health.forget()
    assert first_spike(losses[300:], health, 301) is None


def test_a_checkpoint_is_trusted_after_enough_healthy_steps() -> None:
    health, losses = Health(), noisy(WINDOW + 2 * TRUST)
    first_spike(losses[: WINDOW + 10], health)
    step = WINDOW + 10
    for later in range(1, TRUST + 1):
        assert not health.trusts(step)
        health.observe(step + later, float(losses[step + later - 1]), 1.0)
    assert health.trusts(step)
    assert not health.trusts(step + 1)


def test_its_state_continues_a_run_exactly() -> None:
    losses = noisy(500)
    losses[400:] += 5
    whole, half, rest = Health(), Health(), Health()
    expected = first_spike(losses, whole)
    assert first_spike(losses[:401], half) is None
    rest.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert first_spike(losses[401:], rest, 402) == expected
    assert rest.state_dict() == whole.state_dict()
