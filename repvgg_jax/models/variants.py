"""The published networks, and the function that builds them."""

from __future__ import annotations

import difflib
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from repvgg_jax.models.blocks import SqueezeExcitePosition
from repvgg_jax.models.conv import Operations
from repvgg_jax.models.repvgg import BlockKind, RepVGG, require_strides


class Variant(NamedTuple):
    """The settings of a published network. The fields are those of `RepVGG`."""

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
"""The published networks by name, from 'repvgg_a0' to 'repvggplus_l2pse'."""


def canonical_name(name: str) -> str:
    """Return the key of `VARIANTS` that a name such as 'RepVGG-A0' or 'repvgg_a0' stands for.

    Raises:
      ValueError: If there is no such variant. The message suggests those with the nearest names.
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
    block: BlockKind = "repvgg",
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    frozen: str | None = None,
    ops: Operations = "auto",
    name: str | None = None,
) -> RepVGG:
    """Build a published RepVGG network, with other depths, widths, strides or dilations where they are given.

    Args:
      variant: The name of the network, a key of `VARIANTS`. Capitals and hyphens are taken too: 'RepVGG-A0'.
      num_classes: Number of classes, the width of the head.
      deploy: Whether to build the deploy form, for variables that `fuse` returned.
      strides: Strides of the stem and of stage 1 to 4, each 1 or 2. Small images want fewer 2s, e.g. `(1, 1, 2, 2, 2)`.
      output_stride: Side of the image over side of the output of stage 4. Give 8 or 16 to use the network as a backbone
        for segmentation; the default strides give 32. Later strides then turn into dilation, so that the weights of the
        undilated network still fit. None leaves the strides as they are.
      width_multiplier: Four factors on the channels 64, 128, 256, 512 of stage 1 to 4, in place of the variant's.
      depths: Four numbers of blocks in stage 1 to 4, in place of the variant's.
      block: The block of the training form: "repvgg", or "quantizable", the block of QARepVGG, whose deploy form keeps
        its accuracy in 8 bits. Networks with squeeze-excite or auxiliary heads have no such block.
      epsilon: The epsilon of the batch norms.
      momentum: Momentum of the running statistics: new = momentum · old + (1 − momentum) · batch.
      dtype: Dtype of the computation, e.g. `jnp.bfloat16`. None computes in the dtype of images and parameters.
      param_dtype: Dtype of the parameters. Statistics have it too, but are at least float32.
      remat: Whether to recompute the activations of each block in the backward pass, which takes less memory and more
        time.
      frozen: Last part that is not trained, with all before it: one of 'stem', 'stage1' … 'stage4'. None trains
        everything.
      ops: "auto" uses the fastest lowerings that are known, "xla" XLA's own convolutions and plain arithmetic.
        Forward-mode and second derivatives need "xla".
      name: Name of the network in the tree of variables, where it is a part of another module.

    Returns:
      The Flax module. `model.init(key, images, train=False)` makes its variables.

    Raises:
      ValueError: If the variant is unknown or a value is out of range. The message says which.

    References:
      RepVGG, table 2 and section 4.1, https://arxiv.org/abs/2101.03697; the official implementation,
      https://github.com/DingXiaoH/RepVGG, for D2se and RepVGGplus; Yu & Koltun, arXiv:1511.07122, for dilation;
      QARepVGG, arXiv:2212.01593.

    Example:
      >>> from repvgg_jax import create_model
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
        block=block,
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
    """Return strides and dilations of stem and stages that reach an output stride and go no further."""
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
