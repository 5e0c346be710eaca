"""Settings that Ray and torch read from the environment when they are imported."""

import os
import secrets
import socket


def prepare_environment() -> None:
    """Set them for this process and those it starts; what the user has set stays."""
    # torch starts a thread per core in every process otherwise; workers are told their share.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Else a process of its own reports to the makers of Ray.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A thread of Ray Data that prefetches may outlive the stage that asked for it; without this it
    # starts another Ray, which ends the process when it goes.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    # A node that is cut off is given up after 25 seconds instead of 7 minutes.
    os.environ.setdefault("RAY_grpc_client_keepalive_time_ms", "15000")
    os.environ.setdefault("RAY_grpc_client_keepalive_timeout_ms", "10000")
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        # Whoever reaches a Ray runs code: a local one stays on loopback, which Ray has no other
        # option for, and asks for a token of this process's own, which leaves no file behind.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    elif _on_loopback_only(address):  # else Ray asks this machine's other address instead
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def _on_loopback_only(address: str) -> bool:
    """Whether a cluster at HOST:PORT answers to this machine alone, as cluster/local.sh's does."""
    host, _, port = address.rpartition(":")
    if not (port.isdecimal() and (host == "localhost" or host.startswith("127."))):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of no one; nothing is sent
            others_see = probe.getsockname()[0]
        except OSError:  # no network
            return True
    return _answers(host, int(port)) and not _answers(others_see, int(port))


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True
