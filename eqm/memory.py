"""What a process does with memory that torch has freed on a CPU: it keeps it for the next tensor.

glibc gives large pieces back to the system at once, and gets them again, page by page and full of
zeros, for the next activation of the same size. That was 5 to 10 % of a training step and a fifth
of a descent; to keep it costs a twelfth more memory at most (docs/LOG.md). Called by distributed
and flows.
"""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of mallopt(3): free memory at the end of the heap, and sizes of pieces, from which on either is
the system's."""
LARGEST, LARGEST_ONCE = 2**30, 2**25
"""Bytes of pieces that are kept; larger ones are few. Before 2.35, glibc refuses more than the
second, and would from then on give back all above 128 KiB."""


def keep_freed() -> None:
    """Have malloc keep what is freed, for this process; nothing where it is not glibc's."""
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        if not library.mallopt(M_MMAP_THRESHOLD, LARGEST):
            library.mallopt(M_MMAP_THRESHOLD, LARGEST_ONCE)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
