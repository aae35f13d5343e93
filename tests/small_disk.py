"""A disk that can really be full: a few megabytes of memory, mounted in a namespace of its own.

Needs root or unprivileged user namespaces, and util-linux (unshare, nsenter, mount). Programs that
are started ``within`` it see it; nobody else's mounts change, and it is gone with its holder.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

FILLER = "filler"
PAGE = 4096


class SmallDisk:
    """A disk of so many bytes at ``folder``, as the programs within see it. A context manager."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder, self.size_bytes = folder, size_bytes
        self.user = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]

    def __enter__(self) -> "SmallDisk":
        self.folder.mkdir(parents=True)
        outer = ["unshare", "--mount"] if not self.user else ["unshare", "-r", "--mount"]
        line = [*outer, sys.executable, __file__, str(self.folder), str(self.size_bytes)]
        self.holder = subprocess.Popen(line, stdout=subprocess.PIPE)
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != b"here\n":
            self.__exit__()
            raise OSError(f"no disk can be mounted at {self.folder}: be root, or allow namespaces")
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.kill()
        self.holder.wait()

    def within(self) -> list[str]:
        """What to put before a command line, so that it sees the disk."""
        return ["nsenter", *self.user, "-t", str(self.holder.pid), "--mount"]

    @property
    def seen(self) -> Path:
        """The disk as this process sees it."""
        return Path(f"/proc/{self.holder.pid}/root{self.folder}")

    def fill(self, *, left_bytes: int) -> None:
        """Leave only so much room."""
        room = os.statvfs(self.seen)
        free = room.f_bavail * room.f_frsize
        assert free > left_bytes, f"{free} bytes are free, less than {left_bytes}"
        with (self.seen / FILLER).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (free - left_bytes) // PAGE * PAGE)

    def make_room(self) -> None:
        """Undo :meth:`fill`."""
        (self.seen / FILLER).unlink()


def hold(folder: str, size_bytes: str) -> None:
    """Mount the disk, say so, and keep its namespace until the end."""
    options = f"size={size_bytes},mode=0777"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "eqm-small-disk", folder], check=True)
    sys.stdout.write("here\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    hold(*sys.argv[1:])
