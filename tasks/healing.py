"""Stage: the list of healers, one after another, on unlabeled calibration images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heal.method import HealContext, HealingReport, after
from tasks import artifacts, models
from tasks.image_array import load_calibration

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.progress import Progress


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write the healed bundle, the bundle after every healer but the last, and the reports."""
    section = params.healing
    teacher = models.load(inputs["dense"], params.dense.adapter_allow, section.device)
    student = models.load(inputs["pruning"], params.dense.adapter_allow, section.device)
    images = load_calibration(inputs["calibration"], progress.checkpoints.with_name("decoded"))
    calibration = artifacts.read_json(inputs["calibration"] / "calibration.json")
    context = HealContext(
        statistics=artifacts.load_statistics(inputs["activations"]),
        pruned=artifacts.load_pruned(inputs["pruning"]),
        seed=section.seed,
        checkpoint_saved=progress.checkpoint_saved,
        report=progress.report,
        log=progress.log,
    )
    if any(progress.checkpoints.glob("*/*.safetensors")):
        progress.say("goes on from the checkpoint of an attempt that was cut off")
    reports = []
    for number, (name, healer) in enumerate(zip(section.methods, params.healers(), strict=True)):
        context = replace(context, checkpoints=progress.checkpoints / f"{number}-{name}")
        reports.append(healer.heal(student, teacher, images, context))
        context = after(context, reports[-1])
        is_last = number == len(section.methods) - 1
        folder = output if is_last else output / "after" / name
        methods = {"healers": list(section.methods[: number + 1]), "params": section.options(name)}
        models.save_child(student, folder, inputs["dense"], context.pruned, methods, calibration)
    artifacts.write_json(output / "healing.json", [_content(report) for report in reports])
    seconds = {f"{report.method}_seconds": report.seconds for report in reports}
    measured = {"alignment_before": reports[0].alignment_before, "alignment_after": reports[-1].alignment_after}
    return seconds | {name: _mean(alignment) for name, alignment in measured.items() if alignment}


def _content(report: HealingReport) -> dict[str, Any]:
    """Without the seconds, as an artifact's digest must not depend on how fast the machine was, and without
    the masks, which are the bundle's."""
    described = asdict(replace(report, pruned=None))
    return {key: value for key, value in described.items() if key not in ("seconds", "pruned")}


def _mean(alignment: Mapping[str, float]) -> float:
    return sum(alignment.values()) / len(alignment)
