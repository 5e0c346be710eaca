"""Curves of a run in MLflow: its file store, a run that goes on, a place that is not there."""

import time
from pathlib import Path

import pytest

from snr_ray.config import Config
from snr_ray.errors import InputError
from snr_ray.stages.training import tracker as module
from snr_ray.stages.training.runlog import RunLog
from snr_ray.stages.training.tracker import RUN_FILE, Tracker, check_tracker, settings

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MLflow's file store, which it wants to be asked for by name."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    return tmp_path / "mlruns"


def client(store: Path) -> "mlflow.MlflowClient":
    return mlflow.MlflowClient(tracking_uri=store.as_uri())


def steps(store: Path, run: str, name: str) -> list[int]:
    return [point.step for point in client(store).get_metric_history(run, name)]


def test_what_goes_to_tensorboard_goes_to_mlflow(store: Path, tiny: Config, tmp_path: Path) -> None:
    check_tracker(settings())
    out = tmp_path / "run"
    out.mkdir()
    with RunLog(out, 0, Tracker(out, tiny, settings())) as log:
        log.write({"step": 25, "loss": 2.0, "images_per_s": 9.0})
        log.write({"step": 25, "swap_psnr": 20.0})
        log.write({"step": 50, "loss": 1.0, "images_per_s": 9.0})
    place = client(store).get_experiment_by_name("tests").experiment_id
    (run,) = client(store).search_runs([place])
    assert (out / RUN_FILE).read_text().strip() == run.info.run_id
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1.0, "images_per_s": 9.0, "swap_psnr": 20.0}
    assert steps(store, run.info.run_id, "loss") == [25, 50]
    assert run.data.params["model.channels"] == str(list(tiny.model.channels))
    assert run.data.params["seed"] == "0"


def test_a_continued_run_goes_on_in_mlflow_without_repeating(
    store: Path, tiny: Config, tmp_path: Path
) -> None:
    log = RunLog(tmp_path, 0, Tracker(tmp_path, tiny, settings()))
    for step in (25, 50, 75):
        log.write({"step": step, "loss": 1.0})
    log.__exit__(RuntimeError)
    run = (tmp_path / RUN_FILE).read_text().strip()
    assert client(store).get_run(run).info.status == "FAILED"
    with RunLog(tmp_path, 50, Tracker(tmp_path, tiny, settings())) as log:
        assert client(store).get_run(run).info.status == "RUNNING"
        for step in (75, 100):
            log.write({"step": step, "loss": 1.0})
        log.write({"step": 100, "swap_psnr": 20.0})
    assert (tmp_path / RUN_FILE).read_text().strip() == run
    assert sorted(steps(store, run, "loss")) == [25, 50, 75, 100]
    assert client(store).get_run(run).info.status == "FINISHED"


def test_without_its_variable_mlflow_gets_nothing(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_tracker(settings())
    with RunLog(tmp_path, 0, Tracker(tmp_path, tiny, settings())) as log:
        log.write({"step": 25, "loss": 2.0})
    assert not (tmp_path / RUN_FILE).exists()


def test_an_mlflow_that_is_missing_is_a_sentence(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI is set.*pip install 'snr-ray\[mlfl"):
        check_tracker(settings())


def test_a_server_that_is_not_there_is_a_sentence_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hush@127.0.0.1:9/")
    since = time.monotonic()
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/ cannot be used") as error:
        check_tracker(settings())
    assert time.monotonic() - since < module.ANSWER_S + 2
    assert "hush" not in str(error.value)


def test_a_place_that_goes_away_costs_the_curves_and_not_the_run(
    store: Path, tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with RunLog(out, 0, Tracker(out, tiny, settings())) as log:
        log.write({"step": 25, "loss": 2.0})
        store.rename(tmp_path / "gone")
        log.write({"step": 50, "loss": 2.0})
        log.write({"step": 75, "loss": 2.0})
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("MLflow gets nothing more of this run") == 1


def test_secrets_stay_out_of_what_ray_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hush@host/")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")
    assert repr(settings()) == "MLflow at https://host/"
    assert settings().variables["MLFLOW_TRACKING_PASSWORD"] == "hush"


@pytest.mark.parametrize("uri", ["mlruns", "file:mlruns", "sqlite:///mlflow.db"])
def test_relative_places_mean_the_same_in_a_worker(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert str(tmp_path) in settings().variables["MLFLOW_TRACKING_URI"]
