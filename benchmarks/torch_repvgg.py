"""RepVGG in PyTorch, written as the official repository writes it: the peer that `benchmarks.speed` measures.

Both forms have the modules and the state dict of https://github.com/DingXiaoH/RepVGG, so that
`repvgg_jax.interop.torch` moves weights between the two. Without squeeze-excite and auxiliary heads. Kernels are drawn
as He et al. do, not as PyTorch does by default: through 22 fused convolutions the image would vanish.
"""

from collections import OrderedDict

import torch
from torch import nn

from repvgg_jax import VARIANTS


def _conv_bn(inside, out, kernel_size, stride, groups):
    conv = nn.Conv2d(inside, out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out)))


class Block(nn.Module):
    """One block, in either form."""

    def __init__(self, inside, out, stride, groups, deploy):
        super().__init__()
        self.deploy = deploy
        if deploy:
            self.rbr_reparam = nn.Conv2d(inside, out, 3, stride, 1, groups=groups)
        else:
            self.rbr_identity = nn.BatchNorm2d(inside) if inside == out and stride == 1 else None
            self.rbr_dense = _conv_bn(inside, out, 3, stride, groups)
            self.rbr_1x1 = _conv_bn(inside, out, 1, stride, groups)

    def forward(self, x):
        """Map NCHW to NCHW."""
        if self.deploy:
            return torch.relu(self.rbr_reparam(x))
        identity = 0 if self.rbr_identity is None else self.rbr_identity(x)
        return torch.relu(self.rbr_dense(x) + self.rbr_1x1(x) + identity)


class RepVGG(nn.Module):
    """A published variant; `strides` are those of the stem and of stage 1 to 4."""

    def __init__(self, variant, num_classes, strides, deploy):
        super().__init__()
        depths, widths, groups = VARIANTS[variant][:3]
        stages = [int(base * factor) for base, factor in zip((64, 128, 256, 512), widths, strict=True)]
        inside = min(64, stages[0])
        self.stage0 = Block(3, inside, strides[0], 1, deploy)
        index = 0
        for stage, (depth, out) in enumerate(zip(depths, stages, strict=True), start=1):
            blocks = []
            for number in range(depth):
                index += 1
                stride = strides[stage] if number == 0 else 1
                blocks.append(Block(inside, out, stride, groups if index % 2 == 0 else 1, deploy))
                inside = out
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inside, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x):
        """Map NCHW images to logits."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        return self.linear(self.gap(x).flatten(1))
