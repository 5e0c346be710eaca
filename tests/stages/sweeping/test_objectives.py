"""What a sweep looks for, as its command line says it."""

import math

import pytest

from snr_ray.errors import InputError
from snr_ray.stages.sweeping.objectives import OBJECTIVES, Goals, read_goals

ROW = {"step": 9, "loss": 1.0, "swap_psnr": 21.0, "inject_psnr": 33.0, "seconds_per_image": 0.02}


def test_the_swap_is_what_is_looked_for_by_default() -> None:
    assert read_goals() == Goals()
    assert Goals().directions == ["maximize"]
    assert Goals().identity() == {"objectives": None, "bounds": None}


def test_directions_are_those_of_the_numbers() -> None:
    goals = read_goals(["inject", "seconds", "swap"])
    assert goals.first.metric == "inject_psnr"
    assert goals.directions == ["maximize", "minimize", "maximize"]


def test_only_one_number_that_checkpoints_have_can_prune() -> None:
    assert read_goals(["swap"]).prunes
    assert read_goals(["inject"], at_most=["seconds=1"]).prunes
    assert not read_goals(["seconds"]).prunes
    assert not read_goals(["swap", "inject"]).prunes


@pytest.mark.parametrize("limit", [0.001, 0.02, 0.5])
def test_a_bound_is_kept_to_on_its_side_alone(limit: float) -> None:
    most = read_goals(at_most=[f"seconds={limit}"]).bounds[0]
    least = read_goals(at_least=[f"seconds={limit}"]).bounds[0]
    assert most.excess(ROW) == -least.excess(ROW)
    assert (most.excess(ROW) <= 0) == (limit >= 0.02)


def test_measured_are_the_numbers_that_a_sweep_knows() -> None:
    goals = read_goals(["swap"], at_most=["seconds=1"])
    assert goals.measured(ROW) == {one.metric: ROW[one.metric] for one in OBJECTIVES.values()}
    with pytest.raises(InputError, match="seconds per image of the trial is not a number"):
        goals.measured({"swap_psnr": 21.0})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"names": ["speed"]}, "--objective takes one of swap, inject, seconds, but got 'speed'"),
        ({"names": ["swap", "swap"]}, "each objective once, but got swap 2 times"),
        ({"at_most": ["seconds"]}, "--at-most takes NAME=NUMBER, such as --at-most seconds=0.01"),
        ({"at_most": ["seconds=fast"]}, "but got 'seconds=fast'"),
        ({"at_least": ["inject=nan"]}, "--at-least takes NAME=NUMBER"),
        ({"at_most": ["time=1"]}, "--at-most takes one of swap, inject, seconds, but got 'time'"),
        ({"at_most": ["seconds=1", "seconds=2"]}, "one bound on a side, but seconds has several"),
        ({"at_most": ["seconds=0"]}, "seconds per image is above 0 s whatever is tried"),
        ({"at_most": ["swap=-3"]}, "swap PSNR is above 0 dB whatever .* got swap=-3; give another"),
        ({"at_least": ["inject=101"]}, "injection PSNR is at most 100 dB whatever is tried"),
        ({"at_most": ["swap=20"], "at_least": ["swap=21"]}, "leave nothing between them"),
    ],
)
def test_words_that_are_no_goal_are_refused(words: dict[str, list[str]], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_goals(**words)


def test_values_are_shown_in_the_digits_of_their_unit() -> None:
    assert OBJECTIVES["swap"].show(21.456) == "21.46"
    assert OBJECTIVES["seconds"].show(0.0123456) == "0.0123"
    assert OBJECTIVES["seconds"].show(math.nan) == "nan"
