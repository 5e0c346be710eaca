"""A compiled step: one graph, the same numbers, and a way out where it does not work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config, InputError
from snr_ray.learning.batches import Batch, Share, StepNormal
from snr_ray.learning.compiled import WORTH_STEPS, Compiled, is_wanted
from snr_ray.learning.fit import Learner

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def batch(n: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(n)
    clean = torch.rand(n, 1, 16, 16, generator=generator)
    return Batch(clean, torch.rand(n, 2, 1, 16, 16, generator=generator))


def no_compiler(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


def learner(tiny: Config, backend: str | Callable[..., Any] | None, **changes: object) -> Learner:
    small = {"model.unrolled": 1, "train.batch_size": 4} | changes
    one = Learner(configs.replace(tiny, small))
    if backend:
        one.compiled = Compiled(one.objective, backend=backend)
    return one


def test_a_step_is_one_graph_and_the_same_to_rounding(tiny: Config) -> None:
    # Traced, differentiated and run as one graph (fullgraph), without the code generator.
    plain, compiled = learner(tiny, None), learner(tiny, "aot_eager")
    graphs = []
    for _ in range(3):
        a, b = plain.train_step(batch()), compiled.train_step(batch())
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1  # another step, warm-up and numbers are no new graph
    weights = zip(plain.objective.parameters(), compiled.objective.parameters(), strict=True)
    for x, y in weights:
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_numbers_are_those_that_the_objective_would_have_drawn(tiny: Config) -> None:
    one = learner(tiny, None)
    normal, again = (StepNormal(0, 7, Share(), CPU) for _ in range(2))
    drawn = Compiled(one.objective, backend="eager").draw(batch(), normal)
    one.objective._compiled_call_impl = None
    asked = one.objective(batch(), again, 1.0)
    given = one.objective(batch(), drawn, 1.0)
    assert drawn.given == len(drawn.numbers) > 5
    assert float(asked["loss"].detach()) == float(given["loss"].detach())


def test_what_does_not_compile_goes_on_without(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, broken = learner(tiny, None), learner(tiny, no_compiler)
    expected = plain.train_step(batch())
    assert float(broken.train_step(batch())["loss"]) == pytest.approx(float(expected["loss"]))
    assert broken.compiled is None
    said = capsys.readouterr().err
    assert "no compiler here" in said
    assert "train.compile=false leaves it out" in said


def test_auto_is_for_gpus_and_runs_that_are_long_enough(tiny: Config) -> None:
    long = configs.replace(tiny, {"train.steps": WORTH_STEPS})
    assert is_wanted(long, GPU)
    assert not is_wanted(long, CPU)
    assert not is_wanted(tiny, GPU)
    assert not is_wanted(configs.replace(long, {"train.compile": False}), GPU)
    assert is_wanted(configs.replace(tiny, {"train.compile": True}), CPU)
    ranged = {"noise.views_per_pixel": [0.2, 0.9]}
    assert not is_wanted(configs.replace(long, ranged), GPU)
    with pytest.raises(InputError, match="does not go with noise"):
        configs.replace(long, ranged | {"train.compile": True})
    with pytest.raises(InputError, match=r"train\.compile must be one of auto, True, False"):
        configs.replace(tiny, {"train.compile": 1})
