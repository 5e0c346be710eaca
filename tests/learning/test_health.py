"""When a run is given up: bad steps in a row, a loss far above its start for long; not before."""

import math

import pytest

from snr_ray.learning.health import HIGH_STEPS, SKIPS_IN_A_ROW, Diverged, Health


def test_a_loss_that_falls_is_well() -> None:
    health = Health(0.01, first_loss=20.0)
    for step, loss in ((25, 18.0), (50, 3.0), (75, -1.5), (100, -2.0)):
        assert health.judge(step, loss, 0, last=step == 100)


@pytest.mark.parametrize("first", [20.0, -2.0, 0.01])
def test_a_loss_far_above_its_start_ends_the_run_only_after_long(first: float) -> None:
    health = Health(1.0, first_loss=first)
    assert health.judge(25, first + 1, 0, last=False)
    high = first + 11 * max(1, abs(first))
    for step in range(50, 25 + HIGH_STEPS, 25):
        assert not health.judge(step, high, 0, last=False)
    with pytest.raises(Diverged, match=r"diverged: at step 125 .* since step 25; .* \(it was 1\)"):
        health.judge(125, high, 0, last=False)


def test_a_loss_that_comes_back_is_forgiven() -> None:
    health = Health(1.0, first_loss=1.0)
    for step in range(25, 1000, 25):
        high = step % 75 == 0
        assert health.judge(step, 50.0 if high else 0.5, 0, last=False) != high


def test_a_run_does_not_end_on_a_loss_far_above_its_start() -> None:
    with pytest.raises(Diverged, match="at step 20 the loss is 1e"):
        Health(1.0, first_loss=3.0).judge(20, 1e9, 0, last=True)
    with pytest.raises(Diverged, match="diverged"):
        Health(1.0, first_loss=3.0).judge(20, math.inf, 0, last=True)


def test_skipped_steps_end_the_run_where_they_are_many_in_a_row() -> None:
    health = Health(0.01, first_loss=3.0)
    assert health.judge(25, 2.0, SKIPS_IN_A_ROW - 1, last=False)
    with pytest.raises(Diverged, match=r"gradients of 10 steps in a row were not finite; the last"):
        health.judge(50, math.nan, SKIPS_IN_A_ROW, last=False)


def test_a_run_that_took_no_step_does_not_end_as_done() -> None:
    assert Health(0.01).judge(5, math.nan, 5, last=False)
    with pytest.raises(Diverged, match=r"at step 8: the gradients of 8 steps in a row were not"):
        Health(0.01).judge(8, math.nan, 8, last=True)
