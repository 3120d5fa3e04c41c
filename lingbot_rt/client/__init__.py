"""The Python client: ``connect`` opens a blocking session under ``with`` and an async one under ``async with``.

    with connect("http://127.0.0.1:30000", prompt="A quiet street.") as world:
        world.press("w")
        for frame in world:
            show(frame.pixels)          # uint8 [H, W, 3]

``protocol.py`` is the protocol without a socket, ``frames.py`` decodes the four transports, ``kept.py`` is what a
session needs to go on after a lost line, ``sessions.py`` adds the two kinds of socket, ``connect.py`` opens them,
``camera_poses.py`` takes camera paths of NumPy arrays, ``address.py`` reads URLs and finds the
proxy, ``server_info.py`` reads /v1/models.
"""

from lingbot_rt.client.camera_poses import poses_payload, read_poses
from lingbot_rt.client.connect import connect
from lingbot_rt.client.frames import Frame
from lingbot_rt.client.kept import Place
from lingbot_rt.client.protocol import ChunkStats
from lingbot_rt.client.sessions import AsyncSession, Session
from lingbot_rt.errors import (
    ClientError,
    ConnectFailed,
    EventRefused,
    InitRefused,
    KeyRefused,
    MessageRefused,
    ProtocolError,
    SaveFailed,
    ServerBusy,
    ServerNotReady,
    SessionLost,
)

__all__ = [
    "AsyncSession",
    "ChunkStats",
    "ClientError",
    "ConnectFailed",
    "EventRefused",
    "Frame",
    "InitRefused",
    "KeyRefused",
    "MessageRefused",
    "Place",
    "ProtocolError",
    "SaveFailed",
    "ServerBusy",
    "ServerNotReady",
    "Session",
    "SessionLost",
    "connect",
    "poses_payload",
    "read_poses",
]
