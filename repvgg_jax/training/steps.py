"""The jitted training and evaluation steps over a mesh of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from repvgg_jax.models import RepVGG
from repvgg_jax.ops import compiler_options
from repvgg_jax.preprocess import normalize
from repvgg_jax.training.accumulation import accumulate
from repvgg_jax.training.augmentation import augment
from repvgg_jax.training.config import TrainConfig
from repvgg_jax.training.ema import update_ema

Batch = Mapping[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything that changes from step to step; replicated over the mesh.

    Attributes:
      ema: moving average of `variables`, or None where the config's `ema_decay` is 0.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What is trained."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What is evaluated, fused and saved: the moving average where there is one."""
        return self.variables if self.ema is None else self.ema


def create_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh, axis 'data', over all devices of all processes (or those given)."""
    return Mesh(np.asarray(devices or jax.devices()), ("data",))


def require_divisible(config: TrainConfig, mesh: Mesh, *fields: str) -> None:
    """Raise a ValueError unless the mesh, times its microbatches in training, divides the config's batch sizes."""
    for field in fields:
        size = getattr(config, field)
        microbatches = config.accumulate_steps if field == "batch_size" else 1
        multiple = mesh.size * microbatches
        if size % multiple:
            times = f" times accumulate_steps (={microbatches})" if microbatches > 1 else ""
            raise ValueError(
                f"{field} is {size}: expected a multiple of the {mesh.size} devices{times}, "
                f"e.g. {-(-size // multiple) * multiple}"
            )


def shard_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on its devices; the result is the global batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def abstract_batch(config: TrainConfig, channels: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, dtypes and shardings of a training batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    shape = (config.batch_size, config.image_size, config.image_size, channels)
    integers = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=sharding)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding),
        "label": integers,
        "index": integers,
    }


def create_state(
    model: RepVGG, optimizer: optax.GradientTransformation, config: TrainConfig, channels: int, mesh: Mesh
) -> TrainState:
    """Initialise parameters, statistics and optimizer from the config's seed, replicated over the mesh."""
    platform = mesh.devices.flat[0].platform
    options = compiler_options(platform)
    if platform == "cpu":  # XLA:CPU would spend seconds on optimising code that runs once
        options["xla_backend_optimization_level"] = 0
    init = _initializer(model, optimizer, config, channels)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(init, out_shardings=replicated, compiler_options=options)(jax.random.key(config.seed))


def abstract_state(
    model: RepVGG, optimizer: optax.GradientTransformation, config: TrainConfig, channels: int, mesh: Mesh
) -> TrainState:
    """The shapes, dtypes and shardings of what `create_state` returns, computing nothing."""
    shapes = jax.eval_shape(_initializer(model, optimizer, config, channels), jax.random.key(config.seed))
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), shapes)


def _initializer(
    model: RepVGG, optimizer: optax.GradientTransformation, config: TrainConfig, channels: int
) -> Callable[[jax.Array], TrainState]:
    def init(key: jax.Array) -> TrainState:
        images = jnp.zeros((1, config.image_size, config.image_size, channels))
        variables = model.init(key, images, train=False)
        params, batch_stats = variables["params"], variables["batch_stats"]
        ema = {"params": params, "batch_stats": batch_stats} if config.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), ema)

    return init


def make_train_step(
    model: RepVGG, optimizer: optax.GradientTransformation, config: TrainConfig, mesh: Mesh, *, steps_per_epoch: int
) -> jax.stages.Wrapped:
    """Build the jitted training step.

    Augmentation and normalisation happen inside it, on the device. Batch statistics are those of the global batch, or,
    with `accumulate_steps`, of each global microbatch in turn.

    Args:
      model: in its training form.
      optimizer: from `create_optimizer`.
      config: with `mean` and `std` filled in.
      mesh: from `create_mesh`; its size times `accumulate_steps` must divide the batch.
      steps_per_epoch: counts the epochs of `alternate_flip`.

    Returns:
      `step(state, {'image': uint8 (batch, height, width, channels), 'label', 'index': int32 (batch,)}) -> (state,
      {'loss', 'accuracy'})`, accuracy against the labels, whatever the targets were mixed with; with `skip_nonfinite`
      also 'skipped', 1 where the step changed nothing but the counts of steps. The old state is donated: do not use it
      again.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        epoch = state.step // steps_per_epoch
        images, targets = augment(key, batch, config, model.num_classes, epoch)

        def compute(batch_stats: Any, inputs: Batch) -> tuple[Any, Any]:
            gradient_fn = jax.value_and_grad(_loss, argnums=2, has_aux=True)
            (loss, (logits, batch_stats)), gradients = gradient_fn(model, config, state.params, batch_stats, inputs)
            metrics = {"loss": loss, "accuracy": (logits.argmax(-1) == inputs["label"]).mean()}
            return batch_stats, (gradients, metrics)

        inputs = {"image": images, "target": targets, "label": batch["label"]}
        batch_stats, (gradients, metrics) = accumulate(
            compute, state.batch_stats, inputs, steps=config.accumulate_steps, mesh=mesh
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None
        if config.ema_decay:
            variables = {"params": params, "batch_stats": batch_stats}
            ema = update_ema(state.ema, variables, state.step, config.ema_decay)
        new = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        if config.skip_nonfinite:
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
    model: RepVGG, config: TrainConfig, params: Any, batch_stats: Any, inputs: Batch
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """The loss, auxiliary heads included; the logits, and the statistics after the batch."""
    variables = {"params": params, "batch_stats": batch_stats}
    output, updates = model.apply(variables, inputs["image"], train=True, mutable=["batch_stats"])
    logits, auxiliary = output if isinstance(output, tuple) else (output, {})
    loss = optax.softmax_cross_entropy(logits, inputs["target"]).mean()
    for head in auxiliary.values():
        loss += config.auxiliary_weight * optax.softmax_cross_entropy(head, inputs["target"]).mean()
    return loss, (logits, updates["batch_stats"])


def _where(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state where a step is finite, else the old one."""
    # Counts go on, also the optimizer's, so that the learning rate ends where its schedule does.
    return jax.tree.map(
        lambda update, kept: jnp.where(finite, update, kept) if jnp.issubdtype(kept.dtype, jnp.inexact) else update,
        new,
        old,
    )


def make_eval_step(model: RepVGG, config: TrainConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """Build the jitted evaluation step of either form.

    Args:
      model: in the form of the variables it will be given.
      config: with `mean` and `std` filled in.
      mesh: from `create_mesh`; its size must divide the batch.

    Returns:
      `step(variables, {'image', 'label', 'mask'}) -> {'logits' (batch, classes), 'label', 'mask', 'loss' (sum),
      'correct', 'count'}` of the global batch, replicated; rows whose mask is False count in no sum.
    """
    mean, std = config.normalization

    def step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        logits: Any = model.apply(variables, normalize(batch["image"], mean, std), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = (logits.argmax(-1) == batch["label"]) & batch["mask"]
        return {
            "logits": logits,
            "label": batch["label"],
            "mask": batch["mask"],
            "loss": jnp.where(batch["mask"], losses, 0).sum(),
            "correct": correct.sum(),
            "count": batch["mask"].sum(),
        }

    replicated, sharded = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    return jax.jit(
        step,
        in_shardings=(replicated, sharded),
        out_shardings=replicated,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
