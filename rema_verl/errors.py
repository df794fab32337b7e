"""A user's mistakes, said the same way by every command: one line on stderr and exit code 2. Imports nothing heavy."""

import argparse
import sys
from typing import NoReturn

PREFIX = "rema-verl: error:"
NOTE = "rema-verl: note:"


class UserError(ValueError):
    """A mistake the user can fix. The message is one line and names the file, row or key."""


class Parser(argparse.ArgumentParser):
    """argparse without its usage block: a wrong option is one line like every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def complain(message: object, prefix: str = PREFIX) -> None:
    """Print the one line."""
    print(f"{prefix} {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def die(message: object) -> NoReturn:
    """Print it, and end with exit code 2."""
    complain(message)
    raise SystemExit(2)
