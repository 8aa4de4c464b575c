"""The CIFAR ResNets of He et al. (2016), section 4.2, as an adapter: timm does not have them.

dense.source: file:PATH, dense.architecture: adapter:benchmarks.cifar_resnet:resnet20 (allowed by name). The keys are
those of github.com/akamaster/pytorch_resnet_cifar10, whose weights the benchmarks use.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from heal.families.family import ChannelGroup, Family


class Block(nn.Module):
    """Two convolutions; a shortcut without parameters (a stride, and zero channels on both sides)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks, 16, 32 and 64 channels wide, for [n, 3, 32, 32]."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1)
        self.layer2 = _stage(16, 32, blocks, 2)
        self.layer3 = _stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)
        self.regrow_family = _table(blocks)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def resnet20() -> CifarResNet:
    """ResNet-20: 0.27 million weights."""
    return CifarResNet(3)


def resnet56() -> CifarResNet:
    """ResNet-56: 0.85 million weights."""
    return CifarResNet(9)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def _table(blocks: int) -> Family:
    """What regrow has to know: the layers to prune, the blocks to align, the channels that live inside a block."""
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(blocks)]
    return Family(
        name="cifar_resnet",
        layers=tuple(f"{name}.{conv}" for name in names for conv in ("conv1", "conv2")),
        blocks=tuple(names),
        groups=tuple(
            ChannelGroup(f"{n}.conv1", (f"{n}.conv1",), (f"{n}.conv2",), followers=(f"{n}.bn1",)) for n in names
        ),
        norms=("bn1", *(f"{name}.{norm}" for name in names for norm in ("bn1", "bn2"))),
        classifier=("linear",),
    )
