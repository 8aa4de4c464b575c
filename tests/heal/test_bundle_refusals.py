"""A bundle that is damaged, foreign or too new is refused, with what, where and what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from heal import bundle
from heal.bundle_format import CARD, DESCRIPTION, WEIGHTS
from heal.errors import ArchitectureError, BundleError, InputError
from tests.heal.bundles import VGG, Description, halved, masked
from tests.heal.nets import build


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that is cut and packed."""
    folder = tmp_path_factory.mktemp("bundles") / "whole"
    model = halved(build("vit"))
    bundle.save(model, folder, mask=masked(model, 0.25))
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder: Path, change: Callable[[Description], object]) -> None:
    """Change bundle.json as someone would who wants it to be believed."""
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


def rewrite_weights(
    folder: Path, change: Callable[[dict[str, Tensor]], object], layout: str = "sparse-bitmask/1"
) -> None:
    """Change the tensors in the file, and its digest with it."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    data = safetensors.torch.save(tensors, {"layout": layout})
    (folder / WEIGHTS).write_bytes(data)
    rewrite(folder, lambda d: d["files"].update({WEIGHTS: hashlib.sha256(data).hexdigest()}))


@pytest.mark.parametrize("name", [WEIGHTS, CARD])
def test_a_flipped_bit_is_noticed(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    for act in (bundle.load, bundle.digest, bundle.masks):
        with pytest.raises(BundleError, match=f"{name} is not the file that bundle.json lists"):
            act(copy)


@pytest.mark.parametrize("name", [WEIGHTS, CARD, DESCRIPTION])
def test_a_missing_file_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"copy has no {name}"):
        bundle.load(copy)


def test_the_digest_covers_every_file(whole: Path, copy: Path) -> None:
    assert bundle.digest(copy) == bundle.digest(whole)
    rewrite(copy, lambda d: d.update(licence="mit"))
    assert bundle.digest(copy) != bundle.digest(whole)


CLAIMS: dict[str, tuple[Mapping[str, Any], str]] = {
    "version": ({"version": 3}, "version 3, this reads 1 and 2; upgrade"),
    "version as a bool": ({"version": True}, "version True"),
    "format": ({"format": "other"}, "not a bundle"),
    "tensors": ({"tensors": []}, "'tensors' is a list, not dict"),
    "tensor": ({"tensors": {"x": {"shape": [-1], "dtype": "float32"}}}, "tensor 'x' is described as"),
    "dtype": (
        {"tensors": {"x": {"shape": [1], "dtype": ["float32"], "stored": "float32", "layout": "dense"}}},
        "tensor 'x' is described as",
    ),
    "channels": ({"channels": {"blocks.0.mlp.fc1": 0}}, "channels of 'blocks.0.mlp.fc1' are 0"),
    "architecture": ({"architecture": {"source": "timm", "name": 3, "kwargs": {}}}, "not source, name and kwargs"),
    "classes": ({"class_names": [1]}, "'class_names' are not all strings"),
    "size": ({"preprocessing": {"size": 224}}, "preprocessing size = 224 makes no sense"),
    "digest": ({"files": {WEIGHTS: "abc"}}, "not a SHA-256"),
    "no weights": ({"files": {}}, "lists no weights.safetensors"),
    "outside": ({"files": {"../../etc/passwd": "0" * 64}}, "not one that a bundle has"),
    "absolute": ({"files": {"/etc/passwd": "0" * 64}}, "not one that a bundle has"),
    "wider": ({"channels": {"blocks.0.mlp.fc1": 4096}}, "cannot be given 4096"),
    "another group": ({"channels": {"blocks.9.mlp.fc1": 4}}, "no channel group"),
    "uncut": ({"channels": {}}, r"its architecture and channels make it float32 \[32, 32\]"),
    "bias": ({"biases": ["blocks.0.mlp.fc1"]}, "cannot be given one"),
    "name": ({"architecture": {"source": "timm", "name": "local-dir:/tmp", "kwargs": {}}}, "timm has no model"),
    "kwarg": (
        {"architecture": {"source": "timm", "name": "resnet18", "kwargs": {"checkpoint_path": "/etc/passwd"}}},
        "checkpoint_path",
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_that_cannot_be_is_refused(claim: str, copy: Path) -> None:
    content, message = CLAIMS[claim]
    rewrite(copy, lambda d: d.update(content))
    with pytest.raises(InputError, match=message):
        bundle.load(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 100_000, "\xff"])
def test_what_is_not_json_is_refused(text: str, copy: Path) -> None:
    (copy / DESCRIPTION).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"bundle\.json"):
        bundle.read(copy)


@pytest.mark.parametrize("key", ["architecture", "channels", "tensors", "files", "metrics", "version"])
def test_a_missing_key_is_refused(key: str, copy: Path) -> None:
    rewrite(copy, lambda d: d.pop(key))
    with pytest.raises(BundleError, match=key):
        bundle.load(copy)


PACKED = "blocks.0.mlp.fc1.weight"
WEIGHTS_CHANGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("head.bias"), "weights.safetensors lacks head.bias"),
    "missing part": (lambda t: t.pop(f"{PACKED}.shape"), f"lacks {PACKED}.shape"),
    "unknown": (lambda t: t.update(more=torch.ones(1)), "holds unknown more"),
    "shape": (lambda t: t.update({"head.bias": torch.ones(3)}), r"head.bias is float32 \[3\] in weights"),
    "dtype": (lambda t: t.update({"head.bias": torch.ones(10).double()}), "head.bias is float64"),
    "packed shape": (lambda t: t[f"{PACKED}.shape"].fill_(2**40), f"{PACKED} is packed as"),
    "bits": (lambda t: t[f"{PACKED}.bitmask"].fill_(255), f"{PACKED} in weights.*bits are set but"),
}


@pytest.mark.parametrize("change", WEIGHTS_CHANGES)
def test_tensors_that_bundle_json_does_not_say_are_refused(change: str, copy: Path) -> None:
    alter, message = WEIGHTS_CHANGES[change]
    rewrite_weights(copy, alter)
    with pytest.raises(BundleError, match=message):
        bundle.load(copy)


def test_tensors_that_the_architecture_does_not_have_are_refused(copy: Path) -> None:
    rewrite_weights(copy, lambda t: t.update(more=torch.ones(1)))
    entry = {"shape": [1], "dtype": "float32", "stored": "float32", "layout": "dense"}
    rewrite(copy, lambda d: d["tensors"].update(more=entry))
    with pytest.raises(BundleError, match="it holds unknown more"):
        bundle.load(copy)
    rewrite_weights(copy, lambda t: (t.pop("more"), t.pop("head.bias")))
    rewrite(copy, lambda d: (d["tensors"].pop("more"), d["tensors"].pop("head.bias")))
    with pytest.raises(BundleError, match=r"it lacks head\.bias"):
        bundle.load(copy)


def test_a_file_of_another_layout_or_kind_is_refused(copy: Path) -> None:
    rewrite_weights(copy, lambda t: None, layout="sparse-bitmask/2")
    with pytest.raises(BundleError, match="layout 'sparse-bitmask/2', this reads 'sparse-bitmask/1'"):
        bundle.load(copy)
    (copy / WEIGHTS).write_bytes(b"no tensors")
    rewrite(copy, lambda d: d["files"].update({WEIGHTS: hashlib.sha256(b"no tensors").hexdigest()}))
    with pytest.raises(BundleError, match="not a safetensors file"):
        bundle.load(copy)


def test_a_link_out_of_the_folder_is_not_followed(copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / WEIGHTS, tmp_path / "elsewhere")
    (copy / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        bundle.load(copy)


def test_a_bundle_of_an_adapter_loads_only_where_it_is_allowed(tmp_path: Path) -> None:
    bundle.save(build("vgg"), tmp_path / "b", architecture=VGG)
    with pytest.raises(ArchitectureError, match=r"allow_adapters=\['tests.heal.nets:_vgg'\]"):
        bundle.load(tmp_path / "b")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"license": "mit"}, "'license' is unknown; did you mean 'licence'"),
        ({"class_names": ["a"]}, "1 class_names for a model of 10 classes"),
        ({"metrics": {"top1": float("nan")}}, "cannot be written as JSON"),
        ({"metrics": [0.5]}, "'metrics' is a list"),
        ({"preprocessing": {"mean": "grey"}}, "mean = 'grey' makes no sense"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(metadata: Description, message: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=message):
        bundle.save(build("vit"), tmp_path / "b", metadata=metadata)
    assert list(tmp_path.iterdir()) == []
