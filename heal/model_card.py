"""The model card of a bundle: README.md with the front matter that model hubs read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from heal.packing import LAYOUT


def card(description: Mapping[str, Any], bytes_of_weights: int) -> str:
    """The text for a bundle.json; the same content gives the same text."""
    lines = [*_front_matter(description), "", f"# {description['architecture']['name'].rpartition(':')[2]}", ""]
    lines += [*_facts(description, bytes_of_weights), "", *_use(description), "", *_plain_timm(description)]
    lines += [*_table("Channels that were cut", "kept", description["channels"])]
    lines += [
        *_table("Blocks that were dropped", "in its place", dict.fromkeys(description.get("dropped", []), "its input"))
    ]
    lines += [*_table("Metrics", "value", description["metrics"] or {})]
    return "\n".join(lines) + "\n"


def why_not_timm(description: Mapping[str, Any]) -> str | None:
    """Why plain timm cannot open the model, or None when it can."""
    if description.get("dropped", []):
        return "it lacks blocks that the architecture's name says"
    if description["channels"]:
        return "its layers are narrower than the architecture's name says"
    if description["biases"]:
        return "its layers have biases that the architecture does not"
    return "it is built by an adapter" if description["architecture"]["source"] == "adapter" else None


def is_masked(description: Mapping[str, Any]) -> bool:
    """Whether tensors are stored packed."""
    return any(entry["layout"] == LAYOUT for entry in description["tensors"].values())


def _front_matter(description: Mapping[str, Any]) -> Iterator[str]:
    is_cut = description["channels"] or description.get("dropped", [])
    tags = ["regrow", *(["pruned"] if is_cut or is_masked(description) else [])]
    yield from ("---", "library_name: regrow", "pipeline_tag: image-classification")
    if description["licence"]:
        yield f"license: {json.dumps(description['licence'])}"
    yield f"tags: {json.dumps(tags)}"
    yield "---"


def _facts(description: Mapping[str, Any], bytes_of_weights: int) -> Iterator[str]:
    tensors = description["tensors"].values()
    yield "| | |"
    yield "|---|---|"
    yield f"| built by | {_code(description['architecture']['source'] + ':' + description['architecture']['name'])} |"
    yield f"| tensors | {len(tensors)}, of which {sum(e['layout'] == LAYOUT for e in tensors)} are packed |"
    yield f"| weights file | {bytes_of_weights:,} bytes |"
    if description["class_names"]:
        yield f"| classes | {len(description['class_names'])} |"
    for label, key in (("preprocessing", "preprocessing"), ("method", "method"), ("parent digest", "parent_digest")):
        if description[key]:
            yield f"| {label} | {_code(description[key])} |"
    if description["calibration_digest"]:
        yield f"| healed on images of digest | {_code(description['calibration_digest'])} |"


def _use(description: Mapping[str, Any]) -> Iterator[str]:
    architecture = description["architecture"]
    trusted = f", allow_adapters=[{architecture['name']!r}]" if architecture["source"] == "adapter" else ""
    yield from ("```python", "import heal", f'model = heal.load("path/to/this/folder"{trusted})', "```")
    if trusted:
        yield ""
        yield f"Loading imports {_code(architecture['name'])}: install that package, and trust it, first."


def _plain_timm(description: Mapping[str, Any]) -> Iterator[str]:
    reason = why_not_timm(description)
    if reason is None:
        yield "Plain timm opens the dense export (`heal.bundle.export_dense`) as `local-dir:path/to/the/export`."
    else:
        yield f"Plain timm cannot open this model: {reason}."
    if is_masked(description) and not description["channels"] and not description.get("dropped", []):
        yield "Its zeros make a smaller file; plain runtimes run it at the speed of the dense model."


def _table(title: str, head: str, rows: Mapping[str, Any]) -> Iterator[str]:
    if rows:
        yield from ("", f"## {title}", "", f"| | {head} |", "|---|---|")
        yield from (f"| {_code(name)} | {_code(value)} |" for name, value in sorted(rows.items()))


def _code(value: object) -> str:
    """As code in a table cell: nothing in it is read as Markdown."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"
