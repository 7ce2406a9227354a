"""RepVGG in JAX/Flax: train three branches, infer one 3×3 convolution, exactly."""

from repvgg_jax.models import VARIANTS, RepVGG, compile_inference, create_model, fuse_model, reopen_model, summarize
from repvgg_jax.reparam import branch_rule, first_match, fuse, fuse_with
from repvgg_jax.transform import reparameterize
from repvgg_jax.version import VERSION as __version__  # noqa: N811

__all__ = [
    "VARIANTS",
    "RepVGG",
    "__version__",
    "branch_rule",
    "compile_inference",
    "create_model",
    "first_match",
    "fuse",
    "fuse_model",
    "fuse_with",
    "reopen_model",
    "reparameterize",
    "summarize",
]
