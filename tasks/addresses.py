"""Addresses of servers and stores, as messages may show them."""

from __future__ import annotations

import re


def public(text: str) -> str:
    """An address, or a text with addresses in it, without the users and passwords."""
    return re.sub(r"//[^/@\s]*@", "//", text)
