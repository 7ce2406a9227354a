"""The compiled training step over a mesh of devices."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repvgg_jax.models import RepVGG
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import Normalization
from repvgg_jax.training.config import OptimizationConfig, TrainConfig
from repvgg_jax.training.steps.accumulation import accumulate
from repvgg_jax.training.steps.augmentation import augment
from repvgg_jax.training.steps.ema import update_ema
from repvgg_jax.training.steps.mesh import Batch
from repvgg_jax.training.steps.quantize_aware import train_quantized
from repvgg_jax.training.steps.state import TrainState


def make_train_step(
    model: RepVGG,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    normalization: Normalization,
    mesh: Mesh,
    *,
    steps_per_epoch: int,
) -> jax.stages.Wrapped:
    """Build the training step, under `jit`.

    Augmentation and normalisation happen inside it, on the device. Batch statistics are those of the global batch or,
    with `accumulate_steps`, of each global microbatch in turn.

    Args:
      model: The network in its training form.
      optimizer: The optimizer from `create_optimizer`.
      config: The settings of the epochs that the step is for.
      normalization: The normalisation of the images.
      mesh: The mesh from `create_mesh`. Its size times `accumulate_steps` must divide the batch.
      steps_per_epoch: Number of steps in an epoch, which counts the epochs of `alternate_flip`.

    Returns:
      A function `step(state, batch) -> (state, metrics)`. The batch holds 'image', uint8 `(batch, height, width,
      channels)`, and 'label' and 'index', int32 `(batch,)`. The metrics are 'loss' and 'accuracy', which is against the
      labels, whatever the targets were mixed with. With `skip_nonfinite` there is also 'skipped', which is 1 where the
      step changed nothing but the counts of steps. The old state is donated: do not use it again.
    """
    settings = config.optimization
    # What a batch changes besides the parameters.
    changing = "ranges" if settings.quantize_aware else "batch_stats"
    loss_fn = partial(_quantized_loss if settings.quantize_aware else _loss, model, settings)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        images, targets = augment(
            key,
            batch,
            config.augmentation,
            normalization,
            num_classes=model.num_classes,
            seed=config.seed,
            epoch=state.step // steps_per_epoch,
        )

        def compute(statistics: Any, inputs: Batch) -> tuple[Any, Any]:
            gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
            variables = state.variables | statistics
            (loss, (logits, statistics)), gradients = gradient_fn(state.params, variables, inputs)
            metrics = {"loss": loss, "accuracy": (logits.argmax(-1) == inputs["label"]).mean()}
            return statistics, (gradients, metrics)

        inputs = {"image": images, "target": targets, "label": batch["label"]}
        statistics = {changing: state.variables[changing]}
        statistics, (gradients, metrics) = accumulate(
            compute, statistics, inputs, steps=settings.accumulate_steps, mesh=mesh
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, **statistics)
        if settings.ema_decay:
            new = dataclasses.replace(new, ema=update_ema(state.ema, new.variables, state.step, settings.ema_decay))
        if settings.skip_nonfinite:
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optax.tree.norm(gradients))
            new = _where(finite, new, state)
            metrics["skipped"] = 1.0 - finite
        return new, metrics

    replicated, sharded = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    return jax.jit(
        step,
        in_shardings=(replicated, sharded),
        out_shardings=replicated,
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def _loss(
    model: RepVGG, settings: OptimizationConfig, params: Any, variables: Any, inputs: Batch
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Return the loss, auxiliary heads included, with the logits and the statistics after the batch."""
    variables = {**variables, "params": params}
    output, updates = model.apply(variables, inputs["image"], train=True, mutable=["batch_stats"])
    logits, auxiliary = output if isinstance(output, tuple) else (output, {})
    loss = optax.softmax_cross_entropy(logits, inputs["target"]).mean()
    for head in auxiliary.values():
        loss += settings.auxiliary_weight * optax.softmax_cross_entropy(head, inputs["target"]).mean()
    return loss, (logits, {"batch_stats": updates["batch_stats"]})


def _quantized_loss(
    model: RepVGG, settings: OptimizationConfig, params: Any, variables: Any, inputs: Batch
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Return the loss of the network in 8 bits, with the logits and the ranges after the batch."""
    variables = {**variables, "params": params}
    logits, ranges = train_quantized(model, variables, inputs["image"], reduce_range=settings.weight_bits == 7)
    loss = optax.softmax_cross_entropy(logits, inputs["target"]).mean()
    return loss, (logits, {"ranges": ranges})


def _where(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """Return the new state where a step is finite, else the old one."""
    # Counts go on, also the optimizer's, so that the learning rate ends where its schedule does.
    return jax.tree.map(
        lambda update, kept: jnp.where(finite, update, kept) if jnp.issubdtype(kept.dtype, jnp.inexact) else update,
        new,
        old,
    )
