"""The allocators of weights against published figures (methods.md 3c, 3d) and rankings written out by hand."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heal.allocators.erk import Erk
from heal.allocators.erk_capped import ErkCapped
from heal.allocators.global_magnitude import GlobalMagnitude
from heal.allocators.l2_normalised import L2Normalised
from heal.allocators.lamp import Lamp, scores
from heal.allocators.pool import Pool
from heal.allocators.projection_forced import ProjectionForced
from heal.allocators.uniform import Uniform
from heal.allocators.uniform_plus import UniformPlus
from heal.errors import BudgetError, MethodError
from heal.families.family import Family
from heal.families.lookup import describe
from heal.families.parts import parts
from heal.method import AllocationContext, Allocator
from heal.values import Allocation, Budget
from tests.heal import nets

ALL = ("stem", "depthwise", "classifier")
CLASSES = [Uniform, UniformPlus, Erk, Lamp, GlobalMagnitude, L2Normalised]


def _resnet18() -> nn.Module:
    """The weights of CIFAR's ResNet-18 with 100 classes, by name; it is never called."""
    shapes = {"conv1": (64, 3, 3)}
    channels = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            shapes[f"layer{stage}.{block}.conv1"] = (width, channels, 3)
            shapes[f"layer{stage}.{block}.conv2"] = (width, width, 3)
            if width != channels:
                shapes[f"layer{stage}.{block}.downsample"] = (width, channels, 1)
            channels = width
    layers = {
        name.replace(".", "_"): nn.Conv2d(inputs, outputs, size) for name, (outputs, inputs, size) in shapes.items()
    }
    return nn.Sequential(OrderedDict(layers | {"fc": nn.Linear(512, 100)}))


def _toy() -> nn.Module:
    return nn.Sequential(OrderedDict(a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 8, 3), c=nn.Linear(8, 10)))


def _allocate(allocator: Allocator, model: nn.Module, sparsity: float) -> Allocation:
    return allocator.allocate(model, Budget(weights=sparsity), AllocationContext())


ERK_95 = {
    "conv1": (1.0, 1728),
    "layer1_0_conv1": (0.220034, 8111),
    "layer1_1_conv2": (0.220034, 8111),
    "layer2_0_conv1": (0.162562, 11985),
    "layer2_0_conv2": (0.107554, 15860),
    "layer2_1_conv1": (0.107554, 15860),
    "layer2_1_conv2": (0.107554, 15859),
    "layer2_0_downsample": (1.0, 8192),
    "layer3_0_conv1": (0.080050, 23608),
    "layer3_1_conv1": (0.053161, 31356),
    "layer3_0_downsample": (0.713057, 23366),
    "layer4_0_conv1": (0.039717, 46852),
    "layer4_1_conv2": (0.026427, 62348),
    "layer4_0_downsample": (0.355605, 46610),
    "fc": (0.723550, 37046),
}
ERK_90 = {
    "conv1": 1.0,
    "layer1_0_conv1": 0.461063,
    "layer2_0_conv1": 0.340636,
    "layer2_1_conv2": 0.225371,
    "layer3_0_conv1": 0.167738,
    "layer3_0_downsample": 1.0,
    "layer4_0_conv1": 0.083224,
    "layer4_0_downsample": 0.745142,
    "fc": 1.0,
}


def test_erk_is_the_published_rule_on_cifar_resnet18() -> None:
    model = _resnet18()
    found = _allocate(Erk(include=ALL), model, 0.95)
    assert (found.whole, found.asked, found.got) == (11_210_432, 560_522, 560_522)
    for layer, (density, count) in ERK_95.items():
        assert found.kept[layer] == count, layer
        assert found.kept[layer] / found.total[layer] == pytest.approx(density, abs=1e-4)
    found = _allocate(Erk(include=ALL), model, 0.90)
    assert found.got == 1_121_043
    for layer, density in ERK_90.items():
        assert found.kept[layer] / found.total[layer] == pytest.approx(density, abs=1e-4)


@pytest.mark.parametrize(
    ("sparsity", "projections", "fc"),
    [
        (0.94, (1, 0.8582, 0.4280), 0.8709),
        (0.955, (1, 0.6405, 0.3194), 0.6499),
        (0.97, (0.8529, 0.4243, 0.2116), 0.4305),
    ],
)
def test_erk_between(sparsity: float, projections: tuple[float, ...], fc: float) -> None:
    found = _allocate(Erk(include=ALL), _resnet18(), sparsity)
    densities = [1 - found.sparsity(f"layer{stage}_0_downsample") for stage in (2, 3, 4)]
    assert densities == pytest.approx(projections, abs=1e-4)
    assert 1 - found.sparsity("fc") == pytest.approx(fc, abs=1e-4)


@pytest.mark.parametrize(
    ("sparsity", "densities", "counts"),
    [
        (0.5, (0.613501, 0.318548, 1), [66, 92, 80]),
        (0.6, (0.467725, 0.242857, 0.874286), [50, 70, 70]),
        (0.75, (0.292328, 0.151786, 0.546429), [31, 44, 44]),
    ],
)
def test_erk_toy(sparsity: float, densities: tuple[float, ...], counts: list[int]) -> None:
    assert list(_allocate(Erk(include=ALL), _toy(), sparsity).kept.values()) == counts
    pool = Pool.of(_toy(), ALL, Budget(weights=sparsity), AllocationContext())
    filled = pool.filled({layer: sum(w.shape) / w.numel() for layer, w in pool.weights.items()})
    assert list(filled.values()) == pytest.approx(densities, abs=1e-6)


def test_erk_to_the_half() -> None:
    found = _allocate(Erk(include=ALL, power=0.5), _resnet18(), 0.95)
    expected = {"conv1": 0.3926, "layer2_0_downsample": 0.2940, "layer4_1_conv1": 0.0399, "fc": 0.2088}
    for layer, density in expected.items():
        assert 1 - found.sparsity(layer) == pytest.approx(density, abs=6e-4)


def test_capped_erk_gives_back_what_the_cap_takes() -> None:
    found = _allocate(ErkCapped(include=ALL, cap=0.5), _resnet18(), 0.95)
    expected = {
        "conv1": 0.5,
        "layer2_0_downsample": 0.5,
        "layer3_0_downsample": 0.5,
        "fc": 0.5,
        "layer1_0_conv1": 0.230532,
        "layer4_1_conv1": 0.027687,
        "layer4_0_downsample": 0.372571,
    }
    assert found.got == 560_522
    for layer, density in expected.items():
        assert 1 - found.sparsity(layer) == pytest.approx(density, abs=1e-4)
    with pytest.raises(BudgetError, match="no densities between"):
        _allocate(ErkCapped(include=ALL, cap=0.3), _resnet18(), 0.5)


def test_projections_as_sparse_as_the_whole_leave_more_to_erk() -> None:
    model = _resnet18()
    names = [name for name, _ in model.named_children()]
    projections = tuple(name for name in names if "downsample" in name)
    model.regrow_family = Family(name="cifar", layers=tuple(names), projections=projections)
    found = _allocate(ProjectionForced(), model, 0.95)
    expected = {"layer1_0_conv1": 0.251881, "layer4_1_conv2": 0.030252, "fc": 0.828276, "layer2_0_downsample": 0.05}
    assert found.got == 560_522
    for layer, density in expected.items():
        assert 1 - found.sparsity(layer) == pytest.approx(density, abs=1e-4)
    erk = _allocate(Erk(), model, 0.95)
    share = sum(erk.kept[name] for name in projections) / erk.got
    assert share == pytest.approx(0.1395, abs=1e-4), "what the paper complains of"
    forced = _allocate(ProjectionForced(projections="erk", rest="lamp"), model, 0.95)
    assert forced.got == 560_522
    assert all(abs(forced.kept[name] - erk.kept[name]) <= 1 for name in projections)


def test_uniform_plus_protects_the_ends() -> None:
    found = _allocate(UniformPlus(include=ALL), _resnet18(), 0.95)
    assert (found.kept["conv1"], found.kept["fc"], found.got) == (1728, 10240, 560_522)
    assert 1 - found.sparsity("layer3_1_conv1") == pytest.approx(0.0491646, abs=1e-5)
    pool = Pool.of(_toy(), ALL, Budget(weights=0.6), AllocationContext())
    found = _allocate(UniformPlus(include=ALL), _toy(), 0.6)
    assert [found.kept[layer] / found.total[layer] for layer in pool.weights] == pytest.approx(
        [1, 0.222826, 0.222826], abs=1 / 80
    )
    with pytest.raises(BudgetError, match="protected ends"):
        _allocate(UniformPlus(include=ALL), _toy(), 0.75)


def test_lamp_scores_and_counts() -> None:
    first, second = torch.tensor([[1.0, 2, 3]]), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert scores(first).flatten().tolist() == pytest.approx([0.0714286, 0.3076923, 1], abs=1e-7)
    assert scores(second).flatten().tolist() == pytest.approx([1 / 30, 0.1379310, 0.36, 1], abs=1e-7)
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(4, 1), nn.Linear(1, 1))
    for layer, weight in ((0, first), (1, second)):
        model[layer].weight = nn.Parameter(weight)
    for kept, counts in ((3, [1, 2]), (4, [2, 2]), (5, [2, 3])):
        found = _allocate(Lamp(), model, 1 - kept / 7)
        assert list(found.kept.values()) == counts


@pytest.mark.parametrize("allocator", [GlobalMagnitude, L2Normalised, Lamp])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), sparsity=st.floats(0, 0.99), ties=st.booleans())
def test_a_global_ranking_is_the_one_written_out_by_hand(
    allocator: type[Allocator], seed: int, sparsity: float, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(2, 2))
    ranked = []
    for number, layer in enumerate(list(model)[:2]):
        weight = torch.randn(layer.weight.shape, generator=generator)
        layer.weight = nn.Parameter((weight * 2).round() / 2 if ties else weight)
        values = layer.weight.detach().double().abs().flatten()
        for index, value in enumerate(values):
            not_smaller = sorted(values[j].item() ** 2 for j in range(len(values)) if (values[j], j) > (value, index))
            if allocator is L2Normalised:
                score = value.item() / max(values.square().sum().item() ** 0.5, 1e-30)
            elif allocator is Lamp:
                score = value.item() ** 2 / (value.item() ** 2 + sum(not_smaller)) if value > 0 else 0.0
            else:
                score = value.item()
            ranked.append((-round(score, 12), number, index))
    found = _allocate(allocator(), model, sparsity)
    stays = sorted(ranked)[: found.asked]
    assert list(found.kept.values()) == [sum(entry[1] == number for entry in stays) for number in (0, 1)]


@pytest.mark.parametrize("name", list(nets.NETS))
def test_every_layer_with_weights_belongs_to_one_part(name: str) -> None:
    model = nets.build(name)
    found = parts(model, describe(model))
    assert [layer for layer, part in found.items() if part == "layers"] == list(describe(model).layers)
    with_weights = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert found.keys() == with_weights
    for layer, part in found.items():
        weight = model.get_submodule(layer).get_parameter("weight")
        if part == "depthwise":
            assert weight.ndim == 4 and weight.shape[1] == 1


@pytest.mark.parametrize("allocator", CLASSES)
@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenetv3"])
@pytest.mark.parametrize("include", [(), ("depthwise",), ALL])
def test_a_budget_in_macs_is_met_to_one_weight(allocator: type[Allocator], name: str, include: tuple[str, ...]) -> None:
    model = nets.build(name)
    context = AllocationContext(images=nets.images(2))
    allocator_ = allocator(include=include)  # type: ignore[call-arg]
    try:
        found = allocator_.allocate(model, Budget(macs=0.7), context)
    except BudgetError:
        assert allocator is UniformPlus, "only the protected ends can exceed a budget"
        return
    assert found.cost and found.asked == int(0.3 * found.whole + 0.5)
    assert 0 <= found.asked - found.got < max(cost for cost in found.cost.values())
    cheapest = min((cost, layer) for layer, cost in found.cost.items() if found.kept[layer] < found.total[layer])
    assert found.asked - found.got < cheapest[0], "another weight would still have fitted"


def test_macs_are_counted_as_the_flop_counter_counts() -> None:
    from heal import cost

    model = nets.build("mobilenetv2")
    context = AllocationContext(images=nets.images(1))
    found = Uniform(include=ALL).allocate(model, Budget(macs=0.5), context)
    assert found.whole == cost.macs(model, (3, nets.SIZE, nets.SIZE))


class _HalfUsed(nn.Module):
    """One of its layers is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.spare, self.last = (nn.Conv2d(3, 3, 3) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.first(self.stem(x)))
        return found


@pytest.mark.parametrize("allocator", [Uniform, Erk, Lamp, GlobalMagnitude])
def test_a_layer_that_is_never_called_takes_no_macs(allocator: type[Allocator]) -> None:
    context = AllocationContext(images=nets.images(1, 12))
    found = allocator(include=ALL).allocate(_HalfUsed(), Budget(macs=0.5), context)  # type: ignore[call-arg]
    assert found.cost["spare"] == 0
    assert 0 <= found.asked - found.got < max(found.cost.values())


@settings(max_examples=100, deadline=None)
@given(densities=st.lists(st.floats(0, 1), min_size=3, max_size=3), sparsity=st.floats(0, 0.999))
def test_any_densities_become_counts_that_spend_the_budget_exactly(densities: list[float], sparsity: float) -> None:
    pool = Pool.of(_toy(), ALL, Budget(weights=sparsity), AllocationContext())
    found = pool.allocation(dict(zip(pool.weights, densities, strict=True)))
    assert found.got == found.asked


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(MethodError, match="did you mean 'classifier'"):
        Erk(include=("classifer",))  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="twice"):
        Lamp(include=("stem", "stem"))
