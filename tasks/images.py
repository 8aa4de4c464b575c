"""The images that models are judged by, and whole sources; see image_array.py for the array itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heal.errors import ImagesError
from tasks import artifacts, data
from tasks.image_array import ImageArray, array, load_calibration
from tasks.preprocessing import Preprocessing, parse

if TYPE_CHECKING:
    from tasks.params_schema import Evaluation
    from tasks.progress import Progress

__all__ = ["EvaluationImages", "ImageArray", "array", "load_calibration", "load_evaluation", "load_source"]


@dataclass(frozen=True)
class EvaluationImages:
    """What a model is judged by. labels: int64 [n], subsets: a name an image; None where there are none."""

    array: ImageArray
    ids: Sequence[str]
    labels: Tensor | None
    subsets: Sequence[str] | None


def load_evaluation(
    section: Evaluation, preprocessing: Mapping[str, Any], progress: Progress, calibration: Path
) -> EvaluationImages:
    """The images that params.evaluation names, without those of the calibration artifact's side.

    Labels are read when `evaluation.labels` allows it, and the log says so. Raises ImagesError.
    """
    shared = bool(artifacts.read_json(calibration / "calibration.json")["shared"])
    source, ids = data.for_evaluation(section.source, shared)
    rows = ((image, source.read(image)) for image in ids)
    pixels = array(rows, len(ids), parse(preprocessing), progress.checkpoints / "evaluation.npy")
    if section.labels is False:
        progress.log(f"{len(ids)} images, labels are not read")
        return EvaluationImages(pixels, ids, None, None)
    progress.log(f"{len(ids)} images, labels are read (evaluation.labels)")
    if section.labels is True:
        return EvaluationImages(pixels, ids, _own_labels(source, ids), None)
    table = data.read_labels(Path(section.labels), ids)
    subsets = None if section.subsets is None else table.column(section.subsets, ids)
    return EvaluationImages(pixels, ids, torch.tensor([table.labels[image] for image in ids]), subsets)


def load_source(spec: str, preprocessing: Preprocessing, work: Path) -> tuple[ImageArray, Tensor | None, list[str]]:
    """All images of a source, their labels if it has them, and their ids."""
    source = data.open_source(spec)
    ids = list(source.ids())
    rows = ((image, source.read(image)) for image in ids)
    labels = source.labels()
    pixels = array(rows, len(ids), preprocessing, work / "images.npy")
    return pixels, None if labels is None else torch.tensor([labels[image] for image in ids]), ids


def _own_labels(source: data.Source, ids: Sequence[str]) -> Tensor:
    labels = source.labels()
    if labels is None:
        raise ImagesError(
            f"evaluation.labels is true, but {source.name} has no labels; name a CSV file with columns file,label, "
            "or set it to false"
        )
    return torch.tensor([labels[image] for image in ids])
