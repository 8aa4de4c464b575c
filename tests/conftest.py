"""What every test stands on: no phone-home, no network, no server or state of the developer, one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

QUIET = {
    "DO_NOT_TRACK": "true",  # `true`, not 1: MLflow takes no other value
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",  # also for the processes that tests start
}
FOREIGN = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "PREFECT_API_URL", "PREFECT_PROFILE", "REGROW_STORE")

# Before any of these libraries is imported: they read the environment once.
os.environ.update(QUIET)
for name in FOREIGN:
    os.environ.pop(name, None)

import torch  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_a_state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of wider scope than one test see this state folder."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _environment_restored() -> Iterator[None]:
    """The command line sets variables for the libraries below it; the next test must not inherit them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _own_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has its own state folder."""
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / ".regrow"))
