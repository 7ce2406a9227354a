"""Structural re-parameterization of any traced function. Imports `reparam` and `ops`, and JAX; knows no network."""

from repvgg_jax.transform.merging.api import Reparameterized, reparameterize

__all__ = ["Reparameterized", "reparameterize"]
