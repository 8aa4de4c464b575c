"""What the healers make of layers out of the ordinary: gates and scales, concatenated maps, standardised weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from heal import batchnorm, masking
from heal.allocators.pool import Include, Pool
from heal.allocators.uniform import Uniform
from heal.compat import timm
from heal.errors import ArchitectureError
from heal.families.discovery import batch_norms
from heal.families.lookup import describe
from heal.families.parts import called
from heal.healers.layerwise_variance import LayerwiseVariance
from heal.healers.repair import Repair
from heal.healers.signal_resuscitation import SignalResuscitation
from heal.healers.variance_matching import VarianceMatching
from heal.method import AllocationContext, HealContext, Healer
from heal.pruned import apply
from heal.pruners.magnitude import Magnitude
from heal.values import Budget, Mask
from heal.wiring import trace
from tests.heal import nets

VIT = {"img_size": nets.SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "init_values": 0.1}
DENSENET = {"growth_rate": 8, "block_config": (2, 2, 1, 1)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}


def _net(name: str, **kwargs: object) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=nets.CLASSES, **kwargs)
    nets.randomise(model)
    return model.eval()


def _student(dense: nn.Module, include: Include = (), sparsity: float = 0.7) -> tuple[nn.Module, Mask]:
    allocation = Uniform(include=include).allocate(dense, Budget(weights=sparsity), AllocationContext())
    mask = Magnitude().prune(dense, allocation, {})
    student = copy.deepcopy(dense)
    apply(student, mask)
    return student, mask


def _moments(model: nn.Module, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [d] of a module's output."""
    kept: list[Tensor] = []
    module = model.get_submodule(name)
    hook = module.register_forward_hook(lambda _, __, output: kept.append(output.detach().double().clone()))
    with torch.no_grad():
        model(images)
    hook.remove()
    maps = isinstance(module, nn.Conv2d) or type(module).__name__.endswith("2d")
    rows = kept[0].movedim(1, -1) if maps else kept[0]
    rows = rows.reshape(-1, rows.shape[-1])
    return rows.mean(0), rows.std(0, correction=0)


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny"])
def test_variance_matching_leaves_norms_alone_that_add_their_input(name: str) -> None:
    """The small ones hold theirs as [1, d, 1, 1] maps, the large ones channels last."""
    dense, images = _net(name, **CONVNEXT), nets.images(8)
    student, mask = _student(dense)
    before = copy.deepcopy(student.state_dict())
    report = VarianceMatching(images=8).heal(student, dense, images, HealContext(pruned=mask))
    norms = {norm: type(dense.get_submodule(norm)).__name__ for norm in describe(dense).norms}
    added = [norm for norm, kind in norms.items() if kind == "GlobalResponseNorm"]
    assert len(added) == 4 and report.notes[0].startswith("4 norms")
    for norm in norms:
        if norm in added:
            assert torch.equal(student.state_dict()[f"{norm}.weight"], before[f"{norm}.weight"])
            continue
        (mean_d, std_d), (mean_p, std_p) = (_moments(model, images, norm) for model in (dense, student))
        assert torch.allclose(mean_p, mean_d, atol=1e-4 * float(std_d.max())), norm
        assert torch.allclose(std_p, std_d, rtol=1e-3, atol=1e-4 * float(std_d.max())), norm


def test_variance_matching_gives_every_layer_scale_the_dense_variance() -> None:
    dense, images = _net("vit_tiny_patch16_224", **VIT), nets.images(8)
    student, mask = _student(dense)
    pruned = copy.deepcopy(student)
    report = VarianceMatching(images=8).heal(student, dense, images, HealContext(pruned=mask))
    assert masking.holds(student, mask) and not report.notes
    for scale in ("blocks.0.ls1", "blocks.0.ls2", "blocks.1.ls1", "blocks.1.ls2"):
        wanted, found, unhealed = (_moments(model, images, scale)[1] for model in (dense, student, pruned))
        assert torch.allclose(found, wanted, rtol=1e-4), scale
        assert not torch.allclose(unhealed, wanted, rtol=0.1), scale


@pytest.mark.parametrize(("name", "kwargs"), [("densenet121", DENSENET), ("mobilenetv3_small_050", {})])
@pytest.mark.parametrize("healer", ["asr", "layerwise"])
def test_every_convolution_but_the_first_is_rescaled(name: str, kwargs: dict[str, object], healer: str) -> None:
    """Also those whose output is concatenated before a BatchNorm, or that a BatchNorm never sees."""
    dense, images = _net(name, **kwargs), nets.images(8)
    student, mask = _student(dense, ("stem", "depthwise"), 0.4)
    method = LayerwiseVariance(8) if healer == "layerwise" else SignalResuscitation(8, shrinkage="none")
    method.heal(student, dense, images, HealContext(pruned=mask))
    assert masking.holds(student, mask)
    layers = [layer for layer, module in dense.named_modules() if isinstance(module, nn.Conv2d)]
    wiring = trace(dense, layers, images[:1])
    assert len(wiring.order) == len(layers) and len(wiring.norm_after) < len(layers)
    for layer in wiring.order[1:]:
        (mean_d, std_d), (mean_p, std_p) = (_moments(model, images, layer) for model in (dense, student))
        if healer == "layerwise":
            assert std_p.square().mean() == pytest.approx(float(std_d.square().mean()), rel=1e-3), layer
            continue
        alive = std_p > 1e-6
        assert torch.allclose(std_p[alive], std_d[alive], rtol=1e-3), layer
        if dense.get_submodule(layer).bias is not None:
            assert torch.allclose(mean_p, mean_d, atol=1e-3 * float(std_d.max()) + 1e-6), layer
    first = wiring.order[0]
    assert torch.equal(student.state_dict()[f"{first}.weight"][mask.keep[first]], _kept(dense, mask, first))


def _kept(dense: nn.Module, mask: Mask, layer: str) -> Tensor:
    return dense.state_dict()[f"{layer}.weight"][mask.keep[layer]]


@pytest.mark.parametrize("healer", [LayerwiseVariance(16), SignalResuscitation(16)])
def test_where_every_consumer_is_a_batch_norm_recalibration_undoes_a_rescaling(healer: Healer) -> None:
    dense, images = _net("densenet121", **DENSENET), nets.images(16)
    for norm in batch_norms(dense).values():
        norm.eps = 1e-12
    plain, mask = _student(dense)
    student = copy.deepcopy(plain)
    healer.heal(student, dense, images, HealContext(pruned=mask))
    for model in (plain, student):
        batchnorm.reestimate(model, images, "exact", batch_size=16)
    with torch.no_grad():
        expected, found = plain(images), student(images)
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))


class _Mixed(nn.Module):
    """A convolution, one whose weight is standardised, one with a parametrization, and a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.standard = timm.layers.ScaledStdConv2d(8, 8, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
        self.hidden, self.head = nn.Linear(8, 256), nn.Linear(256, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.standard(self.plain(self.stem(x)))).mean((2, 3))
        out: Tensor = self.head(self.hidden(x).relu())
        return out


def test_layers_that_standardise_their_weight_are_in_no_pool() -> None:
    model, said = _Mixed().eval(), list[str]()
    assert [name for name, _ in called(model)] == ["stem", "plain", "hidden", "head"]
    assert not {"standard", "normed"} & set(describe(model).layers)
    everything: Include = ("stem", "depthwise", "classifier")
    pool = Pool.of(model, everything, Budget(weights=0.5), AllocationContext(log=said.append))
    assert list(pool.weights) == ["stem", "plain", "hidden", "head"]
    assert said[0].startswith("2 layers of _Mixed (ParametrizedConv2d, ScaledStdConv2d; standard is the first)")


@pytest.mark.parametrize("name", ["resnetv2_50x1_bit", "nf_resnet26"])
def test_a_network_of_standardised_layers_is_refused_by_name(name: str) -> None:
    model: nn.Module = timm.create_model(name, num_classes=nets.CLASSES)
    with pytest.raises(ArchitectureError, match=r"StdConv2d.*conv is the first\) have a forward of their own"):
        Uniform(include=("stem", "classifier")).allocate(model, Budget(weights=0.8), AllocationContext())


def test_subclasses_that_compute_with_their_weight_stay_in_the_pool() -> None:
    class Named(nn.Conv2d):
        """A name of its own, and nothing else."""

    model = nn.Sequential(Named(3, 4, 3), timm.layers.Conv2dSame(4, 4, 3), timm.layers.Linear(4, 4))
    assert len(called(model)) == 3


def test_repair_takes_the_stem_and_the_classifier_where_they_are_masked() -> None:
    dense, images = _net("vit_tiny_patch16_224", **VIT), nets.images(16)
    student, mask = _student(dense, ("stem", "classifier"))
    Repair(images=16).heal(student, dense, images, HealContext(pruned=mask))
    assert masking.holds(student, mask)
    for layer in {"patch_embed.proj", "head", *describe(dense).layers}:
        (mean_d, std_d), (mean_p, std_p) = (_moments(model, images, layer) for model in (dense, student))
        assert torch.allclose(mean_p, mean_d, atol=1e-4 * float(std_d.max())), layer
        assert torch.allclose(std_p, std_d, rtol=1e-3), layer
