"""Structural re-parameterization of any traced function. It imports `reparam`, `ops` and JAX, and knows no network."""

from repvgg_jax.transform.expanding.api import expand
from repvgg_jax.transform.expanding.branches import PUBLISHED, Average, Chain, Conv, Identity, Kernel
from repvgg_jax.transform.expanding.expanded import Expanded
from repvgg_jax.transform.merging.api import Reparameterized, reparameterize

__all__ = [
    "PUBLISHED",
    "Average",
    "Chain",
    "Conv",
    "Expanded",
    "Identity",
    "Kernel",
    "Reparameterized",
    "expand",
    "reparameterize",
]
