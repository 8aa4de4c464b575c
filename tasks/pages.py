"""The HTML pages' templates: what they quote is escaped, and a name that is missing is an error."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2

FOLDERS = ("templates", "sweep_templates")
"""The report stage computes with the first one, so what only a sweep's page needs lies in the other."""


def template(name: str) -> jinja2.Template:
    """A template by its file's name."""
    return _environment().get_template(name)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).with_name(folder) for folder in FOLDERS]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
