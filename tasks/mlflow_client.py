"""MLflow itself: its client, what is written into runs, models logged, loaded and fetched. No other file imports it.

MLflow takes seconds to import: whoever needs this module imports it where it is needed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tasks import mlflow_store, state
from tasks.addresses import public
from tasks.mlflow_store import RegistryError, UnreachableError, tracking_uri

mlflow_store.silence()  # before the import: MLflow reads the environment once

import mlflow.pyfunc  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.models import Model, ModelSignature  # noqa: E402
from mlflow.types import Schema, TensorSpec  # noqa: E402

SERVED = Path(__file__).with_name("served_model.py")
METRICS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100


class AnswerError(RegistryError):
    """What MLflow refused; code is its own name for the reason."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


def client() -> MlflowClient:
    """MLflow's client for the tracking address, its store made ready. Its calls raise what `in_our_words` does."""
    uri = tracking_uri()
    if mlflow.get_tracking_uri() != uri:
        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(uri)
        # It also writes the variable, which would then outlive a change of REGROW_HOME.
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
    experiment()
    return cast(MlflowClient, _Client(uri))


def experiment() -> str:
    """The id of the experiment that holds the runs: MLFLOW_EXPERIMENT_NAME, or `regrow`."""
    return _experiment(tracking_uri(), os.environ.get("MLFLOW_EXPERIMENT_NAME") or "regrow")


def write(
    run_id: str,
    metrics: Sequence[tuple[str, float, int]] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write metrics (name, value, step), params and tags of a run in as few requests as MLflow takes."""
    now = int(time.time() * 1000)
    rows = [Metric(name, value, now, step) for name, value, step in metrics]
    for start in range(0, len(rows), METRICS_PER_REQUEST):
        client().log_batch(run_id, metrics=rows[start : start + METRICS_PER_REQUEST])
    pairs = [Param(name, value) for name, value in (params or {}).items()]
    for start in range(0, len(pairs), PARAMS_PER_REQUEST):
        client().log_batch(run_id, params=pairs[start : start + PARAMS_PER_REQUEST])
    if tags:
        client().log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def write_dataset(run_id: str, name: str, digest: str, context: str) -> None:
    """Say that a run read a data set; MLflow keeps 36 characters of the digest, the source holds all."""
    dataset = Dataset(name, digest[:36], "regrow", f'{{"digest": "{digest}"}}')
    client().log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def log_model(bundle: Path, run_id: str, example: NDArray[np.float32], allow_adapters: Collection[str]) -> str:
    """Log the served model in the run; its id. The code of heal travels along: it is on no package index."""
    import heal
    from tasks import serving

    takes, gives = (
        Schema([TensorSpec(np.dtype("float32"), shape)]) for shape in serving.shapes(bundle, example, allow_adapters)
    )
    # Made here, as MLflow would put it into an experiment of its own, with files in the working directory.
    model = client().create_logged_model(experiment(), name="model", source_run_id=run_id)
    with serving.own_modules(), in_our_words():
        Model.log(
            artifact_path=None,
            flavor=mlflow.pyfunc,
            model_id=model.model_id,
            run_id=run_id,
            python_model=str(SERVED),
            artifacts={"bundle": str(bundle)},
            code_paths=[str(Path(heal.__file__).parent)],
            model_config={"allow_adapters": sorted(allow_adapters)} if allow_adapters else None,
            pip_requirements=serving.requirements(),
            signature=ModelSignature(inputs=takes, outputs=gives),
            input_example=example,
        )
    return str(model.model_id)


def predict(uri: str, images: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Load `uri` as a server would: the logits of `images`, or of the version's own input example."""
    from tasks import serving

    with tempfile.TemporaryDirectory() as folder, serving.own_modules(), in_our_words():
        model = mlflow.pyfunc.load_model(uri, dst_path=folder)
        logits: NDArray[np.float32] = model.predict(model.input_example if images is None else images)
        return logits


def download(uri: str, folder: Path) -> Path:
    """Fetch the files below `uri` into `folder`; where they lie."""
    with in_our_words():
        return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))


class _Client:
    """MLflow's client, each call `in_our_words`."""

    def __init__(self, uri: str) -> None:
        with in_our_words():
            self._client = MlflowClient(uri)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            with in_our_words():
                return call(*args, **kwargs)

        return asked


@contextmanager
def in_our_words() -> Iterator[None]:
    """What MLflow raises repeats the address it asked, with user and password.

    Raises AnswerError, or UnreachableError where the server failed and not the question.
    """
    try:
        yield
    except MlflowException as error:
        said = f"MLflow at {public(tracking_uri())}: {public(str(error.message))}"
        if error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):
            raise UnreachableError(said) from None
        raise AnswerError(said, error.error_code) from None


@cache
def _experiment(uri: str, name: str) -> str:
    """Found or made by one process at a time, as the first to open a store also writes its first rows."""
    mlflow_store.ready(uri)
    opened = _Client(uri)
    with mlflow_store.locked(state.home() / "locks" / "experiments.lock"):
        found = opened.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(opened.create_experiment(name, mlflow_store.artifact_location(uri)))
        except AnswerError as error:  # another host was faster
            found = opened.get_experiment_by_name(name)
            if found is None:
                raise RegistryError(f"the experiment {name!r} cannot be made: {error}") from error
            return str(found.experiment_id)
