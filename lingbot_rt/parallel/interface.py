"""The choice of gloo's network interface between hosts.

By default gloo uses the address that the host's own name resolves to. On Debian that is 127.0.1.1, which no other host
can reach.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from datetime import timedelta

import torch.distributed as dist

from lingbot_rt.config_values import environment_value

VARIABLE = "GLOO_SOCKET_IFNAME"

_SIOCGIFADDR = 0x8915
_ANY_PORT = 9  # only to look up the route: nothing is sent


def choose_interface(store: dist.Store, rank: int, world: int, master: str, timeout: timedelta) -> None:
    """Sets ``GLOO_SOCKET_IFNAME`` to the interface that leads to the other hosts, unless it is set already.

    Every rank must call it. ``master`` is the store's address. Raises RuntimeError when a rank does not call it within
    ``timeout``.
    """
    own = address_towards(master)
    store.set(f"address/{rank}", own)
    keys = [f"address/{other}" for other in range(world)]
    store.wait(keys, timeout)
    if environment_value(VARIABLE) is not None:
        return
    if is_loopback(own):
        # The store is on this host. Take the way back to a rank of another host.
        outside = [text for key in keys if not is_loopback(text := store.get(key).decode())]
        own = address_towards(outside[0]) if outside else own
    name = interface_of(own)
    if name is not None:
        os.environ[VARIABLE] = name


def address_towards(host: str) -> str:
    """This host's IPv4 address on the route to ``host``; empty when there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, _ANY_PORT))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    return not address or ipaddress.ip_address(address).is_loopback


def interface_of(address: str) -> str | None:
    """The interface with this IPv4 address, or None. Linux only."""
    if sys.platform != "linux" or not address:
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
