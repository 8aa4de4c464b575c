"""The one place that imports timm: it also works beside a torchvision built for another torch.

A torchvision whose compiled operators do not load (a CUDA build beside a CPU torch) fails on
import, and timm with it. Declaring the two operators it looks up makes both import; box
operators and `torchvision.io` decoding still do not work then, and regrow uses neither.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_DECLARED: list[torch.library.Library] = []  # a Library that is collected takes its operators with it

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_timm() -> ModuleType:
    """timm, importable also where torchvision's compiled operators are not."""
    operators = _compiled_operators()
    if operators is not None and not _loads(operators):
        _declare_operators()
    return importlib.import_module("timm")


def _compiled_operators() -> Path | None:
    """torchvision's compiled library, or None when there is none to load."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("_C*.so"), None)


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in _OPERATORS:
        if not hasattr(torch.ops.torchvision, operator):
            library.define(operator + _SCHEMA)  # type: ignore[no-untyped-call]
    _DECLARED.append(library)


timm = import_timm()
