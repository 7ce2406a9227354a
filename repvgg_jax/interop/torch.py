"""PyTorch state dicts of RepVGG, in the layouts of the official repository and of timm. Needs no torch.

Layouts:
  official: https://github.com/DingXiaoH/RepVGG (`stage1.0.rbr_dense.conv.weight`, `linear.weight`; RepVGGplus
    nests blocks, `stage1.blocks.0…`, and splits stage 3 in `stage3_first` and `stage3_second`).
  timm: https://github.com/huggingface/pytorch-image-models, `timm/models/byobnet.py`
    (`stages.0.0.conv_kxk.conv.weight`, `head.fc.weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.models import RepVGG

Layout = Literal["official", "timm"]

_CHILDREN: dict[str, dict[str, str]] = {
    "official": {
        "branch_3x3": "rbr_dense",
        "branch_1x1": "rbr_1x1",
        "branch_identity": "rbr_identity",
        "reparam": "rbr_reparam",
        "down": "down",
        "up": "up",
    },
    "timm": {
        "branch_3x3": "conv_kxk",
        "branch_1x1": "conv_1x1",
        "branch_identity": "identity",
        "reparam": "reparam_conv",
        "se": "attn",
        "down": "fc1",
        "up": "fc2",
    },
}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


# timm prefers the average, too, where a checkpoint holds both.
_NESTINGS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Of DataParallel and of torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


def from_state_dict(
    model: RepVGG,
    state_dict: Mapping[str, Any],
    *,
    head: Literal["load", "reinit"] = "load",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Turn a PyTorch state dict into variables of a model.

    Args:
      model: in the form the state dict is of; its `num_classes` must be the state dict's, unless `head` is "reinit".
      state_dict: arrays or torch tensors by key, official or timm layout (recognised by its keys), or a checkpoint
        that holds them under 'state_dict_ema', 'model_ema', 'state_dict' or 'model', the first there is. Prefixes
        `module.` (DataParallel) and `_orig_mod.` (torch.compile) are stripped, `num_batches_tracked` ignored.
      head: "reinit" initialises the classifiers anew, whatever the state dict holds of them: to fine-tune on other
        classes.
      key: random key for "reinit"; `jax.random.key(0)` where not given.

    Returns:
      `{'params', 'batch_stats'}` (deploy form: `{'params'}`) in the model's `param_dtype`, to the bit where the
      dtypes are the same.

    Raises:
      ValueError: missing, unexpected or mis-shaped keys, all named in one message.
    """
    found = tensors_by_key(state_dict)
    layout = find_layout(found)
    stems = [np.shape(found[key]) for key in _stem_keys(model, layout) if key in found]
    template = _template(model, in_channels=next((shape[1] for shape in stems if len(shape) == 4), 3))
    problems, leaves = [], []
    paths, structure = jax.tree_util.tree_flatten_with_path(template)
    expected, only_heads = set(), True
    fresh = _fresh_heads(model, template, jax.random.key(0) if key is None else key) if head == "reinit" else {}
    for path, leaf in paths:
        names = tuple(entry.key for entry in path)
        name, shape = torch_key(model, names, layout), _torch_shape(names, leaf.shape)
        expected.add(name)
        if names in fresh:
            leaves.append(fresh[names])
            continue
        value = _to_numpy(found[name]) if name in found else None
        if value is None or value.shape != shape:
            problems.append(
                f"missing {name} {shape}" if value is None else f"{name} has shape {value.shape}, expected {shape}"
            )
            only_heads &= _is_head(names)
            continue
        leaves.append(jnp.asarray(_from_torch_layout(names, value), dtype=leaf.dtype))
    unexpected = [f"unexpected {name} {tuple(np.shape(found[name]))}" for name in found if name not in expected]
    if problems or unexpected:
        form = "deploy" if model.deploy else "training"
        remedy = "check the variant, strides, num_classes and deploy"
        if only_heads and not unexpected:
            remedy = "the rest does: give its num_classes, or head='reinit' to initialise classifiers for yours"
        raise ValueError(
            f"the state dict ({layout} layout) does not fit this model ({form} form, {model.num_classes} classes, "
            f"depths {model.depths}, widths {model.widths}); {remedy}:\n  " + "\n  ".join(problems + unexpected)
        )
    return jax.tree_util.tree_unflatten(structure, leaves)


def tensors_by_key(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a state dict or of a checkpoint around one, under the keys of an undisguised module.

    Args:
      state_dict: as for `from_state_dict`.

    Returns:
      Its values by key, without prefixes and `num_batches_tracked`.

    Raises:
      ValueError: a value is no tensor.
    """
    while nested := [name for name in _NESTINGS if isinstance(state_dict.get(name), Mapping)]:
        state_dict = state_dict[nested[0]]
    found = {}
    for key, value in state_dict.items():
        if not hasattr(value, "shape"):
            raise ValueError(
                f"{key!r} is a {type(value).__name__}, expected a tensor: pass a state dict, or a checkpoint that "
                f"holds one under {', '.join(map(repr, _NESTINGS))}"
            )
        while prefixes := [prefix for prefix in _PREFIXES if key.startswith(prefix)]:
            key = key.removeprefix(prefixes[0])
        if not key.endswith("num_batches_tracked"):
            found[key] = value
    return found


def find_layout(keys: Iterable[str]) -> Layout:
    """Whose names these are: the official repository's, or timm's."""
    return "timm" if any(key.startswith("stem.") for key in keys) else "official"


def to_state_dict(model: RepVGG, variables: Mapping[str, Any], layout: Layout = "official") -> dict[str, np.ndarray]:
    """Turn variables of a model into a PyTorch state dict.

    Args:
      model: in the form the variables are of.
      variables: `{'params', 'batch_stats'}`, or `{'params'}` of a deploy form.
      layout: "official" or "timm".

    Returns:
      NumPy arrays by key, in PyTorch's OIHW; `num_batches_tracked` is written as 0, since the official code and
      timm load strictly.

    Raises:
      ValueError: an unknown layout, a network that timm does not have (RepVGGplus), or variables that are not the
        model's; every path that is missing, unexpected or mis-shaped is named.
    """
    if layout not in _CHILDREN:
        raise ValueError(f"unknown layout {layout!r}: expected 'official' or 'timm'")
    leaves = _by_path({key: variables[key] for key in ("params", "batch_stats") if key in variables})
    stems = [np.shape(leaves[path]) for path in _STEMS if path in leaves]
    template = _by_path(_template(model, in_channels=next((s[2] for s in stems if len(s) == 4), 3)))
    problems = [
        f"{'/'.join(path)} is {np.shape(leaves[path]) if path in leaves else 'missing'}, expected "
        f"{template[path].shape if path in template else 'nothing'}"
        for path in {**template, **leaves}
        if path not in leaves or path not in template or np.shape(leaves[path]) != template[path].shape
    ]
    if problems:
        form = "deploy" if model.deploy else "training"
        raise ValueError(f"the variables are not those of this model ({form} form):\n  " + "\n  ".join(problems))
    state_dict = {}
    for names, leaf in leaves.items():
        key = torch_key(model, names, layout)
        state_dict[key] = np.ascontiguousarray(_to_torch_layout(names, np.asarray(leaf)))
        if names[-1] == "var":
            state_dict[key.replace("running_var", "num_batches_tracked")] = np.asarray(0, np.int64)
    return state_dict


def torch_key(model: RepVGG, path: tuple[str, ...], layout: Layout) -> str:
    """The state-dict key of one leaf.

    Args:
      model: the network; RepVGGplus (`auxiliary_heads=True`) has keys of its own in the official layout.
      path: e.g. `('params', 'stage1_block1', 'branch_3x3', 'conv', 'kernel')`.
      layout: "official" or "timm".

    Returns:
      E.g. `'stage1.0.rbr_dense.conv.weight'`.

    Raises:
      ValueError: timm has no RepVGGplus.
    """
    plus = model.auxiliary_heads
    if plus and layout == "timm":
        raise ValueError("timm has no RepVGGplus: expected layout='official'")
    _, unit, *children, leaf = path
    names: list[str]
    if unit == "head":
        names = ["linear"] if layout == "official" else ["head", "fc"]
    elif unit.endswith("_aux"):
        # nn.Sequential(ConvBN + ReLU, pooling, flatten, linear)
        names = [unit, *(["3"] if children == ["head"] else ["0", *children[1:]])]
    else:
        squeeze_excite = "post_se" if model.squeeze_excite == "after_relu" else "se"
        renamed = {"se": squeeze_excite, **_CHILDREN[layout]}
        names = [_block_name(model, unit, layout), *(renamed.get(child, child) for child in children)]
    return ".".join([*names, _LEAVES[leaf]])


def _block_name(model: RepVGG, unit: str, layout: Layout) -> str:
    if unit == "stem":
        return "stage0" if layout == "official" else "stem"
    stage, number = (int(part) for part in unit.removeprefix("stage").split("_block"))
    if layout == "timm":
        return f"stages.{stage - 1}.{number - 1}"
    if not model.auxiliary_heads:
        return f"stage{stage}.{number - 1}"
    first = model.depths[2] // 2
    if stage != 3:
        return f"stage{stage}.blocks.{number - 1}"
    return f"stage3_first.blocks.{number - 1}" if number <= first else f"stage3_second.blocks.{number - 1 - first}"


_STEMS = (("params", "stem", "reparam", "kernel"), ("params", "stem", "branch_3x3", "conv", "kernel"))


def _stem_keys(model: RepVGG, layout: Layout) -> list[str]:
    return [torch_key(model, path, layout) for path in _STEMS]


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    return {tuple(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _template(model: RepVGG, in_channels: int) -> Any:
    images = jax.ShapeDtypeStruct((1, 32, 32, in_channels), model.param_dtype)
    init: Callable[..., Any] = lambda key, x: model.init(key, x, train=False)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0), images)


def _is_head(names: tuple[str, ...]) -> bool:
    return names[-2] == "head"


def _fresh_heads(model: RepVGG, template: Any, key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
    """The classifiers, initialised; jit leaves out the rest of the network."""
    stems = [leaf.shape for path, leaf in _by_path(template).items() if path in _STEMS]

    def init(key: jax.Array) -> dict[str, jax.Array]:
        variables = model.init(key, jnp.zeros((1, 32, 32, stems[0][2]), model.param_dtype), train=False)
        return {"/".join(path): leaf for path, leaf in _by_path(variables).items() if _is_head(path)}

    return {tuple(name.split("/")): leaf for name, leaf in jax.jit(init)(key).items()}


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.numpy()
    return np.asarray(value)


def _is_squeeze_excite(names: tuple[str, ...]) -> bool:
    return names[-1] == "kernel" and names[-2] in ("down", "up")


def _torch_shape(names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch_layout(names, np.broadcast_to(np.zeros(()), shape)).shape


def _to_torch_layout(names: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 2:
        value = value.T
        # PyTorch's squeeze-excite is a pair of 1×1 convolutions.
        return value[:, :, None, None] if _is_squeeze_excite(names) else value
    return value


def _from_torch_layout(names: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if _is_squeeze_excite(names):
        return value[:, :, 0, 0].T
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
