"""The network: stem, stage1…stage4, head."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from repvgg_jax.models.blocks import AuxiliaryHead, RepVGGBlock, SqueezeExcitePosition, layers, spatial_mean
from repvgg_jax.models.conv import Operations

PARTS = ("stem", "stage1", "stage2", "stage3", "stage4")


class BlockSetting(NamedTuple):
    """What sets one block apart: its name in the tree of variables, output channels, stride, dilation, groups."""

    name: str
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

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """Output channels of the stem and of stage1…stage4."""
        stages = [int(base * factor) for base, factor in zip((64, 128, 256, 512), self.width_multiplier, strict=True)]
        return (min(64, stages[0]), *stages)  # type: ignore[return-value]

    @property
    def blocks(self) -> tuple[BlockSetting, ...]:
        """The blocks, in the order of computation."""
        settings = [BlockSetting("stem", self.widths[0], self.strides[0], self.dilations[0], 1)]
        for stage, depth in enumerate(self.depths, start=1):
            for number in range(1, depth + 1):
                settings.append(
                    BlockSetting(
                        name=f"stage{stage}_block{number}",
                        features=self.widths[stage],
                        stride=self.strides[stage] if number == 1 else 1,
                        dilation=self.dilations[stage - 1 if number == 1 else stage],
                        groups=self.groups if len(settings) % 2 == 0 else 1,
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
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images are {images.dtype}{images.shape}: expected floating point (batch, height, width, channels); "
                "normalise uint8 images first, (images / 255 - mean) / std"
            )
        if images.shape[1] in (1, 3, 4) and min(images.shape[2:]) > 4:
            raise ValueError(
                f"images are {images.shape}: expected (batch, height, width, channels), but the channels seem to come "
                "first; images.transpose(0, 2, 3, 1) puts them last"
            )
        made_of = layers(
            epsilon=self.epsilon,
            momentum=self.momentum,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            ops=self.ops,
        )
        block = partial(
            RepVGGBlock,
            deploy=self.deploy,
            squeeze_excite=self.squeeze_excite,
            squeeze_excite_reduction=self.squeeze_excite_reduction,
            **made_of,
        )
        use_auxiliary = self.auxiliary_heads and not self.deploy

        frozen = self.frozen is not None

        def run(module: RepVGGBlock, x: jax.Array) -> jax.Array:
            return module(x, train=train and not frozen)

        def end(name: str, x: jax.Array) -> jax.Array:
            nonlocal frozen
            ends[name] = x
            if name != self.frozen:
                return x
            frozen = False
            return jax.lax.stop_gradient(x)

        def auxiliary(name: str, x: jax.Array) -> None:
            head = AuxiliaryHead(self.num_classes, **made_of, name=name)
            ends[name] = head(jax.lax.stop_gradient(x) if frozen else x, train=train)

        if self.remat:
            run = nn.remat(run)

        ends: dict[str, jax.Array] = {}
        settings = iter(self.blocks)
        x = end("stem", run(block(**next(settings)._asdict()), images))
        for stage, depth in enumerate(self.depths, start=1):
            for number in range(1, depth + 1):
                x = run(block(**next(settings)._asdict()), x)
                if use_auxiliary and stage == 3 and number == depth // 2:
                    auxiliary("stage3_first_aux", x)
            x = end(f"stage{stage}", x)
            if use_auxiliary and stage in (1, 2):
                auxiliary(f"stage{stage}_aux", x)
        ends["pooled"] = spatial_mean(x)
        ends["logits"] = made_of["dense"](self.num_classes, dtype=None, name="head")(ends["pooled"])

        if features:
            return ends
        if use_auxiliary and train:
            return ends["logits"], {name: ends[name] for name in ends if name.endswith("_aux")}
        return ends["logits"]
