"""Programs for every platform or, while `inference_on` is active, for the one that is known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax import lax

_known: ContextVar[str | None] = ContextVar("known platform", default=None)


@contextmanager
def inference_on(platform: str) -> Iterator[None]:
    """Trace what is inside of the context for one platform and for the forward pass alone.

    Conditionals on the platform and custom gradients are then left out of the traced program, because they hide their
    contents from a transformation that looks at it. Traces are not shared with the outside.

    Args:
      platform: 'cpu', 'cuda', 'rocm' or 'tpu'.
    """
    token = _known.set(platform)
    try:
        yield
    finally:
        _known.reset(token)


def known_platform() -> str | None:
    """Return the platform of the innermost `inference_on`, or None."""
    return _known.get()


def by_platform(*operands: Any, default: Callable[..., Any], **branches: Callable[..., Any]) -> Any:
    """Compute as `lax.platform_dependent` does, or at once by the branch of the platform where it is known."""
    platform = known_platform()
    if platform is None:
        return lax.platform_dependent(*operands, default=default, **branches) if branches else default(*operands)
    return branches.get(platform, default)(*operands)
