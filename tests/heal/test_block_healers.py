"""Blockwise reconstruction, distillation and STARFISH's options, against loops that are written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heal
from heal.allocators.uniform import Uniform
from heal.compat import timm
from heal.errors import ArchitectureError, MethodError
from heal.families.lookup import describe
from heal.healers.blockwise import Blockwise
from heal.healers.distill import Distill
from heal.healers.layer_batches import Site
from heal.healers.starfish import Starfish
from heal.images import generator, shuffled
from heal.method import HealContext, check
from heal.pruned import listed
from heal.pruners.magnitude import Magnitude
from heal.values import Budget, Mask
from tests.heal import nets


def masked(net: str) -> tuple[nn.Module, nn.Module, Mask]:
    """(dense, its student, the mask)."""
    dense = nets.build(net)
    result = heal.recompress(dense, nets.images(2), heal.Budget(weights=0.5), "uniform", "magnitude", ["none"])
    assert isinstance(result.pruned, Mask)
    return dense, result.model, result.pruned


def states(model: nn.Module, images: Tensor, *beyond: str) -> tuple[list[Tensor], Tensor]:
    """What every block gives and what is `beyond`, and the logits."""
    seen: list[Tensor] = []
    blocks = [model.get_submodule(block) for block in (*describe(model).blocks, *beyond)]
    handles = [block.register_forward_hook(lambda m, a, output: seen.append(output)) for block in blocks]
    logits = model(images)
    for handle in handles:
        handle.remove()
    return seen, logits


def remask(student: nn.Module, mask: Mask) -> None:
    with torch.no_grad():
        for layer, keep in mask.keep.items():
            student.get_parameter(f"{layer}.weight").mul_(keep)


@pytest.mark.parametrize("net", ["vit", "resnet"])
def test_blockwise_is_a_loop_over_blocks(net: str) -> None:
    dense, student, mask = masked(net)
    images, steps, expected = nets.images(8), 4, copy.deepcopy(student)
    for at, block in enumerate(describe(dense).blocks):
        module = expected.get_submodule(block)
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
        numbers = torch.randint(4, (steps,), generator=generator(3, f"blockwise batches of {block}")).tolist()
        for step, number in enumerate(numbers):
            batch = images[2 * number : 2 * number + 2]
            with torch.no_grad():
                wanted = states(dense, batch)[0][at]
            found = states(expected, batch)[0][at]
            optimiser.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2
            loss = (found - wanted).square().mean() / wanted.square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            remask(expected, mask)
    Blockwise(steps=steps, batch_size=2, lr=1e-3).heal(student, dense, images, HealContext(pruned=mask, seed=3))
    for (name, value), other in zip(expected.state_dict().items(), student.state_dict().values(), strict=True):
        assert torch.allclose(value, other, atol=2e-5), name


class Shifted(nn.Sequential):
    """Blocks between which something is added in place."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
            x.add_(0.5)
        return x


@pytest.mark.parametrize("net", ["vit", "swin", "convnext", "resnet", "a sum between the blocks"])
def test_leading_pairs_from_block_to_block_changes_no_bit(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for follows in (Site.follows, lambda *_: False):
        monkeypatch.setattr(Site, "follows", follows)
        dense, student, mask = masked("vit" if net not in nets.NETS else net)
        for model in (dense, student):
            if net not in nets.NETS:
                model.blocks = Shifted(*model.blocks)
        images = nets.images(6)
        Blockwise(steps=4, batch_size=2, lr=1e-3).heal(student, dense, images, HealContext(pruned=mask))
        found.append(student.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_the_networks_run_once_for_all_blocks_together() -> None:
    dense, student, mask = masked("vit")
    runs: list[int] = []
    hook = dense.get_submodule("blocks.0").register_forward_pre_hook(lambda _, x: runs.append(len(x[0])))
    Blockwise(steps=20, batch_size=4).heal(student, dense, nets.images(12), HealContext(pruned=mask))
    hook.remove()
    reports, looks = 2 * 12, len(describe(dense).blocks)
    assert sum(runs) == reports + 12 + looks


def test_layers_in_no_block_that_trains_are_named() -> None:
    dense, student, mask = masked("vgg")  # its blocks are the poolings
    before, images = copy.deepcopy(student.state_dict()), nets.images(8)
    report = Blockwise(steps=2, batch_size=4).heal(student, dense, images, HealContext(pruned=mask))
    weights = {layer: student.get_parameter(f"{layer}.weight") for layer in mask.keep}
    stayed = [layer for layer, weight in weights.items() if torch.equal(weight, before[f"{layer}.weight"])]
    assert 0 < len(stayed) < len(weights)
    assert report.notes == (f"not trained, as outside of the blocks: {listed(stayed)}",)
    assert Blockwise(steps=2).heal(*_with_blocks(images)).notes == ()


def _with_blocks(images: Tensor) -> tuple[nn.Module, nn.Module, Tensor, HealContext]:
    dense, student, mask = masked("vit")
    return student, dense, images, HealContext(pruned=mask)


@pytest.mark.parametrize(
    ("net", "kwargs", "said"),
    [
        (
            "eva02_tiny_patch14_224",
            {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 3},
            r"blocks\.0 takes more than its input \(rope\)",
        ),
        (
            "twins_svt_small",
            {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)},
            "patch_embeds.0 gives more than one tensor",
        ),
    ],
)
def test_a_block_that_cannot_be_trained_alone_is_refused(net: str, kwargs: dict[str, object], said: str) -> None:
    dense = timm.create_model(net, num_classes=5, **kwargs).eval()
    images = torch.randn(4, 3, *dense.pretrained_cfg["input_size"][1:] if "img_size" not in kwargs else (28, 28))
    before = copy.deepcopy(dense.state_dict())
    student = copy.deepcopy(dense)
    with pytest.raises(ArchitectureError, match=said):
        Blockwise(steps=1).heal(student, dense, images, HealContext(pruned=Mask({})))
    assert all(torch.equal(student.state_dict()[name], value) for name, value in before.items())
    reported: list[str] = []
    with pytest.raises(ArchitectureError, match=f"healer blockwise: {said}"):
        heal.recompress(
            dense,
            images,
            Budget(weights=0.5),
            "uniform",
            "wanda",
            [Blockwise(steps=1)],
            report=lambda name, done, total: reported.append(name),
        )
    assert not reported


def test_distillation_follows_the_teachers_answers() -> None:
    dense, student, mask = masked("vit")
    images, expected = nets.images(6), copy.deepcopy(student)
    order = shuffled(6, 5, "distill order")
    optimiser = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(6):
        batch = images[order[2 * (step % 3) : 2 * (step % 3) + 2]]
        with torch.no_grad():
            wanted = (dense(batch) / 3).softmax(-1)
        found = (expected(batch) / 3).log_softmax(-1)
        loss = 9 * (wanted * (wanted.log() - found)).sum(-1).mean()
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 6)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        remask(expected, mask)
    method = Distill(epochs=2, batch_size=2, lr=1e-3, weight_decay=0.1, temperature=3)
    report = method.heal(student, dense, images, HealContext(pruned=mask, seed=5))
    assert len(report.losses) == 6
    for (name, value), other in zip(expected.state_dict().items(), student.state_dict().values(), strict=True):
        # The gradient of a key's bias is rounding alone, which Adam makes as large as any.
        assert torch.allclose(value, other, atol=1e-4) or name.endswith("qkv.bias"), name


def test_starfish_with_all_options_descends_its_written_out_loss() -> None:
    dense, student, mask = masked("vit")
    images = nets.images(4)
    options = {"affine": True, "mse": 0.5, "kl": 0.25, "temperature": 4, "depth": 2, "final": True}
    method = Starfish(epochs=1, batch_size=4, lr=1e-3, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        theirs, wanted = states(dense, images, "norm")
        ours, logits = states(student, images, "norm")
        parts = []
        for s, t in zip(ours, theirs, strict=True):
            turned = 1 - F.cosine_similarity(s, t, dim=-1).mean()
            parts.append(turned + 0.5 * (s - t).square().sum() / t.square().sum())
        shares = torch.tensor([float(number**2) for number in range(1, len(parts) + 1)])
        states_loss = (torch.stack(parts) * shares).sum() / shares.sum()
        soft = (wanted / 4).softmax(-1)
        answers = 16 * (soft * (soft.log() - (logits / 4).log_softmax(-1))).sum(-1).mean()
    before = copy.deepcopy(student.state_dict())
    report = method.heal(student, dense, images, HealContext(pruned=mask))
    assert report.losses[0] == pytest.approx(float(states_loss + 0.25 * answers), rel=1e-3)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {"norm.weight", "head.bias", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"} <= moved
    assert "head.weight" not in moved and "pos_embed" not in moved


def test_without_a_norm_behind_the_blocks_there_is_no_final_state() -> None:
    budget, methods = Budget(weights=0.5), (Uniform(), Magnitude())
    check(nets.build("vit"), budget, *methods, [Starfish(final=True)])
    check(nets.build("convnext"), budget, *methods, [Starfish(final=True)])
    with pytest.raises(ArchitectureError, match="compares the norm behind the blocks"):
        check(nets.build("resnet"), budget, *methods, [Starfish(final=True)])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Blockwise(steps=0), r"blockwise\.steps = 0 must be at least 1"),
        (lambda: Blockwise(lr=0), r"blockwise\.lr = 0 must be greater than 0"),
        (lambda: Distill(batch_size=0), r"distill\.batch_size = 0"),
        (lambda: Distill(temperature=0), r"distill\.temperature = 0"),
        (lambda: Distill(weight_decay=-1), "weight_decay = -1"),
        (lambda: Starfish(kl=-1), r"starfish\.kl = -1"),
        (lambda: Starfish(temperature=0), r"starfish\.temperature = 0"),
    ],
)
def test_wrong_params_are_refused(make: object, said: str) -> None:
    assert callable(make)
    with pytest.raises(MethodError, match=said):
        make()
