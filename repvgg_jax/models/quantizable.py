"""The block of QARepVGG, whose deploy form keeps its accuracy in 8 bits."""

from __future__ import annotations

import jax

from repvgg_jax.models.blocks import ConvBN, RepVGGBlock
from repvgg_jax.reparam.networks import SUM_NORMS


class QuantizableBlock(RepVGGBlock):
    """A block that normalises the sum of its branches, in its training form or its deploy form.

    The training form computes `ReLU(BN(BN(W3 ∗ x) + W1 ∗ x + x))`. The input `x` is in the sum where the stride is 1
    and the number of channels stays the same. The norm of the sum sets the variance of what a block puts out, so that
    no channel of the fused kernel grows far beyond the others. The deploy form is that of `RepVGGBlock`.

    The attributes are those of `RepVGGBlock`, without a squeeze-excite unit.

    References:
      Chu et al., *Make RepVGG Greater Again: A Quantization-aware Approach*, arXiv:2212.01593, figure 2; the official
      implementation, https://github.com/cxxgtxy/QARepVGG, `QARepVGGBlockV2`.
    """

    def _branches(self, x: jax.Array, *, train: bool) -> jax.Array:
        shape = (self.features, 3, self.stride, self.dilation, self.groups)
        y = ConvBN(*shape, conv=self.conv, norm=self.norm, name="branch_3x3")(x, train=train)
        y += self.conv(self.features, 1, self.stride, 1, self.groups, use_bias=False, name="branch_1x1")(x)
        of_branches, with_identity = SUM_NORMS
        name = of_branches
        if self.stride == 1 and x.shape[-1] == self.features:
            y, name = y + x, with_identity
        return self.norm(use_running_average=not train, name=name)(y)
