"""A trained network in int8 by qwix, Google's library for quantization: it stays a function of JAX.

    pip install -e ".[quantize]"
    python train.py --workdir RUN_DIR
    python examples/quantize_with_qwix.py RUN_DIR/deploy.safetensors

qwix runs the network as it is, and computes in integers wherever it calls a convolution or a matrix product of JAX. The
weights have a scale for each output channel. The activations have one for each image, which is found as the image
passes, so that nothing has to be calibrated.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import qwix
import tyro

from repvgg_jax import RepVGG
from repvgg_jax.data import load_dataset, normalize
from repvgg_jax.interop.safetensors import load_deploy
from repvgg_jax.quantize import equalize

Network = tuple[RepVGG, dict[str, Any]]


def quantize(model: RepVGG, variables: dict[str, Any], images: jax.Array) -> Network:
    """Return a deploy form with int8 weights and activations; of the images, only the shape matters."""
    rule = qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    # The lowerings of this package are not the convolution that qwix looks for.
    quantized = qwix.quantize_model(model.clone(ops="xla"), qwix.PtqProvider([rule]))
    template = jax.eval_shape(partial(quantized.init, train=False), jax.random.key(0), images)
    return quantized, {"params": qwix.quantize_params(variables["params"], template["params"])}


def decibels(logits: jax.Array, expected: jax.Array) -> float:
    """Signal to noise: how the logits vary from image to image, over their error."""
    signal, noise = expected - expected.mean(0, keepdims=True), logits - expected
    return float(10 * jnp.log10((signal**2).sum() / (noise**2).sum()))


def megabytes(variables: dict[str, Any]) -> float:
    """The size of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) / 1e6


def main(file: tyro.conf.Positional[Path], data_dir: str | None = None) -> None:
    """Quantize the deploy form of a run on the digits, as trained and equalized, and compare with float32.

    Args:
      file: The deploy.safetensors of the run.
      data_dir: Where the digits are, or are to be written.
    """
    model, variables, preprocess, _ = load_deploy(file)
    digits = load_dataset("digits", data_dir=data_dir).test
    pixels = jnp.asarray([digits[number]["image"] for number in range(len(digits))])
    images = normalize(pixels, preprocess.mean, preprocess.std)
    expected = jax.jit(partial(model.apply, train=False))(variables, images)

    for name, floats in (("as trained", variables), ("equalized", equalize(model, variables))):
        quantized, integers = quantize(model, floats, images)
        logits = jax.jit(partial(quantized.apply, train=False))(integers, images)
        same = int((logits.argmax(-1) == expected.argmax(-1)).sum())
        print(f"{name}: {decibels(logits, expected):.1f} dB, {same} of {len(images)} predictions unchanged")
    print(f"{megabytes(variables):.2f} MB became {megabytes(integers):.2f} MB")


if __name__ == "__main__":
    tyro.cli(main)
