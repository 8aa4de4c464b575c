"""Stage: one streaming pass of the dense model over the calibration images, for all methods at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from heal.method import taps
from heal.statistics import capture
from tasks import artifacts, models
from tasks.image_array import load_calibration

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.progress import Progress


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Capture the union of what the named methods need; an empty artifact when they need nothing."""
    dense = models.load(inputs["dense"], params.dense.adapter_allow, params.activations.device)
    wanted = taps(dense, params.methods())
    images = load_calibration(inputs["calibration"], progress.checkpoints.with_name("decoded"))
    batch_size = params.activations.batch_size
    statistics = capture(dense, images, wanted, batch_size, progress.report) if wanted else {}
    artifacts.save_statistics(statistics, output)
    return {"taps": float(len(wanted)), "images": float(len(images))}
