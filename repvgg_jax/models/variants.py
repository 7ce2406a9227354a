"""The published networks and the function that builds them."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from repvgg_jax.models.blocks import SqueezeExcitePosition
from repvgg_jax.models.conv import Operations
from repvgg_jax.models.repvgg import RepVGG, require_strides


class Variant(NamedTuple):
    """What sets a published network apart; the fields are those of `RepVGG`."""

    depths: tuple[int, int, int, int]
    width_multiplier: tuple[float, float, float, float]
    groups: int = 1
    squeeze_excite: SqueezeExcitePosition | None = None
    squeeze_excite_reduction: int = 16
    auxiliary_heads: bool = False


_A, _B, _D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)

# RepVGG, table 2 and section 4.1; D2se and RepVGGplus-L2pse from github.com/DingXiaoH/RepVGG.
VARIANTS: dict[str, Variant] = {
    "repvgg_a0": Variant(_A, (0.75, 0.75, 0.75, 2.5)),
    "repvgg_a1": Variant(_A, (1, 1, 1, 2.5)),
    "repvgg_a2": Variant(_A, (1.5, 1.5, 1.5, 2.75)),
    "repvgg_b0": Variant(_B, (1, 1, 1, 2.5)),
    "repvgg_b1": Variant(_B, (2, 2, 2, 4)),
    "repvgg_b1g2": Variant(_B, (2, 2, 2, 4), groups=2),
    "repvgg_b1g4": Variant(_B, (2, 2, 2, 4), groups=4),
    "repvgg_b2": Variant(_B, (2.5, 2.5, 2.5, 5)),
    "repvgg_b2g2": Variant(_B, (2.5, 2.5, 2.5, 5), groups=2),
    "repvgg_b2g4": Variant(_B, (2.5, 2.5, 2.5, 5), groups=4),
    "repvgg_b3": Variant(_B, (3, 3, 3, 5)),
    "repvgg_b3g2": Variant(_B, (3, 3, 3, 5), groups=2),
    "repvgg_b3g4": Variant(_B, (3, 3, 3, 5), groups=4),
    "repvgg_d2se": Variant(_D, (2.5, 2.5, 2.5, 5), squeeze_excite="before_relu", squeeze_excite_reduction=16),
    "repvggplus_l2pse": Variant(
        _D, (2.5, 2.5, 2.5, 5), squeeze_excite="after_relu", squeeze_excite_reduction=4, auxiliary_heads=True
    ),
}


def canonical_name(name: str) -> str:
    """Map 'RepVGG-A0', 'repvgg_a0' and the like to a key of `VARIANTS`.

    Raises:
      ValueError: there is no such variant; the message suggests the nearest.
    """
    key = name.lower().replace("-", "_")
    if key not in VARIANTS:
        near = difflib.get_close_matches(key, VARIANTS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown variant {name!r}: {hint}expected one of {', '.join(VARIANTS)}")
    return key


def create_model(
    variant: str,
    *,
    num_classes: int = 1000,
    deploy: bool = False,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
    output_stride: int | None = None,
    width_multiplier: Sequence[float] | None = None,
    depths: Sequence[int] | None = None,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    frozen: str | None = None,
    ops: Operations = "auto",
    name: str | None = None,
) -> RepVGG:
    """Build a published RepVGG, or one cut to measure.

    Args:
      variant: 'repvgg_a0' … 'repvgg_b3g4', 'repvgg_d2se', 'repvggplus_l2pse'; 'RepVGG-A0' works too.
      num_classes: width of the head.
      deploy: build the deploy form, for variables that `fuse` returned.
      strides: of the stem and of stage1…stage4, each 1 or 2. Small images want fewer 2s, e.g. (1, 1, 2, 2, 2).
      output_stride: as a backbone, of the pixels of an image to one of stage4 along a side: 8 or 16 for segmentation,
        where `strides` give 32. Later strides turn into dilation (Yu & Koltun, arXiv:1511.07122), so that weights
        stay those of the undilated network. None leaves the strides alone.
      width_multiplier: four factors in place of the variant's.
      depths: four stage depths in place of the variant's.
      epsilon: of the batch norms.
      momentum: of the running statistics.
      dtype: of the computation, e.g. `jnp.bfloat16`.
      param_dtype: of parameters and statistics.
      remat: trade time for memory in the backward pass.
      frozen: the last of 'stem', 'stage1' … 'stage4' that is not trained, with all before it; None trains everything.
      ops: "auto" for the fastest lowerings known, "xla" for XLA's own everywhere; forward-mode and second
        derivatives need "xla".
      name: in the tree of variables, where the network is a part of another module.

    Returns:
      The Flax module. `model.init(key, images, train=False)` makes its variables.

    Raises:
      ValueError: an unknown variant, or a value out of range; the message says which.

    Example:
      >>> create_model("RepVGG-A0", num_classes=10).widths
      (48, 48, 96, 192, 1280)
    """
    fields = VARIANTS[canonical_name(variant)]._asdict()
    if width_multiplier is not None:
        fields["width_multiplier"] = width_multiplier
    if depths is not None:
        fields["depths"] = depths
    dilations: Sequence[int] = (1, 1, 1, 1, 1)
    if output_stride is not None:
        strides, dilations = _dilate(tuple(strides), output_stride)
    model = RepVGG(
        num_classes=num_classes,
        strides=strides,  # type: ignore[arg-type]
        dilations=dilations,  # type: ignore[arg-type]
        deploy=deploy,
        epsilon=epsilon,
        momentum=momentum,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        frozen=frozen,
        ops=ops,
        name=name,
        **fields,
    )
    for stage, (before, after) in enumerate(itertools.pairwise(model.widths), start=1):
        if model.dilations[stage] > model.dilations[stage - 1] and before == after:
            raise ValueError(
                f"output_stride is {output_stride}: expected a larger one, since stage{stage} would lose its stride "
                f"and, its {after} channels being those of its input, gain an identity branch, which no weights are for"
            )
    return model


def _dilate(strides: tuple[int, ...], output_stride: int) -> tuple[list[int], list[int]]:
    """Strides and dilations of stem and stages that reach an output stride and go no further."""
    require_strides(strides)
    reached = list(itertools.accumulate(strides, operator.mul))
    if output_stride not in reached:
        raise ValueError(
            f"output_stride is {output_stride}: expected one of {sorted(set(reached))}, which strides {strides} "
            "pass through"
        )
    kept = [total <= output_stride for total in reached]
    return (
        [stride if keep else 1 for stride, keep in zip(strides, kept, strict=True)],
        [max(1, total // output_stride) for total in reached],
    )
