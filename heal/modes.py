"""Modes and hooks that are undone afterwards, also after an exception."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from heal.families.discovery import batch_norms

Listener = Callable[[Any], None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; every submodule gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, training in before.items():
            module.training = training


@contextmanager
def training_only(model: nn.Module, names: frozenset[str]) -> Iterator[nn.Module]:
    """Gradients for the named parameters only; every parameter gets its own flag back."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        yield model
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def normalising_by_batch(model: nn.Module, moving: bool) -> Iterator[nn.Module]:
    """BatchNorms normalise by the mean and variance of the batch; every other module keeps its mode.

    moving: their running statistics move with every batch, by each norm's own momentum; else nothing of
    them is written, so that no buffer needs to be put back. timm's norms may hold dropout: it stays off.
    """
    norms = list(batch_norms(model).values())
    before = [(norm, norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, moving
        yield model
    finally:
        for norm, training, tracking in before:
            norm.training, norm.track_running_stats = training, tracking


@contextmanager
def without_fused_attention(model: nn.Module, longest: float = math.inf) -> Iterator[nn.Module]:
    """Attention of at most `longest` tokens as two products and a softmax, in the modules whose `fused_attn` is on."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]

    def choose(module: nn.Module, args: tuple[Any, ...]) -> None:
        tokens = args[0].shape[-2] if args and isinstance(args[0], Tensor) else math.inf
        module.fused_attn = tokens > longest  # type: ignore[assignment]

    handles = [module.register_forward_pre_hook(choose) for module in fused]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for module in fused:
            module.fused_attn = True  # type: ignore[assignment]


@contextmanager
def listening(model: nn.Module, taps: Mapping[str, Listener]) -> Iterator[None]:
    """Call a listener with what passes a tap: "<module>.output", or the input for any other last word."""
    handles = []
    try:
        for tap, listener in taps.items():
            name, _, side = tap.rpartition(".")
            module = model.get_submodule(name)
            if side == "output":
                handles.append(module.register_forward_hook(_on_output(listener)))
            else:
                handles.append(module.register_forward_pre_hook(_on_input(listener)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(listener: Listener) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: listener(args[0])


def _on_output(listener: Listener) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    return lambda module, args, output: listener(output)
