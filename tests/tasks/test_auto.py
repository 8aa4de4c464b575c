"""`auto` in params: settled from the network that dense.source names, before anything is planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from heal.errors import InputError, MethodError
from tasks import dense_source, dvcfile, registry
from tasks.keys import stage_key
from tasks.params import Params, load
from tasks.params_file import ParamsError
from tasks.table import STAGES

pytest_plugins = ("tests.tasks.registries",)

NAMED = [
    "allocation={method: global_variance, global_variance: {statistic: weighted}}",
    "pruning={method: variance, variance: {statistic: weighted}}",
    "healing.methods=[closed_form, starfish]",
]
RESNET = ["closed_form", "batchnorm_recalibration", "starfish"]


def chosen(params: Params) -> list[str]:
    return [params.allocation.method, params.pruning.method, *params.healing.methods]


def test_nothing_named_is_what_the_preset_names_key_for_key() -> None:
    auto, named = load(None), load(None, NAMED)
    assert chosen(auto) == ["global_variance", "variance", "closed_form", "starfish"]
    assert auto.sections == named.sections
    for stage in STAGES.values():
        inputs = dict.fromkeys(stage.upstream, "0")
        assert stage_key(stage, auto, inputs)[0] == stage_key(stage, named, inputs)[0]


def test_what_was_chosen_is_said_and_what_was_named_is_not() -> None:
    assert load(None).chosen == (
        "auto (channels cut, vit (transformer)): global_variance, variance, closed_form, starfish"
    )
    assert load(None, NAMED).chosen == ""
    assert load(None).where("healing.methods").startswith("auto")
    assert load(None).where("healing.seed") == "default"


def test_params_that_are_written_stay_and_the_presets_join_them() -> None:
    budget = "allocation.budget={weights: 0.75}"
    params = load(None, [budget, "healing.starfish.epochs=3", "healing.starfish.kl=0"])
    assert params.healing.methods == ("starfish",)
    options = params.healing.options("starfish")
    assert (options["epochs"], options["kl"], options["affine"]) == (3, 0, True)


def test_one_method_named_leaves_the_others_to_the_preset() -> None:
    pattern = load(None, ["allocation.budget={weights: 0.5}", "allocation.method=n_of_m"])
    assert chosen(pattern)[:2] == ["n_of_m", "obs"]
    assert load(None, ["healing.methods=[closed_form]"]).pruning.method == "variance"


def test_a_method_that_contradicts_the_budget_is_refused_where_it_stands() -> None:
    with pytest.raises(MethodError, match=r"^-S pruning.method=magnitude: .* in neurons \(default\)"):
        _ = load(None, ["pruning.method=magnitude"]).healing
    with pytest.raises(ParamsError, match="auto stands alone"):
        load(None, ["healing.methods=[auto, starfish]"])
    with pytest.raises(ParamsError, match="distill does not run"):
        _ = load(None, ["healing.distill.lr=0.1"]).healing


def test_every_source_tells_its_family(tmp_path: Path, bundles: dict[str, Path], home: Path) -> None:
    registry.register_dense(bundles["dense"], "model")
    weights = tmp_path / "weights.safetensors"
    of_file = [f"dense.source=file:{weights}", "dense.architecture=resnet18"]
    for overrides in (["dense.source=timm:resnet18"], of_file):
        assert list(load(None, overrides).healing.methods) == RESNET
    for source in (f"bundle:{bundles['dense']}", "models:/model@dense", "models:/model/1"):
        assert "vit (transformer)" in load(None, [f"dense.source={source}"]).chosen


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("timm:resnet1", "did you mean 'resnet18'"),
        ("bundle:nowhere", "nowhere"),
        ("models:/model@champion", "registry"),
    ],
)
def test_only_what_asks_for_a_method_needs_the_network(source: str, expected: str) -> None:
    params = load(None, [f"dense.source={source}", "calibration.source=imagefolder:here"])
    assert params.registration.name == "digits-vit" and params.where("registration.name") == "default"
    with pytest.raises(InputError, match=expected):
        _ = params.allocation


def test_what_stages_are_handed_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = dense_source.skeleton
    monkeypatch.setattr(
        dense_source, "skeleton", lambda section, is_digits: asked.append("asked") or real(section, is_digits)
    )
    params = load(None)
    for stage in STAGES.values():
        params.restrict(stage.params).slice(stage.params)
    assert asked == ["asked"]


def test_rounds_are_chosen_for_and_what_cannot_go_in_rounds_is_refused_at_once() -> None:
    assert load(None, ["healing.rounds=2"]).pruning.options("variance")["fold_mean"] is False
    with pytest.raises(MethodError, match=r"^-S healing.rounds=2: healing.rounds: rounds = 2, but the pruner"):
        load(None, [*NAMED, "healing.rounds=2"])


def test_presets_count_where_dvc_looks() -> None:
    stages = dvcfile.render()["stages"]
    for name in ("allocation", "pruning", "healing"):
        assert {"heal/presets.py", "tasks/auto.py"} <= set(stages[name]["deps"])
