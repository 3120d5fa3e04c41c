"""What every target shares: bytes made wrong, and the checks of refusals, time and memory."""

from __future__ import annotations

import re
import reprlib
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import msgspec

from lingbot_rt.errors import LingbotError
from lingbot_rt.session.server_messages import error_message

CPU_S = 20.0
"""Most CPU time of one case; it says nothing about how busy the machine is."""

_EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxtuple, _SHORT.maxstring, _SHORT.maxother = (
    6,
    60,
    40,
    20,
    60,
    1000,
)
_ROOT = Path(__file__).resolve().parents[2]
_LEAKS = re.compile(rf" at 0x[0-9a-f]+|Traceback|<class |{re.escape(str(_ROOT))}|/home/|site-packages")


def mutated(data: bytes, random: Random, *, others: list[bytes], most: int = 6) -> bytes:
    """``data`` with a few bytes wrong, missing, repeated or taken from ``others``. More often near the beginning."""
    content = bytearray(data)
    for _ in range(random.randint(1, most)):
        at = int(len(content) * random.random() ** random.choice((1, 3, 6)))
        match random.randrange(9):
            case 0 if content:
                content[min(at, len(content) - 1)] ^= 1 << random.randrange(8)
            case 1 | 2 if content:
                content[min(at, len(content) - 1)] = random.choice((*_EDGES[:11], random.randrange(256))) & 255
            case 3 | 4:
                form = random.choice(("<H", ">H", "<I", ">I"))
                number = random.choice(_EDGES) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF)
                content[at : at + struct.calcsize(form)] = struct.pack(form, number)
            case 5:
                del content[at : at + random.choice((1, 2, 4, 16, 256))]
            case 6:
                piece = content[at : at + random.choice((1, 4, 16, 64, 512))]
                content[at:at] = piece * random.choice((1, 1, 2, 50))
            case 7:
                other = random.choice(others)
                start = random.randrange(len(other) + 1)
                content[at:at] = other[start : start + random.choice((2, 8, 64, 1024))]
            case 8:
                del content[at:]
    return bytes(content)


def check_refusal(error: LingbotError, *, needs_field: bool = False) -> str:
    """One line for a client, short and printable, without what only the server should see. Returns its code."""
    message = msgspec.msgpack.decode(error_message(error))
    assert message["type"] == "error"
    assert message["content"], "an empty text"
    assert not needs_field or message.get("field"), f"no field is named: {message['content']}"
    for text in (message["content"], message.get("field", "")):
        assert text.isprintable(), f"not printable: {text!r}"
        assert len(text) <= 600, f"{len(text)} characters: {text!r}"
        assert not _LEAKS.search(text), text
    return str(message["code"])


@contextmanager
def within(memory_bytes: int, cpu_s: float = CPU_S) -> Iterator[None]:
    """Checks what the block takes at most: CPU time of this thread, and resident memory where the system tells."""
    before, begun = _reset_peak(), time.thread_time()
    yield
    took_s = time.thread_time() - begun
    assert took_s <= cpu_s, f"{took_s:.1f} s of CPU time, at most {cpu_s:g} s are expected"
    if before is not None:
        taken = _status()["VmHWM"] - before
        assert taken <= memory_bytes, f"{taken / 2**20:.0f} MiB, at most {memory_bytes / 2**20:.0f} are expected"


def _reset_peak() -> int | None:
    """Begins to measure the peak anew; the bytes in use now. None: this system does not tell."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status()["VmRSS"]
    return None


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}


@contextmanager
def noted(case: object) -> Iterator[None]:
    """What is raised inside says what the case was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"the case: {_SHORT.repr(case)}")
        raise
