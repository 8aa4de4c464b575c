"""What bundle.json says, and the checks that a reader can rely on: plain JSON, no schema library."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from heal.errors import BundleError
from heal.naming import nearest
from heal.packing import LAYOUT
from heal.weights_file import DENSE, DTYPES

FORMAT = "regrow-bundle"
VERSION = 1
SHALLOW = 2
"""The version of a bundle whose network lost blocks (`dropped`), which readers of version 1 would not build right."""

DESCRIPTION = "bundle.json"
WEIGHTS = "weights.safetensors"
CARD = "README.md"
CONFIG = "config.json"
FILES = frozenset({WEIGHTS, CARD, CONFIG})
"""The names that bundle.json may list: names from a file never reach the file system unchecked."""

METADATA = ("class_names", "preprocessing", "parent_digest", "method", "calibration_digest", "metrics", "licence")

_TYPES: dict[str, tuple[type, ...]] = {
    "architecture": (dict,),
    "channels": (dict,),
    "biases": (list,),
    "dropped": (list,),
    "tensors": (dict,),
    "dtype": (str,),
    "files": (dict,),
    "class_names": (list, type(None)),
    "preprocessing": (dict, type(None)),
    "parent_digest": (str, type(None)),
    "method": (dict, str, type(None)),
    "calibration_digest": (str, type(None)),
    "metrics": (dict, type(None)),
    "licence": (str, type(None)),
}


def dumps(value: Mapping[str, Any], what: str = DESCRIPTION) -> bytes:
    """Canonical JSON: sorted keys, indented, only finite numbers. Raises BundleError."""
    try:
        return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"{what} cannot be written as JSON: {error}; pass plain, finite values") from error


def sha256(data: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def combined(digests: Mapping[str, str]) -> str:
    """One digest of many files: SHA-256 over the lines `<digest>  <name>`, sorted by name."""
    return sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode())


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of a file that lies inside the folder, also after following links. Raises BundleError."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link that leaves the bundle; put a copy of the file in its place")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        hint = "it is not a bundle" if name == DESCRIPTION else "fetch the bundle again"
        raise BundleError(f"{folder} has no {name}; {hint}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def parse(data: bytes, where: Path) -> dict[str, Any]:
    """The validated content of bundle.json at `where`. Raises BundleError."""
    try:
        found = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not JSON: {error}; fetch the bundle again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise BundleError(f'{where} does not say "format": "{FORMAT}"; it is not a bundle')
    if type(found.get("version")) is not int or found["version"] not in (VERSION, SHALLOW):
        known = f"{VERSION} and {SHALLOW}"
        raise BundleError(f"{where} is of version {found.get('version')!r}, this reads {known}; upgrade regrow")
    found.setdefault("dropped", [])
    problem = next(_problems(found), None)
    if problem:
        raise BundleError(f"{where}: {problem}; fetch or save the bundle again")
    return found


def checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of METADATA, None where not given, as it comes back from JSON.

    Raises BundleError for a key that bundles do not have, or a value of the wrong type.
    """
    unknown = sorted(metadata.keys() - set(METADATA))
    if unknown:
        raise BundleError(f"metadata {unknown[0]!r} is unknown; {nearest(unknown[0], METADATA)}")
    plain: dict[str, Any] = json.loads(dumps({key: metadata.get(key) for key in METADATA}, "metadata"))
    problem = next(_wrong_metadata(plain), None)
    if problem:
        raise BundleError(f"metadata: {problem}")
    return plain


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _problems(found: Mapping[str, Any]) -> Iterator[str]:
    yield from _wrong_types(found, _TYPES)
    yield from _wrong_metadata(found)
    if {key: type(value) for key, value in found["architecture"].items()} != _ARCHITECTURE:
        yield f"architecture {found['architecture']!r} is not source, name and kwargs"
    for group, width in found["channels"].items():
        if not _is_positive(width):
            yield f"channels of {group!r} are {width!r}, not a positive number"
    for name, entry in found["tensors"].items():
        if not _is_entry(entry):
            yield f"tensor {name!r} is described as {entry!r}, which is not shape, dtype, stored and layout"
    for name, digest in found["files"].items():
        if name not in FILES:
            yield f"file {name!r} is not one that a bundle has ({', '.join(sorted(FILES))})"
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            yield f"the digest of {name} is {digest!r}, not a SHA-256"
    if WEIGHTS not in found["files"]:
        yield f"it lists no {WEIGHTS}"


def _wrong_metadata(found: Mapping[str, Any]) -> Iterator[str]:
    yield from _wrong_types(found, METADATA)
    preprocessing = found["preprocessing"] or {}
    for key, fits in _PREPROCESSING.items():
        if preprocessing.get(key) is not None and not fits(preprocessing[key]):
            yield f"preprocessing {key} = {preprocessing[key]!r} makes no sense"


def _wrong_types(found: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if key not in found:
            yield f"{key!r} is missing"
        elif not isinstance(found[key], _TYPES[key]):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in _TYPES[key])
            yield f"{key!r} is a {type(found[key]).__name__}, not {names}"
    for key in ("class_names", "biases", "dropped"):
        if not all(isinstance(name, str) for name in found.get(key) or ()):
            yield f"{key!r} are not all strings"


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("shape"), list)
        and all(_is_count(length) for length in entry["shape"])
        and all(isinstance(entry.get(key), str) and entry[key] in DTYPES for key in ("dtype", "stored"))
        and entry.get("layout") in (DENSE, LAYOUT)
    )


def _is_positive(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_positive, value))


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(number) in (int, float) for number in value)


def _is_word(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


_ARCHITECTURE = {"source": str, "name": str, "kwargs": dict}
_PREPROCESSING = {  # what is read from it here; other keys pass
    "size": _is_size,
    "resize": _is_positive,
    "crop": _is_word,
    "interpolation": _is_word,
    "mean": _is_colour,
    "std": _is_colour,
}
