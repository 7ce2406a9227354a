"""Where the weights of a network are in what PyTorch code saved: under which entry, behind which prefix.

A *checkpoint* is any nesting of dicts. An *entry* is a dict in it, or the tensors of one that share a prefix, with the
keys of a RepVGG: `{'model': …, 'ema': …}` has the entries 'model' and 'ema', and Lightning's
`{'state_dict': {'model.stage0…': …, 'ema_model.module.stage0…': …}}` has 'state_dict.model' and
'state_dict.ema_model.module'.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from repvgg_jax.interop.torch.tensors import require_dense

# What `.` in --entry stands for: tensors that lie in the checkpoint itself, without a prefix.
TOP = "."
# DataParallel, torch.compile, FSDP and activation checkpointing put these anywhere in a key.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Names that say a moving average or an average of epochs.
_AVERAGES = {"ema", "swa", "averaged", "average", "avg"}
_USUAL = ("state_dict", "model", "model_state_dict", "model_state", "net", "params", "ema")
_UNITS = re.compile(r"(?:stage[0-4]|stage3_first|stage3_second|stem|stages)$")
_PARTS = {"rbr_dense", "rbr_1x1", "rbr_identity", "rbr_reparam", "conv_kxk", "conv_1x1", "reparam_conv"}
_LEAVES = {"weight", "bias", "running_mean", "running_var"}
# What norms, torch's AveragedModel and thop, which counts multiply-adds, leave beside the weights.
_COUNTERS = {"num_batches_tracked", "n_averaged", "total_ops", "total_params"}
_DEEPEST = 6


class StateDict(NamedTuple):
    """The tensors of one network, and where they were.

    Attributes:
      tensors: Arrays or torch tensors, by the keys of an unwrapped module.
      entry: Dotted name of the entry that they were taken from: 'model', 'state_dict.ema_model.module'; '.' is the
        checkpoint itself.
      others: Entries that hold a network too.
      left: Keys beside the entry's that were left out, bookkeeping aside.
      average: Whether they are known to be an average, by the entry's name or by a count of what was averaged.
    """

    tensors: dict[str, Any]
    entry: str
    others: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    average: bool = False

    def describe(self) -> str:
        """Say in words for a terminal which weights were taken, and what was there beside them."""
        taken = "the weights at the top" if self.entry == TOP else f"the weights under {self.entry!r}"
        average = ", an average" if self.average else ""
        others = f"; there are others under {_quoted(self.others)}" if self.others else ""
        left = f"; left out: {_quoted(self.left)}" if self.left else ""
        return f"{taken}{average}{others}{left}"


class _Entry(NamedTuple):
    """An entry of a checkpoint: the dict, the prefix in its keys, and both as one dotted name."""

    holder: Mapping[Any, Any]
    prefix: str
    name: str

    @property
    def is_average(self) -> bool:
        # torch's AveragedModel keeps its count beside `module`, which it averages.
        outer = self.prefix.removesuffix("module.")
        counted = outer != self.prefix and f"{outer}n_averaged" in self.holder
        return counted or not _AVERAGES.isdisjoint(re.split(r"[._]", self.name.lower()))


def find_state_dict(checkpoint: Mapping[str, Any], entry: str | None = None) -> StateDict:
    """Find the tensors of a network in a state dict or in a checkpoint around one.

    Args:
      checkpoint: What `torch.load` returns, or a plain state dict.
      entry: Which weights to take where there are several: a dotted name or a part of one, e.g. 'ema', or '.' for those
        at the top. By default an average is taken before the weights that it is of.

    Returns:
      The tensors, without prefixes, optimizers, counters and `num_batches_tracked`.

    Raises:
      ValueError: If there is no such entry, several fit and none is the average of the others, keys have a prefix that
        others lack, or a value is no dense tensor.
    """
    entries = list(_entries(checkpoint, (), set()))
    if not entries:
        return _of_another_network(checkpoint, entry)
    chosen = _choose(entries, entry)
    tensors, left = _collect(chosen, entries)
    if left and entry is None:
        raise ValueError(
            f"the keys of the network begin with {chosen.prefix!r}, but not those of {_quoted(left)}; "
            f"entry={chosen.name!r} (--entry {chosen.name}) takes the network alone"
        )
    others = tuple(each.name for each in entries if each is not chosen)
    return StateDict(tensors, chosen.name, others, tuple(left), chosen.is_average)


def _entries(node: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]) -> Iterator[_Entry]:
    """Yield all entries below a dict, each dict once: a file can hold one under two names, or inside itself."""
    seen.add(id(node))
    prefixes = dict.fromkeys(
        split[0] for key, value in node.items() if _is_tensor(value) and (split := _split(key)) is not None
    )
    for prefix in prefixes:
        yield _Entry(node, prefix, ".".join([*path, *prefix.split(".")[:-1]]) or TOP)
    if len(path) == _DEEPEST:
        return
    for key, child in node.items():
        if isinstance(key, str) and isinstance(child, Mapping) and id(child) not in seen and "optim" not in key:
            yield from _entries(child, (*path, key), seen)


def _split(key: Any) -> tuple[str, str] | None:
    """Return the prefix of a key of a RepVGG block, and the key without it and without wrappers."""
    names = key.split(".") if isinstance(key, str) else []
    for start, name in enumerate(names):
        if _UNITS.match(name) and _PARTS.intersection(names[start:]):
            return "".join(f"{each}." for each in names[:start]), _unwrapped(names[start:])
    return None


def _unwrapped(names: Sequence[str]) -> str:
    return ".".join(name for name in names if name not in _WRAPPERS)


def _choose(entries: list[_Entry], entry: str | None) -> _Entry:
    fitting = entries
    if entry is not None:
        fitting = [each for each in entries if each.name == entry] or [
            each for each in entries if f".{entry}." in f".{each.name}."
        ]
        if not fitting:
            raise ValueError(f"there are no weights under {entry!r}: expected entry to be one of {_names(entries)}")
    if len(fitting) > 1:
        fitting = [each for each in fitting if each.is_average] or fitting
    if len(fitting) > 1:
        raise ValueError(
            f"there are weights of several networks, under {_names(fitting)}: choose with entry=… (--entry …)"
        )
    return fitting[0]


def _collect(chosen: _Entry, entries: list[_Entry]) -> tuple[dict[str, Any], list[str]]:
    """Return the tensors of an entry, and the keys beside them that are of no entry."""
    prefixes = [each.prefix for each in entries if each.holder is chosen.holder]
    tensors: dict[str, Any] = {}
    left = []
    for key, value in chosen.holder.items():
        if not isinstance(key, str):
            continue
        owner = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default=None)
        if owner is None:
            if _is_tensor(value) and not _is_counter(key, value) and not _is_single(value):
                left.append(key)
        elif owner == chosen.prefix:
            name = _unwrapped(key.removeprefix(owner).split("."))
            if _is_counter(name, value):
                continue
            if not _is_tensor(value):
                raise ValueError(f"{key!r} is a {type(value).__name__}, expected a tensor")
            if name in tensors:
                raise ValueError(f"{name!r} is there twice, once as {key!r}: expected each tensor under one key")
            require_dense(key, value)
            tensors[name] = value
    return tensors, left


def _of_another_network(checkpoint: Mapping[str, Any], entry: str | None) -> StateDict:
    """Return the tensors of a state dict without one block of RepVGG: they are what they are, for the error to name."""
    state_dict, path = checkpoint, list[str]()
    while nested := [name for name in _USUAL if isinstance(state_dict.get(name), Mapping)]:
        if len(path) == _DEEPEST:
            break
        state_dict, path = state_dict[nested[0]], [*path, nested[0]]
    if entry is not None and entry not in (TOP, ".".join(path)):
        raise ValueError(
            f"there are no weights of a RepVGG under {entry!r}, or anywhere in {_quoted(list(checkpoint))}"
        )
    tensors = {}
    for key, value in state_dict.items():
        if not _is_tensor(value):
            raise ValueError(
                f"{key!r} is a {type(value).__name__}, expected a tensor: pass a state dict of a RepVGG, or a "
                f"checkpoint that holds one under {', '.join(map(repr, _USUAL))} or the like"
            )
        name = _unwrapped(str(key).split("."))
        if not _is_counter(name, value):
            require_dense(str(key), value)
            tensors[name] = value
    return StateDict(tensors, ".".join(path) or TOP)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(type(value), "shape")


def _is_counter(key: str, value: Any) -> bool:
    """Whether a value is bookkeeping: counters of norms and of averages, epochs, rates, settings."""
    *parents, leaf = key.split(".")
    if leaf in _LEAVES:
        return False
    if not _is_tensor(value):
        return not parents
    return leaf in _COUNTERS or (not parents and _is_single(value))


def _is_single(value: Any) -> bool:
    try:
        return all(size == 1 for size in value.shape)
    except RuntimeError:  # a nested tensor has no shape
        return False


def _names(entries: list[_Entry]) -> str:
    return _quoted([each.name for each in entries])


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
