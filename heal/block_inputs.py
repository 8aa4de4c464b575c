"""Whether every block of a network is a function of one tensor, as whoever runs it alone takes it to be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError
from heal.families.lookup import describe
from heal.method import Healer, name_of
from heal.modes import evaluating


def refuse_more_inputs(model: nn.Module, healers: Iterable[Healer], image: Tensor) -> None:
    """Raise ArchitectureError where a healer needs "block_inputs" and a block takes more than a tensor, or gives
    anything else. image: [1, c, h, w], which tells.
    """
    who = ", ".join(name_of(healer) for healer in healers if "block_inputs" in healer.needs)
    if not who:
        return

    def check(block: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            named = {**{str(at): value for at, value in enumerate(args[1:], start=1)}, **kwargs}
            beside = [name for name, value in named.items() if value is not None and value is not False]
            if beside or not isinstance(output, Tensor):
                what = f"takes more than its input ({', '.join(beside)})" if beside else "gives more than one tensor"
                raise ArchitectureError(
                    f"healer {who}: {block} {what}, so it cannot be trained alone; heal by starfish or distill"
                )

        return hook

    handles = [
        model.get_submodule(block).register_forward_hook(check(block), with_kwargs=True)
        for block in describe(model).blocks
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(image.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
