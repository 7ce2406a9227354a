"""The options that XLA compiles the networks with."""

import importlib.metadata
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

# XLA:CPU hands products, convolutions and sums to YNNPACK, piece by piece, and is faster with its own products and
# convolutions: up to 1.7 times for RepVGG-A0 at 224 pixels and batch 16 on two cores. YNNPACK's sums are faster, 1.1 to
# 1.3 times for a training step, but those of jaxlib 0.10.2 are wrong: https://github.com/jax-ml/jax/issues/39103.
_SUMS_WRONGLY = importlib.metadata.version("jaxlib") == "0.10.2"
_WANTED: dict[str, dict[str, Any]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "" if _SUMS_WRONGLY else "LIBRARY_FUSION_TYPE_REDUCE"},
}


def compiler_options(platform: str | None = None) -> dict[str, Any]:
    """Return XLA options for `jax.jit(..., compiler_options=…)` that make the programs of these networks faster.

    They say what XLA:CPU may hand to YNNPACK: sums, which are faster there, and nothing with jaxlib 0.10.2, which sums
    wrongly there. Options that the installed jaxlib does not know are left out. JAX takes options for the outermost
    `jax.jit` alone, so functions that run inside of others, such as those of `repvgg_jax.ops`, are given none.

    Args:
      platform: Platform of the devices, 'cpu', 'gpu' or 'tpu'. By default it is that of JAX's first local device.

    Returns:
      Options by name. There are none for most platforms.

    References:
      The wrong sums: https://github.com/jax-ml/jax/issues/39103.
    """
    platform = platform or jax.local_devices()[0].platform
    return {name: value for name, value in _WANTED.get(platform, {}).items() if _known(platform, name, value)}


@lru_cache
def _known(platform: str, name: str, value: Any) -> bool:
    with jax.default_device(jax.local_devices(backend=platform)[0]):
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(jnp.zeros(())).compile()
        except jax.errors.JaxRuntimeError:
            return False
    return True
