"""What a deploy form needs before its numbers become integers of 8 bits, and those integers simulated."""

from repvgg_jax.quantize.bias_correction import bias_errors, correct_biases
from repvgg_jax.quantize.equalization import equalize
from repvgg_jax.quantize.preparation import Prepared, prepare
from repvgg_jax.quantize.processor import saturates
from repvgg_jax.quantize.ranges import Range, activation_ranges, range_of, tensor_ranges, widen
from repvgg_jax.quantize.simulation import fake_quantize, fake_quantize_weights, simulate

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
    "saturates",
    "simulate",
    "tensor_ranges",
    "widen",
]
