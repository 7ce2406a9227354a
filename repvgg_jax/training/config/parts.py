"""The settings of a training run by topic: each part a frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from repvgg_jax.fields import Bound, at_least, below, bounded, check_fields, require, within
from repvgg_jax.models import RepVGG, create_model
from repvgg_jax.preprocess import Normalization, Preprocess


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network, and the precision it computes in."""

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

    def __post_init__(self) -> None:
        check_fields(self)
        self.create_model(num_classes=1)

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


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """What the network's weights are before the first step."""

    init_from: str | None = None
    """Run directory to start from (fine-tuning): its weights, and its mean and std where none are given."""
    reopen: bool = False
    """Start from a deploy.safetensors: its kernels in 3×3 branches with batch norms that change nothing."""
    whiten_stem: bool = False
    """Begin with a stem that decorrelates the pixels of a training batch: fewer epochs on small images."""
    residual_scale: float | None = bounded(None, within(0, 1))
    """Start the 3×3 and 1×1 norms beside an identity branch at this scale (try 0.25), not at 1; None: as published."""

    def __post_init__(self) -> None:
        check_fields(self)
        reopens_a_file = not self.reopen or str(self.init_from).endswith(".safetensors")
        require(self, "init_from", reopens_a_file, "a deploy.safetensors, since reopen is given")
        if self.init_from is not None:
            require(
                self, "whiten_stem", not self.whiten_stem, "False (--no-whiten-stem), since init_from gives all weights"
            )
            require(
                self,
                "residual_scale",
                self.residual_scale is None,
                "None (--residual-scale None), since init_from gives all weights",
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The images, and how they are read."""

    dataset: str = "digits"
    """'digits' (bundled), any TFDS name with an image and a label ('cifar10'), or 'folder:PATH'."""
    data_dir: str | None = None
    """Where TFDS data sets lie prepared; TFDS' own default (~/tensorflow_datasets) where not given."""
    image_size: int = bounded(32, at_least(1))
    """Side length of the square images the network sees, in pixels."""
    random_resized_crop: bool = False
    """Train on random crops of 8 to 100 % of the image's area (ImageNet); decoded on the host."""
    eval_image_size: int | None = bounded(None, at_least(1))
    """The image_size of evaluation and of the deploy form's input; image_size where not given."""
    eval_resize: int | None = None
    """In evaluation resize the shorter side to this first, then crop the centre (ImageNet: 256 for 224)."""
    eval_batch_size: int = bounded(256, at_least(1))
    """Images in an evaluation step, over all devices."""
    mean: tuple[float, ...] | None = None
    """Channel means in [0, 1] units; measured on the training split where not given."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations in [0, 1] units; measured on the training split where not given."""
    num_workers: int = bounded(0, at_least(0))
    """Processes that decode images; 0 decodes in threads, which is quicker for small images."""

    def __post_init__(self) -> None:
        check_fields(self)
        size = "image_size" if self.eval_image_size is None else "eval_image_size"
        resizes_enough = self.eval_resize is None or self.eval_resize >= self.evaluation_size
        require(self, "eval_resize", resizes_enough, f"at least {size} (={self.evaluation_size})")
        both = (self.mean is None) == (self.std is None)
        require(self, "mean", both, f"mean and std, or neither; std is {self.std}")
        channels = self.mean is None or len(self.mean) in (1, 3)
        require(self, "mean", channels, "1 value for gray images, 3 for RGB")

    @property
    def evaluation_size(self) -> int:
        """Side length of the images in evaluation."""
        return self.image_size if self.eval_image_size is None else self.eval_image_size

    @property
    def normalization(self) -> Normalization | None:
        """The mean and standard deviation that are given, if they are."""
        return None if self.mean is None or self.std is None else Normalization(self.mean, self.std)

    def preprocess(self, normalization: Normalization, class_names: Sequence[str]) -> Preprocess:
        """What the network expects of an image, and what its logits are called.

        Args:
          normalization: of the run, given or measured.
          class_names: one for each logit.

        Raises:
          ValueError: as `Preprocess`.
        """
        return Preprocess(
            image_size=self.evaluation_size,
            channels=normalization.channels,
            mean=normalization.mean,
            std=normalization.std,
            eval_resize=self.eval_resize,
            class_names=tuple(class_names),
        )


@dataclasses.dataclass(frozen=True)
class AugmentationConfig:
    """What happens to training images and their targets on the device."""

    crop_padding: int = bounded(4, at_least(0))
    """Zero-pad by this many pixels and crop at random; 0 switches it off."""
    flip: bool = True
    """Mirror half of the training images left to right."""
    alternate_flip: bool = False
    """With flip: not half of them at random, but one half and the other in turn, an epoch each."""
    trivial_augment: bool = False
    """Change each training image by one of 14 operations, at random strength (TrivialAugment)."""
    color_jitter: float = bounded(0.0, within(0, 1))
    """Scale brightness, contrast and saturation by random factors in [1 - this, 1 + this]; 0 switches it off."""
    cutout: int = bounded(0, at_least(0))
    """Blank a square of this many pixels a side at a random place of each training image; 0 switches it off."""
    mixup: float = bounded(0.0, at_least(0))
    """Blend images and targets pairwise with a weight from Beta(this, this); 0 switches it off."""
    cutmix: float = bounded(0.0, at_least(0))
    """Paste a box of another image, its area from Beta(this, this); 0 is off. With mixup: a coin toss a batch."""
    label_smoothing: float = bounded(0.0, below(0, 1))
    """Share of the target spread evenly over all classes."""
    refine_epochs: int = bounded(0, at_least(0))
    """Leave trivial_augment, color_jitter, cutout, mixup, cutmix out of so many last epochs; at most half of all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "flip", self.flip or not self.alternate_flip, "True where alternate_flip is")

    def refined(self) -> AugmentationConfig:
        """Without what distorts or mixes images."""
        return dataclasses.replace(self, trivial_augment=False, color_jitter=0.0, cutout=0, mixup=0.0, cutmix=0.0)


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """The steps: how many, of which size, by which rule."""

    epochs: int = bounded(120, at_least(1))
    """Passes over the training split."""
    batch_size: int = bounded(256, at_least(1))
    """Images in a training step, over all devices."""
    learning_rate: float = bounded(0.1, Bound(lambda rate: rate > 0, "more than 0"))
    """Peak learning rate of SGD, for batches of learning_rate_batch_size images."""
    learning_rate_batch_size: int = bounded(256, at_least(1))
    """Batch size that learning_rate is meant for; the rate used is learning_rate × batch_size / this."""
    warmup_epochs: float = bounded(0.0, at_least(0))
    """Epochs of linear warm-up from 0 before the rate falls to 0; at most half of all epochs."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls from its peak to 0 at the last step: as a cosine, or in a straight line."""
    momentum: float = bounded(0.9, below(0, 1))
    """Momentum of SGD and of Muon."""
    nesterov: bool = True
    """Nesterov's momentum instead of the classical one."""
    weight_decay: float = bounded(1e-4, at_least(0))
    """L2 on kernels and identity-norm scales; biases and the scales of 3x3 and 1x1 norms are exempt."""
    muon_learning_rate: float = bounded(0.0, at_least(0))
    """Peak rate of Muon for convolution kernels, whatever the batch; SGD does the rest. 0: SGD does all."""
    muon_weight_decay: float = bounded(0.05, at_least(0))
    """Of those kernels, in place of weight_decay: a step shrinks them by this times the rate."""
    grad_clip_norm: float = bounded(0.0, at_least(0))
    """Scale the gradient of the loss down to this global norm, before weight decay is added; 0 switches it off."""
    skip_nonfinite: bool = False
    """Leave out steps whose loss or gradients are not finite, and count them, instead of stopping."""
    accumulate_steps: int = bounded(1, at_least(1))
    """Microbatches a batch is split into, one after the other: less memory; batch norm sees each by itself."""
    ema_decay: float = bounded(0.0, below(0, 1))
    """Evaluate, fuse and save a moving average of parameters and statistics with this decay a step; 0 is off."""
    auxiliary_weight: float = bounded(0.1, at_least(0))
    """Weight of each auxiliary head's loss (RepVGGplus only)."""

    def __post_init__(self) -> None:
        check_fields(self)
        divides = self.batch_size % self.accumulate_steps == 0
        require(self, "accumulate_steps", divides, f"a divisor of batch_size (={self.batch_size})")

    @property
    def peak_learning_rate(self) -> float:
        """The rate at the end of warm-up, scaled linearly with the batch size (Goyal et al., arXiv:1706.02677)."""
        return self.learning_rate * self.batch_size / self.learning_rate_batch_size


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved while the run goes on."""

    checkpoint_every: int = bounded(1, at_least(1))
    """Epochs between checkpoints; the last epoch always has one."""
    keep_checkpoints: int = bounded(2, at_least(1))
    """Newest checkpoints kept, besides the one of the best test accuracy."""

    def __post_init__(self) -> None:
        check_fields(self)
