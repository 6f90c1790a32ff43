"""Ports for what is started on this machine and listens seconds later."""

from __future__ import annotations

import errno
import random
import socket


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now.

    Who asks for it listens seconds later, or listens on it again after a death, so it is none of those that outgoing
    connections (Linux: from 32768) or Ray's workers (10002 to 19999) are given meanwhile. Raises OSError where this
    host cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in random.sample(range(20_000, 32_768), 200):
        with socket.socket(family) as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port
    raise OSError(errno.EADDRINUSE, f"no port of {host} between 20000 and 32767 is free")
