"""dvc.yaml is what the stage table says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tasks import dvcfile
from tasks.table import STAGES
from tests.tasks import toy

ROOT = Path(__file__).parents[2]


def test_the_committed_file_is_the_rendered_one() -> None:
    assert (ROOT / "dvc.yaml").read_text() == dvcfile.text(), "run `python -m tasks.dvcfile`"


def test_dvc_accepts_it() -> None:
    from dvc.schema import COMPILED_MULTI_STAGE_SCHEMA

    content = yaml.safe_load(dvcfile.text())
    assert COMPILED_MULTI_STAGE_SCHEMA(content) and content == dvcfile.render()


def test_every_stage_depends_on_its_upstream_references_its_code_and_its_params() -> None:
    stages = dvcfile.render()["stages"]
    assert list(stages) == list(STAGES)
    for stage in STAGES.values():
        rendered = stages[stage.name]
        assert {f"data/stages/{name}.json" for name in stage.upstream} <= set(rendered["deps"])
        assert f"tasks/{stage.name}.py" in rendered["deps"]
        # Of methods whole sections: options change which statistics a method needs.
        wanted = [key.partition(".")[0] if key.endswith((".method", ".methods")) else key for key in stage.params]
        assert rendered["params"] == list(dict.fromkeys(wanted))
        assert rendered["cmd"] == f"python -m tasks {stage.name}"
        assert rendered["outs"][0] == {f"data/stages/{stage.name}.json": {"cache": False}}


def test_everything_it_depends_on_is_there() -> None:
    stages = dvcfile.render()["stages"]
    deps = {dep for stage in stages.values() for dep in stage["deps"] if not dep.startswith("data/")}
    assert [dep for dep in sorted(deps) if not (ROOT / dep).exists()] == []


def test_the_healed_bundle_is_kept_by_dvc() -> None:
    assert "data/healed" in dvcfile.render()["stages"]["healing"]["outs"]


def test_stages_that_choose_methods_depend_on_all_of_them() -> None:
    stages = dvcfile.render()["stages"]
    assert "heal/healers" in stages["healing"]["deps"] and "heal/training.py" in stages["healing"]["deps"]
    assert "heal/pruners" in stages["pruning"]["deps"] and "heal/allocators" in stages["allocation"]["deps"]
    assert "heal/healers" not in stages["evaluation"]["deps"] and "tasks/templates" in stages["report"]["deps"]


def test_upstream_stages_come_first() -> None:
    names = list(STAGES)
    for name, stage in STAGES.items():
        assert stage.name == name and all(names.index(upstream) < names.index(name) for upstream in stage.upstream)


def test_a_new_stage_needs_one_row(toy_log: Callable[[], list[str]]) -> None:
    assert dvcfile.render({"second": replace(toy.STAGES["second"], files=("first.py",))}) == {
        "stages": {
            "second": {
                "cmd": "python -m tasks second",
                "deps": ["data/stages/first.json", "toy/first.py", "toy/second.py", "toy/shared.py"],
                "params": ["second"],
                "outs": [{"data/stages/second.json": {"cache": False}}],
            }
        },
        "metrics": [],
        "plots": [],
    }


def test_stages_outside_the_store_can_be_asked_whether_they_still_hold() -> None:
    for stage in STAGES.values():
        text = (ROOT / "tasks" / f"{stage.name}.py").read_text()
        assert ("def still_valid(" in text) == stage.outside and "\ndef run(" in text


@pytest.mark.parametrize("key", [key for stage in STAGES.values() for key in stage.params])
def test_dvc_finds_every_param_in_the_committed_file(key: str) -> None:
    found = yaml.safe_load((ROOT / "params.yaml").read_text())
    for part in key.split("."):
        assert part in found, f"params.yaml must spell {key} out, or DVC refuses the stage"
        found = found[part]
