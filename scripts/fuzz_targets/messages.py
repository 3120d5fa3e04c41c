"""The decoder of client messages: whatever the bytes, a message or one line that says what is wrong."""

from __future__ import annotations

import math
import struct
from random import Random
from typing import Any

from lingbot_rt.errors import InvalidEvent, InvalidInit
from lingbot_rt.session.controls import parse_event, payload_of
from lingbot_rt.session.messages import Event, Init, PinnedEvent, decode
from scripts.fuzz_targets.bounds import check_refusal, mutated, noted, within

TYPES = ("init", "event")
KINDS = ("prompt", "camera_actions", "composite_input", "camera_poses", "pause", "resume")
KEYS = ("w", "a", "s", "d", "i", "j", "k", "l")
HELD = [[], *([key] for key in KEYS), ["w", "d"], ["a", "l"], ["w", "s", "i"], ["w", "w"], list(KEYS)]
"""Keys held together."""
NAMES = (
    *("type", "mode", "transitions", "actions", "client_ts_ms", "input_types", "camera_actions"),
    *("camera_poses", "poses", "intrinsics", "anchor", "longest_step"),
    *Init.__struct_fields__,
    *Event.__struct_fields__,
    *PinnedEvent.__struct_fields__,
)
TEXTS = (
    "",
    " ",
    "w",
    "state",
    "é",
    "雪",
    "\0",
    "\x1b[2J",
    "a\nb",
    "🙂",
    "‮",
    "x" * 300,
    "None",
    "64x64",
    "../../etc/passwd",
)


def try_case(random: Random) -> str:
    data = message_bytes(random)
    refusal = random.choice((InvalidInit, InvalidEvent))
    with noted(data), within(96 * 2**20 + 16 * len(data)):
        try:
            message = decode(data, refusal)
        except (InvalidInit, InvalidEvent) as error:
            return check_refusal(error)
        if isinstance(message, Init):
            return "init"
        try:
            parsed = parse_event(message.kind, message.payload)
        except InvalidEvent as error:
            return f"{check_refusal(error)} (payload)"
        kind, payload = payload_of(parsed)
        again = payload_of(parse_event(kind, payload))
        assert again == (kind, payload) or message.kind == "composite_input", "a record plays differently"
        return "event"


def message_bytes(random: Random) -> bytes:
    """Bytes of one client message: from whole ones to noise."""
    match random.randrange(20):
        case 0:
            return random.randbytes(random.choice((0, 1, 2, 10, 1000)))
        case 1:
            return _hostile(random)
        case 2:
            return pack(random, value(random, 4))
    message = random.choice((init_map, event_map))(random)
    for _ in range(random.choice((0, 0, 1, 2, 4))):
        message[random.choice(NAMES)] = value(random, 3)
    data = pack(random, message)
    if random.random() < 0.6:
        return data
    return mutated(data, random, others=[pack(random, value(random, 3)), b"\xdd\xff\xff\xff\xff", b"\x91" * 40])


def init_map(random: Random) -> dict[Any, Any]:
    return {"type": "init", "prompt": "A street.", "first_frame": random.randbytes(20), "size": "64x64", "fps": 16}


def event_map(random: Random) -> dict[Any, Any]:
    kind = random.choice(KINDS)
    return {"type": "event", "kind": kind, "payload": payload(random, kind), "event_id": random.randrange(100)}


def payload(random: Random, kind: str) -> Any:
    """What belongs to ``kind``."""

    match kind:
        case "prompt":
            return random.choice(("Rain.", "Snow falls on the street.", "雪", "x" * 8192))
        case "camera_actions" if random.random() < 0.5:
            return random.choices(HELD, k=random.choice((0, 1, 3, 20, 512)))
        case "camera_actions":
            count = random.choice((0, 1, 2, 5, 600))
            return {
                "mode": "state",
                "transitions": [{"actions": held, "client_ts_ms": 0} for held in random.choices(HELD, k=count)],
            }
        case "camera_poses":
            return _path(random)
        case "composite_input":
            parts = random.sample(("prompt", "camera_actions", "camera_poses"), k=random.randint(1, 3))
            return {"input_types": parts, **{part: payload(random, part) for part in parts}}
    return None


def _path(random: Random) -> dict[str, Any]:
    """Poses near the origin, with rotations that are exact, nearly so, or far from it."""
    fields: dict[str, Any] = {"poses": [], "anchor": random.choice(("session", "camera"))}
    scale = random.choice((1.0, 1.0, 1.0001, 1.2))
    for _ in range(random.choice((1, 3, 20, 100))):
        turn = random.uniform(-math.pi, math.pi)
        c, s, x, z = scale * math.cos(turn), scale * math.sin(turn), random.uniform(-9, 9), random.uniform(-9, 9)
        fields["poses"].append([[c, 0, s, x], [0, scale, 0, 0.5], [-s, 0, c, z], [0, 0, 0, 1]])
    lens = [random.uniform(1, 2000) for _ in range(4)]
    match random.randrange(4):
        case 0:
            fields["intrinsics"] = lens
        case 1:
            fields |= {"intrinsics": [lens] * len(fields["poses"]), "size": "832x480", "longest_step": 2.5}
    return fields


def value(random: Random, depth: int) -> Any:
    """Anything that MessagePack can hold, and a little more: see ``pack``."""
    if depth and random.random() < 0.5:
        count = random.choice((0, 1, 2, 3, 8))
        if random.random() < 0.5:
            return [value(random, depth - 1) for _ in range(count)]
        return {key(random): value(random, depth - 1) for _ in range(count)}
    match random.randrange(12):
        case 0:
            return None
        case 1:
            return random.random() < 0.5
        case 2:
            return random.choice((0, 1, -1, 512, 513, 2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**63)))
        case 3:
            return random.choice(
                (0.0, -0.0, 0.5, 1.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), 2.0**70)
            )
        case 4:
            return random.randbytes(random.choice((0, 1, 30)))
        case 5:
            return Ext(random.randrange(-128, 128), random.randbytes(random.choice((0, 1, 2, 4, 8, 16, 30))))
        case 6:
            return b"\xff\xfe".join((b"\xc3", random.randbytes(3))).decode("latin-1").encode("utf-16-le")
        case 7:
            return random.choice(KINDS + TYPES)
        case 8:
            return payload(random, random.choice(KINDS))
        case 9:
            return NotText(random.randbytes(random.choice((1, 5, 40))))
    return random.choice(TEXTS)


def key(random: Random) -> Any:
    return random.choice(NAMES) if random.random() < 0.7 else random.choice((*TEXTS, 7, -1, 1.5, None, True, b"kind"))


class Ext(tuple[int, bytes]):
    """An extension: its type and its bytes."""

    def __new__(cls, kind: int, data: bytes) -> Ext:
        return super().__new__(cls, (kind, data))


class NotText(bytes):
    """Bytes that are packed as a string."""


def pack(random: Random, item: Any) -> bytes:
    """MessagePack, sometimes in a longer form than needed."""
    match item:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if item else b"\xc2"
        case int():
            return _pack_int(random, item)
        case float():
            return (
                struct.pack(">Bd", 0xCB, item)
                if random.random() < 0.9 or abs(item) > 1e38
                else struct.pack(">Bf", 0xCA, item)
            )
        case Ext():
            kind, data = item
            return _sized(random, (0xC7, 0xC8, 0xC9), len(data)) + struct.pack(">b", kind) + data
        case NotText():
            return _sized(random, (0xD9, 0xDA, 0xDB), len(item)) + item
        case bytes():
            return _sized(random, (0xC4, 0xC5, 0xC6), len(item)) + item
        case str():
            text = item.encode()
            short = bytes([0xA0 | len(text)]) if len(text) < 32 and random.random() < 0.9 else None
            return (short or _sized(random, (0xD9, 0xDA, 0xDB), len(text))) + text
        case list() | tuple():
            head = _counted(random, 0x90, (0xDC, 0xDD), len(item))
            return head + b"".join(pack(random, entry) for entry in item)
        case dict():
            head = _counted(random, 0x80, (0xDE, 0xDF), len(item))
            return head + b"".join(pack(random, part) for entry in item.items() for part in entry)
    raise TypeError(type(item))


def _pack_int(random: Random, number: int) -> bytes:
    if -(2**53) <= number <= 2**53 and random.random() < 0.1:
        return struct.pack(">Bd", 0xCB, number)  # as JavaScript does
    if 0 <= number < 128 and random.random() < 0.9:
        return bytes([number])
    forms = (
        (0xCC, ">B"),
        (0xCD, ">H"),
        (0xCE, ">I"),
        (0xCF, ">Q"),
        (0xD0, ">b"),
        (0xD1, ">h"),
        (0xD2, ">i"),
        (0xD3, ">q"),
    )
    fitting = []
    for code, form in forms:
        try:
            fitting.append(bytes([code]) + struct.pack(form, number))
        except struct.error:
            continue
    return random.choice(fitting)


def _sized(random: Random, codes: tuple[int, int, int], size: int) -> bytes:
    forms = [form for form in range(3) if size < 256 ** (2**form)]
    form = forms[0] if random.random() < 0.8 else random.choice(forms)
    return bytes([codes[form]]) + size.to_bytes(2**form, "big")


def _counted(random: Random, short: int, codes: tuple[int, int], count: int) -> bytes:
    if count < 16 and random.random() < 0.9:
        return bytes([short | count])
    form = 0 if count < 2**16 and random.random() < 0.8 else 1
    return bytes([codes[form]]) + count.to_bytes(2 * (form + 1), "big")


def _hostile(random: Random) -> bytes:
    """Small bytes that stand for much: depth, counts, and many little items."""
    inside = random.choice((b"\x90", b"\xc0", b"\x91", b"\x81\xa1x", b"\xa0", b"\x80"))
    count = random.choice((20, 31, 32, 33, 1000, 30_000, 300_000))
    head = random.choice((b"\xdd", b"\xdc", b"\xdf", b""))
    size = {b"\xdd": 4, b"\xdc": 2, b"\xdf": 4, b"": 0}[head]
    said = random.choice((count, count + 1, count - 1, 2**32 - 1)) & (256**size - 1)
    body = head + said.to_bytes(size, "big") + inside * count
    under = random.choice(NAMES)
    return b"\x82\xa4type" + pack(random, random.choice(TYPES)) + pack(random, under) + body
