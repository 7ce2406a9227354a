"""Comparison of two forms of a network: how far apart they are, how many predictions differ, and where they part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class EquivalenceError(ValueError):
    """Two forms are not the same function, or their comparison proves nothing."""


class Agreement(NamedTuple):
    """The result of comparing two batches of logits.

    All figures but the two counts are NaN where either side holds a value that is not finite.

    Attributes:
      max_difference: Largest absolute difference between a logit and its reference.
      max_reference: Largest absolute logit of the reference.
      relative: `max_difference / max_reference`.
      predictions_changed: Number of rows whose argmax differs.
      compared: Number of rows.
      spread: How much the inputs change the logits: the largest range of one class over the rows, in the form where it
        is smaller, divided by `max_reference`. For a single row, the range is taken over its classes. It is infinite
        for a single logit, which has nothing to differ from.
    """

    max_difference: float
    max_reference: float
    relative: float
    predictions_changed: int
    compared: int
    spread: float = math.inf

    def require(self, rtol: float) -> Agreement:
        """Return the agreement where both forms are the same function, and raise an error otherwise.

        They are the same where the relative difference is at most `rtol` and no prediction changed. Where a logit is
        not finite, or where one form answers every input the same, nothing is proven, and that is an error too: in the
        second case any network with these constants would pass. A single row is compared by its classes, and a single
        logit as it is.

        Args:
          rtol: Largest difference allowed, relative to the largest logit of the reference. A `spread` of at most `rtol`
            counts as the same answer to every input.

        Returns:
          The agreement itself.

        Raises:
          EquivalenceError: If the forms differ, or nothing is proven. The message holds the figures.
        """
        if math.isnan(self.relative):
            raise EquivalenceError(
                "nothing is proven: a logit is NaN or infinite; look for values that are not finite in the weights, "
                "the batch statistics, mean, std and the images"
            )
        if self.spread <= rtol:
            raise EquivalenceError(
                f"nothing is proven: a form answers every input the same (its logits differ by {self.spread:.3g} of "
                f"the largest, expected more than {rtol:.3g}); compare on other images, or, where the network has "
                "collapsed, train it anew with a lower learning rate"
            )
        if not self.relative <= rtol or self.predictions_changed:
            raise EquivalenceError(
                f"the two forms are not the same function: largest logit difference {self.max_difference:.3g} "
                f"({self.relative:.3g} of the largest logit, allowed {rtol:.3g}), {self.predictions_changed} of "
                f"{self.compared} predictions changed (allowed 0). Was epsilon, the padding or the tree another one? "
                "`first_divergence` on the features of both forms tells where they part"
            )
        return self


def agreement(reference: Any, candidate: Any) -> Agreement:
    """Compare two arrays of logits in float64 on the host.

    Compute both arrays under `jax.default_matmul_precision("float32")`. Accelerators multiply in TF32 or bfloat16
    otherwise, and the comparison would measure that.

    Args:
      reference: Logits of the reference, `(batch, classes)`.
      candidate: Logits of the other form, of the same shape.

    Returns:
      The agreement.

    Raises:
      ValueError: If the shapes differ, are not `(batch, classes)`, or hold no logit.
    """
    expected, found = (np.asarray(x).astype(np.float64) for x in (reference, candidate))
    if expected.shape != found.shape or expected.ndim != 2 or not expected.size:
        raise ValueError(
            f"cannot compare logits of shapes {expected.shape} and {found.shape}: expected the same (batch, classes), "
            "with at least one row"
        )
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        difference = scale = relative = spread = float("nan")
    else:
        spread = min(_range(expected), _range(found))
        difference = float(np.abs(expected - found).max())
        scale = float(np.abs(expected).max())
        relative = 0.0 if difference == 0 else difference / scale if scale else float("inf")
        spread = spread / scale if scale else spread
    changed = int(np.sum(expected.argmax(-1) != found.argmax(-1)))
    return Agreement(difference, scale, relative, changed, len(expected), spread)


def _range(logits: np.ndarray) -> float:
    """Return the largest range of a class over the rows, of a single row over its classes; infinity for one logit."""
    if logits.size == 1:
        return math.inf
    return float(np.ptp(logits, axis=0 if len(logits) > 1 else 1).max())


def assert_equivalent(reference: Any, candidate: Any, *, rtol: float) -> Agreement:
    """Raise an error unless two arrays of logits agree and predict the same classes.

    Args:
      reference: Logits of the reference, `(batch, classes)`.
      candidate: Logits of the other form, of the same shape.
      rtol: Largest difference allowed, relative to the largest logit of the reference. Rounding alone stays below 1e-12
        in float64 and below 1e-5 in float32.

    Returns:
      The agreement.

    Raises:
      EquivalenceError: If the two do not agree, or nothing is proven; see `Agreement.require`.
      ValueError: If the arrays cannot be compared; see `agreement`.
    """
    return agreement(reference, candidate).require(rtol)


def first_divergence(reference: Mapping[str, Any], candidate: Mapping[str, Any], *, rtol: float) -> str | None:
    """Return the name of the first endpoint at which two forms differ.

    Args:
      reference: Arrays by name in the order of computation, as `model.apply(…, features=True)` returns them. The first
        axis of each is the batch.
      candidate: Arrays of the other form by name. Names that one side lacks are skipped.
      rtol: Largest difference allowed at an endpoint, relative to the largest absolute value of the reference there.

    Returns:
      The name, or None where all endpoints agree.

    Raises:
      ValueError: If two arrays of one name cannot be compared; see `agreement`.
    """
    for name in reference:
        if name in candidate:
            rows = [np.asarray(side[name]).reshape(len(side[name]), -1) for side in (reference, candidate)]
            if not agreement(*rows).relative <= rtol:
                return name
    return None
