"""The command `regrow`, where the library may be installed without what the command line needs."""

from __future__ import annotations

import sys


def main() -> None:
    """`flows.cli`, or how to install what it imports."""
    try:
        from flows import cli
    except ModuleNotFoundError as error:
        needed = "the command line needs more: pip install 'regrow[pipeline]'"
        sys.stderr.write(f"error: there is no module {error.name}; {needed}\n")
        sys.exit(2)
    cli.main()
