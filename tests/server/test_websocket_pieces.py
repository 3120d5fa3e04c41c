"""Long frames come to the parser as fragments and mean the same."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import SERVER, Protocol

from lingbot_rt.server.frame_pieces import PIECE_BYTES, FramePieces

LIMIT = 4 * PIECE_BYTES
sizes = st.sampled_from([0, 1, 125, 126, 65535, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, LIMIT])
opcodes = st.sampled_from([Opcode.BINARY, Opcode.TEXT, Opcode.CONT, Opcode.PING])


def messages(data: bytes, step: int, pieces: FramePieces | None) -> tuple[list[tuple[Opcode, bytes]], int]:
    """Whole messages, control frames and whether the rest is broken, as a parser reads them, and its longest frame."""
    parser = Protocol(SERVER, max_size=LIMIT)
    for at in range(0, len(data), step):
        part = data[at : at + step]
        parser.receive_data(pieces.cut(part) if pieces else part)
    got, opened, longest = [], [], 0
    for frame in parser.events_received():
        longest = max(longest, len(frame.data))
        if frame.opcode is Opcode.PING:
            got.append((frame.opcode, bytes(frame.data)))
            continue
        opened.append(frame)
        if frame.fin:
            got.append((opened[0].opcode, b"".join(frame.data for frame in opened)))
            opened.clear()
    return [*got, (Opcode.CLOSE, b"" if parser.parser_exc is None else b"broken")], longest


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(st.tuples(opcodes, sizes, st.booleans()), max_size=5),
    step=st.sampled_from([1000, 8192, 100_000]),
    tail=st.binary(max_size=20),
)
def test_fragments_mean_the_same(frames, step, tail):
    """For any frames, broken ones too: the same messages, control frames and errors, in frames of bounded length."""
    data = bytearray()
    for number, (opcode, size, fin) in enumerate(frames):
        size = min(size, 125) if opcode is Opcode.PING else size
        payload = (bytes(range(1, 252)) * (size // 251 + 1))[number : number + size]
        is_last = fin or opcode is Opcode.PING
        data += Frame(opcode, payload[:size], fin=is_last).serialize(mask=True)
    data += tail
    plain, _ = messages(bytes(data), step, None)
    cut, longest = messages(bytes(data), step, FramePieces(LIMIT))
    assert cut == plain
    assert longest <= PIECE_BYTES


def test_headers_may_arrive_byte_by_byte():
    """A long frame whose header comes in single bytes is cut all the same."""
    data = Frame(Opcode.BINARY, bytes(range(256)) * 1024).serialize(mask=True)
    pieces = FramePieces(LIMIT)
    cut = b"".join(pieces.cut(data[i : i + 1]) for i in range(20)) + pieces.cut(data[20:])
    assert messages(cut, len(cut), None)[0][0] == (Opcode.BINARY, bytes(range(256)) * 1024)
    assert messages(cut, len(cut), None)[1] == PIECE_BYTES


def test_a_frame_above_the_limit_is_refused_by_its_header():
    """Nothing of its payload is needed."""
    head = Frame(Opcode.BINARY, bytes(LIMIT + 1)).serialize(mask=True)[:14]
    assert FramePieces(LIMIT).cut(head) == head
