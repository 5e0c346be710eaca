"""Whether the best config is better for sure: what is said of the runs with other seeds."""

import dataclasses
import json
from pathlib import Path

import pytest

from snr_ray.errors import InputError
from snr_ray.stages.sweeping.confirm import CONFIRMED, Confirmation, read_confirmation


def found(best: list[float], given: list[float], objective: str = "swap") -> Confirmation:
    return Confirmation(objective, list(range(1, len(best) + 1)), best, given)


def test_a_difference_within_the_spread_may_be_luck() -> None:
    one = found([21.0, 21.4, 20.7], [20.9, 20.6, 21.2])
    low, high = one.interval
    assert low < 0 < one.gain < high
    assert one.sentence().endswith("so the difference may be luck.")


def test_a_difference_far_beyond_the_spread_is_sure() -> None:
    one = found([23.0, 23.1, 22.9], [20.0, 20.1, 20.2])
    assert one.interval[0] > 0
    assert "23.00 ± 0.10 dB" in one.sentence()
    assert "20.10 ± 0.10: +2.90 dB, with 95% confidence between +2.6" in one.sentence()
    assert one.sentence().endswith("so the best is better for sure.")


def test_fewer_seconds_are_better_and_more_are_worse() -> None:
    less, more = [0.010, 0.011, 0.0105], [0.050, 0.051, 0.0505]
    assert found(less, more, "seconds").sentence().endswith("better for sure.")
    assert found(more, less, "seconds").sentence().endswith("worse for sure.")


def test_the_interval_widens_with_the_spread() -> None:
    narrow = found([21.0, 21.1, 21.2], [20.0, 20.1, 20.2]).interval
    wide = found([20.5, 21.1, 21.7], [19.5, 20.1, 20.7]).interval
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0])
    assert sum(wide) == pytest.approx(sum(narrow))


def test_runs_that_are_all_the_same_have_no_spread() -> None:
    assert found([2.0, 2.0], [1.0, 1.0]).interval == (1.0, 1.0)


def test_what_was_found_is_read_back(tmp_path: Path) -> None:
    assert read_confirmation(tmp_path) is None
    one = found([21.0, 21.4], [20.9, 20.6])
    (tmp_path / CONFIRMED).write_text(json.dumps(dataclasses.asdict(one)))
    assert read_confirmation(tmp_path) == one
    for damaged in ("", "[1]", "null", '{"seeds": [1]}', '{"objective": "x", "seeds": [], "best": '
                    '[1, 2], "given": [1, 2]}', "\x00"):  # fmt: skip
        (tmp_path / CONFIRMED).write_text(damaged)
        with pytest.raises(InputError, match=r"is damaged .* --confirm makes it anew"):
            read_confirmation(tmp_path)
