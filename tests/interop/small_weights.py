"""A small RepVGG as PyTorch code would hold it, without torch."""

import numpy as np

from repvgg_jax import create_model
from repvgg_jax.interop.torch.state_dict import to_state_dict
from tests.random_variables import random_variables


def small_model(**fields):
    return create_model("repvgg_a0", depths=(1, 2, 2, 1), width_multiplier=(0.25,) * 4, num_classes=5, **fields)


def small_state_dict(layout="official", seed=0):
    model = small_model()
    return to_state_dict(model, random_variables(model, dtype=np.float32, seed=seed), layout)
