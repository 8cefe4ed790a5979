"""The command `bara`."""

from bara.cli.app import main

__all__ = ["main"]
