"""Law 3: cutting channels computes what masking them computes; and a cut model is whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor, nn

from heal import surgery
from heal.errors import ArchitectureError, BudgetError, NumericalError
from heal.families.family import HIDDEN, KINDS, ChannelGroup, Family
from heal.families.heads import Heads
from heal.families.lookup import describe
from heal.values import ChannelCut
from tests.heal.nets import CLASSES, EVERY, NETS, build, images

nets = pytest.mark.parametrize("net", EVERY)
TOGETHER = tuple(kind for kind in KINDS if kind != "heads")  # what can be cut at once
ratios = pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])  # with less, ReLUs may leave nothing of a stream
FREE_SIZE = ("convnext", "resnet", "bottleneck", "vgg", "mobilenetv2", "mobilenetv3", "efficientnet")


def random_cut(
    model: nn.Module, ratio: float, seed: int = 0, updates: bool = True, kinds: Collection[str] = TOGETHER
) -> ChannelCut:
    """Channels of these kinds drawn from the seed, of queries and keys by every head for itself; and new biases for
    the consumers that have one."""
    generator = torch.Generator().manual_seed(seed)
    groups, widths = describe(model).groups_of(kinds), surgery.widths(model)
    keep, total, new = {}, {name: widths[name] for name in groups}, {}
    for name, width in total.items():
        count = max(1, round((1 - ratio) * width))
        heads = (_heads(model, groups[name]).number,) if groups[name].kind == "qk" else ()
        keep[name] = torch.rand(*heads, width, generator=generator).argsort()[..., :count].sort().values
    for group in groups.values() if updates else ():
        for consumer in group.consumers:
            bias = model.get_submodule(consumer)._parameters["bias"]
            if bias is not None:
                new[f"{consumer}.bias"] = 0.1 * torch.randn(bias.shape, generator=generator)
    return ChannelCut(keep, total, new)


def zero_out(model: nn.Module, chosen: ChannelCut, table: Family | None = None) -> None:
    """The cut's masked twin: same shapes; the consumers' columns of cut channels are zero."""
    groups = (table or describe(model)).cuttable
    with torch.no_grad():
        for name, new in chosen.updates.items():
            model.get_parameter(name).copy_(new)
        for name, keep in chosen.keep.items():
            group = groups[name]
            if group.kind == "qk":
                _zero_queries(model, group, keep)
            for consumer in group.consumers:
                weight = model.get_submodule(consumer).get_parameter("weight")
                gone = torch.ones(weight.shape[1], dtype=torch.bool)
                gone[_heads(model, group).columns(group.kind, keep) if group.attention else keep] = False
                weight[:, gone] = 0


def _zero_queries(model: nn.Module, group: ChannelGroup, keep: Tensor) -> None:
    qkv, heads = model.get_submodule(group.modules[0]), _heads(model, group)
    for head in range(heads.number):
        kept = (keep if keep.ndim == 1 else keep[head]).tolist()
        gone = [head * heads.qk + dimension for dimension in range(heads.qk) if dimension not in kept]
        for parameter in qkv.parameters():
            parameter[gone] = 0


def _heads(model: nn.Module, group: ChannelGroup) -> Heads:
    return Heads.of(model.get_submodule(group.attention))


def twins(
    model: nn.Module, ratio: float, seed: int = 0, kinds: Collection[str] = TOGETHER
) -> tuple[nn.Module, nn.Module]:
    """The same random cut, sliced and masked."""
    sliced, masked = copy.deepcopy(model), copy.deepcopy(model)
    chosen = random_cut(model, ratio, seed, kinds=kinds)
    surgery.cut(sliced, chosen)
    zero_out(masked, chosen)
    return sliced, masked


def output_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of one fixed mixture of them with respect to the input."""
    x = x.clone().requires_grad_()
    logits: Tensor = model(x)
    mixture = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    (logits * mixture).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return logits.detach(), x.grad


def assert_equal_to(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    for one, other in zip(output_and_gradient(a, x), output_and_gradient(b, x), strict=True):
        assert float((one - other).norm()) <= 1e-5 * float(other.norm())


@nets
@ratios
def test_sliced_equals_masked_forward_and_backward(net: str, ratio: float) -> None:
    model = build(net)
    sliced, masked = twins(model, ratio)
    assert_equal_to(sliced, masked, images(4))
    (dense, _), (cut, gradient) = (output_and_gradient(m, images(4)) for m in (model, sliced))
    assert float((dense - cut).norm() / dense.norm()) > 1e-3  # the cut is felt
    assert bool(gradient.any())


@nets
def test_a_cut_model_can_be_cut_again(net: str) -> None:
    once, masked_once = twins(build(net), 0.4)
    twice, masked_twice = twins(once, 0.5, seed=1)
    assert_equal_to(twice, masked_twice, images(3))
    assert_equal_to(once, masked_once, images(3))


@nets
def test_sliced_equals_masked_at_every_batch_size(net: str) -> None:
    sliced, masked = twins(build(net).double(), 0.5)
    for count in (1, 5):
        assert_equal_to(sliced, masked, images(count, seed=count).double())


@pytest.mark.parametrize("net", FREE_SIZE)
def test_sliced_equals_masked_at_another_image_size(net: str) -> None:
    sliced, masked = twins(build(net), 0.5)
    assert_equal_to(sliced, masked, images(2, size=48))


@pytest.mark.parametrize("net", ["resnet", "bottleneck", "vgg", "mobilenetv3"])
def test_sliced_equals_masked_in_training_mode(net: str) -> None:
    """Batch statistics are each channel's own, so the law holds for them as well."""
    sliced, masked = (twin.train() for twin in twins(build(net), 0.5))
    for module in [*sliced.modules(), *masked.modules()]:
        if isinstance(module, nn.Dropout):
            module.eval()
    assert_equal_to(sliced, masked, images(8))


@nets
def test_a_single_channel_may_stay_everywhere(net: str) -> None:
    sliced, masked = twins(build(net), 0.999)
    found = surgery.widths(sliced)
    assert {found[name] for name in describe(sliced).groups_of(TOGETHER)} == {1}
    assert_equal_to(sliced, masked, images(2))
    assert describe(sliced).cuttable == describe(build(net)).cuttable


@nets
def test_the_table_of_a_cut_model_is_the_dense_ones(net: str) -> None:
    model = build(net)
    assert describe(twins(model, 0.5)[0]) == describe(model)


@nets
def test_attributes_agree_with_tensors_after_a_cut(net: str) -> None:
    model = build(net)
    chosen, dense = random_cut(model, 0.5), surgery.widths(model)
    surgery.cut(model, chosen)
    assert surgery.widths(model) == {**dense, **chosen.kept}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None and len(tensor) == module.num_features


@nets
def test_what_stays_are_the_chosen_channels_of_the_dense_model(net: str) -> None:
    model = build(net)
    sliced, chosen = copy.deepcopy(model), random_cut(model, 0.5, updates=False, kinds=HIDDEN)
    surgery.cut(sliced, chosen)
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for name, group in describe(model).groups_of(HIDDEN).items():
        rows |= dict.fromkeys((*group.producers, *group.followers), chosen.keep[name])
        columns |= dict.fromkeys(group.consumers, chosen.keep[name])
    for name, expected in model.state_dict().items():
        module = name.rpartition(".")[0]
        if module in rows and expected.ndim > 0:
            expected = expected[rows[module]]
        if module in columns and expected.ndim > 1:
            expected = expected[:, columns[module]]
        assert torch.equal(sliced.state_dict()[name], expected)


@nets
def test_cut_hidden_channels_change_the_shape_of_no_blocks_output(net: str) -> None:
    model = build(net)
    sliced, hidden = copy.deepcopy(model), describe(model).groups_of(HIDDEN)
    whole = random_cut(model, 0.5, updates=False)
    surgery.cut(sliced, ChannelCut({g: whole.keep[g] for g in hidden}, {g: whole.total[g] for g in hidden}))
    assert _state_shapes(model) == _state_shapes(sliced)


def _state_shapes(model: nn.Module) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for block in describe(model).blocks:
        model.get_submodule(block).register_forward_hook(
            lambda _, __, output, block=block: shapes.update({block: output.shape})
        )
    model(images(1))
    return shapes


@nets
def test_shrink_makes_a_fresh_model_take_a_cut_ones_weights(net: str) -> None:
    sliced, _ = twins(build(net), 0.5)
    fresh = build(net, seed=1)
    surgery.shrink(fresh, surgery.widths(sliced))
    fresh.load_state_dict(sliced.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images(2)), sliced(images(2)))


def test_shrink_works_on_the_meta_device() -> None:
    sliced, _ = twins(build("efficientnet"), 0.5)
    with torch.device("meta"):
        empty = NETS["efficientnet"]()
    surgery.shrink(empty, surgery.widths(sliced))
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in sliced.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_keep_dtype_and_requires_grad(dtype: torch.dtype) -> None:
    model = build("mobilenetv3").to(dtype)
    frozen = {
        name for i, (name, p) in enumerate(model.named_parameters()) if not p.requires_grad_(i % 2 == 0).requires_grad
    }
    surgery.cut(model, random_cut(model, 0.5, updates=False))
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_keeping_every_channel_changes_no_tensor_object() -> None:
    model = build("resnet")
    before = dict(model.named_parameters())
    total = surgery.widths(model)
    surgery.cut(model, ChannelCut({name: torch.arange(width) for name, width in total.items()}, total))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_cut_of_some_groups_leaves_the_others() -> None:
    model = build("vit")
    total = surgery.widths(model)
    first, *others = total
    surgery.cut(model, ChannelCut({first: torch.tensor([0, 5, 7])}, {first: total[first]}))
    assert surgery.widths(model) == {first: 3} | {name: total[name] for name in others}
    assert model(images(1)).shape == (1, CLASSES)


def test_updates_are_written_before_the_cut_at_their_shape_before_it() -> None:
    model = build("vit")
    group, total = next(iter(surgery.widths(model).items()))
    keep = torch.tensor([1, 3])
    new = torch.randn(total)
    surgery.cut(model, ChannelCut({group: keep}, {group: total}, {f"{group}.bias": new}))
    assert torch.equal(model.get_submodule(group).get_parameter("bias"), new[keep])


def test_an_update_gives_a_layer_the_bias_that_it_lacks() -> None:
    model = build("resnet")
    (group, total), *_ = surgery.widths(model).items()
    consumer = describe(model).cuttable[group].consumers[0]
    chosen = ChannelCut({group: torch.arange(2)}, {group: total}, {f"{consumer}.bias": torch.full((8,), 3.0)})
    before = model(images(1))
    surgery.cut(model, chosen)
    assert torch.equal(model.get_submodule(consumer).get_parameter("bias"), torch.full((8,), 3.0))
    assert not torch.equal(model(images(1)), before)


def _refused(model: nn.Module, chosen: ChannelCut, match: str, family: Family | None = None) -> None:
    """The error names what is wrong, and nothing has changed."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ArchitectureError, NumericalError), match=match):
        surgery.cut(model, chosen, family)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unknown_group_is_refused_with_the_nearest_name() -> None:
    model = build("vit")
    chosen = ChannelCut({"blocks.0.mlp.fc": torch.arange(2)}, {"blocks.0.mlp.fc": 128})
    _refused(model, chosen, r"no channel group 'blocks.0.mlp.fc'; did you mean 'blocks.0.mlp.fc1'")


def test_a_cut_for_another_width_is_refused() -> None:
    model = build("vit")
    chosen = ChannelCut({"blocks.1.mlp.fc1": torch.arange(2)}, {"blocks.1.mlp.fc1": 64})
    _refused(model, chosen, "blocks.1.mlp.fc1.* has 128 rows, the cut was made for 64")


@pytest.mark.parametrize(
    ("update", "value", "match"),
    [
        ("blocks.0.mlp.fc2.bias", torch.zeros(31), r"has shape \[32\], the new value \[31\]"),
        ("blocks.0.mlp.fc2.bais", torch.zeros(32), "no tensor 'blocks.0.mlp.fc2.bais'; did you mean"),
        ("blocks.9.mlp.fc2.bias", torch.zeros(32), "no tensor 'blocks.9.mlp.fc2.bias'; did you mean"),
        ("blocks.0.mlp.fc2.bias", torch.full((32,), torch.nan), "is not finite"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(update: str, value: Tensor, match: str) -> None:
    chosen = random_cut(build("vit"), 0.5)
    _refused(build("vit"), ChannelCut(chosen.keep, chosen.total, {**chosen.updates, update: value}), match)


def test_tied_weights_are_refused() -> None:
    model = build("vit")
    one, other = (model.get_submodule(f"blocks.{i}.mlp.fc1") for i in (0, 2))
    other.weight = one.weight
    _refused(model, random_cut(model, 0.5), "blocks.0.mlp.fc1.* shares its weight with blocks.2.mlp.fc1")


def test_reparametrised_weights_are_refused() -> None:
    model = build("vit")
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule("blocks.0.mlp.fc1"))
    table = describe(build("vit"))
    _refused(model, random_cut(build("vit"), 0.5), "blocks.0.mlp.fc1.* cannot be sliced", table)


@pytest.mark.parametrize(
    ("make", "followers", "match"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2)), (), "1 .* along its columns"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.GroupNorm(2, 4)), ("2",), "2 .* channels"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4 * 9, 2)), (), "1 .* has 36 columns"),
    ],
)
def test_a_table_that_asks_for_the_impossible_is_refused(
    make: Callable[[], nn.Module], followers: tuple[str, ...], match: str
) -> None:
    table = Family("mine", layers=(), groups=(ChannelGroup("0", ("0",), ("1",), followers),))
    _refused(make(), ChannelCut({"0": torch.tensor([1])}, {"0": 4}), match, table)


def test_a_network_without_groups_cannot_be_cut() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert surgery.widths(model) == {}
    _refused(model, ChannelCut({"0": torch.tensor([1])}, {"0": 4}), "has no table of channel groups")


def test_a_users_own_table_is_cut_by_the_same_slicer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    table = Family("mine", layers=("0",), groups=(ChannelGroup("0", ("0",), ("2",)),))
    chosen = ChannelCut({"0": torch.tensor([0, 4])}, {"0": 6})
    masked, x = copy.deepcopy(model), torch.randn(5, 4)
    surgery.cut(model, chosen, table)
    zero_out(masked, chosen, table)
    assert torch.allclose(model(x), masked(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("width", "match"), [(0, "cannot be given 0"), (129, "cannot be given 129")])
def test_shrink_refuses_an_impossible_width(width: int, match: str) -> None:
    with pytest.raises(ArchitectureError, match=match):
        surgery.shrink(build("vit"), {"blocks.0.mlp.fc1": width})


def test_shrink_refuses_an_unknown_group() -> None:
    with pytest.raises(ArchitectureError, match="no channel group 'stem'; known: "):
        surgery.shrink(build("vit"), {"stem": 8})


def test_a_cut_that_leaves_nothing_is_no_cut() -> None:
    with pytest.raises(BudgetError, match="would leave no channel"):
        ChannelCut({"a": torch.tensor([], dtype=torch.int64)}, {"a": 4})
