"""`auto` in place of a method's name: which one it stands for, by the network that `dense.source` names.

It is settled before anything is planned, so that keys, manifests and reports hold the methods that ran.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tasks import methods, params_file
from tasks.params_file import Json, Written
from tasks.params_schema import AUTO

if TYPE_CHECKING:
    from heal.presets import Named, Preset
    from tasks.params_schema import Sections


def is_open(sections: Sections) -> bool:
    """Whether any method is left to the preset."""
    return any(_is_auto(sections, section) for section in methods.METHOD_KEYS)


def settled(written: Written, sections: Sections) -> Written:
    """The values with the preset's methods in place of every `auto`; params that are written stay.

    Raises InputError when the network that it depends on is not there.
    """
    chosen = _preset(sections)
    filled = copy.deepcopy(written)
    named: dict[str, tuple[Named, ...]] = {
        "allocation": (chosen.allocator,),
        "pruning": (chosen.pruner,),
        "healing": chosen.healers,
    }
    for section, taken in named.items():
        if _is_auto(sections, section):
            key = methods.METHOD_KEYS[section]
            _put(filled, f"{section}.{key}", _names(taken) if section == "healing" else taken[0].name, chosen)
            for method in taken:
                _options(filled, section, method, chosen)
    return filled


def _names(taken: Iterable[Named]) -> list[Json]:
    return [method.name for method in taken]


def _is_auto(sections: Sections, section: str) -> bool:
    value = getattr(getattr(sections, section), methods.METHOD_KEYS[section])
    return value in (AUTO, (AUTO,))


def _preset(sections: Sections) -> Preset:
    from heal.presets import preset, removed_by_default
    from tasks import dense_source

    model = dense_source.skeleton(sections.dense, is_digits=sections.calibration.source == "digits")
    budget = sections.allocation.budget.build()
    if _is_auto(sections, "allocation"):
        return preset(model, removed_by_default(model, budget))
    allocator = methods.allocator(sections)
    return preset(model, budget.removes(allocator.unit), has_pattern=hasattr(allocator, "pattern"))


def _options(filled: Written, section: str, method: Named, chosen: Preset) -> None:
    own: Any = filled.values.get(section)
    given = own.get(method.name) if isinstance(own, dict) else None
    for key, value in method.params.items():
        if not isinstance(given, dict) or key not in given:
            _put(filled, f"{section}.{method.name}.{key}", value, chosen)


def _put(filled: Written, dotted: str, value: Json, chosen: Preset) -> None:
    place = f"{AUTO} ({chosen.why})"
    params_file.put(filled, dotted, value, {dotted: place})
    # A section that is made for this sets nothing else: the rest of it is at its defaults still.
    for section in methods.METHOD_KEYS:
        if filled.places.get(section) == place:
            del filled.places[section]
