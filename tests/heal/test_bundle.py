"""A bundle gives back the same bits anywhere, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from heal import bundle, masking, surgery
from heal.architecture import Architecture
from heal.bundle_format import CARD, CONFIG, DESCRIPTION, WEIGHTS
from heal.compat import timm
from heal.errors import BundleError
from tests.heal.bundles import VGG, Description, assert_same_model, files_of, halved, masked, recipe, same_bits
from tests.heal.nets import NETS, build, images

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("pruned", ["dense", "masked", "cut", "cut and masked"])
def test_a_loaded_model_is_the_saved_one_bit_for_bit(name: str, pruned: str, tmp_path: Path) -> None:
    model = build(name)
    if "cut" in pruned:
        halved(model)
    mask = masked(model, 0.25) if "masked" in pruned else None
    digest = bundle.save(model, tmp_path / "b", architecture=recipe(name), mask=mask)
    loaded = bundle.load(tmp_path / "b", allow_adapters=[VGG.name])
    assert_same_model(loaded, model)
    assert not loaded.training and bundle.digest(tmp_path / "b") == digest
    for module in loaded.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
    if mask:
        assert masking.holds(loaded, mask)


def test_bundle_json_says_what_the_model_is(tmp_path: Path) -> None:
    model = build("vit")
    surgery.shrink(model, {"blocks.1.mlp.fc1": 40})
    facts: Description = {
        "class_names": [f"class {i}" for i in range(10)],
        "preprocessing": {"size": (32, 32), "resize": 36, "crop": "center", "mean": [0.1] * 3, "std": [0.3] * 3},
        "parent_digest": "ab" * 32,
        "method": {"pruner": "variance", "params": {"ratio": 0.5}},
        "calibration_digest": "cd" * 32,
        "metrics": {"agreement": 0.9},
        "licence": "apache-2.0",
    }
    bundle.save(model, tmp_path / "b", metadata=facts)
    found = bundle.read(tmp_path / "b")
    assert {key: found[key] for key in facts} == json.loads(json.dumps(facts))
    assert found["version"] == 1 and found["channels"] == {"blocks.1.mlp.fc1": 40}
    assert found["architecture"]["name"] == "vit_tiny_patch16_224"
    assert found["tensors"]["blocks.1.mlp.fc1.weight"]["shape"] == [40, 32]
    assert found["files"] == {
        name: hashlib.sha256(data).hexdigest() for name, data in files_of(tmp_path / "b").items() if name != DESCRIPTION
    }


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for folder, order in (("a", 1), ("b", -1)):
        model = build("vit")
        method = dict(list({"x": 1, "y": 2}.items())[::order])
        bundle.save(model, tmp_path / folder, mask=masked(model, 0.3), metadata={"method": method})
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_loading_and_saving_again_changes_nothing(tmp_path: Path) -> None:
    model = halved(build("swin"))
    first = bundle.save(model, tmp_path / "a", metadata={"preprocessing": {"size": [32, 32], "mean": [0.1] * 3}})
    facts = {"preprocessing": bundle.read(tmp_path / "a")["preprocessing"]}
    assert bundle.save(bundle.load(tmp_path / "a"), tmp_path / "b", metadata=facts) == first


def test_preprocessing_comes_from_timm_and_goes_back(tmp_path: Path) -> None:
    bundle.save(build("vit"), tmp_path / "a")
    assert bundle.read(tmp_path / "a")["preprocessing"] == {
        "size": [32, 32],
        "resize": 35,  # floor(32 / 0.9)
        "crop": "center",
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    wanted = {"size": [40, 40], "resize": 44, "mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    bundle.save(build("resnet"), tmp_path / "b", metadata={"preprocessing": wanted})
    config = timm.data.resolve_model_data_config(bundle.load(tmp_path / "b"))
    assert config["input_size"] == (3, 40, 40) and int(40 / config["crop_pct"]) == 44
    assert list(config["mean"]) == wanted["mean"] and config["interpolation"] == "bilinear"


def test_a_bias_that_pruning_added_is_loaded(tmp_path: Path) -> None:
    model = build("resnet")
    masking.write(model, {"layer1.0.conv2.bias": torch.linspace(-1, 1, 8)})
    bundle.save(model, tmp_path / "b")
    assert_same_model(bundle.load(tmp_path / "b"), model)
    assert not (tmp_path / "b" / CONFIG).exists()


def test_dtypes_and_ties_survive(tmp_path: Path) -> None:
    half = build("vit").bfloat16()
    bundle.save(half, tmp_path / "half")
    state = bundle.load(tmp_path / "half").state_dict()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
        for name, tensor in half.state_dict().items()
    )
    mixed = build("resnet")
    mixed.get_submodule("fc").half()
    bundle.save(mixed, tmp_path / "mixed")
    assert bundle.load(tmp_path / "mixed").get_parameter("fc.weight").dtype == torch.float16
    assert bundle.load(tmp_path / "mixed").get_parameter("conv1.weight").dtype == torch.float32
    bundle.save(tied(), tmp_path / "tied", architecture=TIED)
    loaded = bundle.load(tmp_path / "tied", [TIED.name])
    assert loaded.get_parameter("0.weight") is loaded.get_parameter("1.weight")


TIED = Architecture("adapter", f"{__name__}:tied")


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def test_a_bundle_is_replaced_whole_and_nothing_is_left_beside(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "b"
    bundle.save(build("vit"), folder)
    second = bundle.save(halved(build("vit", seed=1)), folder)
    assert bundle.digest(folder) == second and not (folder / CONFIG).exists()
    assert [path.name for path in folder.parent.iterdir()] == ["b"]
    assert os.stat(folder).st_mode & 0o777 == os.stat(folder.parent).st_mode & 0o777


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    bundle.save(build("resnet"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and bundle.load(tmp_path / "real")


@pytest.mark.parametrize("present", [["notes.txt"], [DESCRIPTION, "notes.txt"], [WEIGHTS]])
def test_a_folder_that_is_not_a_bundle_is_not_overwritten(present: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in present:
        (folder / name).write_text("precious")
    with pytest.raises(BundleError, match="not ours to overwrite"):
        bundle.save(build("resnet"), folder)
    assert sorted(files_of(folder)) == sorted(present) and set(files_of(folder).values()) == {b"precious"}
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BundleError, match="is a file"):
        bundle.save(build("resnet"), tmp_path / "file")


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_save_that_fails_leaves_the_old_bundle(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = bundle.save(build("resnet"), tmp_path / "b")
    calls = []
    real_rename = Path.rename

    def full(*args: object) -> None:
        raise OSError("disk full")

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        return full() if len(calls) == 2 else real_rename(self, target)  # type: ignore[func-returns-value]

    with monkeypatch.context() as patch:
        patch.setattr("heal.atomic.os.fsync", full) if step == "fsync" else patch.setattr(Path, "rename", second_fails)
        with pytest.raises(BundleError, match=r"cannot be written: disk full"):
            bundle.save(build("resnet", seed=1), tmp_path / "b")
    assert bundle.digest(tmp_path / "b") == digest and [path.name for path in tmp_path.iterdir()] == ["b"]


CLEAN = """
import sys
BLOCKED = ("prefect", "mlflow", "dvc", "datasets", "pydantic", "heal.pruners", "heal.healers", "heal.allocators")
class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in BLOCKED):
            raise ImportError("not installed here: " + name)
sys.meta_path.insert(0, Block())
import torch
torch.set_num_threads(1)
import heal
folder, pictures, answers = sys.argv[1:]
model = heal.load(folder)
with torch.inference_mode():
    logits = model(torch.load(pictures, weights_only=True))
heal.save(model, folder + "-again")
torch.save({"logits": logits, **model.state_dict()}, answers)
assert not any(m.split(".")[0] in ("prefect", "mlflow", "dvc", "tasks", "flows") for m in sys.modules)
"""


def test_a_clean_interpreter_loads_the_same_bits_and_writes_them_again(tmp_path: Path) -> None:
    model = halved(build("vit"))
    bundle.save(model, tmp_path / "b", mask=masked(model, 0.25))
    torch.save(images(3), tmp_path / "images")
    command = [sys.executable, "-c", CLEAN, *(str(tmp_path / name) for name in ("b", "images", "answers"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    subprocess.run(command, check=True, cwd=tmp_path, env=env)
    assert files_of(tmp_path / "b-again") == files_of(tmp_path / "b")
    found = torch.load(tmp_path / "answers", weights_only=True)
    with torch.inference_mode():
        assert same_bits(found.pop("logits"), model(images(3)))
    state = model.state_dict()
    assert found.keys() == state.keys() and all(same_bits(found[name], state[name]) for name in state)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet", "efficientnet"])
def test_plain_timm_opens_the_dense_export_of_a_masked_bundle(name: str, tmp_path: Path) -> None:
    model = build(name)
    wanted = {"size": [32, 32], "resize": 36, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    facts = {"preprocessing": wanted, "licence": "mit", "class_names": [str(i) for i in range(10)]}
    bundle.save(model, tmp_path / "b", mask=masked(model, 0.25), metadata=facts)
    bundle.export_dense(tmp_path / "b", tmp_path / "out")
    bundle.export_dense(tmp_path / "b", tmp_path / "out")  # replaces its own
    assert set(files_of(tmp_path / "out")) == {"model.safetensors", CONFIG}
    opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert_same_model(opened, model)
    config = timm.data.resolve_model_data_config(opened)
    assert list(config["input_size"]) == [3, 32, 32] and list(config["mean"]) == wanted["mean"]
    assert opened.pretrained_cfg["label_names"][9] == "9" and opened.pretrained_cfg["license"] == "mit"


def test_what_plain_timm_cannot_open_is_not_exported(tmp_path: Path) -> None:
    bundle.save(halved(build("vit")), tmp_path / "cut")
    with pytest.raises(BundleError, match="narrower than the architecture's name says"):
        bundle.export_dense(tmp_path / "cut", tmp_path / "out")
    bundle.save(build("vgg"), tmp_path / "b", architecture=VGG)
    with pytest.raises(BundleError, match="built by an adapter"):
        bundle.export_dense(tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_says_what_one_gets(tmp_path: Path) -> None:
    model = build("vit")
    facts = {"licence": "apache-2.0", "metrics": {"agreement": 0.9}, "method": "evil | `cell`\n# heading"}
    bundle.save(model, tmp_path / "masked", mask=masked(model, 0.25), metadata=facts)
    card = (tmp_path / "masked" / CARD).read_text()
    assert card.startswith("---\nlibrary_name: regrow\n") and 'license: "apache-2.0"' in card and '"pruned"' in card
    assert "speed of the dense model" in card and "local-dir:" in card and "| `agreement` | `0.9` |" in card
    assert "`evil \\| 'cell' # heading`" in card
    bundle.save(halved(build("vit")), tmp_path / "cut")
    card = (tmp_path / "cut" / CARD).read_text()
    assert "Plain timm cannot open this model" in card and "| `blocks.0.mlp.fc1` | `64` |" in card
    bundle.save(build("vgg"), tmp_path / "own", architecture=VGG)
    assert "allow_adapters=['tests.heal.nets:_vgg']" in (tmp_path / "own" / CARD).read_text()


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build("resnet").train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    bundle.save(model, tmp_path / "b", dtype="float16")
    bundle.load(tmp_path / "b")
    assert torch.equal(torch.rand(1), expected) and model.training
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
