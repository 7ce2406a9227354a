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
    """Replace this process, under the same id, by the same command with `GLIBC_TUNABLES` set to `HUGE_PAGES`.

    Scripts call it before they do anything. It does nothing where the variable is set already, even to nothing, and on
    other systems than Linux, which have no glibc to read it.
    """
    if sys.platform == "linux" and sys.executable and "GLIBC_TUNABLES" not in os.environ:
        environment = {**os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def are_on() -> bool:
    """Return whether this process was started with `HUGE_PAGES`."""
    return sys.platform == "linux" and os.environ.get("GLIBC_TUNABLES") == HUGE_PAGES
