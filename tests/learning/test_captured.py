"""A step that is compiled or captured: one graph, the same numbers, one sentence where it does not
work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from snr_ray import configfile as configs
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning import learner as learners
from snr_ray.learning.batches import Batch, Share, StepNormal
from snr_ray.learning.captured import is_capturable
from snr_ray.learning.drawing import Drawing
from snr_ray.learning.learner import Learner

CPU = torch.device("cpu")
RANGE = {"noise.views_per_pixel": [0.2, 0.9], "train.sizes": [16]}


def batch(n: int = 4, *, ranged: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(n)
    clean = torch.rand(n, 1, 16, 16, generator=generator)
    if ranged:
        pairs = torch.randint(4, 14, (n // 2, 3), generator=generator)
        return Batch(clean, n_views=pairs.repeat_interleave(2, dim=0))
    return Batch(clean, torch.rand(n, 2, 1, 16, 16, generator=generator))


def no_compiler(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


@pytest.fixture
def learner(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Learner]:
    def made(backend: str | Callable[..., Any] | None = None, **changes: object) -> Learner:
        monkeypatch.setattr(learners, "BACKEND", backend)
        small = {"model.unrolled": 1, "train.batch_size": 4, "train.compile": bool(backend)}
        return Learner(configs.replace(tiny, small | changes))

    return made


@pytest.mark.parametrize("ranged", [False, True])
def test_a_step_is_one_graph_and_the_same_to_rounding(
    learner: Callable[..., Learner], ranged: bool
) -> None:
    # Traced, differentiated and run as one graph (fullgraph), without the code generator.
    torch._dynamo.reset()
    changes: dict[str, object] = dict(RANGE) if ranged else {}
    plain, compiled = learner(**changes), learner("aot_eager", **changes)
    graphs = []
    for _ in range(3):
        a, b = (its.train_step(batch(ranged=ranged)) for its in (plain, compiled))
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1  # another step, warm-up and numbers are no new graph
    weights = zip(plain.objective.parameters(), compiled.objective.parameters(), strict=True)
    for x, y in weights:
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ranged", [False, True])
def test_numbers_are_those_that_the_objective_would_have_drawn(
    learner: Callable[..., Learner], ranged: bool
) -> None:
    one = learner(**(RANGE if ranged else {}))
    normal, again = (StepNormal(0, 7, Share(), CPU) for _ in range(2))
    drawn = Drawing(one.objective)(batch(ranged=ranged), normal)
    whole = one.with_noise(batch(ranged=ranged))
    asked = one.objective(whole, again, 1.0)
    given = one.objective(whole, drawn, 1.0)
    assert drawn.given == len(drawn.numbers) > 5
    assert float(asked["loss"].detach()) == float(given["loss"].detach())


@pytest.mark.parametrize("ranged", [False, True])
def test_what_is_captured_is_the_step(learner: Callable[..., Learner], ranged: bool) -> None:
    # On a GPU it is replayed; here it runs as it is, with numbers drawn before.
    changes: dict[str, object] = dict(RANGE) if ranged else {}
    plain, other = learner(**changes), learner(**changes)
    for step in range(3):
        images = batch(ranged=ranged)
        expected = plain.train_step(images)
        other._set_rates()
        drawn = other.drawing(images, StepNormal(other.config.seed, step, Share(), CPU))
        parts = other._step(images, drawn, torch.tensor(other._warmup))
        other._follow(parts["taken"])
        other.step += 1
        assert parts.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(parts[name], value, msg=name)
    weights = zip(plain.average.parameters(), other.average.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_without_a_compiler_there_is_one_sentence(learner: Callable[..., Learner]) -> None:
    torch._dynamo.reset()
    with pytest.raises(InputError, match=r"needs a compiler .* no compiler here; leave it out"):
        learner(no_compiler).train_step(batch())


def test_what_is_captured_and_what_compiled(tiny: Config) -> None:
    assert is_capturable(tiny)
    assert not is_capturable(configs.replace(tiny, {"train.compile": False}))
    assert not is_capturable(configs.replace(tiny, {"train.parts": 2}))
    physics = {"model.physics": True, "images.size": 16}
    assert not is_capturable(configs.replace(tiny, physics))
    with pytest.raises(InputError, match=r"does not go with model\.physics"):
        configs.replace(tiny, physics | {"train.compile": True})
    with pytest.raises(InputError, match=r"train\.compile must be one of auto, True, False"):
        configs.replace(tiny, {"train.compile": 1})
