"""Structural re-parameterization of any traced function. It imports `reparam`, `ops` and JAX, and knows no network."""

from repvgg_jax.transform.merging.api import Reparameterized, reparameterize

__all__ = ["Reparameterized", "reparameterize"]
