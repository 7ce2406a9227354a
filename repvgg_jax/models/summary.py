"""A table of a network in both forms: output shape, parameters and multiply-adds of each block."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from tabulate import tabulate

from repvgg_jax.models.repvgg import RepVGG
from repvgg_jax.reparam.networks import AUXILIARY_HEADS


class Row(NamedTuple):
    """One block of a network and what it costs in the two forms.

    Attributes:
      name: Name of the block in the tree of variables.
      output_shape: Shape of its output without the batch.
      training_parameters: Number of trainable parameters in the training form.
      training_multiply_adds: Multiply-adds for one image in the training form.
      deploy_parameters: Number of parameters in the deploy form.
      deploy_multiply_adds: Multiply-adds for one image in the deploy form.
    """

    name: str
    output_shape: tuple[int, ...]
    training_parameters: int
    training_multiply_adds: int
    deploy_parameters: int
    deploy_multiply_adds: int


class Summary(NamedTuple):
    """The blocks of a network and what they cost in the two forms. `str(summary)` is a table.

    Attributes:
      rows: The blocks, and the head, in the order of computation.
    """

    rows: tuple[Row, ...]

    @property
    def total(self) -> Row:
        """The sums over all rows. The output shape is that of the last row."""
        sums = [sum(column) for column in list(zip(*self.rows, strict=True))[2:]]
        return Row("total", self.rows[-1].output_shape, *sums)

    def __str__(self) -> str:
        lines = [
            (row.name, "×".join(map(str, row.output_shape)), *(f"{value:,}" for value in row[2:]))
            for row in (*self.rows, self.total)
        ]
        headers = [
            "block", "output", "parameters\ntraining", "multiply-adds\ntraining", "parameters\ndeploy",
            "multiply-adds\ndeploy",
        ]  # fmt: skip
        lines.insert(-1, tuple("-" * 5 for _ in headers))
        return tabulate(lines, headers=headers, colalign=("left", "left", *["right"] * 4))


def summarize(model: RepVGG, image_shape: tuple[int, int, int]) -> Summary:
    """Count the parameters and multiply-adds of a network in both forms, block by block.

    Nothing is computed; shapes alone are traced. Parameters are the trainable ones, without batch statistics.
    Multiply-adds are those of convolutions and dense layers for one image. Norms, ReLU, pooling and the scaling by
    squeeze-excite gates are not counted. Of the auxiliary heads, which serve training only, the parameters are counted
    and the multiply-adds are not.

    Args:
      model: The network, in either form.
      image_shape: Shape of one image, `(height, width, channels)`.

    Returns:
      The summary.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), model.dtype or model.param_dtype)
    training, deploy = (_count(model.clone(deploy=form), images) for form in (False, True))
    return Summary(
        tuple(
            Row(name, shape, parameters, adds, *deploy.get(name, (shape, 0, 0))[1:])
            for name, (shape, parameters, adds) in training.items()
        )
    )


def _count(model: RepVGG, images: jax.ShapeDtypeStruct) -> dict[str, tuple[tuple[int, ...], int, int]]:
    def outputs(key: Any, x: jax.Array) -> Any:
        variables = model.init(key, x, train=False, capture_intermediates=True, mutable=True)
        return variables["params"], variables["intermediates"]

    params, intermediates = jax.eval_shape(outputs, jax.random.key(0), images)
    order = [name for block in model.blocks for name in (block.name, block.auxiliary) if name]
    rows = {}
    for name in (*order, "head"):
        if name not in params:
            continue
        shape = intermediates[name]["__call__"][0].shape[1:]
        positions = math.prod(shape[:-1])
        parameters = adds = 0
        for leaf in jax.tree.leaves(params[name]):
            parameters += math.prod(leaf.shape)
            if len(leaf.shape) == 4:
                adds += positions * math.prod(leaf.shape)
            elif len(leaf.shape) == 2:
                adds += math.prod(leaf.shape)
        rows[name] = (shape, parameters, 0 if name in AUXILIARY_HEADS else adds)
    return rows
