"""Two small networks, and the ways to train them that `benchmarks.expand` compares.

None of the networks knows of branches: `repvgg_jax.expand` lets them train with some.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from repvgg_jax import expand
from repvgg_jax.data import load_dataset, measure_normalization, normalize, random_crop, random_flip
from repvgg_jax.data.pipeline import ReadBatch
from repvgg_jax.ops import conv_general_dilated
from repvgg_jax.optimizers import scale_by_branches
from repvgg_jax.preprocess import Normalization

BATCH, EVAL_BATCH = 128, 500
DECAY, MOMENTUM, WARMUP = 1e-4, 0.9, 0.1
WAYS = ("plain", "repvgg", "acnet", "dbb", "multipliers")


class ConvNet(nn.Module):
    """3×3 convolutions with batch norms, and no shortcut.

    Attributes:
        num_classes: Number of logits.
        layers: Features and stride of each convolution.
        convolution: What computes them.
    """

    num_classes: int
    layers: tuple[tuple[int, int], ...] = ((16, 2), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1))
    convolution: Callable[..., jax.Array] = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to logits."""
        unit = partial(_unit, convolution=self.convolution, train=train)
        for features, stride in self.layers:
            x = nn.relu(unit(x, features, 3, stride))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class ResNet(nn.Module):
    """Basic blocks behind a convolution; where a block strides, a 1×1 convolution is its shortcut.

    Attributes:
        num_classes: Number of logits.
        blocks: Features and stride of each block.
        convolution: What computes the convolutions.
    """

    num_classes: int
    blocks: tuple[tuple[int, int], ...] = ((16, 1), (32, 2), (64, 2))
    convolution: Callable[..., jax.Array] = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to logits."""
        unit = partial(_unit, convolution=self.convolution, train=train)
        x = nn.relu(unit(x, self.blocks[0][0], 3, 2))
        for features, stride in self.blocks:
            y = nn.relu(unit(x, features, 3, stride))
            y = unit(y, features, 3, 1)
            if x.shape != y.shape:
                x = unit(x, features, 1, stride)
            x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


def _unit(
    x: jax.Array, features: int, side: int, stride: int, *, convolution: Callable[..., jax.Array], train: bool
) -> jax.Array:
    """A convolution and a batch norm, within a compact module."""
    he = nn.initializers.he_normal()
    padding = ((side // 2, side // 2),) * 2
    conv = nn.Conv(
        features, (side, side), stride, padding, use_bias=False, kernel_init=he, conv_general_dilated=convolution
    )
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(conv(x))


NETWORKS = {"plain": ConvNet, "resnet": ResNet}


class Data(NamedTuple):
    """A whole data set, with images in uint8."""

    name: str
    images: jax.Array
    labels: jax.Array
    test_images: jax.Array
    test_labels: np.ndarray
    classes: int
    normalization: Normalization

    @property
    def steps(self) -> int:
        """Steps of an epoch. What is left of it is left out."""
        return len(self.images) // BATCH


def load(name: str, data_dir: str | None, limit: int | None) -> Data:
    """Read a data set, and of the images to train on no more than the limit."""
    dataset = load_dataset(name, data_dir=data_dir)
    count = len(dataset.train) if limit is None else limit
    if not BATCH <= count <= len(dataset.train):
        raise ValueError(f"--images is {count}: expected {BATCH}, which is a batch, to {len(dataset.train):,}")
    assert dataset.image_shape is not None
    side, channels = dataset.image_shape[0], dataset.channels
    train, test = (
        ReadBatch(source, side, channels)(np.arange(size))
        for source, size in ((dataset.train, count), (dataset.test, len(dataset.test)))
    )
    return Data(
        name,
        *map(jnp.asarray, (train["image"], train["label"], test["image"])),
        test["label"],
        dataset.num_classes,
        measure_normalization(dataset.train, image_size=side, channels=channels),
    )


class Training(NamedTuple):
    """What a step changes: parameters, the state of the branches, the statistics of batch norms, and momentum."""

    params: Any
    state: Any
    statistics: Any
    momentum: Any


class Task:
    """A network and the data to train it on."""

    def __init__(self, network: str, data: Data):
        self.data = data
        self.module = NETWORKS[network](data.classes)
        self.normalize = partial(normalize, mean=data.normalization.mean, std=data.normalization.std)
        self._init = jax.jit(lambda key: self.module.init(key, self.normalize(data.images[:1]), train=False))
        self._correct = jax.jit(self._count_correct)
        self.logits = jax.jit(self.apply)

    def variables(self, seed: int) -> Any:
        """Parameters and statistics to begin with."""
        return self._init(jax.random.key(seed))

    def apply(self, params: Any, statistics: Any, images: jax.Array, *, module: nn.Module | None = None) -> Any:
        """Logits in training, and the statistics after it."""
        variables = {"params": params, "batch_stats": statistics}
        logits, updates = (module or self.module).apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, updates["batch_stats"]

    def accuracy(self, params: Any, statistics: Any) -> float:
        """Of the network itself on all test images, in percent."""
        variables = {"params": params, "batch_stats": statistics}
        correct = 0
        for start in range(0, len(self.data.test_labels), EVAL_BATCH):
            batch = slice(start, start + EVAL_BATCH)
            correct += int(self._correct(variables, self.data.test_images[batch], self.data.test_labels[batch]))
        return 100 * correct / len(self.data.test_labels)

    def _count_correct(self, variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = self.module.apply(variables, self.normalize(images), train=False)
        return (logits.argmax(-1) == labels).sum()


class Way:
    """One way to train a network, compiled once for all seeds."""

    def __init__(self, name: str, task: Task, init: str, rate: float):
        self.name, self.task, self._start, self._rate = name, task, init, rate
        # The branches convolve with these lowerings too: with XLA's own, plain would be slower for another reason.
        self._fast = task.module.clone(convolution=conv_general_dilated)
        self._by_seed: dict[int, Any] = {}
        self.wide = None if name in ("plain", "multipliers") else self._of_seed(0)
        self.optimizer = self._create_optimizer()
        data, training = task.data, self.begin(0)
        self.parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(training.params))
        arguments = training, data.images, data.labels, np.arange(BATCH), np.float32(rate), np.zeros(2, np.int32)
        self.step = jax.jit(self._step, donate_argnums=0).lower(*arguments).compile()
        self.memory = self.step.memory_analysis().temp_size_in_bytes

    def begin(self, seed: int) -> Training:
        """What the training begins with."""
        variables = self.task.variables(seed)
        params, state = variables["params"], {}
        if self.wide:
            wide = self._of_seed(seed)
            # A step is given its arrays to write over.
            params, state = jax.tree.map(jnp.copy, (wide.params, wide.state))
        return Training(params, state, variables["batch_stats"], self.optimizer.init(params))

    def train(self, seed: int, epochs: int, progress: Callable[[int, float], None]) -> Training:
        """Train, and report each epoch's number and loss."""
        data, training = self.task.data, self.begin(seed)
        steps = epochs * data.steps
        schedule = optax.warmup_cosine_decay_schedule(0, self._rate, round(WARMUP * steps), steps)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32)
        random = np.random.default_rng(seed)
        for epoch in range(epochs):
            losses = []
            order = random.permutation(len(data.images))
            for number in range(data.steps):
                step = epoch * data.steps + number
                chosen = order[number * BATCH : (number + 1) * BATCH]
                training, loss = self.step(
                    training, data.images, data.labels, chosen, rates[step], np.array([seed, step], np.int32)
                )
                losses.append(loss)
            progress(epoch + 1, float(np.mean(losses)))
        return training

    def collapse(self, training: Training) -> Any:
        """The parameters of the network itself."""
        return self._collapse(training.params, training.state) if self.wide else training.params

    def difference(self, training: Training) -> float:
        """How far the network itself is from its branches, relative to the largest output."""
        if not self.wide:
            return 0.0
        images = self.task.normalize(self.task.data.test_images[:BATCH])
        (expected, _), _ = self._evaluate(training.params, training.state, training.statistics, images)
        found, _ = self.task.logits(self.collapse(training), training.statistics, images)
        return float(jnp.abs(found - expected).max() / jnp.abs(expected).max())

    @cached_property
    def _collapse(self) -> Callable[..., Any]:
        return jax.jit(self.wide.collapse)

    @cached_property
    def _evaluate(self) -> Callable[..., Any]:
        return jax.jit(partial(self.wide, train=False))

    def _of_seed(self, seed: int) -> Any:
        if seed not in self._by_seed:
            self._by_seed[seed] = self._expanded(seed)
        return self._by_seed[seed]

    def _expanded(self, seed: int, **options: Any) -> Any:
        variables = self.task.variables(seed)
        inputs = variables["batch_stats"], self.task.normalize(self.task.data.images[:BATCH])
        options = {"branches": self.name, "init": self._start, "key": jax.random.key(seed), **options}
        return expand(self.task.apply, variables["params"], *inputs, **options)

    def _create_optimizer(self) -> optax.GradientTransformation:
        def kernels(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

        usual = optax.add_decayed_weights(DECAY, mask=kernels), optax.trace(MOMENTUM, nesterov=True)
        if self.name != "multipliers":
            return optax.chain(*usual)
        wide = self._expanded(0, branches="repvgg", norms=False)
        return optax.chain(scale_by_branches(wide.gradient_multipliers()), *usual)

    def _forward(self, params: Any, state: Any, statistics: Any, images: jax.Array) -> Any:
        if self.wide:
            return self.wide(params, state, statistics, images, train=True)
        return self.task.apply(params, statistics, images, module=self._fast), state

    def _step(
        self,
        training: Training,
        images: jax.Array,
        labels: jax.Array,
        chosen: jax.Array,
        rate: jax.Array,
        seed_and_step: jax.Array,
    ) -> tuple[Training, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed_and_step[0]), seed_and_step[1])
        flip, crop = jax.random.split(key)
        # Normalised first, so that the zeros around a crop are the mean.
        batch = random_flip(flip, self.task.normalize(images[chosen]))
        batch = random_crop(crop, batch, padding=images.shape[1] // 8)

        def loss(params: Any) -> Any:
            (logits, statistics), state = self._forward(params, training.state, training.statistics, batch)
            value = optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean()
            return value, (state, statistics)

        (value, (state, statistics)), gradients = jax.value_and_grad(loss, has_aux=True)(training.params)
        updates, momentum = self.optimizer.update(gradients, training.momentum, training.params)
        params = jax.tree.map(lambda leaf, update: leaf - rate * update, training.params, updates)
        return Training(params, state, statistics, momentum), value
