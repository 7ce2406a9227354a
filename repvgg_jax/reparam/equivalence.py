"""Are two forms the same function? How far apart, for how many predictions, and from where on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class EquivalenceError(ValueError):
    """Two forms are not the same function."""


class Agreement(NamedTuple):
    """How two batches of logits compare.

    Attributes:
      max_difference: the largest absolute difference of any logit.
      max_reference: the largest absolute logit of the reference.
      relative: `max_difference / max_reference`; NaN where either side holds a value that is not finite.
      predictions_changed: rows whose argmax differs.
      compared: rows in all.
      spread: how far apart the logits of one class lie, relative to the largest logit, in the form where they lie
        closer: what the inputs change at all. Of a single row, the same over its classes. NaN as `relative` is, and
        infinite for a single logit, which has nothing to differ from.
    """

    max_difference: float
    max_reference: float
    relative: float
    predictions_changed: int
    compared: int
    spread: float = math.inf

    def require(self, rtol: float) -> Agreement:
        """Return the agreement, or raise an EquivalenceError with its figures.

        It holds where the relative difference is at most `rtol` and no prediction changed. Nothing is proven, and that
        is an error as well, where a logit is not finite, or where a form answers each input the same: then the logits
        lie within `rtol` of each other, and any network with these constants would pass. One input is compared by its
        classes, and a single logit of one input as it is, since a test of one image or one class is small, not empty.
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
    """Compare two arrays of logits, in float64 on the host.

    Compute both under `jax.default_matmul_precision("float32")`: accelerators multiply in TF32 or bf16 otherwise,
    and the comparison would measure that.

    Args:
      reference: logits `(batch, classes)`.
      candidate: logits of the same shape.

    Returns:
      The agreement.

    Raises:
      ValueError: the shapes differ, or there is no row.
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
    """The largest range of a class over the rows; of a single row, over the classes; infinite for a single logit."""
    if logits.size == 1:
        return math.inf
    return float(np.ptp(logits, axis=0 if len(logits) > 1 else 1).max())


def assert_equivalent(reference: Any, candidate: Any, *, rtol: float) -> Agreement:
    """Raise unless two arrays of logits agree and predict the same classes.

    Args:
      reference: logits `(batch, classes)`.
      candidate: logits of the same shape.
      rtol: the largest difference allowed, relative to the largest reference logit. Rounding alone stays below
        1e-12 in float64 and 1e-5 in float32.

    Returns:
      The agreement, where it holds.

    Raises:
      EquivalenceError: where it does not, or where nothing is proven; see `Agreement.require`.
    """
    return agreement(reference, candidate).require(rtol)


def first_divergence(reference: Mapping[str, Any], candidate: Mapping[str, Any], *, rtol: float) -> str | None:
    """Name the first endpoint at which two forms part.

    Args:
      reference: arrays by name in the order of computation, as `model.apply(…, features=True)` returns them.
      candidate: the same of the other form; names missing from either side are passed over.
      rtol: the largest difference allowed at an endpoint, relative to its largest reference value.

    Returns:
      The name, or None where all endpoints agree.
    """
    for name in reference:
        if name in candidate:
            rows = [np.asarray(side[name]).reshape(len(side[name]), -1) for side in (reference, candidate)]
            if not agreement(*rows).relative <= rtol:
                return name
    return None
