"""What a deploy form needs before its numbers become integers of 8 bits, and those integers simulated."""

from repvgg_jax.quantize.correct_biases import bias_errors, correct_biases
from repvgg_jax.quantize.equalize import equalize
from repvgg_jax.quantize.fake_quantize import fake_quantize, fake_quantize_weights, simulate
from repvgg_jax.quantize.prepare import Prepared, prepare
from repvgg_jax.quantize.ranges import Range, activation_ranges, range_of, tensor_ranges, widen

__all__ = [
    "Prepared",
    "Range",
    "activation_ranges",
    "bias_errors",
    "correct_biases",
    "equalize",
    "fake_quantize",
    "fake_quantize_weights",
    "prepare",
    "range_of",
    "simulate",
    "tensor_ranges",
    "widen",
]
