"""What moving names point to right now: aliases, folders, files. Keys hold these digests, never the names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from heal.errors import ImagesError
from tasks import dense_source, remembered
from tasks.keys import canonical, sha256

if TYPE_CHECKING:
    from tasks.params import Params

LOCAL = ("imagefolder:", "parquet:")
"""Sources that may change while the name stays. Digits come with the code, and `hf` names a commit."""


def resolve(params: Params) -> dict[str, str]:
    """Dotted params key -> digest of what it points to now.

    Raises InputError subclasses when something named is not there.
    """
    # The dense model last: it may import timm or MLflow.
    return {**resolve_images(params), "dense.source": dense_source.resolve(params.dense, params.is_digits)}


def resolve_images(params: Params) -> dict[str, str]:
    """The same of images and labels alone."""
    found = {}
    if params.calibration.source.startswith(LOCAL):
        found["calibration.source"] = _images(params.calibration.source, labelled=params.calibration.labels)
    if params.evaluation.source.startswith(LOCAL):
        found["evaluation.source"] = _images(params.evaluation.source, labelled=params.evaluation.labels is True)
    if isinstance(params.evaluation.labels, str):
        found["evaluation.labels"] = _file(Path(params.evaluation.labels))
    return found


def evaluation(params: Params, shared: bool) -> str:
    """Names the images that models are judged by, and their labels: contents where these may change while the name
    stays. shared: calibration draws from the same source.
    """
    section, found = params.evaluation, resolve_images(params)
    images, labels = (found.get(f"evaluation.{key}", getattr(section, key)) for key in ("source", "labels"))
    return sha256(canonical([images, labels, shared]))


def _images(spec: str, labelled: bool = False) -> str:
    from tasks import data

    source = data.open_source(spec)
    named = f"{spec} with labels" if labelled else spec
    return remembered.digest(named, source.files(), lambda: data.digest(source, labelled=labelled))


def _file(path: Path) -> str:
    if not path.is_file():
        raise ImagesError(f"evaluation.labels: there is no file {path}; give a CSV with columns file,label")
    return hashlib.sha256(path.read_bytes()).hexdigest()
