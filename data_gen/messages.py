"""Lines for the user, beside what a verb prints as its result."""

import contextlib
import sys


def say(message: str) -> None:
    """A line for the user, if anyone still listens."""
    with contextlib.suppress(OSError):
        print(f"stablerep generate: {message}", file=sys.stderr, flush=True)
