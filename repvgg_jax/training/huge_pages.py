"""Huge pages for large arrays: a setting of glibc's allocator, which reads it before a process does anything else."""

from __future__ import annotations

import os
import sys

# Large arrays lie in huge pages and stay mapped when freed. By default glibc returns them to the system, which clears
# and maps them again, 4 KiB at a time, in every training step.
HUGE_PAGES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={2**30}",
        f"glibc.malloc.trim_threshold={2**34}",
        f"glibc.malloc.top_pad={2**26}",
    )
)


def restart_with_huge_pages() -> None:
    """Start this process anew with huge pages, on Linux; a variable `GLIBC_TUNABLES`, even an empty one, is left alone.

    Only the first call of a process returns to its caller in another process image, of the same id; scripts call it
    first of all.
    """
    if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
        environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
