"""Allocations judged the long way round, to hold against how the searching allocators judge them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heal import masking
from heal.allocators.pool import Include, Pool
from heal.batchnorm import reestimate
from heal.method import AllocationContext
from heal.pruners.magnitude import Magnitude
from heal.values import Allocation, Budget
from tests.heal import nets

ALL: Include = ("stem", "depthwise", "classifier")


def pool_of(model: nn.Module, budget: Budget) -> Pool:
    """Every layer of the model."""
    return Pool.of(model, ALL, budget, AllocationContext(images=nets.images(1)))


def the_long_way(dense: nn.Module, kept: Allocation, images: Tensor, mode: Any, batch_size: int) -> tuple[float, float]:
    """(agreement, minus KL) of a fresh copy, masked by the pruner, in numpy."""
    student = copy.deepcopy(dense)
    masking.apply(student, Magnitude().prune(dense, kept, {}))
    if any(isinstance(module, nn.BatchNorm2d) for module in student.modules()):
        reestimate(student, images, mode, batch_size)
    with torch.no_grad():
        teacher, answer = (
            torch.cat([net(batch) for batch in images.split(batch_size)]).double().numpy() for net in (dense, student)
        )
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (teacher, answer))
    return (
        float((teacher.argmax(1) == answer.argmax(1)).mean()),
        -float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()),
    )
