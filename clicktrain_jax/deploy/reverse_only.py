"""Arrays that enter what can be differentiated in reverse mode alone, so that forward mode is refused in words.

jax refuses it too, and names neither the function nor a way out. Whether a derivative is taken in forward mode or in
reverse shows late: both push tangents through, and reverse mode then transposes what it did to them, while forward mode
computes it. So tangents go through an identity that can be transposed and not computed.
"""

from typing import Any, NoReturn

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@jax.custom_jvp
def reverse_only(array: jax.Array) -> jax.Array:
    """The floating-point array itself.

    Raises:
        TypeError: where its tangent is computed, by `jax.jvp`, `jax.linearize`, `jax.jacfwd` or `jax.hessian`.
    """
    return array


@reverse_only.defjvp
def _rule(primals: Any, tangents: Any) -> Any:
    # The value may be a tangent, of another derivative around this one.
    return reverse_only(*primals), _transposable.bind(*primals, *tangents)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        "forward-mode derivatives (jax.jvp, linearize, jacfwd, hessian) of an accelerated net: layers that run by "
        "patterns or natively have reverse-mode ones alone. Differentiate the net itself on masked parameters, "
        "apply_fn(ct.apply_masks(params, masks), ...), which computes the same; or take jax.grad, vjp and jacrev, also "
        "of one another: jax.jacrev(jax.grad(loss)) is the Hessian"
    )


def _mapped(arrays: Any, axes: Any) -> Any:
    # Many tangents of one value are those of `jax.jacfwd`: in reverse mode they are mapped where their value is.
    if axes[0] is None and axes[1] is not None:
        _refuse()
    return _transposable.bind(*arrays), axes[1]


# Of a value and its tangent; linear in both, as it does not read the value.
_transposable = Primitive("reverse_only")
_transposable.def_impl(_refuse)
_transposable.def_abstract_eval(lambda _, tangent: tangent)
ad.deflinear2(_transposable, lambda cotangent, *_: [None, cotangent])
batching.primitive_batchers[_transposable] = _mapped
mlir.register_lowering(_transposable, _refuse)
