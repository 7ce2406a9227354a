"""What the processor at hand does with products of 8 bits."""

from __future__ import annotations

import platform
from pathlib import Path


def saturates() -> bool:
    """Return whether products of 8 bits saturate on this processor, as on x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: the safe answer
        return True
    return "avx512_vnni" not in flags and "avx_vnni" not in flags
