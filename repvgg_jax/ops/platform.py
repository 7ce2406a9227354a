"""One program for every platform, or, while `inference_on` is active, for the one that is known."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jax import lax

_known: ContextVar[str | None] = ContextVar("known platform", default=None)


@contextmanager
def inference_on(platform: str) -> Iterator[None]:
    """What is traced inside is for one platform and the forward pass only.

    Conditionals on the platform and custom gradients, which hide their contents from a transformation that looks at
    the traced program, are left out of it. Traces are not shared with the outside.

    Args:
        platform: 'cpu', 'cuda', 'rocm' or 'tpu'.
    """
    token = _known.set(platform)
    try:
        yield
    finally:
        _known.reset(token)


def known_platform() -> str | None:
    """The platform of the innermost `inference_on`, or None."""
    return _known.get()


def by_platform(*operands: Any, default: Callable[..., Any], **branches: Callable[..., Any]) -> Any:
    """`lax.platform_dependent`, decided at once where the platform is known."""
    platform = known_platform()
    if platform is None:
        return lax.platform_dependent(*operands, default=default, **branches) if branches else default(*operands)
    return branches.get(platform, default)(*operands)
