"""The images that models are judged by, and whole sources; see image_array.py for the array itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heal import bundle
from heal.errors import ImagesError
from tasks import artifacts, data
from tasks.classes import Classes
from tasks.data import IdsDigest
from tasks.image_array import ImageArray, array, load_calibration
from tasks.preprocessing import Preprocessing, parse

if TYPE_CHECKING:
    from tasks.params_schema import Evaluation
    from tasks.progress import Progress

__all__ = ["EvaluationImages", "ImageArray", "array", "load_calibration", "load_evaluation", "load_source"]


@dataclass(frozen=True)
class EvaluationImages:
    """What a model is judged by. labels: int64 [n], subsets: a name an image; None where there are none.

    digest: SHA-256 over the images' own and their ids, as the calibration stage makes it.
    """

    source: str
    digest: str
    array: ImageArray
    ids: Sequence[str]
    labels: Tensor | None
    subsets: Sequence[str] | None


def load_evaluation(section: Evaluation, dense: Path, calibration: Path, progress: Progress) -> EvaluationImages:
    """The images that params.evaluation names, without those of the calibration artifact's side.

    dense, calibration: those stages' artifacts. Labels are read when `evaluation.labels` allows it,
    and the log says so. Raises ImagesError.
    """
    shared = bool(artifacts.read_json(calibration / "calibration.json")["shared"])
    source, ids = data.for_evaluation(section.source, shared)
    labels, subsets = read_labels(section, source, ids, Classes.of(dense), progress.fallback)
    progress.log(f"{len(ids)} images, labels are {'not read' if labels is None else 'read (evaluation.labels)'}")
    digest = IdsDigest()
    rows = ((image, digest.add(image, source.read(image))) for image in ids)
    preprocessing = parse(bundle.read(dense / "bundle")["preprocessing"])
    pixels = array(rows, len(ids), preprocessing, progress.checkpoints / "evaluation.npy")
    return EvaluationImages(source.name, digest.hex(), pixels, ids, labels, subsets)


def read_labels(
    section: Evaluation,
    source: data.Source,
    ids: Sequence[str],
    classes: Classes,
    fallback: Callable[[str], None] | None = None,
) -> tuple[Tensor | None, Sequence[str] | None]:
    """Class indices and subsets of these ids, as far as `evaluation.labels` allows. Raises ImagesError.

    `fallback` is told when names of classes had to be ranked.
    """
    if section.labels is False:
        return None, None
    if section.labels is True:
        return _tensor(_own_labels(source, classes, fallback), ids), None
    table = data.read_labels(Path(section.labels), ids)
    subsets = None if section.subsets is None else table.column(section.subsets, ids)
    return _tensor(classes.indices(table.labels, table.path.name), ids), subsets


def load_source(
    spec: str, preprocessing: Preprocessing, classes: Classes, work: Path
) -> tuple[ImageArray, Tensor, list[str]]:
    """All images of a source, their labels, and their ids. Raises ImagesError."""
    source = data.open_source(spec)
    ids = list(source.ids())
    rows = ((image, source.read(image)) for image in ids)
    pixels = array(rows, len(ids), preprocessing, work / "images.npy")
    return pixels, _tensor(_own_labels(source, classes), ids), ids


def _tensor(labels: Mapping[str, int], ids: Sequence[str]) -> Tensor:
    return torch.tensor([labels[image] for image in ids])


def _own_labels(
    source: data.Source, classes: Classes, fallback: Callable[[str], None] | None = None
) -> Mapping[str, int]:
    labels = classes.of_source(source, fallback)
    if labels is None:
        raise ImagesError(
            f"evaluation.labels is true, but {source.name} has no labels; name a CSV file with columns file,label, "
            "or set it to false"
        )
    return labels
