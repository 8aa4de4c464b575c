"""The file that MLflow runs to serve a registered version: the bundle beside it, answering `predict` with logits."""

from __future__ import annotations

from typing import Any

import mlflow.models
import numpy as np
import torch
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray

import heal
from heal.evaluation import predict


class ServedModel(PythonModel):
    """Logits [n, classes] of images [n, 3, height, width], float32, preprocessed as bundle.json says."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the bundle; an adapter may be imported only if it was allowed when the version was registered."""
        allowed = (context.model_config or {}).get("allow_adapters", ())
        self.model = heal.load(context.artifacts["bundle"], allow_adapters=allowed)

    # MLflow finds the arguments by these names, and warns of a missing or a narrower type of the images.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Logits in the order of the images."""
        images = torch.from_numpy(np.array(model_input, dtype=np.float32))
        logits: NDArray[np.float32] = predict(self.model, images).numpy()
        return logits


mlflow.models.set_model(ServedModel())
