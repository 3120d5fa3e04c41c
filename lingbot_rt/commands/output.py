"""Standard output and standard error of the commands: what fails there never shows a traceback."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from lingbot_rt.errors import OutputFailed, ReaderGone, printable, reason_of

_MAX_CHARACTERS = 1000


def prepare_output() -> None:
    """Characters that the console's encoding does not have are escaped instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None without a console, another class under a test's capture
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints ``text`` on standard output now. Raises OutputFailed, or ReaderGone when nobody reads any more."""
    try:
        print(text, flush=True)
    except OSError as error:
        raise _failure(error) from None


def flush_output() -> None:
    """Writes what argparse printed. Raises as ``say`` does."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise _failure(error) from None


def one_message(text: str) -> str:
    """``text`` as one line that a terminal can show: without control characters, and not too long."""
    line = printable(text)
    return line if len(line) <= _MAX_CHARACTERS else line[:_MAX_CHARACTERS] + "..."


def complain(text: str) -> None:
    """Prints one line about what went wrong on standard error."""
    note(f"lingbot-rt: {one_message(text)}")


def note(text: str) -> None:
    """Prints on standard error. A standard error that cannot be written leaves no other place to say so."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _failure(error: OSError) -> OutputFailed:
    # The text is still in the stream's buffer. Python would write it again at its end, fail, and exit with code 120.
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    if isinstance(error, BrokenPipeError):
        return ReaderGone("the reader of standard output has ended")
    return OutputFailed(f"standard output: {reason_of(error)}")
