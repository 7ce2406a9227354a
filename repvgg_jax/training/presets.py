"""Ready-made configs, by the name the command line takes. They are values: change them with dataclasses.replace."""

from __future__ import annotations

from repvgg_jax.training.config import TrainConfig

# The embedded default: scikit-learn's 1,797 handwritten digits, 8×8 pixels, in a minute on two CPU cores.
_DIGITS = TrainConfig(
    dataset="digits",
    image_size=8,
    strides=(1, 1, 2, 2, 1),
    depths=(1, 2, 2, 1),
    width_multiplier=(0.5, 0.5, 0.5, 0.5),
    crop_padding=1,
    flip=False,
    epochs=20,
    batch_size=64,
    eval_batch_size=128,
    learning_rate=0.1,
    learning_rate_batch_size=64,
    warmup_epochs=2,
    weight_decay=5e-4,
    label_smoothing=0.1,
    checkpoint_every=10,
)

# RepVGG on 32×32 images: strides (1, 1, 2, 2, 2) leave an 8×8 map before stage 4. For accelerators.
_CIFAR10 = TrainConfig(
    dataset="cifar10",
    image_size=32,
    strides=(1, 1, 2, 2, 2),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    epochs=200,
    batch_size=128,
    eval_batch_size=256,
    learning_rate=0.1,
    learning_rate_batch_size=128,
    warmup_epochs=5,
    weight_decay=5e-4,
    label_smoothing=0.1,
)

_CIFAR100 = TrainConfig(
    **{
        **_CIFAR10.__dict__,
        "dataset": "cifar100",
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
    }
)

# RepVGG, section 4.1, for A0–A2, B0, B1, B1g*: 120 epochs, batch 256, learning rate 0.1, cosine, decay 1e-4.
_IMAGENET = TrainConfig(
    dataset="imagenet2012",
    image_size=224,
    eval_resize=256,
    random_resized_crop=True,
    crop_padding=0,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    num_workers=8,
    epochs=120,
    batch_size=256,
    eval_batch_size=256,
    learning_rate=0.1,
    nesterov=False,
    weight_decay=1e-4,
)

PRESETS: dict[str, TrainConfig] = {
    "digits": _DIGITS,
    "cifar10": _CIFAR10,
    "cifar100": _CIFAR100,
    "imagenet": _IMAGENET,
}
