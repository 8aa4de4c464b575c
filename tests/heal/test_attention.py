"""Attention that loses dimensions of queries and keys, of values, or whole heads."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import heal
from heal import cost, surgery
from heal.allocators.global_variance import GlobalVariance
from heal.compat import timm
from heal.errors import ArchitectureError, MethodError
from heal.families.family import ChannelGroup, Family, attention_groups
from heal.families.heads import Heads
from heal.families.lookup import describe
from heal.families.narrow_attention import NarrowAttention
from heal.healers import HEALERS
from heal.healers.closed_form import ClosedForm
from heal.healers.qk_compensation import QkCompensation
from heal.method import HealContext, check, taps
from heal.pruned import apply
from heal.pruners.variance import Variance
from heal.statistics import capture
from heal.values import Budget, ChannelCut
from heal.variances import of_all_heads, variances
from tests.heal import nets
from tests.heal.test_surgery import assert_equal_to, random_cut, twins

ATTENTION = "blocks.1.attn"
QK, V, HEADS = (group.name for group in attention_groups(ATTENTION))
CASES = [("qk",), ("v",), ("heads",), ("qk", "v"), ("mlp", "qk", "v"), ("mlp", "heads")]
cases = pytest.mark.parametrize("kinds", CASES, ids="+".join)


@cases
@pytest.mark.parametrize("net", ["vit", "deit"])
def test_sliced_equals_masked_forward_and_backward(net: str, kinds: tuple[str, ...]) -> None:
    model = nets.build(net)
    for ratio in (0.25, 0.7):
        sliced, masked = twins(model, ratio, kinds=kinds)
        for count in (1, 5):
            assert_equal_to(sliced, masked, nets.images(count))
        assert cost.parameters(sliced) < cost.parameters(model)
        assert cost.macs(sliced, (3, 32, 32)) < cost.macs(model, (3, 32, 32))
        assert describe(sliced) == describe(model)
        assert sliced.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("first", "second"),
    [(("qk",), ("qk",)), (("qk",), ("heads",)), (("heads",), ("qk", "v")), (("v",), ("heads",)), (("heads",), ("v",))],
)
def test_a_cut_attention_can_be_cut_again(first: Collection[str], second: Collection[str]) -> None:
    once, _ = twins(nets.build("vit"), 0.4, kinds=first)
    twice, masked = twins(once, 0.5, seed=1, kinds=second)
    assert_equal_to(twice, masked, nets.images(3))
    assert describe(twice) == describe(nets.build("vit"))


@pytest.mark.parametrize("kinds", [("qk",), ("heads",)])
def test_without_fused_kernels_and_compiled_it_computes_the_same(kinds: tuple[str, ...]) -> None:
    sliced, _ = twins(nets.build("vit"), 0.4, kinds=kinds)
    plain, images = copy.deepcopy(sliced), nets.images(3)
    for block in plain.blocks:
        block.attn.fused_attn = False
    assert_equal_to(plain, sliced, images)
    compiled = torch.compile(sliced, backend="eager", fullgraph=True)
    exported = torch.export.export(sliced, (images,)).module()
    with torch.no_grad():
        for again in (compiled, exported):
            torch.testing.assert_close(again(images), sliced(images))


@pytest.mark.parametrize("fused", [True, False])
def test_masks_of_attention_mean_what_they_mean_to_timm(fused: bool) -> None:
    """Around uncut layers the two are the same attention."""
    attention = nets.build("vit").get_submodule(ATTENTION)
    attention.fused_attn = fused
    narrow, tokens = NarrowAttention(attention), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    seen = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    seen.fill_diagonal_(True)
    for options in ({}, {"attn_mask": seen}, {"attn_mask": seen.float()}, {"is_causal": True}):
        torch.testing.assert_close(narrow(tokens, **options), attention(tokens, **options))


def test_sizes_and_scale_after_a_cut() -> None:
    model = nets.build("vit")
    keep = {QK: torch.tensor([1, 4, 6]), V: torch.tensor([0, 2, 3, 4, 7])}
    surgery.cut(model, ChannelCut(keep, {QK: 8, V: 8}))
    attention = model.get_submodule(ATTENTION)
    assert isinstance(attention, NarrowAttention)
    assert (attention.scale, attention.num_heads, attention.head_dim, attention.attn_dim) == (8**-0.5, 4, 5, 20)
    assert attention.qkv.weight.shape == (4 * (3 + 3 + 5), 32) and attention.proj.weight.shape == (32, 20)
    surgery.cut(model, ChannelCut({HEADS: torch.tensor([0, 3])}, {HEADS: 4}))
    attention = model.get_submodule(ATTENTION)
    assert (attention.scale, attention.num_heads, attention.head_dim, attention.attn_dim) == (8**-0.5, 2, 5, 10)
    assert Heads.of(attention) == Heads(2, 3, 5)


def test_timms_own_attention_runs_on_fewer_heads() -> None:
    model = nets.build("vit")
    surgery.cut(model, ChannelCut({HEADS: torch.tensor([1, 2, 3])}, {HEADS: 4}))
    attention = model.get_submodule(ATTENTION)
    assert type(attention) is timm.layers.Attention and attention.scale == 8**-0.5
    assert (attention.num_heads, attention.attn_dim) == (3, 24)


@cases
def test_a_bundle_of_a_cut_attention_is_read_bit_for_bit(kinds: tuple[str, ...], tmp_path: Path) -> None:
    sliced, _ = twins(nets.build("vit"), 0.4, kinds=kinds)
    sliced, _ = twins(sliced, 0.4, seed=1, kinds=("heads",))
    heal.save(sliced, tmp_path / "bundle")
    again = heal.load(tmp_path / "bundle")
    assert surgery.widths(again) == surgery.widths(sliced)
    with torch.no_grad():
        assert torch.equal(again(nets.images(2)), sliced(nets.images(2)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"qk_norm": True}, "has no channels of kind qk"),
        ({"scale_attn_norm": True}, "has no channels of kind qk"),
        ({"attn_layer": "diff"}, "has no channels of kind qk"),
    ],
)
def test_attention_that_mixes_its_dimensions_has_no_groups(change: dict[str, object], match: str) -> None:
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4} | change
    model = timm.create_model("vit_tiny_patch16_224", **kwargs)
    assert not describe(model).groups
    with pytest.raises(ArchitectureError, match=match):
        check(model, Budget(neurons=0.5), GlobalVariance(kinds=("qk",)), Variance(), [])


def statistics_of(model: nn.Module, images: Tensor, *methods: object) -> dict[str, heal.LayerStats]:
    return capture(model, images, taps(model, methods))  # type: ignore[arg-type]


def seen_by(model: nn.Module, images: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries and keys of ATTENTION [heads, rows, dims] and the input of its proj [rows, heads, dims], float64."""
    attention, seen = model.get_submodule(ATTENTION), list[Tensor]()
    hook = attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    q, k = queries_and_keys(attention, tokens_of(model, images))
    hook.remove()
    heads = Heads.of(attention)
    return q, k, seen[0].double().view(-1, heads.number, heads.v).numpy()


def queries_and_keys(attention: nn.Module, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """[heads, rows, dims] each."""
    heads = Heads.of(attention)
    with torch.no_grad():
        both = attention.qkv(tokens).flatten(0, 1)[:, : 2 * heads.number * heads.qk].double()
    q, k = both.view(-1, 2, heads.number, heads.qk).permute(1, 2, 0, 3).numpy()
    return q, k


def test_scores_are_what_they_say() -> None:
    model, images = nets.build("vit"), nets.images(6)
    weights = model.get_parameter(f"{ATTENTION}.proj.weight").detach().double().numpy().reshape(32, 4, 8)
    q, k, inputs = seen_by(model, images)
    cost_of = inputs.var(0, ddof=1) * (weights**2).sum(0)
    pairs = np.einsum("hrd,hsd->hrsd", q, k)  # what each dimension adds to the score of each pair of tokens
    slow = {
        "qk": {"post": (pairs**2).mean((1, 2))},
        "v": {"post": inputs.var(0, ddof=1).mean(0), "weighted": cost_of.mean(0)},
        "heads": {"post": cost_of.sum(1), "weighted": cost_of.sum(1)},
    }
    for kind, expected in slow.items():
        statistics = statistics_of(model, images, GlobalVariance(kinds=(kind,)))
        groups = describe(model).groups_of([kind])
        for statistic, values in expected.items():
            found = variances(model, groups, statistics, statistic, 0.5)  # type: ignore[arg-type]
            np.testing.assert_allclose(found[{"qk": QK, "v": V, "heads": HEADS}[kind]], values, rtol=1e-4)
    denoised = GlobalVariance(kinds=("v", "mlp"), statistic="denoised")
    result = heal.recompress(model, nets.images(48), Budget(neurons=0.5), denoised, Variance(statistic="denoised"), [])
    assert surgery.widths(result.model) != surgery.widths(model)


def test_of_what_each_head_keeps_for_itself_the_allocator_sees_the_mean() -> None:
    assert of_all_heads(torch.tensor([[3.0, 1.0, 2.0], [10.0, 40.0, 30.0]])).tolist() == [21.5, 16.0, 5.5]
    assert of_all_heads(torch.tensor([3.0, 1.0])).tolist() == [3.0, 1.0]


@cases
def test_the_budget_is_exact_kind_by_kind_and_equal_in_all_heads(kinds: tuple[str, ...]) -> None:
    model, images = nets.build("vit"), nets.images(8)
    result = heal.recompress(model, images, Budget(neurons=0.5), GlobalVariance(kinds=kinds), healers=[])
    assert isinstance(result.pruned, ChannelCut)
    found, groups = surgery.widths(result.model), describe(model).groups_of(kinds)
    for kind in kinds:
        names = [name for name, group in groups.items() if group.kind == kind]
        assert sum(found[name] for name in names) * 2 == sum(surgery.widths(model)[name] for name in names)
    for name, keep in result.pruned.keep.items():
        assert keep.ndim == (2 if groups[name].kind == "qk" else 1), "queries and keys are chosen by every head"
        assert found[name] == keep.shape[-1] == result.report.allocation.kept[name]
    assert len(result.report.cuts) == len(groups)


def test_a_multiple_is_of_dimensions_not_of_heads() -> None:
    model, images = nets.build("vit"), nets.images(4)
    allocator = GlobalVariance(kinds=("mlp", "heads"), multiple=4)
    allocation = heal.recompress(model, images, Budget(neurons=0.5), allocator, healers=[]).report.allocation
    assert sum(allocation.kept[group] for group in describe(model).groups_of(["heads"])) == 6
    assert all(allocation.kept[group] % 4 == 0 for group in describe(model).groups_of(["mlp"]))


@pytest.mark.parametrize("kind", ["v", "heads"])
def test_the_mean_of_what_goes_is_folded(kind: str) -> None:
    """Values that do not vary may go: the bias of proj takes over what they gave."""
    model, images = nets.build("vit"), nets.images(6)
    keep = {"v": torch.arange(5), "heads": torch.tensor([0, 2])}[kind]
    group = next(group for group in attention_groups(ATTENTION) if group.kind == kind)
    gone = torch.ones(32, dtype=torch.bool)
    gone[Heads(4, 8, 8).columns(kind, keep)] = False
    with torch.no_grad():
        model.get_parameter(f"{ATTENTION}.qkv.weight")[64:][gone] = 0
        model.get_parameter(f"{ATTENTION}.proj.weight")[:, ~gone] *= 3
    total = surgery.widths(model)[group.name]
    heads_last = heal.Allocation("neurons", {group.name: len(keep)}, {group.name: total}, len(keep))
    pruner = Variance()
    statistics = statistics_of(model, images, GlobalVariance(kinds=(kind,)), pruner)
    pruned = pruner.prune(model, heads_last, statistics)
    assert torch.equal(pruned.keep[group.name], keep)
    student = copy.deepcopy(model)
    apply(student, pruned)
    with torch.no_grad():
        torch.testing.assert_close(student(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["v", "heads"])
def test_proj_is_solved_by_least_squares_on_the_columns_that_stay(kind: str) -> None:
    model, images = nets.build("vit"), nets.images(24)
    group = next(group for group in attention_groups(ATTENTION) if group.kind == kind)
    keep = torch.tensor([0, 1, 3])
    pruned = ChannelCut({group.name: keep}, {group.name: surgery.widths(model)[group.name]})
    healer, student = ClosedForm(damping=1e-8), copy.deepcopy(model)
    statistics = statistics_of(model, images, GlobalVariance(kinds=(kind,)), healer)
    apply(student, pruned)
    healer.heal(student, model, images, HealContext(statistics=statistics, pruned=pruned))
    inputs = seen_by(model, images)[2]
    chosen = (inputs[:, keep] if kind == "heads" else inputs[:, :, keep]).reshape(len(inputs), -1)
    design = np.hstack([chosen, np.ones((len(inputs), 1))])
    dense = model.get_submodule(f"{ATTENTION}.proj")
    target = dense(torch.tensor(inputs.reshape(len(inputs), -1)).float()).detach().double().numpy()
    best = np.linalg.lstsq(design, target, rcond=None)[0]
    solved = student.get_submodule(f"{ATTENTION}.proj")
    np.testing.assert_allclose(solved.weight.detach().T, best[:-1], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(solved.bias.detach(), best[-1], rtol=1e-2, atol=1e-3)


def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the dense qkv of ATTENTION reads."""
    seen: list[Tensor] = []
    hook = model.get_submodule(f"{ATTENTION}.qkv").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0]


def _refused(match: str, model: nn.Module, allocator: object, pruner: object, healers: list[object]) -> None:
    with pytest.raises(MethodError, match=match):
        check(model, Budget(neurons=0.5), allocator, pruner, healers)  # type: ignore[arg-type]


def test_combinations_that_make_no_sense_are_refused() -> None:
    model, qk = nets.build("vit"), GlobalVariance(kinds=("qk",))
    for kinds in (("heads", "qk"), ("v", "mlp", "heads")):
        with pytest.raises(MethodError, match="heads are made of the dimensions that"):
            GlobalVariance(kinds=kinds)
    with pytest.raises(MethodError, match="statistic = weighted does not rank channels of kind qk; take post"):
        GlobalVariance(kinds=("mlp", "qk"), statistic="weighted")
    compensate, solve, train = QkCompensation(), ClosedForm(), HEALERS["starfish"]()
    _refused("pruner variance.statistic = denoised does not rank", model, qk, Variance(statistic="denoised"), [])
    _refused("queries and keys are read by none; take qk_compensation", model, qk, Variance(), [solve])
    _refused("the allocator cuts inner, mlp; add qk", model, GlobalVariance(), Variance(), [compensate])
    _refused("qk_compensation solves layers anew", model, qk, Variance(), [train, compensate])
    both = GlobalVariance(kinds=("mlp", "qk"))
    _refused("closed_form solves layers anew", model, both, Variance(), [solve, compensate, solve])
    for healers in ([solve, compensate, train], [compensate, solve, train]):
        check(model, Budget(neurons=0.5), both, Variance(), healers)


@pytest.mark.parametrize(
    ("keep", "total", "error", "match"),
    [
        ({QK: torch.arange(3), HEADS: torch.arange(2)}, {QK: 8, HEADS: 4}, MethodError, "cut heads first"),
        ({QK: torch.arange(3).expand(2, 3)}, {QK: 8}, ArchitectureError, "has 4 heads, the cut has 2 rows"),
        ({HEADS: torch.arange(3).expand(4, 3)}, {HEADS: 4}, ArchitectureError, "and of heads one"),
        ({V: torch.arange(3)}, {V: 16}, ArchitectureError, "has 8 dimensions a head, the cut was made for 16"),
        ({HEADS: torch.arange(2)}, {HEADS: 3}, ArchitectureError, "has 4 heads, the cut was made for 3"),
        ({"blocks.0.mlp.fc1": torch.zeros(2, 1).long()}, {"blocks.0.mlp.fc1": 128}, ArchitectureError, "keep is 1-D"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused(
    keep: dict[str, Tensor], total: dict[str, int], error: type[Exception], match: str
) -> None:
    model = nets.build("vit")
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(error, match=match):
        surgery.cut(model, ChannelCut(keep, total))
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_indices_ascend_in_every_head() -> None:
    with pytest.raises(ValueError, match="must ascend within"):
        ChannelCut({QK: torch.tensor([[0, 1], [2, 1]])}, {QK: 8})
    assert ChannelCut({QK: torch.tensor([[0, 1], [1, 7]])}, {QK: 8}).removed == 6


def test_a_table_of_ones_own_names_attention_that_is_there_and_plain() -> None:
    model = nets.build("vit")
    model.regrow_family = Family("mine", layers=(), groups=attention_groups("blocks.0.attn"))
    surgery.cut(model, random_cut(model, 0.5, kinds=("qk", "v"), updates=False))
    assert model(nets.images(1)).shape == (1, nets.CLASSES)
    model.regrow_family = Family("mine", layers=(), groups=attention_groups("blocks.9.attn"))
    with pytest.raises(ArchitectureError, match=r"names 'blocks.9.attn.qkv'.* did you mean"):
        describe(model)
    swin = nets.build("swin")
    swin.regrow_family = Family("mine", layers=(), groups=attention_groups("layers.0.blocks.0.attn"))
    with pytest.raises(ArchitectureError, match="is not timm's plain Attention"):
        surgery.cut(
            swin, ChannelCut({"layers.0.blocks.0.attn.qkv:v": torch.arange(3)}, {"layers.0.blocks.0.attn.qkv:v": 8})
        )
    with pytest.raises(ArchitectureError, match="no such parts of an attention; let attention_groups make it"):
        ChannelGroup("a.qkv", ("a.qkv",), ("a.proj",), kind="v", attention="a")
