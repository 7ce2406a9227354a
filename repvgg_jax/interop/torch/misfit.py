"""Weights that do not fit a model: a few lines on what differs, and which published network they are of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import NamedTuple

from repvgg_jax.interop.torch.keys import Layout, expected_shapes, find_block
from repvgg_jax.models import VARIANTS, RepVGG, create_model
from repvgg_jax.models.blocks import SqueezeExcitePosition
from repvgg_jax.terminal import printable

Shapes = Mapping[str, tuple[int, ...]]

_SHOWN = 6
_CHECK = "check the variant, strides, num_classes and deploy"
_KERNEL: dict[Layout, str] = {
    "official": r"stage(?P<stage>\d)(?P<half>_first|_second)?(\.blocks)?(\.(?P<number>\d+))?"
    r"\.(rbr_dense\.conv|rbr_reparam)\.weight",
    "timm": r"(stem|stages\.(?P<stage>\d)(?P<half>)\.(?P<number>\d+))\.(conv_kxk\.conv|reparam_conv)\.weight",
}
_CLASSIFIERS = ("linear.weight", "head.fc.weight")


class Architecture(NamedTuple):
    """The settings that tell one RepVGG from another. The fields are those of the model."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    groups: int
    squeeze_excite: SqueezeExcitePosition | None
    plus: bool


def require_fit(
    model: RepVGG, layout: Layout, expected: Shapes, found: Shapes, heads: set[str], *, ignore_heads: bool
) -> None:
    """Check that a state dict has the keys and shapes of a model.

    Args:
      model: The model, for the message.
      layout: The layout that the keys are of.
      expected: Shapes of the model by key.
      found: Shapes of the state dict by key.
      heads: Keys of the classifiers.
      ignore_heads: Whether the classifiers may be anything.

    Raises:
      ValueError: If they differ. The message names the first few keys of each kind, and the published network that the
        weights are of.
    """
    differing = {name for name in {*expected, *found} if expected.get(name) != found.get(name)}
    if ignore_heads:
        differing -= heads
    if not differing:
        return
    form = "deploy" if model.deploy else "training"
    remedy = "the rest does: give its num_classes, or head='reinit' to initialise classifiers for yours"
    if not differing <= heads:
        remedy = _diagnose(model, layout, found) or _CHECK
    raise ValueError(
        f"the state dict ({layout} layout) does not fit this model ({form} form, {model.num_classes} classes, "
        f"depths {model.depths}, widths {model.widths}); {remedy}:\n  "
        + "\n  ".join(_examples(differing, expected, found))
    )


def _examples(differing: set[str], expected: Shapes, found: Shapes) -> list[str]:
    """Return a line for a few of the keys that differ, of each kind; kernels first, which say the most."""
    kinds: dict[str, list[str]] = {"shape": [], "missing": [], "unexpected": []}
    for name in sorted(differing, key=lambda name: (-len(expected.get(name, found.get(name, ()))), name)):
        shown = printable(name)
        if name not in found:
            kinds["missing"].append(f"missing {shown} {expected[name]}")
        elif name not in expected:
            kinds["unexpected"].append(f"unexpected {shown} {found[name]}")
        else:
            kinds["shape"].append(f"{shown} has shape {found[name]}, expected {expected[name]}")
    each = _SHOWN // sum(map(bool, kinds.values()))
    lines = [line for kind in kinds.values() for line in kind[:each]]
    more = len(differing) - len(lines)
    return [*lines, f"and {more} more"] if more else lines


def _diagnose(model: RepVGG, layout: Layout, found: Shapes) -> str:
    """Say which published network the weights are of, and what to do; nothing where that cannot be told."""
    architecture = _architecture(layout, found)
    if architecture is None:
        return ""
    deploy, block = any("reparam" in name for name in found), find_block(found)
    strides = _strides(layout, found)
    form = "deploy" if deploy else "training"
    names = [name for name in VARIANTS if _published(name) == architecture]
    if not deploy and not model.deploy and block != model.block:
        return f"these are weights of {block} blocks, the model has {model.block} ones: give block={block!r}"
    if not names and architecture == _architecture_of(model):
        return ""
    if not names:
        return (
            f"no published network has depths {architecture.depths}, widths {architecture.widths} and groups "
            f"{architecture.groups}, as the weights have; {_CHECK}"
        )
    shapes = [found[name] for name in _CLASSIFIERS if len(found.get(name, ())) == 2]
    classes = shapes[0][0] if shapes else model.num_classes
    fitting = create_model(names[0], num_classes=max(1, classes), block=block, deploy=deploy, strides=strides)
    wanted = expected_shapes(fitting, layout, _in_channels(layout, found))
    sure = dict(wanted.values()) == dict(found)
    classifier = f"{classes} classes" if shapes else "no classifier"
    told = "".join(f", stride 1 in stage{stage}" for stage, stride in enumerate(strides) if stride == 1)
    weights = f"these {'are' if sure else 'resemble'} the weights of {names[0]} in its {form} form, {classifier}{told}"
    if architecture != _architecture_of(model):
        return f"{weights}: give that variant"
    return f"{weights}; {_CHECK}"


def _architecture(layout: Layout, found: Shapes) -> Architecture | None:
    """Read the architecture off the 3×3 kernels, one a block; None where they are not those of stem and four stages."""
    blocks: dict[tuple[int, bool, int], tuple[int, ...]] = {}
    for name, shape in found.items():
        match = re.fullmatch(_KERNEL[layout], name)
        if match is None:
            continue
        if len(shape) != 4 or 0 in shape:
            return None
        stage = int(match["stage"] or 0)
        if layout == "timm" and match["stage"] is not None:
            stage += 1
        blocks[stage, match["half"] == "_second", int(match["number"] or 0)] = shape
    order = sorted(blocks)
    stages = [[blocks[where] for where in order if where[0] == stage] for stage in range(5)]
    if not all(stages):
        return None
    kernels = [blocks[where] for where in order]
    groups = max(before[0] // kernel[1] for before, kernel in itertools.pairwise(kernels))
    after = any(".post_se." in name for name in found)
    before = any(".se." in name or ".attn." in name for name in found)
    return Architecture(
        depths=tuple(map(len, stages[1:])),
        widths=tuple(stage[0][0] for stage in stages),
        groups=groups,
        squeeze_excite="after_relu" if after else "before_relu" if before else None,
        plus=any(".blocks." in name for name in found),
    )


def _published(name: str) -> Architecture:
    return _architecture_of(create_model(name))


def _architecture_of(model: RepVGG) -> Architecture:
    return Architecture(model.depths, model.widths, model.groups, model.squeeze_excite, model.auxiliary_heads)


def _strides(layout: Layout, found: Shapes) -> tuple[int, ...]:
    """Return the strides of stem and stages: 1 where an identity branch in a first block tells so, 2 elsewhere."""
    first = {
        "official": r"stage(\d)(?:_first)?(?:\.blocks)?\.0\.rbr_identity\.weight",
        "timm": r"stages\.(\d)\.0\.identity\.weight",
    }[layout]
    told = {int(match[1]) + (layout == "timm") for name in found if (match := re.fullmatch(first, name))}
    return tuple(1 if stage in told else 2 for stage in range(5))


def _in_channels(layout: Layout, found: Shapes) -> int:
    stem = "stage0." if layout == "official" else "stem."
    shapes = (shape for name, shape in found.items() if re.fullmatch(_KERNEL[layout], name) and name.startswith(stem))
    return next((shape[1] for shape in shapes if len(shape) == 4), 3)
