"""Fixtures of every test that needs a registry: a migrated SQLite file, and tiny bundles to put into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from heal import bundle
from heal.evaluation import predict
from tasks import mlflow_store, state
from tests.heal import nets


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a migrated, empty database: making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("migrated")
    mlflow_store.ready(f"sqlite:///{folder / 'mlflow.db'}")
    return folder


@pytest.fixture
def home(migrated: Path, _own_state_folder: None) -> Path:
    """The test's state folder, its registry migrated."""
    shutil.copytree(migrated, state.home())
    return state.home()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`dense`; `healed`, which answers nearly the same; `ruined`, which answers something else."""
    root = tmp_path_factory.mktemp("bundles")
    healed = nets.build("vit")
    with torch.no_grad():
        healed.get_parameter("head.bias").add_(1e-4)
    made = {"dense": nets.build("vit"), "healed": healed, "ruined": nets.build("vit", seed=1)}
    for name, model in made.items():
        bundle.save(model, root / name)
    return {name: root / name for name in made}


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Evaluation images [64, 3, 32, 32]."""
    return nets.images(64)


@pytest.fixture(scope="session")
def labels(bundles: dict[str, Path], images: torch.Tensor) -> torch.Tensor:
    """What the dense model answers, so that its top-1 is 1."""
    return predict(bundle.load(bundles["dense"]), images).argmax(dim=1)


@pytest.fixture
def logits(bundles: dict[str, Path]) -> Callable[[str, NDArray[np.float32]], NDArray[np.float32]]:
    """The logits of a bundle, without a registry."""

    def answer(name: str, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = predict(bundle.load(bundles[name]), torch.from_numpy(inputs)).numpy()
        return found

    return answer
