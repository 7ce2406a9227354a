"""What the official PyTorch implementation returned, on parameters drawn by name.

`official_logits.npz` holds float64 logits of github.com/DingXiaoH/RepVGG in evaluation mode and its parameter
counts; `qarepvgg_logits.npz` the same of `QARepVGGBlockV2` in github.com/cxxgtxy/QARepVGG, for A0 and B1g4 (PyTorch
2.14.1); `state_dict_keys.json` the keys and shapes of its state dicts and of timm 1.0.22's.
"""

import functools
import json
import pathlib
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent

GOLDEN_NAMES = {
    **{f"repvgg_{n}": f"RepVGG-{n.upper()}" for n in ("a0", "a1", "a2", "b0", "b1", "b2", "b3")},
    **{f"repvgg_{n}": f"RepVGG-{n[0].upper()}{n[1:]}" for n in ("b1g2", "b1g4", "b2g2", "b2g4", "b3g2", "b3g4")},
    "repvgg_d2se": "RepVGG-D2se",
    "repvggplus_l2pse": "RepVGGplus-L2pse",
}


@functools.cache
def _arrays():
    return np.load(HERE / "official_logits.npz")


def parameter_counts(golden_name):
    """Trainable parameters of the training form and of the deploy form."""
    return tuple(int(n) for n in _arrays()[f"{golden_name}/params"])


def logits(golden_name, size, head="main"):
    return _arrays()[f"{golden_name}/{size}/{head}"]


@functools.cache
def qarepvgg():
    """Logits by 'QARepVGGV2-A0/64' and the like, and numbers of parameters by 'QARepVGGV2-A0/params'."""
    with np.load(HERE / "qarepvgg_logits.npz") as arrays:
        return dict(arrays)


@functools.cache
def state_dict_shapes(layout_and_name):
    """`{key: shape}` of 'official/RepVGG-A0', 'timm-fused/repvgg_a0' and the like."""
    return json.loads((HERE / "state_dict_keys.json").read_text())[layout_and_name]


def draw_tensor(key, shape):
    """The value of one tensor of the official state dict, by its key."""
    rng = np.random.default_rng(zlib.crc32(f"repvgg-golden/{key}".encode()))
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_mean" or leaf == "bias":
        return rng.uniform(-0.1, 0.1, shape)
    if leaf == "running_var":
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) == 1:
        return rng.uniform(0.5, 1.0, shape)
    return rng.normal(0.0, np.prod(shape[1:]) ** -0.5, shape)


def draw_images(size):
    """The two images the logits belong to, `(2, size, size, 3)`."""
    rng = np.random.default_rng(zlib.crc32(f"repvgg-golden/image{size}".encode()))
    return rng.uniform(-1, 1, (2, 3, size, size)).transpose(0, 2, 3, 1)
