"""A gate in a program that reverse-mode differentiation passes and forward mode does not, with an error."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from repvgg_jax.ops.platform import known_platform

_MESSAGE = (
    "forward-mode differentiation (jvp, jacfwd, hessian) of repvgg_jax.ops, whose lowerings have gradients in reverse "
    'mode alone: expected ops="xla", which has both, in create_model, model.clone or reparameterize'
)


def reverse_mode_only(x: jax.Array) -> jax.Array:
    """Return `x`, and raise a TypeError with the remedy where it is differentiated in forward mode.

    The custom gradients behind it would end in an error of JAX, which knows of no remedy. Reverse mode goes through.
    """
    return x if known_platform() is not None else _gate.bind(x)


_gate = Primitive("reverse_mode_only")
_tangent = Primitive("reverse_mode_only_tangent")


def _refuse(*_: Any, **__: Any) -> Any:
    raise TypeError(_MESSAGE)


for _primitive in (_gate, _tangent):
    _primitive.def_abstract_eval(lambda x: x)
    batching.defvectorized(_primitive)
# A tangent that is computed is one of forward mode: reverse mode only transposes what makes it.
_gate.def_impl(lambda x: x)
mlir.register_lowering(_gate, lambda _, x: [x])
ad.primitive_jvps[_gate] = lambda primals, tangents: (
    _gate.bind(*primals),
    tangents[0] if type(tangents[0]) is ad.Zero else _tangent.bind(*tangents),
)
_tangent.def_impl(_refuse)
mlir.register_lowering(_tangent, _refuse)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
