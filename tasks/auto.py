"""`auto` in place of a method's name: which one it stands for, by the network that `dense.source` names.

It is settled before anything is planned, so that keys, manifests and reports hold the methods that ran.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from heal.naming import AUTO
from tasks import methods, params_file
from tasks.params_file import Json, Written

if TYPE_CHECKING:
    from heal.presets import Named, Preset
    from tasks.params_schema import Sections


def is_open(sections: Sections) -> bool:
    """Whether any method is left to the preset."""
    return any(_is_auto(sections, section) for section in methods.METHOD_KEYS)


def settled(written: Written, sections: Sections) -> tuple[Written, str]:
    """The values with the preset's methods in place of every `auto`, and for whom; params that are written stay.

    Raises InputError when the network that it depends on is not there.
    """
    chosen = _preset(sections)
    filled, why = copy.deepcopy(written), f"{AUTO} ({chosen.why})"
    named: dict[str, tuple[Named, ...]] = {
        "allocation": (chosen.allocator,),
        "pruning": (chosen.pruner,),
        "healing": chosen.healers,
    }
    for section, taken in named.items():
        if _is_auto(sections, section):
            names = list[Json]([method.name for method in taken])
            _put(filled, f"{section}.{methods.METHOD_KEYS[section]}", names if section == "healing" else names[0], why)
            for method in taken:
                _options(filled, section, method, why)
    return filled, why


def _is_auto(sections: Sections, section: str) -> bool:
    value = getattr(getattr(sections, section), methods.METHOD_KEYS[section])
    return value in (AUTO, (AUTO,))


def _preset(sections: Sections) -> Preset:
    from heal.presets import choose
    from tasks import dense_source

    return choose(
        dense_source.skeleton(sections.dense, is_digits=sections.calibration.source == "digits"),
        sections.allocation.budget.build(),
        None if _is_auto(sections, "allocation") else methods.allocator(sections),
        None if _is_auto(sections, "pruning") else methods.pruner(sections),
        [methods.healer(sections, name) for name in sections.healing.methods if name != AUTO],
        sections.healing.rounds,
    )


def _options(filled: Written, section: str, method: Named, why: str) -> None:
    own: Any = filled.values.get(section)
    given = own.get(method.name) if isinstance(own, dict) else None
    for key, value in method.params.items():
        if not isinstance(given, dict) or key not in given:
            _put(filled, f"{section}.{method.name}.{key}", value, why)


def _put(filled: Written, dotted: str, value: Json, why: str) -> None:
    section = dotted.partition(".")[0]
    is_new = section not in filled.values
    params_file.put(filled, dotted, value, {dotted: why})
    if is_new:  # the rest of the section is at its defaults still
        del filled.places[section]
