"""The files of cluster/ agree with Ray, with each other and with the repository."""

import json
import os
import runpy
import shlex
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray._private.runtime_env.packaging import create_package

from snr_ray import __version__
from snr_ray.arguments import parser
from snr_ray.stages.job.connection import OFF_HEAD, ON_CORES

REPOSITORY = Path(__file__).parents[1]
CLUSTER = REPOSITORY / "cluster"
KUBERAY = ("raycluster.yaml", "rayjob.yaml")

# Fields of KubeRay 1.7 that the files may use; its full schemas are megabytes.
JOB_FIELDS = {
    "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "activeDeadlineSeconds", "runtimeEnvYAML", "rayClusterSpec",
}  # fmt: skip
CLUSTER_FIELDS = {
    "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions", "headGroupSpec",
    "workerGroupSpecs",
}  # fmt: skip
HEAD_FIELDS = {"rayStartParams", "template", "labels"}
GROUP_FIELDS = HEAD_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return spec if name == "raycluster.yaml" else spec["rayClusterSpec"]


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_autoscaler_fits_the_schema_of_the_installed_ray() -> None:
    schema = json.loads(resources.files("ray.autoscaler").joinpath("ray-schema.json").read_text())
    # The schema forbids unknown keys, so a typo fails here and not after machines were rented.
    jsonschema.validate(read("autoscaler.yaml"), schema)


def test_autoscaler_refuses_to_run_without_a_token() -> None:
    config = read("autoscaler.yaml")
    # An open cluster runs anyone's code: each `ray start` must demand the token it was sent.
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token ray start" in starts[0]
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]


def test_autoscaler_nodes_share_storage() -> None:
    config = read("autoscaler.yaml")
    # The mount happens on the node, jobs run in its container: both must name the folder.
    assert any("mount -t" in command for command in config["initialization_commands"])
    assert "-v /mnt/share:/mnt/share" in config["docker"]["run_options"]


def test_pools_have_the_same_labels_everywhere() -> None:
    launched = read("autoscaler.yaml")["available_node_types"].values()
    pools = [[node["labels"]["pool"] for node in launched]]
    pools += [[group["labels"]["pool"] for group in groups(name)] for name in KUBERAY]
    # Stages look for these: cluster.ON_CORES and cluster.OFF_HEAD.
    assert pools == [["head", "cpu", "gpu"]] * 3
    assert ON_CORES["label_selector"] == {"pool": "!gpu"}
    assert OFF_HEAD["label_selector"] == {"pool": "!head"}


def test_the_network_policy_is_of_the_pods_of_ray() -> None:
    policy = read("networkpolicy.yaml")
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    spec = policy["spec"]
    # Buckets and volumes are outside: a policy of Egress would end every job.
    assert spec["policyTypes"] == ["Ingress"]
    ray_pods = {"matchExpressions": [{"key": "ray.io/cluster", "operator": "Exists"}]}
    assert spec["podSelector"] == ray_pods
    assert spec["ingress"][0] == {"from": [{"podSelector": ray_pods}]}
    for rule in spec["ingress"]:
        # An empty rule, or one without `from`, would let everyone in.
        assert rule["from"]
        assert all("podSelector" in peer or "namespaceSelector" in peer for peer in rule["from"])
        others = rule is not spec["ingress"][0]
        assert {port["port"] for port in rule.get("ports", [])} <= {8265, 8080}
        assert others == bool(rule.get("ports"))


def test_stages_find_nodes_when_they_start() -> None:
    launched = read("autoscaler.yaml")["available_node_types"]
    least = [launched[name]["min_workers"] for name in ("cpu_pool", "gpu_pool")]
    least += [
        group["minReplicas"] for name in KUBERAY for group in cluster_spec(name)["workerGroupSpecs"]
    ]
    # Stages count cores and GPUs once; a pool that starts empty would stay unused.
    assert min(least) >= 1


def test_a_node_that_is_cut_off_is_given_up_soon() -> None:
    wanted = {
        "RAY_grpc_client_keepalive_time_ms": "15000",
        "RAY_grpc_client_keepalive_timeout_ms": "10000",
    }
    # Ray's own figures let a job stand still for seven minutes. Every node and driver needs them.
    options = read("autoscaler.yaml")["docker"]["run_options"]
    assert {f"-e {key}={value}" for key, value in wanted.items()} <= set(options)
    for name in KUBERAY:
        for group in groups(name):
            for container in group["template"]["spec"]["containers"]:
                assert {e["name"]: e["value"] for e in container["env"]} == wanted
    for key, value in wanted.items():
        assert f"export {key}=${{{key}:-{value}}}" in (CLUSTER / "local.sh").read_text()
        assert os.environ[key] == value  # snr itself has set them


def test_head_takes_no_work() -> None:
    # A task that exhausts the head's memory ends the whole cluster.
    assert read("autoscaler.yaml")["available_node_types"]["head"]["resources"]["CPU"] == 0
    for name in KUBERAY:
        assert cluster_spec(name)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_uses_fields_that_exist(name: str) -> None:
    document = read(name)
    assert document["apiVersion"] == "ray.io/v1"
    # Kubernetes drops or refuses fields it does not know: a typo would change the cluster.
    if document["kind"] == "RayJob":
        assert set(document["spec"]) <= JOB_FIELDS
    spec = cluster_spec(name)
    assert set(spec) <= CLUSTER_FIELDS
    assert set(spec["headGroupSpec"]) <= HEAD_FIELDS
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= GROUP_FIELDS
    for group in groups(name):
        # KubeRay takes the parameters of `ray start` as strings only.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_has_the_ray_of_the_package(name: str) -> None:
    minor = ray.__version__.rpartition(".")[0] + "."
    # pyproject.toml allows one minor release; nodes, drivers and operator must agree on it.
    assert cluster_spec(name)["rayVersion"].startswith(minor)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_asks_for_a_token_and_scales(name: str) -> None:
    spec = cluster_spec(name)
    # Inside Kubernetes the dashboard listens on all interfaces: only the token guards it.
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_pods_mount_the_shared_claim(name: str) -> None:
    for group in groups(name):
        pod = group["template"]["spec"]
        claims = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"]
            for volume in pod["volumes"]
        }
        for container in pod["containers"]:
            # Run folders must be on storage that every node sees, at one path.
            mounted = {claims[m["name"]]: m["mountPath"] for m in container["volumeMounts"]}
            assert mounted == {"snr-share": "/mnt/share"}


def test_rayjob_is_a_raycluster_with_a_job() -> None:
    # Two copies of one specification, which kubectl cannot share between files.
    assert cluster_spec("rayjob.yaml") == cluster_spec("raycluster.yaml")


def test_rayjob_entrypoint_is_a_command_that_parses() -> None:
    words = shlex.split(read("rayjob.yaml")["spec"]["entrypoint"])
    # The image copies jobs/ to the folder where jobs start.
    assert words[:2] == ["python", "jobs/rayjob.py"]
    arguments = parser().parse_args(words[2:])
    # What a retry continues must outlive its cluster.
    assert arguments.out.is_relative_to("/mnt/share")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["demo", "--config", "none"], 0, "status 2, which no retry mends: its input"),
        (["denoise", "--modle", "none"], 0, "status 2, which no retry mends: its input"),
        (["--version"], 0, ""),
    ],
)
def test_rayjob_does_not_retry_what_stays_wrong(
    words: list[str], status: int, said: str, tmp_path: Path
) -> None:
    run = subprocess.run(
        [sys.executable, REPOSITORY / "jobs" / "rayjob.py", *words],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == status
    assert said in run.stdout
    assert bool(said) == ("rayjob:" in run.stdout)


def test_rayjob_retries_what_ended_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    job = runpy.run_path(str(REPOSITORY / "jobs" / "rayjob.py"))
    for status, told in ((0, 0), (1, 1), (2, 0), (3, 0), (143, 143)):
        monkeypatch.setitem(job["once"].__globals__, "main", lambda argv, status=status: status)
        assert job["once"]([]) == told


def test_rayjob_retries() -> None:
    # Stages continue where they were interrupted, so giving up at the first lost node is waste.
    assert read("rayjob.yaml")["spec"]["backoffLimit"] >= 1


def test_one_image_everywhere() -> None:
    images = {read("autoscaler.yaml")["docker"]["image"]}
    for name in KUBERAY:
        images |= {
            container["image"]
            for group in groups(name)
            for container in group["template"]["spec"]["containers"]
        }
    # Its tag is the package's version, so that an upgrade cannot forget a file.
    assert images == {f"snr-ray:{__version__}"}


def test_dockerfile_has_the_ray_of_kuberay() -> None:
    version = cluster_spec("raycluster.yaml")["rayVersion"]
    # The operator writes start commands for rayVersion, which the image must then have.
    assert f"FROM rayproject/ray:{version}-" in (CLUSTER / "Dockerfile").read_text()


def test_runtime_env_leaves_out_what_is_large() -> None:
    environment = read("runtime_env.yaml")
    # A virtual environment alone exceeds the size that Ray uploads.
    assert {".git/", ".venv/", "venv/", "/runs/", "*.parquet"} <= set(environment["excludes"])
    # Values of other types are refused by Ray when the job starts.
    assert all(isinstance(value, str) for value in environment["env_vars"].values())
    # The job itself must travel.
    kept = {"jobs", "snr_ray", "pyproject.toml"}
    assert not kept & {pattern.strip("/") for pattern in environment["excludes"]}


def test_shipped_models_travel_with_a_job_and_other_weights_do_not(tmp_path: Path) -> None:
    for name in ("runs/a/model/model.safetensors", "mine/model.safetensors", "data/x.parquet",
                 "snr_ray/shipped/new/model.safetensors", "snr_ray/cli.py"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    package = tmp_path.with_suffix(".zip")
    create_package(str(tmp_path), package, True, excludes=read("runtime_env.yaml")["excludes"])
    sent = {Path(name).as_posix() for name in zipfile.ZipFile(package).namelist()}
    files = {name for name in sent if (tmp_path / name).is_file()}
    assert files == {"snr_ray/shipped/new/model.safetensors", "snr_ray/cli.py"}


@pytest.mark.parametrize("name", ["local.sh", "slurm.sh"])
def test_script_parses(name: str) -> None:
    # bash reads a script as it runs it: an error near the end would leave a cluster behind.
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)


def test_slurm_runs_the_stage_on_a_ray_of_its_own(tmp_path: Path) -> None:
    stand_ins = {
        "scontrol": "echo node1; echo node2",
        "hostname": "echo 10.1.2.3 fe80::1",
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "ray": 'echo "$@" "$RAY_ADDRESS" "$RAY_AUTH_MODE" $(stat -c %a "$RAY_AUTH_TOKEN_PATH")'
        " $(stat -c %a /tmp/snr-ray-*-771)",
    }
    for name, body in stand_ins.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{body}\n")
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path), "SLURM_JOB_ID": "771",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "8",
    }  # fmt: skip
    stage = ["denoise", "--model", "m", "--images", "a b", "--out", "/o"]
    run = subprocess.run(
        [CLUSTER / "slurm.sh", *stage], env=environment, capture_output=True, text=True, check=True
    )
    words = run.stdout.split()
    assert words[:5] == ["symmetric-run", "--address", "10.1.2.3:7171", "--min-nodes", "2"]
    assert "--num-cpus=8" in words
    assert run.stdout.partition(" -- ")[2] == (
        "snr denoise --model m --images a b --out /o 10.1.2.3:7171 token 600 700\n"
    )
    # Neither the token nor Ray's folder stays.
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
    assert not list(Path("/tmp").glob("snr-ray-*-771"))
    words = [CLUSTER / "slurm.sh"]
    assert subprocess.run(words, env=environment, capture_output=True, check=False).returncode == 2


def test_local_script_explains_itself_when_misused() -> None:
    run = subprocess.run(
        ["bash", CLUSTER / "local.sh", "restart"], capture_output=True, text=True, check=False
    )
    # 2 is wrong usage, as for `snr`.
    assert run.returncode == 2
    assert "usage:" in run.stderr


def test_local_script_stop_without_a_cluster_does_nothing(tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", CLUSTER / "local.sh", "stop"],
        env={"PATH": "/usr/bin:/bin", "SNR_RAY_DIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # `ray stop` would end every Ray of the machine, whoever started it.
    assert "no cluster" in run.stdout
    assert '"$ray" stop' not in (CLUSTER / "local.sh").read_text()
