"""PyTorch state dicts of RepVGG, in the layouts of the official repository and of timm. It needs no PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.interop.torch.entries import find_state_dict
from repvgg_jax.interop.torch.keys import (
    STEMS,
    Layout,
    by_path,
    expected_shapes,
    find_layout,
    from_torch_layout,
    is_head,
    stem_keys,
    to_torch_layout,
    torch_key,
)
from repvgg_jax.interop.torch.misfit import require_fit
from repvgg_jax.interop.torch.tensors import require_floating, to_numpy
from repvgg_jax.models import RepVGG
from repvgg_jax.models.shapes import abstract_variables, differences, shapes_by_name
from repvgg_jax.ops import compiler_options

_LOGGER = logging.getLogger(__name__)


def from_state_dict(
    model: RepVGG,
    state_dict: Mapping[str, Any],
    *,
    entry: str | None = None,
    head: Literal["load", "reinit"] = "load",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Turn a PyTorch state dict into variables of a model.

    Args:
      model: The network, in the form that the state dict is of. Its `num_classes` must be the state dict's, unless
        `head` is "reinit".
      state_dict: Arrays or torch tensors by key, in the official or the timm layout, which its keys tell apart. A
        checkpoint around a state dict works too, as `repvgg_jax.interop.torch.entries.find_state_dict` reads it:
        without the prefixes of wrappers, counters and optimizers. Where it holds several, a warning is logged that says
        which was taken.
      entry: Which weights to take from a checkpoint, e.g. 'model' or 'ema'. By default it is the average, if there is
        one.
      head: "load" takes the classifiers of the state dict. "reinit" initialises them anew, whatever the state dict
        holds of them, to fine-tune on other classes.
      key: Random key for "reinit", by default `jax.random.key(0)`.

    Returns:
      `{'params', 'batch_stats'}`, or `{'params'}` of a deploy form, in the model's `param_dtype`. Values are the same
      to the bit where the dtypes are.

    Raises:
      ValueError: If keys are missing, unexpected or of another shape; the first few are named, with the network that
        the weights are of. Also if tensors are not dense and floating point, or `find_state_dict` raises one.
    """
    found = find_state_dict(state_dict, entry)
    if found.others and entry is None:
        _LOGGER.warning("took %s; choose with entry=…", found.describe())
    tensors = found.tensors
    layout = find_layout(tensors)
    stems = [tensors[name].shape for name in stem_keys(model, layout) if name in tensors]
    in_channels = next((max(1, shape[1]) for shape in stems if len(shape) == 4), 3)
    expected = expected_shapes(model, layout, in_channels)
    heads = {name for path, (name, _) in expected.items() if is_head(path)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    require_fit(model, layout, dict(expected.values()), shapes, heads, ignore_heads=head == "reinit")
    variables = abstract_variables(model, in_channels)
    fresh = _fresh_heads(model, in_channels, jax.random.key(0) if key is None else key) if head == "reinit" else {}

    def leaf(path: tuple[str, ...], like: Any) -> jax.Array:
        if path in fresh:
            return fresh[path]
        name = expected[path][0]
        require_floating(name, tensors[name])
        return jnp.asarray(from_torch_layout(path, to_numpy(name, tensors[name])), dtype=like.dtype)

    leaves = [leaf(path, like) for path, like in by_path(variables).items()]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def to_state_dict(model: RepVGG, variables: Mapping[str, Any], layout: Layout = "official") -> dict[str, np.ndarray]:
    """Turn variables of a model into a PyTorch state dict.

    Args:
      model: The network, in the form that the variables are of.
      variables: Its variables, `{'params', 'batch_stats'}`, or `{'params'}` of a deploy form.
      layout: "official" or "timm".

    Returns:
      NumPy arrays by key, kernels in PyTorch's OIHW. `num_batches_tracked` is written as 0, since the official code and
      timm load strictly.

    Raises:
      ValueError: If the layout is unknown, timm has no such network (RepVGGplus), or the variables are not the model's.
        Every path that is missing, unexpected or of another shape is named.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout {layout!r}: expected 'official' or 'timm'")
    leaves = by_path({key: variables[key] for key in ("params", "batch_stats") if key in variables})
    stems = [np.shape(leaves[path]) for path in STEMS if path in leaves]
    expected = abstract_variables(model, next((s[2] for s in stems if len(s) == 4), 3))
    found = {"/".join(path): np.shape(leaf) for path, leaf in leaves.items()}
    problems = differences(found, shapes_by_name(expected))
    if problems:
        form = "deploy" if model.deploy else "training"
        raise ValueError(f"the variables are not those of this model ({form} form):\n  " + "\n  ".join(problems))
    state_dict = {}
    for names, leaf in leaves.items():
        key = torch_key(model, names, layout)
        state_dict[key] = np.ascontiguousarray(to_torch_layout(names, np.asarray(leaf)))
        if names[-1] == "var":
            state_dict[key.replace("running_var", "num_batches_tracked")] = np.asarray(0, np.int64)
    return state_dict


def _fresh_heads(model: RepVGG, in_channels: int, key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
    """Return the classifiers, initialised. `jit` leaves out the rest of the network."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        variables = model.init(key, jnp.zeros((1, 32, 32, in_channels), model.param_dtype), train=False)
        return {"/".join(path): leaf for path, leaf in by_path(variables).items() if is_head(path)}

    heads = jax.jit(init, compiler_options=compiler_options())(key)
    return {tuple(name.split("/")): leaf for name, leaf in heads.items()}
