"""The report page: what it shows is what was measured, it stands alone, and it escapes what it quotes."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heal import bundle as bundle_io
from heal.compat import timm
from heal.pruned import apply, describe_cuts
from heal.values import Allocation, ChannelCut
from tasks import artifacts, figures, keys, manifest, report, reproduction
from tasks import models as models_io
from tasks.facts import forward_order, gather
from tasks.params import load
from tasks.progress import Progress
from tasks.table import MOVING, STAGES
from tests.tasks.page import Page
from tests.tasks.published import CASES, DEIT, baseline, deit, digits, masked, write

Case = Callable[[Path], dict[str, Path]]


def run(inputs: dict[str, Path], output: Path, title: str | None = None) -> str:
    output.mkdir(parents=True, exist_ok=True)
    params: Any = SimpleNamespace(report=SimpleNamespace(title=title))
    report.run(params, inputs, output, Progress(output))
    return (output / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_the_page_is_well_formed_and_needs_no_network(case: str, tmp_path: Path) -> None:
    text = run(CASES[case](tmp_path / "in"), tmp_path / "out")
    page = Page(text)
    assert len(text.encode()) < 1_000_000
    assert "://" not in text and "@import" not in text and "url(" not in text
    loaded = {(tag, name) for tag, name, _ in page.attributes if name in ("src", "href", "srcset", "data", "action")}
    assert loaded == set()
    assert "script" not in {tag for tag, _, _ in page.attributes} and "<script" not in text


@pytest.mark.parametrize("case", CASES)
def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(case: str, tmp_path: Path) -> None:
    first = run(CASES[case](tmp_path / "a"), tmp_path / "out1")
    assert run(CASES[case](tmp_path / "elsewhere"), tmp_path / "out2") == first
    assert str(tmp_path) not in first


@pytest.mark.parametrize("case", CASES)
def test_every_measured_number_is_in_the_page(case: str, tmp_path: Path) -> None:
    inputs = CASES[case](tmp_path / "in")
    page = Page(run(inputs, tmp_path / "out"))
    shown = {float(value) for value in page.values}
    for entry in json.loads((inputs["evaluation"] / "evaluation.json").read_text())["models"].values():
        numbers = [entry[key] for key in ("top1", "agreement", "parameters", "nonzeros", "macs", "bytes")]
        numbers += [timing["median"] for timing in entry.get("latency", {}).values()]
        assert {number for number in numbers if number is not None} <= shown


def test_texts_say_what_the_numbers_are(tmp_path: Path) -> None:
    text = Page(run(deit(tmp_path / "in"), tmp_path / "out")).text
    for wanted in (
        "79.85",
        "77.12",
        "2.73 points below dense",
        "22.1",
        "15.0",
        "4.61",
        "3.22",
        "88.2",
        "59.9",
        "113",
        "85.1",
    ):
        assert wanted in text
    assert "1.33×" in text and "0.68×" in text
    assert "dense pruned after closed_form healed" in text


def test_the_size_in_float16_leaves_vectors_as_they_are(tmp_path: Path) -> None:
    dense = gather(digits(tmp_path / "in")).rows[0]
    assert dense.bytes_float16 == dense.bytes - 2 * (dense.bytes // 4 - 1100)


def test_budget_asked_and_got_stand_side_by_side(tmp_path: Path) -> None:
    text = Page(run(deit(tmp_path / "in"), tmp_path / "out")).text
    kept = 12 * 1536 - sum(DEIT)
    assert f"Asked to keep {kept:,} of 18,432" in text and f"Got {kept:,} of 18,432, met exactly" in text


def test_cuts_print_as_producer_to_consumer(tmp_path: Path) -> None:
    text = Page(run(deit(tmp_path / "in"), tmp_path / "out")).text
    assert "blocks.0.mlp.fc1 → blocks.0.mlp.fc2 514 1,536 0.665" in text


def test_a_mask_promises_no_speed_and_no_accuracy_it_did_not_measure(tmp_path: Path) -> None:
    page = Page(run(masked(tmp_path / "in"), tmp_path / "out"))
    assert "Smaller file, same speed on plain runtimes" in page.text
    assert "No labels were used, not even to measure." in page.text
    assert "Top-1" not in page.text
    assert "blocks.11.attn.qkv" in page.text


@pytest.mark.parametrize("judged", [True, False], ids=["judged", "stored"])
@pytest.mark.parametrize("case", [digits, masked], ids=["labels", "unlabelled"])
def test_labels_of_calibration_images_are_told_of(case: Case, judged: bool, tmp_path: Path) -> None:
    inputs = case(tmp_path / "in")
    before = Page(run(inputs, tmp_path / "before")).text
    for stage, entries in (
        ("calibration", {"labels": True}),
        ("allocation", {"evidence": {"labels": True} if judged else {}}),
    ):
        path = inputs[stage] / f"{stage}.json"
        write(path, json.loads(path.read_text()) | entries)
    text = Page(run(inputs, tmp_path / "out")).text
    assert "512 unlabeled images" in before and "512 labelled images" in text
    assert "holds images only" not in text and "not even to measure" not in text
    assert "holds images only" in before or "not even to measure" in before
    told = "the allocation was chosen by them, pruning and healing saw none" if judged else "no method read them"
    assert f"The calibration set holds the labels of its images (calibration.labels): {told}." in text


def test_a_baseline_claims_nothing(tmp_path: Path) -> None:
    text = Page(run(baseline(tmp_path / "in"), tmp_path / "out")).text
    assert "Nothing was pruned" in text and "not pruned, not healed" in text
    assert "Layer by layer" not in text and "Masks" not in text
    assert "off by 128" in text


def test_passed_over_calibration_images_are_counted(tmp_path: Path) -> None:
    inputs = digits(tmp_path / "in")
    described = json.loads((inputs["calibration"] / "calibration.json").read_text())
    write(inputs["calibration"] / "calibration.json", described | {"skipped": ["a", "b"], "duplicates": ["c"]})
    text = Page(run(inputs, tmp_path / "out")).text
    assert "because they could not be decoded: 2." in text and "because they are also among" in text


def test_missing_latency_is_said(tmp_path: Path) -> None:
    text = Page(run(digits(tmp_path / "in"), tmp_path / "out")).text
    assert "speed was not measured" in text and "Latency was not measured." in text


def test_a_model_at_chance_before_healing_is_pointed_out(tmp_path: Path) -> None:
    assert "leaves little to heal from" in Page(run(digits(tmp_path / "a"), tmp_path / "out1")).text
    assert "leaves little to heal from" not in Page(run(deit(tmp_path / "b"), tmp_path / "out2")).text


def test_every_digest_is_shown(tmp_path: Path) -> None:
    inputs = deit(tmp_path / "in")
    text = Page(run(inputs, tmp_path / "out")).text
    for folder in inputs.values():
        assert manifest.digest_of(manifest.scan(folder)) in text
    assert "ef" * 32 in text and "ab" * 32 in text


def test_a_manifest_in_the_folder_changes_no_digest(tmp_path: Path) -> None:
    inputs = deit(tmp_path / "in")
    before = gather(inputs).digests
    write(inputs["dense"] / manifest.NAME, {"ingredients": {"params": {}, "names": {}}})
    assert gather(inputs).digests == before


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>\"&"
    inputs = digits(tmp_path / "in", name=hostile, classes=[hostile])
    subsets = {hostile: {"images": 10, "top1": {"dense": 0.9, "pruned": 0.1, "healed": 0.8}}}
    evaluation = json.loads((inputs["evaluation"] / "evaluation.json").read_text())
    write(inputs["evaluation"] / "evaluation.json", evaluation | {"subsets": subsets})
    text = run(inputs, tmp_path / "out", title=f"{hostile}</title></style>")
    page = Page(text)
    assert "<script" not in text and "</title></style>" not in text and text.count("</style>") == 1
    assert page.text.count("<script>alert('x')</script>\"&") >= 3


def test_figures_are_named_for_who_cannot_see_them(tmp_path: Path) -> None:
    page = Page(run(deit(tmp_path / "in"), tmp_path / "out"))
    ids = [value for _, name, value in page.attributes if name == "id"]
    labels = {part for _, name, value in page.attributes if name == "aria-labelledby" for part in value.split()}
    assert len(ids) == len(set(ids)) and labels <= set(ids)
    assert "Loss of starfish from" in page.text
    assert ("html", "lang", "en") in page.attributes


def test_the_params_on_the_page_make_the_same_again(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    overrides = [
        f"dense.source=file:{secret}/weights.safetensors",
        "dense.architecture=vit_tiny_patch16_224",
        "dense.architecture_args={img_size: 64}",
        f"calibration.source=imagefolder:{secret}/photos",
        "calibration.seed=3",
        f"evaluation.labels={secret}/labels.csv",
        "allocation.budget={neurons: 0.4}",
        "healing.starfish.lr=3e-4",
    ]
    asked, inputs = load(None, overrides), deit(tmp_path / "in")
    looked_up = dict.fromkeys(MOVING, "digest")
    for stage, folder in inputs.items():
        write(folder / manifest.NAME, {"ingredients": keys.settings(STAGES[stage], asked, looked_up)})
    page = run(inputs, tmp_path / "out")
    assert "secret" not in page and "give files and folders their paths" in page
    (tmp_path / "params.yaml").write_text(html.unescape(page.partition("<pre><code>")[2].partition("</code>")[0]))
    again = load(tmp_path / "params.yaml", [text for text in overrides if "secret" in text])
    for stage in inputs:
        assert again.slice(STAGES[stage].params) == asked.slice(STAGES[stage].params)


def test_summary_csv_has_the_raw_numbers(tmp_path: Path) -> None:
    run(deit(tmp_path / "in"), tmp_path / "out")
    lines = (tmp_path / "out" / "summary.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["model", "dense", "pruned", "after closed_form", "healed"]
    assert lines[0].startswith("model,top1,agreement,parameters,nonzeros,macs,bytes")
    assert "0.79852" in lines[1] and "4608338304" in lines[1]


def test_a_long_loss_curve_stays_small() -> None:
    losses = [1 / (1 + step) for step in range(100_000)]
    made = figures.curve("starfish", losses)
    assert len(made.raw) + len(made.smooth) < 20_000
    assert made.logarithmic and re.fullmatch(r"M[\d. L-]+", made.raw)


def test_what_the_stages_write_is_what_the_report_reads(tmp_path: Path) -> None:
    inputs = digits(tmp_path / "in")
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=2)
    layers = [f"blocks.{block}.mlp.fc1" for block in range(2)]
    cut = ChannelCut({layer: torch.arange(0, 192, 2) for layer in layers}, dict.fromkeys(layers, 192))
    bundle_io.save(dense, inputs["dense"] / "bundle", metadata={"class_names": ["a", "b"]})
    lines = describe_cuts(dense, cut)
    apply(dense, cut)
    artifacts.save_pruned(cut, lines, inputs["pruning"])
    allocation = Allocation("neurons", dict.fromkeys(layers, 96), dict.fromkeys(layers, 192), 192)
    artifacts.save_allocation(allocation, "uniform", {}, inputs["allocation"])
    calibration = {"ids_digest": "ef" * 32}
    for stage in ("pruning", "healing"):
        method = {"pruner": "variance", "params": {}}
        models_io.save_child(dense, inputs[stage], inputs["dense"], cut, method, calibration)
    text = Page(run(inputs, tmp_path / "out")).text
    assert "blocks.1.mlp.fc1 → blocks.1.mlp.fc2 96 192 0.500" in text
    assert "vit_tiny_patch16_224" in text and "uniform" in text


def test_a_budget_in_macs_is_reported_in_macs(tmp_path: Path) -> None:
    inputs = digits(tmp_path / "in")
    kept, total, cost = {"a": 20, "b": 30}, {"a": 40, "b": 60}, {"a": 100, "b": 10}
    allocation = Allocation("weights", kept, total, 2305, cost)
    artifacts.save_allocation(allocation, "lamp", {}, inputs["allocation"])
    text = Page(run(inputs, tmp_path / "out")).text
    assert "remove 0.499 of the MACs" in text
    assert "2,305 of 4,600" in text
    assert "2,300 of 4,600, 5 less, which one weight costs more than" in text
    assert "budget.macs" in text and "budget.weights" not in text


def test_a_cut_by_macs_is_reported_in_macs(tmp_path: Path) -> None:
    inputs = digits(tmp_path / "in")
    evidence = {"macs": {"dense": 9000, "asked": 6000, "got": 5900}}
    allocation = Allocation("neurons", {"a": 20}, {"a": 40}, 20, evidence=evidence)
    artifacts.save_allocation(allocation, "global_variance", {}, inputs["allocation"])
    text = Page(run(inputs, tmp_path / "out")).text
    assert "remove 0.333" in text and "of the MACs" in text
    assert "5,900 of 9,000, 100 less: the widest cut that fits" in text


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0], [0.3, 0.2], [-0.1, 0.4]])
def test_short_and_flat_curves_are_drawn_inside_the_plot(losses: list[float]) -> None:
    numbers = [int(number) for number in re.findall(r"-?\d+", figures.curve("starfish", losses).raw)]
    assert all(0 <= number <= 1000 for number in numbers)


def test_blocks_are_in_forward_order() -> None:
    names = dict.fromkeys(["stages.1.0", "blocks.10", "blocks.2", "blocks.1"], 0.0)
    assert forward_order(names) == ["blocks.1", "blocks.2", "blocks.10", "stages.1.0"]


def test_a_curve_below_zero_has_its_marks() -> None:
    """The divergence of UniPTS is measured from the teacher's entropy, so that it may be negative throughout."""
    made = figures.curve("unipts", [-31.3 - 0.002 * step for step in range(100)])
    assert [tick.text for tick in made.y] == ["-31.45", "-31.4", "-31.35", "-31.3"]
    assert [tick.at for tick in made.y] == sorted((tick.at for tick in made.y), reverse=True)


def test_dropped_blocks_are_named_beside_what_was_cut(tmp_path: Path) -> None:
    inputs = digits(tmp_path / "in")
    cut = ChannelCut({}, {}, dropped=("blocks.1", "blocks.3"))
    artifacts.save_pruned(cut, tuple(f"{block}: dropped" for block in cut.dropped), inputs["pruning"])
    blocks = [f"blocks.{number}" for number in range(8)]
    kept = {block: int(block not in cut.dropped) for block in blocks}
    artifacts.save_allocation(
        Allocation("blocks", kept, dict.fromkeys(blocks, 1), 6), "depth", {}, inputs["allocation"]
    )
    text = Page(run(inputs, tmp_path / "out")).text
    facts = gather(inputs)
    asked = replace(facts, params={"allocation.budget.blocks": 0.25})
    assert (reproduction.removed(facts), reproduction.removed(asked)) == (0.2, 0.25), "both ask for 6 of 8"
    assert "remove 0.2 of the blocks" in text and "6 of 8, met exactly" in text
    assert "Dropped blocks Blocks that add what they compute to their input" in text
    assert (
        "blocks.1 , blocks.3" in text and "Dropped blocks are not there, so every runtime has less to compute" in text
    )
    assert "Producer" not in text and "Width kept" not in text


def test_rounds_are_told_and_the_last_is_drawn(tmp_path: Path) -> None:
    inputs = deit(tmp_path / "in")
    once = json.loads((inputs["healing"] / "healing.json").read_text())
    reports = [report | {"round": number, "notes": ["a note"]} for number in (1, 2) for report in once]
    (inputs["healing"] / "healing.json").write_text(json.dumps(reports))
    text = Page(run(inputs, tmp_path / "out")).text
    assert "healed by closed_form, then starfish in 2 rounds" in text
    assert "dense pruned after closed_form healed" in text
    assert "starfish round 1" in text and "starfish round 2" in text and "before healing in round 2" in text
    assert "closed_form round 1: a note" in text and "What goes was taken away in 2 rounds, each healed." in text
    plain = Page(run(deit(tmp_path / "plain"), tmp_path / "out2")).text
    assert "round" not in plain.replace("rounded", "")
