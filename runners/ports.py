"""Ports for ranks to meet at."""

from __future__ import annotations

import itertools
import random
import socket

UNASSIGNED = range(12_000, 32_000)
"""Below those that Linux gives out for outgoing connections."""


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, and which the kernel gives to nobody who asks for any port."""
    ports = random.SystemRandom().sample(UNASSIGNED, len(UNASSIGNED))
    return list(itertools.islice(filter(_free, ports), count))


def _free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
