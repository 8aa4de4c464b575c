"""Finding the names that tables are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from heal.families.family import ChannelGroup, MlpPair, attention_groups
from heal.families.narrow_attention import NarrowAttention

ATTENTION_HOMES = ("timm.layers.attention", "timm.models.vision_transformer")  # the second in older timm
PLAIN = ("Linear", "Conv2d", "Conv2dSame")  # subclasses that standardise or mix their weights are not


def children(model: nn.Module, container: str) -> tuple[str, ...]:
    """Dotted names of a container's children, in order."""
    return tuple(f"{container}.{name}" for name, _ in model.get_submodule(container).named_children())


def present(model: nn.Module, container: str) -> tuple[str, ...]:
    """Those of them that compute something: a block that was dropped is an Identity."""
    return tuple(name for name in children(model, container) if not isinstance(model.get_submodule(name), nn.Identity))


def matrices(model: nn.Module, roots: Iterable[str]) -> tuple[str, ...]:
    """Every Linear and every Conv2d that is not depthwise, at or below the named modules."""
    return tuple(name for name, module in _below(model, roots) if _is_matrix(module))


def norms(model: nn.Module) -> tuple[str, ...]:
    """Every normalisation layer with a weight."""
    return tuple(name for name, module in model.named_modules() if _is_norm(module))


def first_norm(model: nn.Module, *names: str) -> str:
    """The first of these modules that normalises, or ""."""
    known = norms(model)
    return next((name for name in names if name in known), "")


def classifier(model: nn.Module) -> tuple[str, ...]:
    """The layers that timm calls the classifier; a distilled DeiT has two, a headless model none."""
    heads = model.get_classifier()  # type: ignore[operator]
    chosen = {id(head) for head in (heads if isinstance(heads, tuple) else (heads,))}
    return tuple(name for name, module in model.named_modules() if id(module) in chosen and _is_matrix(module))


def mlp_pairs(model: nn.Module, blocks: Iterable[str]) -> tuple[MlpPair, ...]:
    """The plain MLPs of the blocks. Gated ones, and those that normalise their hidden layer, mix units: left out."""
    names = (name for name, module in _below(model, blocks) if _is_plain_mlp(module))
    return tuple(MlpPair(f"{name}.fc1", f"{name}.act", f"{name}.fc2") for name in names)


def attentions(model: nn.Module, blocks: Iterable[str]) -> tuple[ChannelGroup, ...]:
    """The channel groups of the blocks' plain attention."""
    names = (name for name, module in _below(model, blocks) if is_plain_attention(module))
    return tuple(group for name in names for group in attention_groups(name))


def is_plain_attention(module: object) -> bool:
    """timm's Attention, or what a cut made of it, that neither norms queries, keys and values nor gates its output."""
    is_timms = type(module).__name__ == "Attention" and type(module).__module__ in ATTENTION_HOMES
    norms = (getattr(module, norm, None) for norm in ("q_norm", "k_norm", "norm"))
    layers = (getattr(module, layer, None) for layer in ("qkv", "proj"))
    bare = all(isinstance(norm, nn.Identity | None) for norm in norms) and getattr(module, "gate", None) is None
    return (is_timms or isinstance(module, NarrowAttention)) and bare and all(map(is_plain, layers))


def is_plain(layer: object) -> bool:
    """A Linear or ungrouped Conv2d whose output channel i comes from row i of its weight alone."""
    known = type(layer).__name__ in PLAIN and isinstance(layer, (nn.Linear, nn.Conv2d))
    return known and getattr(layer, "groups", 1) == 1


def uses_its_weight(layer: nn.Module) -> bool:
    """A Linear or Conv2d that multiplies by the very weight it stores, so that a zero in there computes as a zero.

    A subclass with a forward of its own may standardise its weight first, and so may a parametrization.
    """
    plain = type(layer).__name__ in PLAIN or type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)
    return isinstance(layer, (nn.Linear, nn.Conv2d)) and plain and "weight" in layer._parameters


def is_depthwise(layer: object) -> bool:
    """A Conv2d with one filter a channel; cut to a single channel it still is one."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels


def is_batch_norm(layer: object) -> bool:
    """A normalisation that treats every channel alone."""
    return isinstance(layer, _BatchNorm)


def channel_axis(module: nn.Module) -> int:
    """Where a module's input and output have their channels: 1 in maps [n, c, h, w], else -1."""
    is_map = isinstance(module, (nn.Conv2d, _BatchNorm, nn.GroupNorm)) or type(module).__name__.endswith("2d")
    return 1 if is_map else -1


def is_layer_scale(layer: object) -> bool:
    """A learned factor for every channel of a branch."""
    return type(layer).__name__ in ("LayerScale", "LayerScale2d") and hasattr(layer, "gamma")


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every BatchNorm that keeps running statistics, by name; timm's with an activation inside are among them."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, _BatchNorm) and m.running_mean is not None}


def _below(model: nn.Module, roots: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    for root in roots:
        yield from model.get_submodule(root).named_modules(prefix=root)


def _is_matrix(layer: nn.Module) -> bool:
    single = getattr(layer, "groups", 1) == 1  # one channel to one channel is both, and counts as a matrix
    return uses_its_weight(layer) and (single or not is_depthwise(layer))


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None


def _is_plain_mlp(module: nn.Module) -> bool:
    if type(module).__name__ not in ("Mlp", "ConvMlp") or not type(module).__module__.startswith("timm.layers"):
        return False
    producer, consumer, norm = (getattr(module, part, None) for part in ("fc1", "fc2", "norm"))
    return is_plain(producer) and is_plain(consumer) and isinstance(norm, nn.Identity | None)
