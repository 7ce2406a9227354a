"""Configs by the name that the command line takes. They are values: change them with `replace`."""

from __future__ import annotations

from repvgg_jax.training.config.parts import (
    AugmentationConfig,
    CheckpointConfig,
    DataConfig,
    NetworkConfig,
    OptimizationConfig,
)
from repvgg_jax.training.config.train_config import TrainConfig

# python train.py
# Two CPU cores. scikit-learn's 1,797 handwritten digits, 8×8 pixels, in a minute.
_DIGITS = TrainConfig(
    network=NetworkConfig(strides=(1, 1, 2, 2, 1), depths=(1, 2, 2, 1), width_multiplier=(0.5, 0.5, 0.5, 0.5)),
    data=DataConfig(dataset="digits", image_size=8, eval_batch_size=128),
    augmentation=AugmentationConfig(crop_padding=1, flip=False, label_smoothing=0.1),
    optimization=OptimizationConfig(
        epochs=20,
        batch_size=64,
        learning_rate=0.1,
        learning_rate_batch_size=64,
        warmup_epochs=2,
        weight_decay=5e-4,
    ),
    checkpoints=CheckpointConfig(checkpoint_every=10),
)

# python train.py cifar10 --data-dir DIR
# One GPU or TPU. Strides (1, 1, 2, 2, 2) leave an 8×8 map before stage 4; the rate rises to 0.4 at batch 512.
# On a copy of CIFAR-10 in JPEG of quality 75: 91.84 %, one seed, 6 minutes on an H100 that two runs shared (91.54 %
# without TrivialAugment).
_CIFAR10 = TrainConfig(
    network=NetworkConfig(variant="repvgg_a0", strides=(1, 1, 2, 2, 2), dtype="bfloat16"),
    data=DataConfig(
        dataset="cifar10",
        image_size=32,
        eval_batch_size=512,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    augmentation=AugmentationConfig(crop_padding=4, flip=True, trivial_augment=True, cutout=8, label_smoothing=0.1),
    optimization=OptimizationConfig(
        epochs=100,
        batch_size=512,
        learning_rate=0.1,
        learning_rate_batch_size=128,
        warmup_epochs=5,
        nesterov=True,
        weight_decay=5e-4,
        ema_decay=0.999,
    ),
)

# python train.py cifar10_fast --data-dir DIR
# One GPU or TPU. The same in a fifth of the epochs: too few of them for cutout, and a shorter average.
_CIFAR10_FAST = _CIFAR10.replace(epochs=20, trivial_augment=False, cutout=0, ema_decay=0.99)

# python train.py cifar10_a0_stride32 --data-dir DIR
# Two CPU cores, or any accelerator. The published A0, strides and all: an image ends as one pixel, a step is cheap.
# Muon, at a batch that its steps pay at. On a copy in JPEG: 84.89 %, one seed, 36 minutes.
_CIFAR10_A0_STRIDE32 = _CIFAR10.replace(
    dtype="float32",
    trivial_augment=False,
    strides=(2, 2, 2, 2, 2),
    whiten_stem=True,
    residual_scale=0.25,
    epochs=36,
    eval_batch_size=256,
    learning_rate_batch_size=256,
    warmup_epochs=2,
    muon_learning_rate=0.05,
    ema_decay=0.99,
)

# python train.py cifar10_cpu --data-dir DIR
# Two CPU cores, 98 minutes with AVX-512, more without. A0's depths; 8×8 maps in stage 2 and 4×4 maps
# after it. Muon, a whitened stem and a start near the identity save epochs. On a copy in JPEG: 90.17 %, one seed.
_CIFAR10_CPU = _CIFAR10.replace(
    dtype="float32",
    trivial_augment=False,
    strides=(1, 2, 2, 2, 1),
    width_multiplier=(1.0, 1.5, 0.5, 0.5),
    whiten_stem=True,
    residual_scale=0.25,
    alternate_flip=True,
    cutout=12,
    epochs=36,
    batch_size=128,
    eval_batch_size=256,
    warmup_epochs=2,
    schedule="linear",
    muon_learning_rate=0.03,
    ema_decay=0.995,
)

# python train.py cifar100 --data-dir DIR
# One GPU or TPU. The recipe of cifar10.
_CIFAR100 = _CIFAR10.replace(dataset="cifar100", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))

# python train.py imagenet --data-dir DIR
# Eight GPUs or TPU cores. RepVGG, section 4.1, for A0–A2, B0, B1, B1g*: 120 epochs, rate 0.1 at batch 256, decay 1e-4.
_IMAGENET = TrainConfig(
    data=DataConfig(
        dataset="imagenet2012",
        image_size=224,
        random_resized_crop=True,
        eval_resize=256,
        eval_batch_size=256,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        num_workers=8,
    ),
    augmentation=AugmentationConfig(crop_padding=0),
    optimization=OptimizationConfig(
        epochs=120,
        batch_size=256,
        learning_rate=0.1,
        learning_rate_batch_size=256,
        nesterov=False,
        weight_decay=1e-4,
    ),
)

# python train.py imagenet_heavy --data-dir DIR, with --variant for others
# Eight GPUs or TPU cores. RepVGG, section 4.1, for B2 and B3: 200 epochs, mixup; TrivialAugment, which needs no tuning
# and in its paper (arXiv:2103.10158) does as well, for AutoAugment. Not run yet.
_IMAGENET_HEAVY = _IMAGENET.replace(
    variant="repvgg_b2",
    epochs=200,
    warmup_epochs=5,
    label_smoothing=0.1,
    mixup=0.2,
    trivial_augment=True,
)

# python train.py imagenet_plus --data-dir DIR
# Eight GPUs or TPU cores. Official RepVGGplus-L2pse: 300 epochs at 256 pixels, tested at 320;
# TrivialAugment for RandAugment. Not run yet.
_IMAGENET_PLUS = _IMAGENET_HEAVY.replace(
    variant="repvggplus_l2pse",
    image_size=256,
    eval_image_size=320,
    eval_resize=None,
    epochs=300,
    weight_decay=4e-5,
)

PRESETS: dict[str, TrainConfig] = {
    "digits": _DIGITS,
    "cifar10": _CIFAR10,
    "cifar10_fast": _CIFAR10_FAST,
    "cifar10_a0_stride32": _CIFAR10_A0_STRIDE32,
    "cifar10_cpu": _CIFAR10_CPU,
    "cifar100": _CIFAR100,
    "imagenet": _IMAGENET,
    "imagenet_heavy": _IMAGENET_HEAVY,
    "imagenet_plus": _IMAGENET_PLUS,
}
"""The ready-made configs by name."""
