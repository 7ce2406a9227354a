"""The RepVGG network: stem, stage 1 to 4, head."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.models.blocks import AuxiliaryHead, RepVGGBlock, SqueezeExcitePosition, layers, spatial_mean
from repvgg_jax.models.conv import Operations
from repvgg_jax.models.quantizable import QuantizableBlock
from repvgg_jax.reparam.networks import AUXILIARY_HEADS

PARTS = ("stem", "stage1", "stage2", "stage3", "stage4")
"""The names of the parts of a network before its head, in the order of computation."""

BlockKind = Literal["repvgg", "quantizable"]
"""The kinds of block that a network can be made of."""
_BLOCKS: dict[BlockKind, type[RepVGGBlock]] = {"repvgg": RepVGGBlock, "quantizable": QuantizableBlock}


class BlockSetting(NamedTuple):
    """The settings of one block of a network.

    Attributes:
      name: Name of the block in the tree of variables.
      part: Part of the network that the block belongs to, one of `PARTS`.
      last: Whether the block is the last of its part.
      auxiliary: Name of the auxiliary head on the block in the tree of variables, or None where the block has none.
      features: Number of output channels.
      stride: Stride of the block.
      dilation: Dilation of the 3×3 convolution.
      groups: Groups of the convolutions.
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
    """A RepVGG network in its training form or, with `deploy=True`, in its deploy form.

    The training form has three branches in a block. The deploy form is a plain stack of 3×3 convolutions.
    `create_model` builds the published networks.

    Attributes:
      num_classes: Number of classes, the width of the head.
      depths: Numbers of blocks in stage 1 to 4.
      width_multiplier: Factors on the channels 64, 128, 256, 512 of stage 1 to 4. The stem has as many channels as
        stage 1, but at most 64.
      strides: Strides of the stem and of the first block of stage 1 to 4, each 1 or 2.
      dilations: Dilations of the stem and of stage 1 to 4. The first block of a stage still has the dilation of the
        stage before.
      groups: Groups of the convolutions of every second block: of those with an even number, where the stem has the
        number 0 and is not grouped.
      squeeze_excite: Place of the squeeze-excite unit in every block, "before_relu" (RepVGG-D2se) or "after_relu"
        (RepVGGplus), or None for no unit.
      squeeze_excite_reduction: Channels of a block over the width of the bottleneck of its squeeze-excite unit.
      auxiliary_heads: Whether the training form has three classifiers on inner stages (RepVGGplus). The deploy form
        never has them.
      block: The block of the training form: "repvgg", or "quantizable", the block of QARepVGG, whose deploy form keeps
        its accuracy in 8 bits. The deploy form is the same.
      deploy: Whether the network is in its deploy form.
      epsilon: The epsilon of the batch norms.
      momentum: Momentum of the running statistics: new = momentum · old + (1 − momentum) · batch.
      dtype: Dtype of the computation, e.g. `jnp.bfloat16`. None computes in the dtype of images and parameters. Logits
        are always at least float32.
      param_dtype: Dtype of the parameters. Statistics have it too, but are at least float32.
      remat: Whether to recompute the activations of each block in the backward pass instead of storing them.
      frozen: Last part that is not trained, one of 'stem', 'stage1' … 'stage4'. All parts up to it normalise by their
        running statistics and get no gradient. None trains everything. Auxiliary heads are always trained.
      ops: "auto" uses the lowerings of `repvgg_jax.ops` where they are faster. "xla" uses XLA's own convolutions and
        plain arithmetic everywhere. The variables are the same.

    References:
      Ding et al., *RepVGG: Making VGG-style ConvNets Great Again*, CVPR 2021, https://arxiv.org/abs/2101.03697; the
      official implementation, https://github.com/DingXiaoH/RepVGG
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
    block: BlockKind = "repvgg"
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
        """Output channels of the stem and of stage 1 to 4."""
        stages = [int(base * factor) for base, factor in zip((64, 128, 256, 512), self.width_multiplier, strict=True)]
        return (min(64, stages[0]), *stages)  # type: ignore[return-value]

    @property
    def blocks(self) -> tuple[BlockSetting, ...]:
        """The settings of the blocks, in the order of computation."""
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
        """Compute the logits of a batch of images or, with `features=True`, the outputs of all parts.

        Args:
          images: `(batch, height, width, channels)`, floating point, normalised. Height and width may be any number
            from 1.
          train: Whether to normalise by the statistics of the batch and to update the running ones; the collection
            `batch_stats` must then be mutable. It makes no difference in the deploy form.
          features: Whether to return the outputs of all parts instead of the logits.

        Returns:
          Logits `(batch, num_classes)`. In the training form with auxiliary heads and `train=True`, the pair
          `(logits, {'stage1_aux': …, 'stage2_aux': …, 'stage3_first_aux': …})`. With `features=True`, a dict in the
          order of computation: 'stem', 'stage1' … 'stage4' `(batch, height, width, channels)`, 'pooled'
          `(batch, channels)`, 'logits', and the logits of the auxiliary heads where they exist.

        Raises:
          ValueError: If the images are not floating point, not of rank 4, or seem to have their channels first.
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
            module = _BLOCKS[self.block](
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
    """Return the parts that are not trained, where `frozen` is the last of them."""
    return PARTS[: PARTS.index(frozen) + 1] if frozen else ()


def _require_settings(model: RepVGG) -> None:
    """Raise a ValueError unless each field but those of `_require_shape` is in its range."""
    for name, least in (("num_classes", 1), ("groups", 1), ("squeeze_excite_reduction", 1), ("epsilon", 0)):
        value = getattr(model, name)
        _require(value >= least, f"{name} is {value}", f"at least {least}")
    _require(0 <= model.momentum <= 1, f"momentum is {model.momentum}", "in [0, 1]")
    positions = get_args(SqueezeExcitePosition)
    for name, choices in (("ops", get_args(Operations)), ("block", get_args(BlockKind))):
        value = getattr(model, name)
        _require(value in choices, f"{name} is {value!r}", f"one of {', '.join(choices)}")
    _require(
        model.block == "repvgg" or (model.squeeze_excite is None and not model.auxiliary_heads),
        f"block is {model.block!r}",
        "'repvgg' in a network with squeeze-excite units (RepVGG-D2se) or auxiliary heads (RepVGGplus)",
    )
    for name, choices in (("squeeze_excite", positions), ("frozen", PARTS)):
        value = getattr(model, name)
        _require(value in (None, *choices), f"{name} is {value!r}", f"None or one of {', '.join(choices)}")


def _require_shape(model: RepVGG) -> None:
    """Raise a ValueError unless blocks, strides, dilations and channels of stem and stages go together."""
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
    """Raise a ValueError unless strides are five numbers, each 1 or 2."""
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
