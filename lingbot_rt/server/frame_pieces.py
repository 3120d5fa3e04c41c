"""Cuts the long WebSocket frames of a client into fragments while they arrive.

A parser waits for a whole frame and then copies and unmasks it at once. For 64 MB that takes long enough to hold up
every other connection. Fragments of a few kilobytes are unmasked one by one.
"""

from __future__ import annotations

PIECE_BYTES = 64 * 2**10
"""Largest payload of a fragment. A multiple of 4, so that each begins with the first byte of the mask."""

_FIN, _MASKED, _LENGTH = 0x80, 0x80, 0x7F
_DATA = (0, 1, 2)
"""First bytes, without FIN, of frames that carry parts of messages."""


class FramePieces:
    """The bytes that one client sends after the handshake. Frames longer than ``max_size`` are left as they are: the
    parser refuses them by their header."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._head = bytearray()  # of a frame whose header is not complete
        self._given = 0  # bytes of it that the parser has
        self._first = 0  # first byte of the frame, without its opcode once a fragment has it
        self._mask = b""
        self.left = 0  # payload bytes that the frame in work still has
        self._piece_left = 0  # of these, the bytes of the fragment in work

    def cut(self, data: bytes) -> bytes:
        """The same messages, with long frames as fragments."""
        out, at = bytearray(), 0
        while at < len(data):
            if self.left == 0:
                at = self._take_head(data, at, out)
                continue
            if self._piece_left == 0:
                self._begin_piece(out)
            taken = min(self._piece_left, len(data) - at)
            out += data[at : at + taken]
            at += taken
            self.left -= taken
            self._piece_left -= taken
        return bytes(out)

    def _take_head(self, data: bytes, at: int, out: bytearray) -> int:
        """Reads on in a header; where it ended. It is held back only where the frame may be cut."""
        end = at + self._head_bytes() - len(self._head)
        self._head += data[at:end]
        is_held = len(self._head) < 2 or _may_be_long(self._head)
        if not is_held:
            out += self._head[self._given :]
            self._given = len(self._head)
        if len(self._head) < self._head_bytes():
            return min(end, len(data))
        head, self._head, self._given = bytes(self._head), bytearray(), 0
        code = head[1] & _LENGTH
        self.left = code if code < 126 else int.from_bytes(head[2 : 4 if code == 126 else 10], "big")
        self._piece_left = self.left
        if is_held and PIECE_BYTES < self.left <= self._max_size:
            self._first, self._mask, self._piece_left = head[0], head[-4:], 0
        elif is_held:
            out += head
        return end

    def _head_bytes(self) -> int:
        """Length of the header, as far as it is known."""
        if len(self._head) < 2:
            return 2
        length = self._head[1] & _LENGTH
        return 2 + {126: 2, 127: 8}.get(length, 0) + (4 if self._head[1] & _MASKED else 0)

    def _begin_piece(self, out: bytearray) -> None:
        self._piece_left = min(self.left, PIECE_BYTES)
        is_last = self._piece_left == self.left
        out.append(self._first if is_last else self._first & ~_FIN)
        self._first &= _FIN  # what follows is a continuation
        out.append(_MASKED | 127)
        out += self._piece_left.to_bytes(8, "big") + self._mask


def _may_be_long(head: bytes | bytearray) -> bool:
    return head[0] & ~_FIN in _DATA and head[1] == _MASKED | 127
