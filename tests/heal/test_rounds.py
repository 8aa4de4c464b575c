"""Cutting in rounds: nested equal shares, what each healer is shown, an attempt that goes on after it was cut off."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import heal
from heal import channels, checkpoint, masking, rounds
from heal.allocators.global_variance import GlobalVariance
from heal.errors import MethodError
from heal.families.lookup import describe
from heal.healers.closed_form import ClosedForm
from heal.healers.least_squares import LeastSquares
from heal.healers.starfish import Starfish
from heal.images import Images
from heal.method import HealContext, Healer, HealingReport, taps
from heal.pruned import apply
from heal.pruners.variance import Variance
from heal.states import alignment
from heal.statistics import capture
from heal.surgery import widths
from heal.values import NM, ChannelCut, Mask
from tests.heal import nets

ONLY_CHOOSES = Variance(fold_mean=False)
QUICK = Starfish(epochs=1, batch_size=4)
KINDS = {"vit": ("mlp", "qk", "v"), "resnet": ("inner", "residual"), "mobilenetv2": ("inner", "residual")}
DENSE = {name: nets.build(name) for name in (*KINDS, "convnext")}


def share(lost: int, number: int, of: int) -> int:
    """Rounded half up, the slow way."""
    return floor(Fraction(number, of) * lost + Fraction(1, 2))


def cut_of(model: nn.Module, kinds: tuple[str, ...], seed: int, by_head: bool = True) -> ChannelCut:
    """Any channels of these kinds, of queries and keys others in every head."""
    generator = torch.Generator().manual_seed(seed)
    groups, width, keep = describe(model).groups_of(kinds), widths(model), {}
    for name, group in groups.items():
        heads = model.get_submodule(group.attention).num_heads if group.kind == "qk" and by_head else 1
        kept = int(torch.randint(1, width[name] + 1, (), generator=generator))
        drawn = torch.stack([torch.randperm(width[name], generator=generator)[:kept] for _ in range(heads)])
        keep[name] = drawn.sort(dim=1).values if heads > 1 else drawn[0].sort().values
    return ChannelCut(keep, {name: width[name] for name in keep})


def mask_of(model: nn.Module, density: float = 0.4) -> Mask:
    weights = {layer: model.get_parameter(f"{layer}.weight") for layer in describe(model).layers}
    return Mask({layer: masking.keep_largest(w.abs(), int(density * w.numel())) for layer, w in weights.items()})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def walked(model: nn.Module, pruned: Mask | ChannelCut, healers: list[Healer], count: int, **context: Any) -> nn.Module:
    """The network after all rounds."""
    student, images = copy.deepcopy(model), context.pop("images", nets.images(8))
    for _ in rounds.heal_in_rounds(student, model, healers, images, HealContext(pruned=pruned, **context), count):
        pass
    return student


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_steps_of_masks_are_nested_and_take_the_smallest_first(count: int, kept: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(8, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-4, 5, (5, 8), generator=generator))  # many of equal magnitude
    model, keep = nn.Sequential(layer), torch.zeros(40, dtype=torch.bool)
    keep[torch.randperm(40, generator=generator)[:kept]] = True
    whole = Mask({"0": keep.view(5, 8)})
    found = rounds.steps(model, whole, count)
    assert len(found) == count and found[-1] is whole
    for number, step in enumerate(found, start=1):
        gone = ~step.keep["0"]
        assert int(gone.sum()) == share(40 - kept, number, count)
        assert not (gone & whole.keep["0"]).any(), "what stays at the end stays"
        order = sorted(
            (~keep).nonzero().flatten().tolist(), key=lambda at: (abs(float(layer.weight.detach().flatten()[at])), -at)
        )
        assert set(gone.flatten().nonzero().flatten().tolist()) == set(order[: int(gone.sum())])
        earlier = found[number - 2].keep["0"] if number > 1 else torch.ones(5, 8, dtype=torch.bool)
        assert not (step.keep["0"] & ~earlier).any()


@pytest.mark.parametrize(("net", "by_head"), [("vit", True), ("vit", False), ("resnet", False), ("mobilenetv2", False)])
@given(st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=5, deadline=None)
def test_steps_of_cuts_are_nested_and_end_in_the_same_network(net: str, by_head: bool, count: int, seed: int) -> None:
    model = DENSE[net]
    whole = cut_of(model, KINDS[net], seed, by_head)
    found = rounds.steps(model, whole, count)
    assert found[-1] is whole
    stepwise, at_once = copy.deepcopy(model), copy.deepcopy(model)
    apply(at_once, whole)
    for number, step in enumerate(found, start=1):
        assert isinstance(step, ChannelCut)
        for name, total in whole.total.items():
            assert total - step.kept[name] == share(total - whole.kept[name], number, count)
            assert step.keep[name].shape[:-1] == whole.keep[name].shape[:-1]
            for row, last in zip(
                step.keep[name].view(-1, step.kept[name]), whole.keep[name].view(-1, whole.kept[name]), strict=True
            ):
                assert set(last.tolist()) <= set(row.tolist())
        apply(stepwise, step if number == 1 else rounds.onwards(step, found[number - 2]))
        assert {name: widths(stepwise)[name] for name in step.kept} == step.kept
    assert same(state(stepwise), state(at_once))


def test_heads_go_in_steps_too() -> None:
    model = DENSE["vit"]
    whole = ChannelCut({"blocks.1.attn.qkv:heads": torch.tensor([2])}, {"blocks.1.attn.qkv:heads": 4})
    stepwise, at_once = walked(model, whole, [], 3), copy.deepcopy(model)
    apply(at_once, whole)
    assert same(state(stepwise), state(at_once))


def test_blocks_are_dropped_in_steps_and_the_last_leaves_the_same_network() -> None:
    model, images = nets.build("vit"), nets.images(8)
    whole = ChannelCut({}, {}, dropped=("blocks.0", "blocks.2"))
    first, last = rounds.steps(model, whole, 2)
    assert (first.dropped, last.dropped) == (("blocks.0",), whole.dropped)  # type: ignore[union-attr]
    student, at_once = copy.deepcopy(model), copy.deepcopy(model)
    context = HealContext(pruned=whole)
    healed = list(rounds.heal_in_rounds(student, model, [QUICK], images, context, rounds=2))
    apply(at_once, whole)
    assert [report.report.round for report in healed] == [1, 2]
    assert student.state_dict().keys() == at_once.state_dict().keys()
    assert describe(student).blocks == ("blocks.1",)


def test_the_channel_of_least_norm_goes_first() -> None:
    model = copy.deepcopy(DENSE["vit"])
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.weight")[[5, 9]] *= torch.tensor([[0.01], [0.001]])
    keep = torch.tensor([at for at in range(128) if at not in (3, 5, 9)])
    found = rounds.steps(model, ChannelCut({"blocks.0.mlp.fc1": keep}, {"blocks.0.mlp.fc1": 128}), 3)
    left = [sorted({3, 5, 9} & set(step.keep["blocks.0.mlp.fc1"].tolist())) for step in found]
    assert left == [[3, 5], [3], []]


def test_the_norm_of_a_channel_of_attention_is_that_of_its_rows() -> None:
    model = DENSE["vit"]
    rows = model.get_parameter("blocks.0.attn.qkv.weight").detach().double().view(3, 4, 8, 32)  # q k v, heads, width
    wanted = {"q": rows[:2].square().sum((0, 3)), "v": rows[2].square().sum(2), "heads": rows.square().sum((0, 2, 3))}
    for part, squares in wanted.items():
        found = channels.norms(model, describe(model).cuttable[f"blocks.0.attn.qkv:{part}"])
        torch.testing.assert_close(found, squares.sqrt())


def test_two_rounds_of_the_closed_form_are_two_solves_one_after_another() -> None:
    model, images = DENSE["vit"], nets.images(24)
    result = heal.recompress(
        model, images, heal.Budget(neurons=0.5), pruner=ONLY_CHOOSES, healers=["closed_form"], rounds=2
    )
    assert isinstance(result.pruned, ChannelCut)
    first, last = rounds.steps(model, result.pruned, 2)
    by_hand, before = copy.deepcopy(model), copy.deepcopy(model)
    second = ChannelCut(  # by searching for every index what place it has among those that stayed
        {
            name: torch.tensor([first.keep[name].tolist().index(at) for at in last.keep[name].tolist()])
            for name in first.keep
        },
        first.kept if isinstance(first, ChannelCut) else {},
    )
    for step in (first, second):
        apply(by_hand, step)
        statistics = capture(before, images, taps(before, [ClosedForm()]))
        ClosedForm().heal(by_hand, before, images, HealContext(statistics=statistics, pruned=step))
        before = copy.deepcopy(by_hand)
    for name, tensor in state(by_hand).items():
        torch.testing.assert_close(tensor, state(result.model)[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("net", ["vit", "convnext", "resnet", "mobilenetv2"])
def test_a_cut_network_heals_in_rounds(net: str) -> None:
    model, images = DENSE[net], nets.images(8)
    before, evenly = state(model), GlobalVariance(scope="layer")
    once, twice = (
        heal.recompress(model, images, heal.Budget(neurons=0.5), evenly, ONLY_CHOOSES, ["closed_form", QUICK], rounds=r)
        for r in (1, 2)
    )
    assert widths(twice.model) == widths(once.model)
    assert all(torch.equal(twice.pruned.keep[name], keep) for name, keep in once.pruned.keep.items())
    ran = [(report.method, report.round) for report in twice.report.healing]
    assert ran == [("closed_form", 1), ("starfish", 1), ("closed_form", 2), ("starfish", 2)]
    assert [report.round for report in once.report.healing] == [1, 1]
    assert same(state(model), before), "the dense model is only read"


def test_masks_hold_after_every_round() -> None:
    model, images = DENSE["resnet"], nets.images(8)
    before, whole = state(model), mask_of(model)
    healers: list[Healer] = [LeastSquares(), QUICK]
    student, wanted = copy.deepcopy(model), rounds.steps(model, whole, 3)
    context = HealContext(pruned=whole)
    for healed in rounds.heal_in_rounds(student, model, healers, images, context, 3):
        step = wanted[healed.report.round - 1]
        assert isinstance(step, Mask) and healed.pruned is not None
        assert masking.holds(student, step) and same(healed.pruned.keep, step.keep)
    assert masking.holds(student, whole) and same(state(model), before)


@dataclass(frozen=True)
class Seen:
    """A healer that notes what it is shown, and moves all weights a little."""

    unit: ClassVar[str] = "any"
    needs: frozenset[str] = frozenset()
    notes: list[Any] = field(default_factory=list)

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        self.notes.append((teacher, state(teacher), state(student), context))
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.01)
        return HealingReport("seen", {}, alignment_before={"blocks.0": 7.0}, alignment_after={"blocks.0": 7.0})


def test_what_reads_statistics_is_shown_the_step_and_what_does_not_the_dense_network() -> None:
    model, images = DENSE["vit"], nets.images(8)
    before, whole = state(model), cut_of(model, ("mlp", "v"), 3)
    reads, trains = Seen(needs=frozenset({"moments"})), Seen()
    statistics = capture(model, images, taps(model, [reads], channels.cuts(("mlp", "v"))))
    student, reports = copy.deepcopy(model), []
    context = HealContext(pruned=whole, statistics=statistics)
    for healed in rounds.heal_in_rounds(student, model, [reads, trains], images, context, 2):
        reports.append((healed.report, alignment(student, model, images, healed.pruned)))
    first, last = rounds.steps(model, whole, 2)
    assert isinstance(first, ChannelCut) and isinstance(last, ChannelCut)
    for (teacher, seen, _, shown), step in zip(trains.notes, (first, last), strict=True):
        assert teacher is model and same(seen, before) and same(shown.pruned.keep, step.keep)
    (dense, _, _, at_first), (teacher, seen, found, shown) = reads.notes
    assert dense is model and at_first.statistics is statistics and same(at_first.pruned.keep, first.keep)
    assert teacher is not model and same(shown.pruned.keep, rounds.onwards(last, first).keep)
    assert shown.pruned.total == first.kept and shown.statistics.keys() == statistics.keys()
    assert all(
        len(shown.statistics[f"{name}.mlp.fc2.input"].mean) == first.kept[f"{name}.mlp.fc1"]
        for name in ("blocks.0", "blocks.1")
    )
    stepped = copy.deepcopy(teacher)
    apply(stepped, shown.pruned)
    assert same(state(stepped), found), "the student is that network after the step"
    assert reports[0][0].alignment_after == {"blocks.0": 7.0}
    assert reports[2][0].alignment_after == reports[2][1], "a report compares with the dense network"


def test_a_healer_that_moves_what_is_pruned_is_refused() -> None:
    @dataclass(frozen=True)
    class Moves(Seen):
        def heal(self, *given: Any) -> HealingReport:
            return replace(super().heal(*given), pruned=given[3].pruned)

    with pytest.raises(MethodError, match="seen moved what is pruned"):
        walked(DENSE["vit"], mask_of(DENSE["vit"]), [Moves()], 2)


def test_what_cannot_go_in_steps_is_refused_before_anything_is_computed() -> None:
    model, images = DENSE["vit"], nets.images(4)
    neurons, weights = heal.Budget(neurons=0.5), heal.Budget(weights=0.5)
    for said, asked in (
        (r"rounds = 0 must be at least 1", {"budget": neurons, "rounds": 0}),
        (
            r"set pruning\.variance\.fold_mean: false and name mean_folding or closed_form",
            {"budget": neurons, "pruner": "variance"},
        ),
        (r"in place of obs take magnitude", {"budget": weights, "allocator": "uniform", "pruner": "obs"}),
        (r"an N:M pattern holds only", {"budget": weights, "allocator": "n_of_m", "pruner": "magnitude"}),
        (
            r"unipts is one course of training on the whole mask",
            {"budget": weights, "allocator": "uniform", "pruner": "magnitude", "healers": ["unipts"]},
        ),
        (
            r"bias_correction estimates",
            {"budget": weights, "allocator": "uniform", "pruner": "magnitude", "healers": ["bias_correction"]},
        ),
        (
            r"qk_compensation mixes the dimensions",
            {
                "budget": neurons,
                "allocator": GlobalVariance(kinds=("qk",)),
                "pruner": ONLY_CHOOSES,
                "healers": ["qk_compensation"],
            },
        ),
    ):
        with pytest.raises(MethodError, match=said):
            heal.recompress(model, images, **({"rounds": 2, "healers": [QUICK]} | asked))


def test_a_round_in_which_nothing_goes_heals_nothing() -> None:
    dense = DENSE["vit"]
    result = heal.recompress(
        dense, nets.images(8), heal.Budget(blocks=0.4), healers=[QUICK], rounds=3, log=(said := list[str]()).append
    )
    assert [report.round for report in result.report.healing] == [2]
    assert [line for line in said if "nothing goes" in line] == [
        f"round {number}: nothing goes that was not gone before, so nothing is healed" for number in (1, 3)
    ]


def test_what_a_pruner_wrote_or_patterned_has_no_steps() -> None:
    model = DENSE["vit"]
    keep = {"blocks.0.mlp.fc1": torch.ones(128, 32, dtype=torch.bool)}
    for whole in (Mask(keep, {"blocks.0.mlp.fc1.bias": torch.zeros(128)}), Mask(keep, pattern=NM(2, 4))):
        assert rounds.steps(model, whole, 1) == [whole]
        with pytest.raises(MethodError, match="rounds = 2"):
            rounds.steps(model, whole, 2)


@pytest.mark.parametrize("ends_in", [1, 2])
def test_an_attempt_that_was_cut_off_goes_on_and_ends_in_the_same_bits(
    ends_in: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    model, whole = DENSE["vit"], cut_of(DENSE["vit"], ("mlp",), 5)
    statistics = capture(model, nets.images(8), taps(model, [ClosedForm()]))
    healers: list[Healer] = [ClosedForm(), Starfish(epochs=4, batch_size=4)]
    undisturbed = walked(model, whole, healers, 2, statistics=statistics)
    began = []

    def cut_off(stage: str, done: int, total: int) -> None:
        began.extend([1] if (stage, done) == ("starfish", 1) else [])
        if stage == "starfish" and len(began) == ends_in and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walked(model, whole, healers, 2, statistics=statistics, checkpoints=tmp_path, report=cut_off)
    assert {path.parent.name for path in tmp_path.glob("*/*.safetensors")} == {"1-starfish", "3-starfish"} - (
        {"3-starfish"} if ends_in == 1 else set()
    )
    said: list[str] = []
    again = walked(model, whole, healers, 2, statistics=statistics, checkpoints=tmp_path, log=said.append)
    resumed = [line for line in said if "resuming" in line]
    assert len(resumed) == ends_in and (ends_in == 1 or resumed[0] == "resuming after step 8")
    assert same(state(again), state(undisturbed))
