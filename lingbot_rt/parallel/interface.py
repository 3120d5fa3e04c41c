"""Which network interface gloo takes between hosts.

Left alone it goes by what the host's own name resolves to. On Debian that is 127.0.1.1, where no other host finds it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from datetime import timedelta

import torch.distributed as dist

VARIABLE = "GLOO_SOCKET_IFNAME"

_SIOCGIFADDR = 0x8915
_ANY_PORT = 9  # nothing is sent there


def choose_interface(store: dist.Store, rank: int, world: int, master: str, timeout: timedelta) -> None:
    """Sets gloo's variable, unless it is set, to the interface that leads to other hosts. Every rank has to call it.

    ``master``: where the store listens. Raises RuntimeError when a rank does not come within ``timeout``.
    """
    own = address_towards(master)
    store.set(f"address/{rank}", own)
    keys = [f"address/{other}" for other in range(world)]
    store.wait(keys, timeout)
    if VARIABLE in os.environ:
        return
    if is_loopback(own):
        # The store is on this host: which way lead those who come from outside?
        outside = [text for key in keys if not is_loopback(text := store.get(key).decode())]
        own = address_towards(outside[0]) if outside else own
    name = interface_of(own)
    if name is not None:
        os.environ[VARIABLE] = name


def address_towards(host: str) -> str:
    """This host's IPv4 address on the way to ``host``; empty where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _ANY_PORT))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    return not address or ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """The interface that has this IPv4 address, where the system (Linux) tells."""
    if sys.platform != "linux" or not address:
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
