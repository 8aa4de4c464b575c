"""What networks are: the name of a family to what draws up its table."""

from collections.abc import Callable

from torch import nn

from heal.families.cnn import efficientnet, resnet, vgg
from heal.families.convnext import convnext
from heal.families.family import Family
from heal.families.generic import generic
from heal.families.swin import swin
from heal.families.vit import vit

FAMILIES: dict[str, Callable[[nn.Module], Family]] = {
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
    "resnet": resnet,
    "vgg": vgg,
    "efficientnet": efficientnet,
    "generic": generic,
}
