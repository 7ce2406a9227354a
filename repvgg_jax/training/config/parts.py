"""The settings of a training run by topic. Each part is a frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from repvgg_jax.fields import Bound, at_least, below, bounded, check_fields, require, within
from repvgg_jax.models import RepVGG, create_model
from repvgg_jax.models.repvgg import BlockKind
from repvgg_jax.preprocess import Normalization, Preprocess


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The network, and the precision that it computes in."""

    variant: str = "repvgg_a0"
    """Published network to train, from repvgg_a0 to repvgg_b3g4, or repvgg_d2se or repvggplus_l2pse."""
    block: BlockKind = "repvgg"
    """Block to train: repvgg, or quantizable (QARepVGG), whose deploy form keeps its accuracy in 8 bits."""
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)
    """Strides of the stem and of stage 1 to 4, each 1 or 2. Small images want fewer 2s."""
    depths: tuple[int, int, int, int] | None = None
    """Numbers of blocks in stage 1 to 4, in place of those of the variant."""
    width_multiplier: tuple[float, float, float, float] | None = None
    """Factors on the channels 64, 128, 256, 512 of stage 1 to 4, in place of those of the variant."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation. Parameters and batch statistics stay float32."""
    frozen: Literal["stem", "stage1", "stage2", "stage3", "stage4"] | None = None
    """Do not train the network up to this part. Its batch norms use their running statistics. It needs init_from."""
    remat: bool = False
    """Compute activations anew in the backward pass. This takes less memory and more time."""

    def __post_init__(self) -> None:
        check_fields(self)
        self.create_model(num_classes=1)

    @property
    def description(self) -> str:
        """The variant, and the block where it is not the published one."""
        return self.variant if self.block == "repvgg" else f"{self.variant} of {self.block} blocks"

    def create_model(self, num_classes: int) -> RepVGG:
        """Build the network in its training form."""
        return create_model(
            self.variant,
            num_classes=num_classes,
            strides=self.strides,
            depths=self.depths,
            width_multiplier=self.width_multiplier,
            block=self.block,
            dtype=jnp.bfloat16 if self.dtype == "bfloat16" else None,
            remat=self.remat,
            frozen=self.frozen,
        )


@dataclasses.dataclass(frozen=True)
class StartConfig:
    """The weights of the network before the first step."""

    init_from: str | None = None
    """Run directory that gives the weights, and mean and std where none are given. With reopen it is a file."""
    reopen: bool = False
    """Let init_from be a deploy.safetensors. Its kernels become 3×3 branches whose batch norms change nothing."""
    whiten_stem: bool = False
    """Start with a stem that decorrelates the pixels of a training batch. Small images then need fewer epochs."""
    residual_scale: float | None = bounded(None, within(0, 1))
    """Start the 3×3 and 1×1 norms beside an identity branch at this scale; try 0.25. None starts them at 1."""

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
    """'digits' (needs no download), 'folder:PATH', or any TFDS name with an image and a label, e.g. 'cifar10'."""
    data_dir: str | None = None
    """Directory of prepared TFDS data sets. The default is TFDS_DATA_DIR, or else ~/tensorflow_datasets."""
    image_size: int = bounded(32, at_least(1))
    """Side length in pixels of the square images that the network sees."""
    random_resized_crop: bool = False
    """Train on random crops of 8 to 100 % of an image's area, as for ImageNet. The host cuts them out."""
    eval_image_size: int | None = bounded(None, at_least(1))
    """Side length in pixels of the images in evaluation and of the deploy form. The default is image_size."""
    eval_resize: int | None = None
    """Length in pixels that evaluation resizes the shorter side to before the centre crop. ImageNet has 256 for 224."""
    eval_batch_size: int = bounded(256, at_least(1))
    """Number of images in an evaluation step, over all devices."""
    mean: tuple[float, ...] | None = None
    """Means of the channels, for pixels in [0, 1]. By default they are measured on the training split."""
    std: tuple[float, ...] | None = None
    """Standard deviations of the channels, for pixels in [0, 1]. By default they are measured like the means."""
    num_workers: int = bounded(0, at_least(0))
    """Number of processes that decode images. 0 decodes in threads, which is faster for small images."""

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
        """Side length of the images in evaluation, in pixels."""
        return self.image_size if self.eval_image_size is None else self.eval_image_size

    @property
    def normalization(self) -> Normalization | None:
        """The mean and the standard deviation that are given, or None."""
        return None if self.mean is None or self.std is None else Normalization(self.mean, self.std)

    def preprocess(self, normalization: Normalization, class_names: Sequence[str]) -> Preprocess:
        """Return the way from an image to the network in evaluation, and the names of its logits.

        Args:
          normalization: The normalisation of the run, given or measured.
          class_names: One name for each logit.

        Returns:
          The preprocessing.

        Raises:
          ValueError: If `Preprocess` refuses a value.
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
    """Number of pixels of zeros to add on each side before a random crop to the old size. 0 switches it off."""
    flip: bool = True
    """Mirror half of the training images left to right."""
    alternate_flip: bool = False
    """Mirror one half of the images in one epoch and the other half in the next, not at random. It needs flip."""
    trivial_augment: bool = False
    """Change each training image by one of the 14 operations of TrivialAugment, at random strength."""
    color_jitter: float = bounded(0.0, within(0, 1))
    """Scale brightness, contrast and saturation by random factors in [1 - this, 1 + this]. 0 switches it off."""
    cutout: int = bounded(0, at_least(0))
    """Blank a square with sides of this many pixels at a random place of each image. 0 switches it off."""
    mixup: float = bounded(0.0, at_least(0))
    """Blend images and targets in pairs, with a weight from Beta(this, this). 0 switches it off."""
    cutmix: float = bounded(0.0, at_least(0))
    """Paste a box of another image, its area from Beta(this, this). 0 is off. With mixup, a coin picks one of both."""
    label_smoothing: float = bounded(0.0, below(0, 1))
    """Share of each target that is spread evenly over all classes."""
    refine_epochs: int = bounded(0, at_least(0))
    """Number of last epochs, at most half, without trivial_augment, color_jitter, cutout, mixup and cutmix."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "flip", self.flip or not self.alternate_flip, "True where alternate_flip is")

    def refined(self) -> AugmentationConfig:
        """Return the settings without what distorts or mixes images."""
        return dataclasses.replace(self, trivial_augment=False, color_jitter=0.0, cutout=0, mixup=0.0, cutmix=0.0)


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """The training steps: how many, of which size, by which rule."""

    epochs: int = bounded(120, at_least(1))
    """Number of passes over the training split."""
    batch_size: int = bounded(256, at_least(1))
    """Number of images in a training step, over all devices."""
    learning_rate: float = bounded(0.1, Bound(lambda rate: rate > 0, "more than 0"))
    """Peak learning rate of SGD, for batches of learning_rate_batch_size images."""
    learning_rate_batch_size: int = bounded(256, at_least(1))
    """Batch size that learning_rate is meant for. The rate used is learning_rate × batch_size / this."""
    warmup_epochs: float = bounded(0.0, at_least(0))
    """Number of epochs, at most half of all, in which the learning rate rises from 0 to its peak in a straight line."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls from its peak to 0 at the last step, as a cosine or in a straight line."""
    momentum: float = bounded(0.9, below(0, 1))
    """Momentum of SGD and of Muon."""
    nesterov: bool = True
    """Use Nesterov's momentum instead of the classical one."""
    weight_decay: float = bounded(1e-4, at_least(0))
    """L2 penalty on kernels and on the scales of identity norms. Biases and the other scales are exempt."""
    muon_learning_rate: float = bounded(0.0, at_least(0))
    """Peak learning rate of Muon for convolution kernels, whatever the batch size. 0 trains everything by SGD."""
    muon_weight_decay: float = bounded(0.05, at_least(0))
    """Weight decay of Muon's kernels, in place of weight_decay. A step shrinks them by this times the rate."""
    grad_clip_norm: float = bounded(0.0, at_least(0))
    """Scale larger gradients of the loss down to this norm, before weight decay is added. 0 switches it off."""
    skip_nonfinite: bool = False
    """Leave out and count steps whose loss or gradients are not finite, instead of stopping."""
    accumulate_steps: int = bounded(1, at_least(1))
    """Number of pieces that a batch is computed in, one after the other, to save memory. Batch norm sees each alone."""
    ema_decay: float = bounded(0.0, below(0, 1))
    """Decay per step of a moving average of the variables, which is evaluated and fused. 0 switches it off."""
    quantize_aware: bool = False
    """Train for 8 bits, from init_from: figures are those of rounded numbers, rates a hundredth of those given."""
    weight_bits: Literal[7, 8] = 8
    """Bits of a weight that quantize_aware trains for: 7 for x86 processors without VNNI, 8 for others."""
    auxiliary_weight: float = bounded(0.1, at_least(0))
    """Weight of the loss of each auxiliary head. Only RepVGGplus has them."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, "weight_bits", self.quantize_aware or self.weight_bits == 8, "8 without quantize_aware")
        divides = self.batch_size % self.accumulate_steps == 0
        require(self, "accumulate_steps", divides, f"a divisor of batch_size (={self.batch_size})")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of warm-up, scaled linearly with the batch size.

        References:
          Goyal et al., *Accurate, Large Minibatch SGD*, arXiv:1706.02677.
        """
        return self._rate_factor * self.learning_rate * self.batch_size / self.learning_rate_batch_size

    @property
    def peak_muon_learning_rate(self) -> float:
        """The learning rate of Muon at the end of warm-up."""
        return self._rate_factor * self.muon_learning_rate

    @property
    def _rate_factor(self) -> float:
        # Batch norms that keep their statistics no longer make up for the size of a step.
        return 0.01 if self.quantize_aware else 1.0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved while the run goes on."""

    checkpoint_every: int = bounded(1, at_least(1))
    """Number of epochs from one checkpoint to the next. The last epoch always has one."""
    keep_checkpoints: int = bounded(2, at_least(1))
    """Number of newest checkpoints to keep, besides the one of the best test accuracy."""

    def __post_init__(self) -> None:
        check_fields(self)
