"""The names that PyTorch code has for the leaves of a RepVGG, and how it lays them out. It needs no PyTorch.

Layouts:
  official: https://github.com/DingXiaoH/RepVGG (`stage1.0.rbr_dense.conv.weight`, `linear.weight`; RepVGGplus nests
    blocks, `stage1.blocks.0…`, and splits stage 3 in `stage3_first` and `stage3_second`). QARepVGG, of
    https://github.com/cxxgtxy/QARepVGG, has the same names but for its blocks' own (`stage1.0.rbr_1x1.weight`,
    `stage1.0.bn.weight`).
  timm: https://github.com/huggingface/pytorch-image-models, `timm/models/byobnet.py`
    (`stages.0.0.conv_kxk.conv.weight`, `head.fc.weight`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import jax
import numpy as np

from repvgg_jax.models import RepVGG
from repvgg_jax.models.repvgg import BlockKind
from repvgg_jax.models.shapes import abstract_variables
from repvgg_jax.reparam.networks import AUXILIARY_HEADS

Layout = Literal["official", "timm"]
Path = tuple[str, ...]

_CHILDREN: dict[str, dict[str, str]] = {
    "official": {
        "branch_3x3": "rbr_dense",
        "branch_1x1": "rbr_1x1",
        "branch_identity": "rbr_identity",
        "bn_with_identity": "bn",
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


def find_layout(keys: Iterable[str]) -> Layout:
    """Return the layout that names are of: the official repository's, or timm's."""
    return "timm" if any(key.startswith("stem.") for key in keys) else "official"


def find_block(keys: Iterable[str]) -> BlockKind:
    """Return the block that names are of. Those of a deploy form, which do not tell, are taken for plain ones."""
    return "quantizable" if any(key.endswith(".rbr_1x1.weight") for key in keys) else "repvgg"


def torch_key(model: RepVGG, path: Path, layout: Layout) -> str:
    """Return the state-dict key of one leaf.

    Args:
      model: The network. RepVGGplus (`auxiliary_heads=True`) has keys of its own in the official layout.
      path: Path of the leaf, e.g. `('params', 'stage1_block1', 'branch_3x3', 'conv', 'kernel')`.
      layout: "official" or "timm".

    Returns:
      The key, e.g. 'stage1.0.rbr_dense.conv.weight'.

    Raises:
      ValueError: If the network is a RepVGGplus or has quantizable blocks, which timm does not have.
    """
    if layout == "timm" and (model.auxiliary_heads or model.block == "quantizable"):
        network = "RepVGGplus" if model.auxiliary_heads else "quantizable block"
        raise ValueError(f"timm has no {network}: expected layout='official'")
    _, unit, *children, leaf = path
    names: list[str]
    if unit == "head":
        names = ["linear"] if layout == "official" else ["head", "fc"]
    elif unit in AUXILIARY_HEADS:
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
    if stage != 3:
        return f"stage{stage}.blocks.{number - 1}"
    # Where the last auxiliary head stands.
    *_, middle = (block.name for block in model.blocks if block.auxiliary)
    first = int(middle.removeprefix("stage3_block"))
    return f"stage3_first.blocks.{number - 1}" if number <= first else f"stage3_second.blocks.{number - 1 - first}"


STEMS = (("params", "stem", "reparam", "kernel"), ("params", "stem", "branch_3x3", "conv", "kernel"))


def stem_keys(model: RepVGG, layout: Layout) -> list[str]:
    """Return the keys that the kernel of the stem can have."""
    return [torch_key(model, path, layout) for path in STEMS]


def expected_shapes(model: RepVGG, layout: Layout, in_channels: int) -> dict[Path, tuple[str, tuple[int, ...]]]:
    """Return key and shape of each leaf in PyTorch, by its path in the variables. Kernels are OIHW there.

    Args:
      model: The network, in the form of the state dict.
      layout: "official" or "timm".
      in_channels: Number of channels of the images.
    """
    leaves = by_path(abstract_variables(model, in_channels)).items()
    # A broadcast zero has the shape and takes no memory.
    hollow = {path: np.broadcast_to(np.zeros(()), leaf.shape) for path, leaf in leaves}
    return {path: (torch_key(model, path, layout), to_torch_layout(path, leaf).shape) for path, leaf in hollow.items()}


def by_path(tree: Any) -> dict[Path, Any]:
    """Return the leaves of a tree of dicts by path."""
    return {tuple(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def is_head(names: Path) -> bool:
    """Whether a path is that of a classifier's leaf."""
    return names[-2] == "head"


def to_torch_layout(names: Path, value: np.ndarray) -> np.ndarray:
    """Turn a kernel from HWIO into OIHW. Dense kernels are transposed."""
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    if value.ndim == 2:
        value = value.T
        # PyTorch's squeeze-excite is a pair of 1×1 convolutions.
        return value[:, :, None, None] if _is_squeeze_excite(names) else value
    return value


def from_torch_layout(names: Path, value: np.ndarray) -> np.ndarray:
    """Turn a kernel from PyTorch's layout into this package's: the inverse of `to_torch_layout`."""
    if _is_squeeze_excite(names):
        return value[:, :, 0, 0].T
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _is_squeeze_excite(names: Path) -> bool:
    return names[-1] == "kernel" and names[-2] in ("down", "up")
