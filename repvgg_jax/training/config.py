"""What a training run is made of: one flat, frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from repvgg_jax.fields import read_object, require_types
from repvgg_jax.files import write_whole
from repvgg_jax.interop.deploy_metadata import DeployMetadata
from repvgg_jax.models import RepVGG, create_model
from repvgg_jax.preprocess import Preprocess

# Every config that was ever saved holds these; where one is lacking, its default would be another network.
_ALWAYS = ("variant", "strides", "depths", "width_multiplier", "dataset", "image_size", "mean", "std")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. The batch size is the global one, whatever the number of devices."""

    variant: str = "repvgg_a0"
    """Published network to start from: repvgg_a0 … repvgg_b3g4, repvgg_d2se, repvggplus_l2pse."""
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    """Strides of the stem and of stage 1 to 4; small images want fewer 2s."""
    depths: tuple[int, int, int, int] | None = None
    """Blocks in stage 1 to 4, in place of the variant's."""
    width_multiplier: tuple[float, float, float, float] | None = None
    """Factors on the channels 64, 128, 256, 512 of stage 1 to 4, in place of the variant's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters and batch statistics stay float32."""
    frozen: Literal["stem", "stage1", "stage2", "stage3", "stage4"] | None = None
    """Do not train the network up to this part; its batch norms use their running statistics. With init_from."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    init_from: str | None = None
    """Run directory to start from (fine-tuning): its weights, and its mean and std where none are given."""
    reopen: bool = False
    """Start from a deploy.safetensors: its kernels in 3×3 branches with batch norms that change nothing."""
    whiten_stem: bool = False
    """Begin with a stem that decorrelates the pixels of a training batch: fewer epochs on small images."""
    residual_scale: float | None = None
    """Start the 3×3 and 1×1 norms beside an identity branch at this scale (try 0.25), not at 1; None: as published."""

    dataset: str = "digits"
    """'digits' (bundled), any TFDS name with an image and a label ('cifar10'), or 'folder:PATH'."""
    data_dir: str | None = None
    """Where TFDS data sets lie prepared; TFDS' own default (~/tensorflow_datasets) where not given."""
    image_size: int = 32
    """Side length of the square images the network sees, in pixels."""
    eval_image_size: int | None = None
    """The same in evaluation and of the deploy form's input; image_size where not given."""
    eval_resize: int | None = None
    """In evaluation resize the shorter side to this first, then crop the centre (ImageNet: 256 for 224)."""
    random_resized_crop: bool = False
    """Train on random crops of 8 to 100 % of the image's area (ImageNet); decoded on the host."""
    crop_padding: int = 4
    """Zero-pad by this many pixels and crop at random, on the device; 0 switches it off."""
    flip: bool = True
    """Mirror half of the training images left to right, on the device."""
    alternate_flip: bool = False
    """With flip: not half of them at random, but one half and the other in turn, an epoch each."""
    trivial_augment: bool = False
    """Change each training image by one of 14 operations, at random strength, on the device (TrivialAugment)."""
    color_jitter: float = 0.0
    """Scale brightness, contrast and saturation by random factors in [1 - this, 1 + this]; 0 switches it off."""
    cutout: int = 0
    """Blank a square of this many pixels a side at a random place of each training image; 0 switches it off."""
    mixup: float = 0.0
    """Blend images and targets pairwise with a weight from Beta(this, this); 0 switches it off."""
    cutmix: float = 0.0
    """Paste a box of another image, its area from Beta(this, this); 0 is off. With mixup: a coin toss a batch."""
    refine_epochs: int = 0
    """Leave trivial_augment, color_jitter, cutout, mixup, cutmix out of so many last epochs; at most half of all."""
    mean: tuple[float, ...] | None = None
    """Channel means in [0, 1] units; measured on the training split where not given."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations in [0, 1] units; measured on the training split where not given."""
    num_workers: int = 0
    """Processes that decode images; 0 decodes in threads, which is quicker for small images."""

    epochs: int = 120
    """Passes over the training split."""
    batch_size: int = 256
    """Images in a training step, over all devices."""
    eval_batch_size: int = 256
    """Images in an evaluation step, over all devices."""
    learning_rate: float = 0.1
    """Peak learning rate of SGD, for batches of learning_rate_batch_size images."""
    learning_rate_batch_size: int = 256
    """Batch size that learning_rate is meant for; the rate used is learning_rate × batch_size / this."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from 0 before the rate falls to 0; at most half of all epochs."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls from its peak to 0 at the last step: as a cosine, or in a straight line."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Nesterov's momentum instead of the classical one."""
    weight_decay: float = 1e-4
    """L2 on kernels and identity-norm scales; biases and the scales of 3x3 and 1x1 norms are exempt."""
    muon_learning_rate: float = 0.0
    """Peak rate of Muon for convolution kernels, whatever the batch; SGD does the rest. 0: SGD does all."""
    muon_weight_decay: float = 0.05
    """Of those kernels, in place of weight_decay: a step shrinks them by this times the rate."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    grad_clip_norm: float = 0.0
    """Scale the gradient of the loss down to this global norm, before weight decay is added; 0 switches it off."""
    skip_nonfinite: bool = False
    """Leave out steps whose loss or gradients are not finite, and count them, instead of stopping."""
    accumulate_steps: int = 1
    """Microbatches a batch is split into, one after the other: less memory; batch norm sees each by itself."""
    ema_decay: float = 0.0
    """Evaluate, fuse and save a moving average of parameters and statistics with this decay a step; 0 is off."""
    auxiliary_weight: float = 0.1
    """Weight of each auxiliary head's loss (RepVGGplus only)."""

    checkpoint_every: int = 1
    """Epochs between checkpoints; the last epoch always has one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the one of the best test accuracy."""
    seed: int = 0
    """Of initialisation, data order, augmentation and drawn splits."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        require_types(self)
        self.create_model(num_classes=1)
        at_least = dict(
            image_size=1, epochs=1, batch_size=1, eval_batch_size=1, checkpoint_every=1, keep_checkpoints=1,
            crop_padding=0, num_workers=0, warmup_epochs=0, weight_decay=0, auxiliary_weight=0, seed=0,
            cutout=0, mixup=0, cutmix=0, learning_rate_batch_size=1, accumulate_steps=1, grad_clip_norm=0,
            muon_learning_rate=0, muon_weight_decay=0, refine_epochs=0,
        )  # fmt: skip
        for name, bound in at_least.items():
            _require(getattr(self, name) >= bound, name, getattr(self, name), f"at least {bound}")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _require(
            not self.reopen or str(self.init_from).endswith(".safetensors"),
            "init_from",
            self.init_from,
            "a deploy.safetensors, since reopen is given",
        )
        _require(
            self.frozen is None or self.init_from is not None,
            "frozen",
            self.frozen,
            "init_from as well: without a run to start from, what is frozen would stay random",
        )
        _require(
            self.init_from is None or (not self.whiten_stem and self.residual_scale is None),
            "whiten_stem and residual_scale",
            (self.whiten_stem, self.residual_scale),
            "False and None (--no-whiten-stem --residual-scale None), since init_from gives all weights",
        )
        scale = self.residual_scale
        _require(scale is None or 0 <= scale <= 1, "residual_scale", scale, "None or in [0, 1]")
        _require(not self.whiten_stem or self.image_size >= 3, "image_size", self.image_size, "at least 3 to whiten")
        _require(not self.alternate_flip or self.flip, "flip", self.flip, "True where alternate_flip is")
        _require(
            not (self.alternate_flip and self.random_resized_crop),
            "alternate_flip",
            self.alternate_flip,
            "False with random_resized_crop, which leaves nothing to know an image by",
        )
        _require(0 <= self.color_jitter <= 1, "color_jitter", self.color_jitter, "in [0, 1]")
        _require(self.cutout <= self.image_size, "cutout", self.cutout, f"at most image_size (={self.image_size})")
        _require(
            self.batch_size % self.accumulate_steps == 0,
            "accumulate_steps",
            self.accumulate_steps,
            f"a divisor of batch_size (={self.batch_size})",
        )
        _require(self.seed < 2**63, "seed", self.seed, "less than 2**63")
        _require(
            (self.mean is None) == (self.std is None),
            "mean and std",
            (self.mean, self.std),
            "both or neither",
        )
        size, resize = self.eval_image_size, self.eval_resize
        _require(size is None or size >= 1, "eval_image_size", size, "at least 1")
        _require(
            resize is None or resize >= self.evaluation_size,
            "eval_resize",
            resize,
            f"at least {'image_size' if size is None else 'eval_image_size'} (={self.evaluation_size})",
        )
        channels = 1 if self.mean is None else len(self.mean)
        _require(channels in (1, 3), "mean", self.mean, "1 value for gray images, 3 for RGB")
        # What no deploy form can be saved with would otherwise be found when the training is over.
        stand_in = Preprocess(self.evaluation_size, 1, (0.0,), (1.0,), self.eval_resize, class_names=("any",))
        preprocess = stand_in if self.mean is None else self.preprocess(class_names=("any",))
        DeployMetadata.of(self.variant, self.create_model(num_classes=1).clone(deploy=True), preprocess)

    def create_model(self, num_classes: int) -> RepVGG:
        """Build the network, in its training form."""
        return create_model(
            self.variant,
            num_classes=num_classes,
            strides=self.strides,
            depths=self.depths,
            width_multiplier=self.width_multiplier,
            dtype=jnp.bfloat16 if self.dtype == "bfloat16" else None,
            remat=self.remat,
            frozen=self.frozen,
        )

    def preprocess(self, class_names: Sequence[str]) -> Preprocess:
        """What the network expects of an image, and what its logits are called.

        Raises:
          ValueError: the normalisation is not filled in, or as `Preprocess`.
        """
        mean, std = self.normalization
        return Preprocess(
            image_size=self.evaluation_size,
            channels=len(mean),
            mean=mean,
            std=std,
            eval_resize=self.eval_resize,
            class_names=tuple(class_names),
        )

    @property
    def evaluation_size(self) -> int:
        """Side length of the images in evaluation."""
        return self.image_size if self.eval_image_size is None else self.eval_image_size

    def at_epoch(self, epoch: int) -> TrainConfig:
        """The settings of one epoch, counted from 1; those of the last `refine_epochs` have no strong augmentation.

        As many epochs at most as come before them, so that a preset cut short still trains as it is meant to.

        References:
          He et al., *Data Augmentation Revisited*, arXiv:1909.09148.
        """
        if epoch <= self.epochs - min(self.refine_epochs, self.epochs // 2):
            return self
        return dataclasses.replace(self, trivial_augment=False, color_jitter=0.0, cutout=0, mixup=0.0, cutmix=0.0)

    @property
    def peak_learning_rate(self) -> float:
        """The rate at the end of warm-up, scaled linearly with the batch size (Goyal et al., arXiv:1706.02677)."""
        return self.learning_rate * self.batch_size / self.learning_rate_batch_size

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, filled in.

        Raises:
          ValueError: they are not.
        """
        if self.mean is None or self.std is None:
            raise ValueError("mean and std are None: fill them in, with repvgg_jax.data.measure_normalization")
        return self.mean, self.std

    def save(self, path: Path) -> None:
        """Write the config as JSON."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Read a config that `save` wrote.

        Raises:
          ValueError: the file is no config, lacks what says which network it is, or holds fields or values that this
            version does not know; it is named, and the field is.
        """
        try:
            values = read_object(path)
            lacking = set(_ALWAYS) - set(values)
            unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
            for verdict, names in (("it lacks", lacking), ("it has the unknown", unknown)):
                if names:
                    raise ValueError(f"{verdict} {', '.join(sorted(names))}")
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{path} is not a config of this version of repvgg_jax: {error}") from None


def _require(holds: bool, field: str, found: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"{field} is {found}: expected {expected}")
