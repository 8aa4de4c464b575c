"""From a model to its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from heal.errors import ArchitectureError
from heal.families.cnn import efficientnet, regnet, resnet, vgg
from heal.families.convnext import convnext
from heal.families.family import Family
from heal.families.generic import generic
from heal.families.swin import swin
from heal.families.vit import vit
from heal.naming import nearest

# Here and not in __init__, which has no weight in code digests: a table that changes must invalidate.
FAMILIES: dict[str, Callable[[nn.Module], Family]] = {
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
    "resnet": resnet,
    "regnet": regnet,
    "vgg": vgg,
    "efficientnet": efficientnet,
    "generic": generic,
}

CLASSES: dict[str, str] = {  # timm's class to its family; subclasses are of the same
    "VisionTransformer": "vit",
    "SwinTransformer": "swin",
    "SwinTransformerV2": "swin",
    "ConvNeXt": "convnext",
    "ResNet": "resnet",
    "RegNet": "regnet",
    "VGG": "vgg",
    "EfficientNet": "efficientnet",
    "MobileNetV3": "efficientnet",
}

OWN_TABLE = "regrow_family"
"""The attribute by which a network brings its own table."""


def describe(model: nn.Module) -> Family:
    """The model's table; a network that no family knows gets the generic one, without channel groups.

    Blocks that were dropped are in none. A model may bring its own as attribute `regrow_family`. Raises
    ArchitectureError when that names a module which the model does not have.
    """
    own = getattr(model, OWN_TABLE, None)
    return _checked(own, model) if isinstance(own, Family) else FAMILIES[_family_name(model)](model)


def cuttable_or_raise(model: nn.Module) -> Family:
    """The model's table if it has channels that can be cut. Raises ArchitectureError."""
    family = describe(model)
    if family.cuttable:
        return family
    kind = type(model).__name__
    if family.name == "generic":
        known = ", ".join(name for name in FAMILIES if name != "generic")
        raise ArchitectureError(
            f"{kind} has no table of channel groups, so its channels cannot be cut (families with one: {known}, "
            "as timm builds them); give a budget in weights, or set model.regrow_family to a table"
        )
    raise ArchitectureError(
        f"{kind} is of family {family.name}, but none of its blocks has channels that can be cut alone "
        "(gated, grouped and normalised hidden layers mix them); give a budget in weights"
    )


def droppable_or_raise(model: nn.Module) -> Family:
    """The model's table if it has blocks that can be dropped. Raises ArchitectureError."""
    family = describe(model)
    if family.droppable:
        return family
    raise ArchitectureError(
        f"{type(model).__name__} (family {family.name}) has no block that adds what it computes to its input, so none "
        "can be dropped; give a budget in weights or neurons, or name such blocks in `droppable` of a table of yours"
    )


def _family_name(model: nn.Module) -> str:
    """By class name within timm.models, so that timm need not be imported to describe another network."""
    bases = (base for base in type(model).__mro__ if base.__module__.startswith("timm.models."))
    return next((CLASSES[base.__name__] for base in bases if base.__name__ in CLASSES), "generic")


def _checked(family: Family, model: nn.Module) -> Family:
    modules = dict(model.named_modules())
    family = family.without([name for name in family.droppable if isinstance(modules.get(name), nn.Identity)])
    for name in _names(family):
        if name not in modules:
            raise ArchitectureError(
                f"the family table of {type(model).__name__} names {name!r}, "
                f"which the model does not have; {nearest(name, modules)}"
            )
    return family


def _names(family: Family) -> Iterator[str]:
    yield from (*family.layers, *family.blocks, *family.norms, *family.classifier, *family.projections)
    yield from (family.last_norm,) if family.last_norm else ()
    for group in family.cuttable.values():
        yield from (*group.modules, *group.followers, *group.consumers, *group.blocks)
