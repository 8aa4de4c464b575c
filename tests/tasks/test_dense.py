"""The dense stage: a trained model from any source becomes a bundle, or is refused with what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from heal import bundle
from heal.errors import ArchitectureError, ImagesError, InputError, WeightsError
from tasks import adapter_code, artifacts, demo, dense, dense_source, registry
from tasks.params import load
from tasks.progress import Progress
from tests.heal import nets

pytest_plugins = ("tests.tasks.registries",)

VIT = "{img_size: 32, patch_size: 8, embed_dim: 32, depth: 3, num_heads: 4, num_classes: 10}"
FILE = ["dense.architecture=vit_tiny_patch16_224", f"dense.architecture_args={VIT}"]
FACTS = [
    "dense.preprocessing.size=[32, 32]",
    "dense.preprocessing.mean=[0.5, 0.5, 0.5]",
    "dense.preprocessing.std=[0.5, 0.5, 0.5]",
]

ADAPTER = """
import torch
from torch import nn

def build(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))
"""


UNTRUSTED = """
import sys
from heal.errors import InputError
from tasks import dense_source
from tasks.params import load
try:
    params = load(None, sys.argv[1:])
    dense_source.resolve(params.dense, params.is_digits)
except InputError:
    print(*sys.modules)
"""


def made(output: Path, *overrides: str) -> dict[str, Any]:
    """Run the stage; dense.json."""
    output.mkdir(parents=True, exist_ok=True)
    dense.run(load(None, overrides).restrict(["dense"]), {}, output, Progress(output.parent / "work"))
    found: dict[str, Any] = artifacts.read_json(output / "dense.json")
    return found


def resolved(*overrides: str) -> str:
    params = load(None, overrides)
    return dense_source.resolve(params.dense, params.is_digits)


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def vit() -> nn.Module:
    return nets.build("vit")


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that name a user's own module."""
    (tmp_path / "own_networks.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return ["dense.source=adapter:own_networks:build", "dense.adapter_allow=['own_networks:build']"]


@pytest.mark.parametrize("wrapper", ["plain", "state_dict", "model", "module", "compiled", "half", "safetensors"])
def test_a_file_of_weights_in_any_wrapping_is_read(tmp_path: Path, vit: nn.Module, wrapper: str) -> None:
    state: dict[str, Any] = vit.state_dict()
    wrappings: dict[str, dict[str, Any]] = {
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": {"state_dict": state}},
        "module": {f"module.{name}": tensor for name, tensor in state.items()},
        "compiled": {"state_dict": {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}},
        "half": {name: tensor.half() for name, tensor in state.items()},
    }
    wrapped = wrappings.get(wrapper, state)
    path = tmp_path / ("w.safetensors" if wrapper == "safetensors" else "w.pth")
    save_file(wrapped, path) if wrapper == "safetensors" else torch.save(wrapped, path)
    found = made(tmp_path / "out", f"dense.source=file:{path}", *FILE)
    expected = {name: tensor.half().float() for name, tensor in state.items()} if wrapper == "half" else state
    model = bundle.load(tmp_path / "out" / "bundle")
    assert same(model.state_dict(), expected)
    assert next(model.parameters()).dtype == torch.float32
    assert found == {
        "source": f"file:{path.name}",
        "digest": bundle.digest(tmp_path / "out" / "bundle"),
        "family": "vit",
        "classes": 10,
    }


def refusal(tmp_path: Path, state: object, *overrides: str) -> str:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        made(tmp_path / "out", f"dense.source=file:{tmp_path / 'w.pth'}", *FILE, *overrides)
    return str(caught.value)


def test_weights_that_do_not_fit_are_refused_with_the_first_names(tmp_path: Path, vit: nn.Module) -> None:
    state = dict(vit.state_dict())
    state["extra"] = state.pop("norm.bias")
    state["head.weight"], state["head.bias"] = torch.zeros(7, 32), torch.zeros(7)
    message = refusal(tmp_path, state)
    assert "lacks norm.bias" in message
    assert "has unknown extra" in message
    assert "head.weight [7, 32], not [10, 32]" in message
    assert "num_classes: 7" in message
    assert "lacks" in refusal(tmp_path, {"a": torch.zeros(1)})


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, vit: nn.Module) -> None:
    state = dict(vit.state_dict())
    state["norm.bias"] = state["norm.bias"].clone().index_fill_(0, torch.tensor([3]), torch.nan)
    assert "norm.bias holds NaN" in refusal(tmp_path, state)


def test_a_pickled_model_is_not_unpickled(tmp_path: Path, vit: nn.Module) -> None:
    assert "weights only" in refusal(tmp_path, vit)
    assert "holds no state dict" in refusal(tmp_path, {"epoch": 3})
    assert "holds no state dict" in refusal(tmp_path, {})
    assert "has other types" in refusal(tmp_path, {n: t.long() for n, t in vit.state_dict().items()})


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x02."])
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot be read"):
        made(tmp_path / "out", f"dense.source=file:{tmp_path / name}", *FILE)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        resolved(f"dense.source=file:{tmp_path / 'none.pth'}", *FILE)


def test_a_misspelled_architecture_names_its_neighbour(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ArchitectureError, match="resnet18"):
        made(tmp_path / "out", f"dense.source=file:{tmp_path / 'w.pth'}", "dense.architecture=resnet81")
    with pytest.raises(ArchitectureError, match="resnet18"):
        resolved("dense.source=timm:resnet81")


def test_preprocessing_is_timms_until_params_say_otherwise(tmp_path: Path, vit: nn.Module) -> None:
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    source = f"dense.source=file:{tmp_path / 'w.pth'}"
    made(tmp_path / "1", source, *FILE)
    own = bundle.read(tmp_path / "1" / "bundle")["preprocessing"]
    assert (own["size"], own["resize"], own["interpolation"], own["mean"]) == ([32, 32], 35, "bicubic", [0.5] * 3)
    made(tmp_path / "2", source, *FILE, "dense.preprocessing.resize=32", "dense.preprocessing.mean=[0.1, 0.2, 0.3]")
    assert bundle.read(tmp_path / "2" / "bundle")["preprocessing"] == own | {"resize": 32, "mean": [0.1, 0.2, 0.3]}


def test_a_bundle_is_taken_over_byte_for_byte(tmp_path: Path, vit: nn.Module) -> None:
    bundle.save(vit, tmp_path / "given", metadata={"class_names": list("abcdefghij"), "licence": "MIT"})
    (tmp_path / "given" / "stray.txt").write_text("not part of it")
    found = made(tmp_path / "out", f"dense.source=bundle:{tmp_path / 'given'}")
    assert found["digest"] == bundle.digest(tmp_path / "given") == resolved(f"dense.source=bundle:{tmp_path / 'given'}")
    assert not (tmp_path / "out" / "bundle" / "stray.txt").exists()


def test_a_bundle_takes_new_facts_and_keeps_its_masks(tmp_path: Path, vit: nn.Module) -> None:
    with torch.no_grad():
        vit.get_parameter("blocks.0.mlp.fc1.weight")[:64] = 0
    bundle.save(vit, tmp_path / "given", metadata={"licence": "MIT"})
    names = list("abcdefghij")
    made(tmp_path / "out", f"dense.source=bundle:{tmp_path / 'given'}", f"dense.class_names={names}")
    described = bundle.read(tmp_path / "out" / "bundle")
    assert (described["class_names"], described["licence"]) == (names, "MIT")
    assert same(bundle.load(tmp_path / "out" / "bundle").state_dict(), vit.state_dict())
    before, after = bundle.masks(tmp_path / "given"), bundle.masks(tmp_path / "out" / "bundle")
    assert before.keep.keys() == after.keep.keys() == {"blocks.0.mlp.fc1"}
    assert same(before.keep, after.keep)


def test_class_names_must_match_the_model(tmp_path: Path, vit: nn.Module) -> None:
    bundle.save(vit, tmp_path / "given")
    with pytest.raises(InputError, match="class_names"):
        made(tmp_path / "out", f"dense.source=bundle:{tmp_path / 'given'}", "dense.class_names=[cat, dog]")


def test_an_adapter_builds_the_users_own_network(tmp_path: Path, adapter: list[str]) -> None:
    with pytest.raises(ImagesError, match=r"lacks size, mean, std; set dense\.preprocessing\.size"):
        made(tmp_path / "out", *adapter)
    found = made(tmp_path / "out", *adapter, *FACTS)
    assert (found["family"], found["source"]) == ("generic", "adapter:own_networks:build")
    assert bundle.load(tmp_path / "out" / "bundle", ["own_networks:build"])(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


def test_an_adapter_may_be_the_architecture_of_a_file(tmp_path: Path, adapter: list[str]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Identity(), nn.Identity(), nn.Linear(6, 2))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    source = [f"dense.source=file:{tmp_path / 'w.pth'}", "dense.architecture=adapter:own_networks:build"]
    made(tmp_path / "out", *source, adapter[1], "dense.architecture_args={width: 6}", *FACTS)
    model = bundle.load(tmp_path / "out" / "bundle", ["own_networks:build"])
    assert same(model.state_dict(), network.state_dict())


def test_what_a_source_points_to_is_a_digest_of_its_content(tmp_path: Path, adapter: list[str]) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    (tmp_path / "copy.pth").write_bytes((tmp_path / "w.pth").read_bytes())
    before = [resolved(f"dense.source=file:{tmp_path / name}", *FILE) for name in ("w.pth", "copy.pth")]
    assert before[0] == before[1]
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    assert resolved(f"dense.source=file:{tmp_path / 'w.pth'}", *FILE) != before[0]
    first = resolved(*adapter)
    assert resolved(*adapter) == first
    (tmp_path / "own_networks.py").write_text(ADAPTER + "CHANGED = True\n")
    assert resolved(*adapter) != first
    with pytest.raises(InputError, match=r"cannot be imported: No module named .not_there"):
        resolved("dense.source=adapter:not_there:build", "dense.adapter_allow=['not_there:build']")


def test_the_code_of_an_adapter_counts_from_wherever_its_network_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "networks.py").write_text("from own_package.layers import build\n")
    (package / "layers.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    allowed = "dense.adapter_allow=['own_package.networks:build']"
    of_adapter = ("dense.source=adapter:own_package.networks:build", allowed)
    of_bundle = (f"dense.source=bundle:{tmp_path / 'out' / 'bundle'}", allowed)
    first = made(tmp_path / "out", *of_adapter, *FACTS)
    before = [resolved(*source) for source in (of_adapter, of_bundle)]
    (package / "layers.py").write_text(ADAPTER.replace("nn.ReLU()", "nn.GELU()"))
    with pytest.raises(InputError, match=r"built by own_package\.networks:build, which is code to import"):
        resolved(of_bundle[0])
    command = [sys.executable, "-c", UNTRUSTED, of_bundle[0]]
    loaded = subprocess.check_output(command, text=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"})
    assert "tasks.dense_source" in loaded and "own_package" not in loaded
    assert all(resolved(*s) != b for s, b in zip((of_adapter, of_bundle), before, strict=True))
    second = made(tmp_path / "again", *of_bundle)
    assert second["digest"] == first["digest"] and second["code"] != first["code"]


COUNTED = ["their_package/__init__.py", "their_package/deep/layers.py", "their_helpers.py", "theirs/far/below.py"]
COUNTED += ["elsewhere/linked.py"]
CLUTTER = ["stranger.py", "their_package/.venv/tool.py", "their_package/.#layers.py"]


@pytest.fixture
def their_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with all that may hide code, and what ordinary editors and tools leave beside it."""
    for name in (*COUNTED, *CLUTTER):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    package = tmp_path / "their_package"
    (package / "deep" / "layers.py").write_text("import their_helpers, theirs.far.below\n" + ADAPTER)
    (package / "linked").symlink_to(tmp_path / "elsewhere")
    (package / "loop").symlink_to(package)
    (package / "gone.py").symlink_to(tmp_path / "nowhere.py")
    (package / "folder.py").mkdir()
    (package / "deep" / "generated.py").write_text("x = " + "+".join(["1"] * 20000) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", COUNTED)
def test_everything_that_an_adapter_may_run_counts(name: str, their_code: Path) -> None:
    before = adapter_code.digest("their_package:build")
    with (their_code / name).open("a") as file:
        file.write("# a comment\n")
    assert adapter_code.digest("their_package:build") == before
    with (their_code / name).open("a") as file:
        file.write("CHANGED = True\n")
    assert adapter_code.digest("their_package:build") != before


@pytest.mark.parametrize("name", CLUTTER)
def test_what_an_adapter_does_not_run_does_not_count(name: str, their_code: Path) -> None:
    before = adapter_code.digest("their_package:build")
    (their_code / name).write_text("CHANGED = True\n")
    assert adapter_code.digest("their_package:build") == before


def test_an_adapter_may_lie_in_any_part_of_a_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("one", "two"):
        (tmp_path / part / "spread" / part).mkdir(parents=True)
        (tmp_path / part / "spread" / part / "nets.py").write_text(ADAPTER)
        monkeypatch.syspath_prepend(tmp_path / part)
    assert adapter_code.digest("spread.one.nets:build") and adapter_code.digest("spread.two.nets:build")


def test_half_precision_is_brought_to_float32_and_said(tmp_path: Path, vit: nn.Module) -> None:
    bundle.save(
        vit.half(),
        tmp_path / "given",
        metadata={"preprocessing": {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}},
    )
    (tmp_path / "out").mkdir()
    progress = Progress(tmp_path / "work")
    params = load(None, [f"dense.source=bundle:{tmp_path / 'given'}"])
    dense.run(params.restrict(["dense"]), {}, tmp_path / "out", progress)
    model = bundle.load(tmp_path / "out" / "bundle")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and "float16" in progress.fallbacks[0]
    assert same(model.state_dict(), vit.float().state_dict())


def test_another_number_of_classes_than_timm_trained_is_refused() -> None:
    arguments = ("dense.source=timm:test_vit", "dense.architecture_args={num_classes: 7}")
    with pytest.raises(ArchitectureError, match="was trained for 1000 classes"):
        dense.run(load(None, arguments).restrict(["dense"]), {}, Path("nowhere"), Progress(Path("nowhere")))


def test_a_timm_name_points_to_its_tag() -> None:
    assert resolved("dense.source=timm:test_vit") == resolved("dense.source=timm:test_vit.r160_in1k")
    assert resolved("dense.source=timm:test_vit") != resolved("dense.source=timm:test_vit2")
    with pytest.raises(ArchitectureError, match=r"no weights 'test_vit\.r160_in21k'.*test_vit\.r160_in1k"):
        resolved("dense.source=timm:test_vit.r160_in21k")


def test_timm_weights_that_cannot_be_fetched_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"timm:test_vit: the weights test_vit\.r160_in1k are not in the local cache"
    ):
        made(tmp_path / "out", "dense.source=timm:test_vit")


def test_timm_weights_are_read_from_its_cache(tmp_path: Path) -> None:
    from heal.compat import timm

    model = timm.create_model("test_vit")
    nets.randomise(model, 0)
    snapshot = tmp_path / "hub" / "models--timm--test_vit.r160_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    code = (
        "import sys; from pathlib import Path; from tests.tasks.test_dense import made; "
        "made(Path(sys.argv[1]), 'dense.source=timm:test_vit')"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[2])
    assert same(bundle.load(tmp_path / "out" / "bundle").state_dict(), model.state_dict())
    assert bundle.read(tmp_path / "out" / "bundle")["preprocessing"]["size"] == [160, 160]


def test_a_missing_alias_trains_the_digits_model_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = demo.train_digits
    monkeypatch.setattr(demo, "train_digits", lambda folder, seed, progress: train(folder, seed, progress, epochs=1))
    (tmp_path / "out").mkdir()
    progress = Progress(tmp_path / "work")
    dense.run(load(None).restrict(["dense"]), {}, tmp_path / "out", progress)
    assert "models:/digits-vit@dense is not in the registry" in progress.fallbacks[0]
    assert bundle.read(tmp_path / "out" / "bundle")["class_names"] == [str(digit) for digit in range(10)]
    assert resolved() == dense_source.TRAINED


def test_a_missing_alias_or_version_is_refused_where_nothing_can_stand_in() -> None:
    sources = (f"dense.source=models:/digits-vit{version}" for version in ("/3", "@staging"))
    for overrides in ("dense.if_missing=refuse", *sources, "calibration.source=imagefolder:birds"):
        with pytest.raises(registry.RegistryError):
            resolved(overrides)


@pytest.mark.usefixtures("home")
def test_a_registered_bundle_is_what_was_registered(tmp_path: Path, bundles: dict[str, Path]) -> None:
    registry.register_dense(bundles["dense"], "digits-vit")
    assert resolved() == bundle.digest(bundles["dense"])
    assert made(tmp_path / "out")["digest"] == bundle.digest(bundles["dense"])


def test_a_registry_that_does_not_answer_is_not_taken_for_a_missing_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(registry.RegistryError, match="127"):
        resolved()
