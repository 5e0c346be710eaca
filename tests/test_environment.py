"""What Ray and torch find in the environment: no Ray by the way, and loopback where it is meant."""

import os
import socket
import subprocess
import sys

from snr_ray.environment import _on_loopback_only


def test_nothing_starts_ray_by_the_way() -> None:
    code = "from snr_ray.environment import prepare_environment as p; p(); import ray; ray.put(0)"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ENABLE_AUTO_CONNECT"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Ray has not been started" in done.stderr


def test_a_loopback_cluster_is_known_by_who_it_answers_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert _on_loopback_only(f"127.0.0.1:{port}")
        assert _on_loopback_only(f"localhost:{port}")
    assert not _on_loopback_only(f"127.0.0.1:{port}")
    with socket.create_server(("0.0.0.0", 0)) as server:
        assert not _on_loopback_only(f"127.0.0.1:{server.getsockname()[1]}")
    for address in ("10.0.0.1:6379", "auto", "ray://127.0.0.1:10001", "head:6379"):
        assert not _on_loopback_only(address)
