"""What Orbax prints besides the errors that it raises."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType


def quieten_orbax() -> None:
    """Keep quiet what Orbax tells of a checkpoint besides the error that it raises, in hundreds of lines.

    They come from its logs, from coroutines it leaves behind and from threads of TensorStore, which go on when the
    command has ended. So this is for scripts, for the whole of the process, before they do anything.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
    sys.excepthook = _of_the_main_thread


def _of_the_main_thread(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, traceback)
