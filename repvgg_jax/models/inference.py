"""Compilation of a network for inference: what depends on the weights alone is computed once, ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.experimental.layout import Format, Layout

from repvgg_jax.models.partial_evaluation import split
from repvgg_jax.ops import compiler_options, inference_on

# One CUDA graph in place of a launch per kernel. XLA leaves convolutions out of its graphs unless asked; a chain of
# kernels runs fastest as a chain (0.19 ms in place of 0.26 for RepVGG-A0 at batch 1 on an H100).
_CUDA_OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONVOLUTION",
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
}


def compile_inference(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: jax.ShapeDtypeStruct | jax.Array,
    *,
    device: jax.Device | None = None,
) -> Callable[[jax.Array], jax.Array]:
    """Compile `model.apply(variables, images, train=False)` for one shape of images, with the weights inside.

    Casts, transforms and transpositions of kernels are computed here, once, and not in every call. On CUDA the whole
    network is one graph launch. The result is that of `model.apply` up to rounding.

    Args:
      model: The network, usually in its deploy form. Its `dtype` is the dtype of the computation.
      variables: The variables of the model. Later changes to them have no effect.
      images: `(batch, height, width, channels)`, floating point. Only shape and dtype matter. Images of the compute
        dtype spare a cast.
      device: The device to run on. By default it is the first local device of JAX.

    Returns:
      A function from images of that shape and dtype to logits. It has been compiled already and does not trace, so it
      cannot be used inside another transformation.

    Raises:
      TypeError: If the returned function is called with images of another shape or dtype.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from repvgg_jax import compile_inference, create_model
      >>> model = create_model("repvgg_a0", num_classes=10, depths=(1, 1, 1, 1), deploy=True)
      >>> images = jnp.ones((1, 32, 32, 3))
      >>> forward = compile_inference(model, model.init(jax.random.key(0), images, train=False), images)
      >>> forward(images).shape
      (1, 10)
    """
    device = device or jax.local_devices()[0]
    platform = device.platform
    if platform == "gpu":  # JAX calls NVIDIA's and AMD's alike
        platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    leaves, structure = jax.tree.flatten(variables)

    def forward(leaves: list[jax.Array], images: jax.Array) -> jax.Array:
        return model.apply(jax.tree.unflatten(structure, leaves), images, train=False)  # type: ignore[return-value]

    shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
    with inference_on(platform):
        traced = jax.make_jaxpr(forward)(leaves, shape)
    prepare, run = split(traced)
    sharding = jax.sharding.SingleDeviceSharding(device)
    options = compiler_options(device.platform)
    prepared = jax.jit(prepare, out_shardings=sharding, compiler_options=options)(*jax.device_put(leaves, sharding))
    abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in prepared]
    weights_format = Format(Layout.AUTO, sharding) if platform == "cuda" else sharding
    compiled = (
        jax.jit(
            run,
            in_shardings=([weights_format] * len(prepared), sharding),
            out_shardings=sharding,
            compiler_options=_CUDA_OPTIONS if platform == "cuda" else options,
        )
        .lower(abstract, shape)
        .compile()
    )
    if platform == "cuda":
        prepared = jax.device_put(prepared, compiled.input_formats[0][0])

    def call(images: jax.Array) -> jax.Array:
        return compiled(prepared, images)

    return call
