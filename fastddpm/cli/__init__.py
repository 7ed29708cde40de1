"""The command line: `fastddpm COMMAND`, and each command's options."""

from fastddpm.cli.command import main

__all__ = ["main"]
