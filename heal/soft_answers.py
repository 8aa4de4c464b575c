"""How far apart the softened answers of two networks are: the loss of distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) (scalar) of logits [n, classes] over T, mean over images; float32.

    Source: Hinton et al. (arXiv 1503.02531).
    """
    own, wanted = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2
