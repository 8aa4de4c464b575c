"""Stage: the list of healers, one after another, on unlabeled calibration images; in rounds, after every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from heal.method import HealContext, HealingReport
from heal.rounds import Healed, heal_in_rounds
from tasks import artifacts, models
from tasks.image_array import load_calibration

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.params_schema import Healing
    from tasks.progress import Progress


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write the healed bundle, the bundle after every healer but the last, and the reports."""
    section = params.healing
    teacher, student = (models.load(inputs["dense"], params.dense.adapter_allow, section.device) for _ in range(2))
    images = load_calibration(inputs["calibration"], progress.checkpoints.with_name("decoded"))
    calibration = artifacts.read_json(inputs["calibration"] / "calibration.json")
    context = HealContext(
        statistics=artifacts.load_statistics(inputs["activations"]),
        pruned=artifacts.load_pruned(inputs["pruning"]),
        seed=section.seed,
        checkpoints=progress.checkpoints,
        checkpoint_saved=progress.checkpoint_saved,
        report=progress.report,
        log=progress.log,
    )
    if any(progress.checkpoints.glob("*/*.safetensors")):
        progress.say("goes on from the checkpoint of an attempt that was cut off")
    reports: list[HealingReport] = []
    for healed in heal_in_rounds(student, teacher, params.healers(), images, context, section.rounds):
        reports.append(healed.report)
        if healed.in_last:
            _save(student, healed, section, output, inputs["dense"], calibration)
    artifacts.write_json(output / "healing.json", [_content(report, section.rounds) for report in reports])
    return _metrics(reports)


def _save(
    student: nn.Module, healed: Healed, section: Healing, output: Path, dense: Path, calibration: Mapping[str, Any]
) -> None:
    """The bundle after a healer of the last round; the last healer's is the stage's."""
    named = section.methods[: healed.number + 1]
    folder = output if named == section.methods else output / "after" / named[-1]
    methods: dict[str, Any] = {"healers": list(named), "params": section.options(named[-1])}
    methods |= {"rounds": section.rounds} if section.rounds > 1 else {}
    models.save_child(student, folder, dense, healed.pruned, methods, calibration)


def _metrics(reports: Sequence[HealingReport]) -> dict[str, float]:
    """Seconds of every healer, all rounds together; alignment before and after those of the last."""
    seconds: dict[str, float] = {}
    for report in reports:
        name = f"{report.method}_seconds"
        seconds[name] = seconds.get(name, 0.0) + report.seconds
    last = [report for report in reports if report.round == reports[-1].round]
    measured = {"alignment_before": last[0].alignment_before, "alignment_after": last[-1].alignment_after}
    return seconds | {name: _mean(alignment) for name, alignment in measured.items() if alignment}


def _content(report: HealingReport, rounds: int) -> dict[str, Any]:
    """Without the seconds, as an artifact's digest must not depend on how fast the machine was, without the masks,
    which are the bundle's, and with the round only where there are several."""
    described = asdict(replace(report, pruned=None))
    left_out = {"seconds", "pruned"} | ({"round"} if rounds == 1 else set())
    return {key: value for key, value in described.items() if key not in left_out}


def _mean(alignment: Mapping[str, float]) -> float:
    return sum(alignment.values()) / len(alignment)
