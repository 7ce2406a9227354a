"""The network: stem, stage1…stage4, head."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.models.blocks import AuxiliaryHead, RepVGGBlock, SqueezeExcitePosition, layers, spatial_mean
from repvgg_jax.models.conv import Operations
from repvgg_jax.reparam.rules import AUXILIARY_HEADS

PARTS = ("stem", "stage1", "stage2", "stage3", "stage4")


class BlockSetting(NamedTuple):
    """What sets one block apart.

    Attributes:
      name: in the tree of variables.
      part: one of `PARTS`.
      last: whether its part ends with it.
      auxiliary: the auxiliary head that stands on it, by its name in the tree of variables, if there is one.
    """

    name: str
    part: str
    last: bool
    auxiliary: str | None
    features: int
    stride: int
    dilation: int
    groups: int


class RepVGG(nn.Module):
    """RepVGG in its training form, or with `deploy=True` the plain stack of 3×3 convolutions.

    `create_model` builds the published variants.

    Attributes:
      num_classes: width of the head.
      depths: blocks in stage1…stage4.
      width_multiplier: of the channels 64, 128, 256, 512 of stage1…stage4; the stem has min(64, stage1).
      strides: of the stem and of the first block of stage1…stage4.
      dilations: of the stem and of stage1…stage4; the first block of a stage still has that of the stage before.
      groups: of every second block, counted from the stem, which is not grouped.
      squeeze_excite: None, "before_relu" (RepVGG-D2se) or "after_relu" (RepVGGplus), in every block.
      squeeze_excite_reduction: channels over the width of the squeeze-excite bottleneck.
      auxiliary_heads: three classifiers on inner stages in training (RepVGGplus); never in the deploy form.
      deploy: which form.
      epsilon: of the batch norms.
      momentum: of the running statistics.
      dtype: of the computation, e.g. `jnp.bfloat16`; logits stay in at least float32.
      param_dtype: of parameters and statistics.
      remat: recompute each block's activations in the backward pass instead of storing them.
      frozen: the last of 'stem', 'stage1' … 'stage4' that is not trained: all up to it normalises by running
        statistics and gets no gradient. None trains everything. Auxiliary heads are always trained.
      ops: "auto" takes the lowerings of `repvgg_jax.ops` where they are faster (float32 on CPU), "xla" XLA's own
        convolutions and plain arithmetic everywhere. Variables are the same.

    References:
      Ding et al., CVPR 2021, https://arxiv.org/abs/2101.03697; https://github.com/DingXiaoH/RepVGG
    """

    num_classes: int
    depths: tuple[int, int, int, int]
    width_multiplier: tuple[float, float, float, float]
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    dilations: tuple[int, int, int, int, int] = (1, 1, 1, 1, 1)
    groups: int = 1
    squeeze_excite: SqueezeExcitePosition | None = None
    squeeze_excite_reduction: int = 16
    auxiliary_heads: bool = False
    deploy: bool = False
    epsilon: float = 1e-5
    momentum: float = 0.9
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: bool = False
    frozen: str | None = None
    ops: Operations = "auto"

    def __post_init__(self) -> None:
        for name in ("depths", "width_multiplier", "strides", "dilations"):
            setattr(self, name, tuple(getattr(self, name)))
        _require_settings(self)
        _require_shape(self)
        super().__post_init__()

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """Output channels of the stem and of stage1…stage4."""
        stages = [int(base * factor) for base, factor in zip((64, 128, 256, 512), self.width_multiplier, strict=True)]
        return (min(64, stages[0]), *stages)  # type: ignore[return-value]

    @property
    def blocks(self) -> tuple[BlockSetting, ...]:
        """The blocks, in the order of computation."""
        ends = (f"stage1_block{self.depths[0]}", f"stage2_block{self.depths[1]}", f"stage3_block{self.depths[2] // 2}")
        heads = dict(zip(ends, AUXILIARY_HEADS, strict=True)) if self.auxiliary_heads else {}
        settings: list[BlockSetting] = []
        for place, (part, depth) in enumerate(zip(PARTS, (1, *self.depths), strict=True)):
            for number in range(1, depth + 1):
                name = part if part == "stem" else f"{part}_block{number}"
                settings.append(
                    BlockSetting(
                        name=name,
                        part=part,
                        last=number == depth,
                        auxiliary=heads.get(name),
                        features=self.widths[place],
                        stride=self.strides[place] if number == 1 else 1,
                        dilation=self.dilations[max(place - 1, 0) if number == 1 else place],
                        groups=self.groups if settings and len(settings) % 2 == 0 else 1,
                    )
                )
        return tuple(settings)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, features: bool = False) -> Any:
        """Run the network.

        Args:
          images: `(batch, height, width, channels)`, floating point, normalised; any height and width ≥ 1.
          train: normalise by the batch's statistics and update the running ones (collection `batch_stats` must be
            mutable). In the deploy form it makes no difference.
          features: return the endpoints instead of the logits.

        Returns:
          Logits `(batch, num_classes)`; with auxiliary heads and `train=True`, `(logits, {'stage1_aux': …,
          'stage2_aux': …, 'stage3_first_aux': …})`. With `features=True` a dict in the order of computation:
          'stem', 'stage1'…'stage4' `(batch, height, width, channels)`, the auxiliary logits where they exist,
          'pooled' `(batch, channels)`, 'logits'.
        """
        _require_images(images)
        made_of = layers(
            epsilon=self.epsilon,
            momentum=self.momentum,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            ops=self.ops,
        )
        run = nn.remat(_run, static_argnums=2) if self.remat else _run
        still = frozen_parts(self.frozen)
        x, ends = images, {}
        for block in self.blocks:
            module = RepVGGBlock(
                block.features,
                block.stride,
                block.dilation,
                block.groups,
                self.squeeze_excite,
                self.squeeze_excite_reduction,
                self.deploy,
                **made_of,
                name=block.name,
            )
            x = run(module, x, train and block.part not in still)
            if block.part in still:
                x = jax.lax.stop_gradient(x)
            if block.last:
                ends[block.part] = x
            if block.auxiliary and not self.deploy:
                head = AuxiliaryHead(self.num_classes, **made_of, name=block.auxiliary)
                ends[block.auxiliary] = head(x, train=train)
        ends["pooled"] = spatial_mean(x)
        ends["logits"] = made_of["dense"](self.num_classes, dtype=None, name="head")(ends["pooled"])

        if features:
            return ends
        if self.auxiliary_heads and train and not self.deploy:
            return ends["logits"], {name: ends[name] for name in AUXILIARY_HEADS}
        return ends["logits"]


def frozen_parts(frozen: str | None) -> tuple[str, ...]:
    """The parts that are not trained, where `frozen` is the last of them."""
    return PARTS[: PARTS.index(frozen) + 1] if frozen else ()


def _require_settings(model: RepVGG) -> None:
    """See that each field but those of `_require_shape` is in its range."""
    for name, least in (("num_classes", 1), ("groups", 1), ("squeeze_excite_reduction", 1), ("epsilon", 0)):
        value = getattr(model, name)
        _require(value >= least, f"{name} is {value}", f"at least {least}")
    _require(0 <= model.momentum <= 1, f"momentum is {model.momentum}", "in [0, 1]")
    positions, operations = get_args(SqueezeExcitePosition), get_args(Operations)
    _require(model.ops in operations, f"ops is {model.ops!r}", f"one of {', '.join(operations)}")
    for name, choices in (("squeeze_excite", positions), ("frozen", PARTS)):
        value = getattr(model, name)
        _require(value in (None, *choices), f"{name} is {value!r}", f"None or one of {', '.join(choices)}")


def _require_shape(model: RepVGG) -> None:
    """See that stem and stages have blocks, strides, dilations and channels that go together."""
    depths, factors, dilations = model.depths, model.width_multiplier, model.dilations
    require_strides(model.strides)
    _require(
        len(dilations) == 5 and min(dilations) >= 1,
        f"dilations are {dilations}",
        "five, each at least 1, for the stem and stage1…stage4",
    )
    _require(len(depths) == 4 and min(depths) >= 1, f"depths are {depths}", "four, each at least 1, for stage1…stage4")
    _require(
        not model.auxiliary_heads or depths[2] >= 2,
        f"depths are {depths}",
        "at least 2 blocks in stage 3, since an auxiliary head sits at its half",
    )
    _require(
        len(factors) == 4 and all(0 < factor < math.inf for factor in factors),
        f"width_multiplier is {factors}",
        "four positive factors for stage1…stage4",
    )
    smallest = model.groups * (model.squeeze_excite_reduction if model.squeeze_excite else 1)
    _require(
        all(width >= smallest and width % model.groups == 0 for width in model.widths),
        f"width_multiplier is {factors}, which gives {model.widths} channels",
        f"multiples of {model.groups} (groups), at least {smallest}",
    )


def require_strides(strides: tuple[int, ...]) -> None:
    """See that strides are five, each 1 or 2.

    Raises:
      ValueError: they are not.
    """
    _require(
        len(strides) == 5 and set(strides) <= {1, 2},
        f"strides are {strides}",
        "five, each 1 or 2, for the stem and stage1…stage4",
    )


def _require_images(images: jax.Array) -> None:
    _require(
        images.ndim == 4 and jnp.issubdtype(images.dtype, jnp.floating),
        f"images are {images.dtype}{images.shape}",
        "floating point (batch, height, width, channels); normalise uint8 images first, (images / 255 - mean) / std",
    )
    _require(
        images.shape[1] not in (1, 3, 4) or min(images.shape[2:]) <= 4,
        f"images are {images.shape}",
        "(batch, height, width, channels), but the channels seem to come first; images.transpose(0, 2, 3, 1) puts them "
        "last",
    )


def _require(holds: bool, found: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{found}: expected {expected}")


def _run(block: RepVGGBlock, x: jax.Array, train: bool) -> jax.Array:
    return block(x, train=train)
