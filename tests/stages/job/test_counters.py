"""Figures reach Prometheus under the names that the Grafana dashboard asks for."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml

from snr_ray.environment import prepare_environment
from snr_ray.stages.job.counters import count_bytes, count_images, show_training, show_trials

CLUSTER = Path(__file__).parents[3] / "cluster"
NOT_HERE = {"ray_node_gpus_utilization", "ray_node_gpus_available"}
"""Of machines with GPUs."""


def _panels() -> list[dict]:
    return json.loads((CLUSTER / "grafana.json").read_text())["panels"]


def _asked() -> set[str]:
    expressions = [target["expr"] for panel in _panels() for target in panel["targets"]]
    return set(re.findall(r"\bray_\w+", " ".join(expressions)))


@pytest.mark.ray
def test_a_running_ray_serves_what_the_dashboard_asks_for() -> None:
    """In a process of its own: figures belong to the Ray that was there when they were first told,
    and a test session has several."""
    code = "import test_counters; test_counters.serve()"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": path})


def serve() -> None:
    """Tell figures to a Ray of this process's own, and read them as Prometheus would."""
    prepare_environment()
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    count_images("simulate", read=5, done=4, failed=1)
    count_images("simulate", done=3, doubtful=2)
    count_bytes("simulate", read=7, written=9)
    ray.get(ray.remote(lambda: 0).remote())
    port = ray.nodes()[0]["MetricsExportPort"]
    served: set[str] = set()
    until = time.monotonic() + 120
    while not _asked() - NOT_HERE <= served and time.monotonic() < until:
        time.sleep(1)
        show_training("run", 7, 12.5)  # as stages do, again and again: Ray forgets what was once
        show_trials(running=2, failed=1)
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read()
        lines = page.decode().splitlines()
        now = {re.split(r"[{ ]", line)[0] for line in lines if line[:1] != "#"}
        served |= now
        if "ray_snr_trials" in now and "ray_snr_images_total" in now:
            told_at_once = lines
    assert _asked() - NOT_HERE <= served
    lines = told_at_once
    values = {}
    for line in lines:
        if line.startswith("ray_snr_"):
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
            told = re.findall(r'(?:stage|outcome|way|run|state)="(\w+)"', labels)
            values[(name, *sorted(told))] = float(value)
    assert values[("ray_snr_images_total", "done", "simulate")] >= 7
    assert values[("ray_snr_images_total", "doubtful", "simulate")] >= 2
    assert values[("ray_snr_bytes_total", "simulate", "written")] >= 9
    assert values[("ray_snr_training_images_per_second", "run")] == 12.5
    assert values[("ray_snr_trials", "running")] == 2


def test_dashboard_has_what_grafana_needs() -> None:
    board = json.loads((CLUSTER / "grafana.json").read_text())
    assert board["schemaVersion"] >= 36
    assert {"title", "uid", "time", "templating"} <= set(board)
    source = board["templating"]["list"][0]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    panels = _panels()
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == f"${{{source['name']}}}"
        assert panel["title"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
    assert {"ray_snr_images_total", "ray_snr_bytes_total", "ray_snr_trials"} <= _asked()


def test_scraper_reads_the_list_that_ray_keeps() -> None:
    jobs = yaml.safe_load((CLUSTER / "prometheus.yml").read_text())["scrape_configs"]
    files = jobs[0]["file_sd_configs"][0]["files"]
    assert files == ["/tmp/ray/prom_metrics_service_discovery.json"]
