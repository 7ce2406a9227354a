"""SGD with the learning-rate schedule and the weight-decay mask of the official implementation, and Muon beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import optax
from optax import contrib

from repvgg_jax.models.repvgg import frozen_parts
from repvgg_jax.reparam.networks import AUXILIARY_HEADS
from repvgg_jax.training.config import OptimizationConfig


def learning_rate_schedule(config: OptimizationConfig, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    It rises from 0 in a straight line, for at most half of all steps, and then falls to 0 at the last step as a cosine
    or in a straight line.

    Args:
      config: The settings: the peak rate (scaled to its batch size), the warm-up, the shape of the decay and the
        epochs.
      steps_per_epoch: Number of training steps in an epoch.

    Returns:
      A function from the step (counted from 0) to the learning rate.

    References:
      The cosine: the official repository, `train.py`. The line: Li et al., *Budgeted Training*, arXiv:1905.04753.
    """
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total // 2)
    peak = config.peak_learning_rate
    if config.schedule == "linear":
        decay = optax.linear_schedule(peak, 0.0, total - warmup)
    else:
        decay = optax.cosine_decay_schedule(peak, total - warmup)
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def weight_decay_mask(params: Any, frozen: str | None = None) -> Any:
    """Return which parameters decay: kernels, and the scale of the identity branch's norm.

    Biases do not decay, and neither do the scales of the norms behind a convolution, which the convolution's own kernel
    can undo. The identity branch has no kernel: its scale is its weight.

    Args:
      params: The tree of parameters.
      frozen: Last part of the network that is not trained. What is not trained does not decay.

    Returns:
      A tree of booleans of the same structure.

    References:
      The official repository, https://github.com/DingXiaoH/RepVGG, `train.py`.
    """

    still = frozen_parts(frozen)

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [entry.key for entry in path]
        if names[0] not in AUXILIARY_HEADS and names[0].split("_")[0] in still:
            return False
        return names[-1] == "kernel" or names[-2:] == ["branch_identity", "scale"]

    return jax.tree_util.tree_map_with_path(decays, params)


def create_optimizer(
    config: OptimizationConfig, steps_per_epoch: int, *, frozen: str | None = None
) -> optax.GradientTransformation:
    """Return SGD with (Nesterov) momentum and L2 added to the gradient before the momentum, as in PyTorch.

    Where the config clips, it clips the gradient of the loss alone. Weight decay is added afterwards, so that its
    strength does not depend on how large the gradient was. In PyTorch, too, `clip_grad_norm_` comes before the
    optimizer adds its decay.

    With `muon_learning_rate`, Muon takes the convolution kernels, as matrices of (patch, output channel). Its steps are
    orthogonal matrices, so that no direction of a kernel waits for the others. Both follow the one schedule, each to
    its own peak. The 1×1 kernel of a quantizable block is left to SGD: Muon's steps have one size, and no norm of its
    own makes up for it.

    Args:
      config: The settings: the schedule, the rule and its numbers.
      steps_per_epoch: Number of training steps in an epoch.
      frozen: Last part of the network that is not trained. What is not trained does not decay.

    Returns:
      The optimizer.

    References:
      Muon: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon
    """
    schedule = learning_rate_schedule(config, steps_per_epoch)
    clip = [optax.clip_by_global_norm(config.grad_clip_norm)] if config.grad_clip_norm else []
    rest = [
        optax.add_decayed_weights(config.weight_decay, mask=partial(weight_decay_mask, frozen=frozen)),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    ]
    if not config.muon_learning_rate:
        # One chain: its state is the tree that checkpoints hold.
        return optax.chain(*clip, *rest)
    factor = config.peak_muon_learning_rate / config.peak_learning_rate
    kernels = contrib.muon(
        lambda step: factor * schedule(step),
        beta=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.muon_weight_decay,
        weight_decay_mask=partial(weight_decay_mask, frozen=frozen),
        muon_weight_dimension_numbers=partial(jax.tree.map, lambda _: contrib.MuonDimensionNumbers((0, 1, 2), 3)),
    )
    return optax.chain(*clip, optax.partition({"muon": kernels, "sgd": optax.chain(*rest)}, _muon_or_sgd))


def _muon_or_sgd(params: Any) -> Any:
    def label(path: tuple[Any, ...], leaf: Any) -> str:
        # In a RepVGG block a kernel is that of a `conv` beside its norm.
        alone = [entry.key for entry in path[-2:]] == ["branch_1x1", "kernel"]
        return "muon" if leaf.ndim == 4 and not alone else "sgd"

    return jax.tree_util.tree_map_with_path(label, params)
