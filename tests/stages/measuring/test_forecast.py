"""A forecast: arithmetic that can be followed, honest about where figures are from."""

import dataclasses

import pytest

from snr_ray.stages.measuring.forecast import forecast_job, table
from snr_ray.stages.measuring.planrates import Rates

RATES = Rates(
    size=128,
    n_views=30,
    channels=1,
    images_per_s_per_core=10.0,
    start_s=36.0,
    output_bytes=20_000.0,
    driver_bytes=1e9,
    worker_bytes=8e8,
    images_per_s_per_gpu=1000.0,
)


def test_forecast_is_start_and_images_over_rate() -> None:
    job = forecast_job(RATES, images=720_000, nodes=5, cores=4, gpus=0, price=2.0)
    assert job.hours == pytest.approx(36 / 3600 + 1.0)
    assert job.price == pytest.approx(2.0 * 5 * job.hours)
    assert job.output_bytes == 720_000 * 20_000
    assert job.node_bytes == 4 * 8e8
    assert job.head_bytes == 1e9
    with_gpus = forecast_job(RATES, images=7_200_000, nodes=5, cores=4, gpus=2, price=None)
    assert with_gpus.hours == pytest.approx(36 / 3600 + 1.0)
    assert with_gpus.price is None


@pytest.mark.parametrize("more", [{"nodes": 10}, {"cores": 8}])
def test_twice_the_cores_take_half_the_time(more: dict[str, int]) -> None:
    rates = dataclasses.replace(RATES, start_s=0.0)
    base = {"images": 10**6, "nodes": 5, "cores": 4, "gpus": 0, "price": None}
    one, two = (forecast_job(rates, **kind) for kind in (base, base | more))
    assert two.hours == pytest.approx(one.hours / 2)


@pytest.mark.parametrize(("size", "together"), [(28, 256), (128, 64), (512, 4), (4096, 1)])
def test_the_store_holds_two_blocks_of_each_core(size: int, together: int) -> None:
    rates = dataclasses.replace(RATES, size=size)
    job = forecast_job(rates, images=10**6, nodes=5, cores=4, gpus=0, price=None)
    assert job.store_bytes == 2 * 4 * together * 4 * size**2


def test_table_says_where_figures_are_from() -> None:
    job = forecast_job(RATES, images=10**6, nodes=5, cores=4, gpus=0, price=2.0)
    said = table(RATES, job, measured=True, cores=4, nodes=5, here=2)
    hours = next(line for line in said.splitlines() if line.startswith("hours"))
    assert hours.endswith("extrapolated: measured here, times 5 x 4 cores")
    assert "20 GB" in said
    assert all(("measured" in line or "given" in line or "reckoned" in line)
               for line in said.splitlines())  # fmt: skip
