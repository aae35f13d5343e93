"""Ports for servers that a test starts itself."""

import contextlib
import random
import socket


def unused_port() -> int:
    """One that nothing holds, and that Linux gives to nobody who connects to something."""
    while True:
        port = random.randrange(20_000, 32_768)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port
