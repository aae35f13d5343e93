"""Two machines on one: network namespaces that a pair of virtual interfaces joins.

Needs root or unprivileged user namespaces, and util-linux (unshare, nsenter). Interfaces are made
by netlink from here, so that ``ip`` need not be there: ``python machines.py VERB ...`` does it
inside a namespace.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

NAME = "eqm0"
"""Of the interface, in both."""
ADDRESSES = ("10.211.7.1", "10.211.7.2")
REQUEST, ACK, CREATE = 1, 4, 0x400 | 0x200
NEW_LINK, NEW_ADDRESS = 16, 20
IFF_UP = 1


class Machines:
    """Two namespaces with one link between them."""

    def __init__(self) -> None:
        self.user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]
        self.holders: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Machines":
        try:
            outer = ["unshare", "--net"] if not self.user else ["unshare", "-r", "--net"]
            self._hold(outer)
            inner = ["nsenter", *self.user, "-t", str(self.holders[0].pid)] if self.user else []
            self._hold([*inner, "unshare", "--net"])
            self.inside(0, "pair", str(self.holders[1].pid))
            for number, address in enumerate(ADDRESSES):
                self.inside(number, "address", NAME, address)
                self.inside(number, "up", "lo")
            self.join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _hold(self, line: list[str]) -> None:
        """Start a process that keeps a namespace; it says when it is in it."""
        child = subprocess.Popen(
            [*line, sys.executable, __file__, "hold"], stdout=subprocess.PIPE, stderr=sys.stderr
        )
        self.holders.append(child)
        assert child.stdout is not None
        if child.stdout.readline() != b"here\n":
            raise OSError(
                f"no network namespace can be made here ({' '.join(line[:3])} failed): be root, or "
                "allow namespaces of users (sysctl user.max_user_namespaces)"
            )

    def __exit__(self, *_: object) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()

    def within(self, number: int) -> list[str]:
        """What to put before a command line, so that it runs on a machine."""
        return ["nsenter", *self.user, "-t", str(self.holders[number].pid), "--net"]

    def inside(self, number: int, *words: str) -> None:
        """Run a verb of this module on a machine."""
        subprocess.run([*self.within(number), sys.executable, __file__, *words], check=True)

    def cut(self) -> None:
        """Take the link down: packets vanish, nothing is told."""
        self.inside(0, "down", NAME)

    def join(self) -> None:
        """Take the link up on both sides."""
        for number in range(2):
            self.inside(number, "up", NAME)


# -- netlink ------------------------------------------------------------------------------------


def attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def link(index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return struct.pack("=BxHiII", 0, 0, index, flags, change)


def ask(kind: int, body: bytes, flags: int = 0) -> None:
    """Send a request to the kernel, and raise OSError for what it refuses."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        size = 16 + len(body)
        kernel.send(struct.pack("=IHHII", size, kind, REQUEST | ACK | flags, 1, 0) + body)
        (error,) = struct.unpack_from("=i", kernel.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error))


def pair(pid: str) -> None:
    """A virtual cable from here into the namespace of a process."""
    name = attribute(3, NAME.encode() + b"\0")
    peer = attribute(1, link() + name + attribute(19, struct.pack("=I", int(pid))))
    info = attribute(1, b"veth") + attribute(2, peer)
    ask(NEW_LINK, link() + name + attribute(18, info), CREATE)


def address(name: str, text: str) -> None:
    body = struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, socket.if_nametoindex(name))
    bits = socket.inet_aton(text)
    ask(NEW_ADDRESS, body + attribute(2, bits) + attribute(1, bits), CREATE)


def up(name: str) -> None:
    ask(NEW_LINK, link(socket.if_nametoindex(name), IFF_UP, IFF_UP))


def down(name: str) -> None:
    ask(NEW_LINK, link(socket.if_nametoindex(name), 0, IFF_UP))


def hold() -> None:
    sys.stdout.write("here\n")
    sys.stdout.flush()
    signal.pause()


# -- processes ----------------------------------------------------------------------------------


def with_mark(mark: str) -> list[int]:
    """Processes that have a text in their environment."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def gone(mark: str, seconds: float) -> bool:
    """Whether all processes with a mark end by themselves within a time."""
    until = time.monotonic() + seconds
    while with_mark(mark) and time.monotonic() < until:
        time.sleep(0.1)
    return not with_mark(mark)


if __name__ == "__main__":
    VERBS = {"hold": hold, "pair": pair, "address": address, "up": up, "down": down}
    VERBS[sys.argv[1]](*sys.argv[2:])
