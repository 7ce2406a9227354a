"""PyTorch weights of RepVGG in and out, in the layouts of the official repository and of timm. It needs no PyTorch."""

from repvgg_jax.interop.torch.state_dict import from_state_dict, to_state_dict
from repvgg_jax.interop.torch.weights_file import Weights, load_weights, read_state_dict

__all__ = ["Weights", "from_state_dict", "load_weights", "read_state_dict", "to_state_dict"]
