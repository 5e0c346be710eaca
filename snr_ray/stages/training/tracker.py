"""MLflow as a second place for the curves of a run, where MLFLOW_TRACKING_URI names one.

The driver's MLFLOW_ variables go to the worker that writes, wherever it runs. MLflow is imported
there and then alone. A server that goes away costs its curves, never the run.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snr_ray import configfile as configs
from snr_ray.address import within, without_secrets
from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.learning.validation import Metrics
from snr_ray.outputs import write_atomic

URI = "MLFLOW_TRACKING_URI"
EXPERIMENT = "MLFLOW_EXPERIMENT_NAME"
RUN_FILE = "mlflow_run"
"""File of a run folder: the id of its run in MLflow, which a continued run goes on with."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""MLflow itself asks a server that is not there for minutes; what the user has set stays."""
ANSWER_S = 20.0
"""A server that has not answered for so long cannot be used."""
TABLES_S = 180.0
"""The same of a database, which makes its tables when it is asked for the first time."""
PARAMETERS = 100
"""MLflow takes so many at once."""


@dataclass(frozen=True, repr=False)
class Settings:
    """The MLFLOW_ variables of a driver, some of which are secret: Ray shows what its workers are
    given on its dashboard, and of this it shows the place alone."""

    variables: Mapping[str, str]

    def __repr__(self) -> str:
        return f"MLflow at {self.place}" if self.variables else "no MLflow"

    @property
    def place(self) -> str:
        """Where the curves go, as it may be shown."""
        return without_secrets(self.variables.get(URI, ""))


def settings() -> Settings:
    """Those of this process, paths made absolute; none where no place is named."""
    uri = os.environ.get(URI, "")
    if not uri:
        return Settings({})
    found = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    return Settings(PATIENCE | {EXPERIMENT: "snr_ray"} | found | {URI: _absolute(uri)})


def _absolute(uri: str) -> str:
    """A tracking URI that means the same in every folder."""
    head, slashes, path = uri.partition("sqlite:///")
    if slashes and not head:
        return uri if path.startswith("/") else f"{slashes}{Path(path).resolve()}"
    if uri.startswith("databricks") or "://" in uri:
        return uri
    return Path(uri.removeprefix("file:")).resolve().as_uri()


def check_tracker(known: Settings) -> None:
    """Raise InputError where a place is named and MLflow is missing, or does not take it."""
    if not known.variables:
        return
    if importlib.util.find_spec("mlflow") is None:
        raise InputError(
            f"{URI} is set, but the package mlflow is not installed: pip install "
            f"'snr-ray[mlflow]', or unset {URI}."
        )
    import mlflow  # noqa: F401  # takes seconds, which are not those of the server

    asked = known.variables[URI].startswith("http")
    try:
        within(ANSWER_S if asked else TABLES_S, lambda: _experiment(known))
    except Exception as error:  # of MLflow, of its databases, of the network
        reason = without_secrets(" ".join(str(error).split()))
        raise InputError(
            f"{URI}={known.place} cannot be used ({reason}); mend or unset it."
        ) from None


def _experiment(known: Settings) -> tuple[Any, str]:
    """A client of the tracking place, and the id of the experiment there, which is made if new."""
    os.environ.update(known.variables)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    variables = known.variables
    client, name = MlflowClient(tracking_uri=variables[URI]), variables[EXPERIMENT]
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return client, experiment.experiment_id
    try:
        return client, client.create_experiment(name)
    except MlflowException:  # another run was faster
        if (experiment := client.get_experiment_by_name(name)) is None:
            raise
        return client, experiment.experiment_id


class Tracker:
    """The run in MLflow of a run folder."""

    def __init__(self, out: Path, config: Config, known: Settings, *, where: str = "") -> None:
        """`known`: `settings` of the driver; with none nothing is written anywhere. `where` the run
        is, if not in `out`."""
        self.client: Any = None
        self.logged = -1
        """Step up to which MLflow, which cannot take back, has the curves."""
        if known.variables:
            self._do(lambda: self._open(out, config, known, where or str(out)))

    def _open(self, out: Path, config: Config, known: Settings, where: str) -> None:
        client, experiment = _experiment(known)
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        path = out / RUN_FILE
        if path.is_file():
            try:
                self.run = client.get_run(path.read_text().strip()).info.run_id
                history = client.get_metric_history(self.run, "loss")
                self.logged = max((point.step for point in history), default=-1)
                client.update_run(self.run, status="RUNNING")
                self.client = client
                return
            except MlflowException:
                pass  # of another place, or deleted there
        run = client.create_run(experiment, run_name=out.name, tags={"folder": where})
        self.run = run.info.run_id
        write_atomic(path, f"{self.run}\n")
        tree = configs.to_dict(config)
        flat = [
            Param(f"{section}.{key}", str(value))
            for section, values in tree.items()
            if isinstance(values, dict) and section != "sweep"
            for key, value in values.items()
        ] + [Param("seed", str(config.seed))]
        for start in range(0, len(flat), PARAMETERS):
            client.log_batch(self.run, params=flat[start : start + PARAMETERS])
        self.client = client

    def write(self, metrics: Metrics) -> None:
        """Add a line of the curves, where MLflow does not have it from before a restart."""
        step = int(metrics["step"])
        if self.client is None or (step <= self.logged and "loss" in metrics):
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(k, float(v), now, step) for k, v in metrics.items() if k != "step"]
        self._do(lambda: self.client.log_batch(self.run, metrics=points))

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED, as MLflow has it."""
        if self.client is not None:
            self._do(lambda: self.client.set_terminated(self.run, status))

    def _do(self, ask: Any) -> None:
        try:
            ask()
        except Exception as error:
            self.client = None
            reason = without_secrets(" ".join(str(error).split())[:300])
            print(f"MLflow gets nothing more of this run: {reason}", file=sys.stderr, flush=True)
