"""RepVGG as Flax modules, in training form and deploy form, and the table of the published networks."""

from repvgg_jax.models.blocks import ConvBN, RepVGGBlock, SqueezeExcite, layers
from repvgg_jax.models.forms import fuse_model, reopen_model
from repvgg_jax.models.inference import compile_inference
from repvgg_jax.models.quantizable import QuantizableBlock
from repvgg_jax.models.repvgg import PARTS, RepVGG
from repvgg_jax.models.summary import Summary, summarize
from repvgg_jax.models.variants import VARIANTS, Variant, create_model

__all__ = [
    "PARTS",
    "VARIANTS",
    "ConvBN",
    "QuantizableBlock",
    "RepVGG",
    "RepVGGBlock",
    "SqueezeExcite",
    "Summary",
    "Variant",
    "compile_inference",
    "create_model",
    "fuse_model",
    "layers",
    "reopen_model",
    "summarize",
]
