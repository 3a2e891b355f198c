"""A function's jaxpr as whoever runs it elsewhere reads it: in the operations of XLA."""

from collections.abc import Callable
from typing import Any

import jax

from clicktrain_jax.jaxprs import walk


def traced(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """`jax.make_jaxpr` with the shapes of the results; convolutions that are left open stand in it as XLA's.

    A net may use `pallas_kernels.dense_conv` and `pattern_conv` itself: what they run natively here would be no
    convolution for whoever reads the jaxpr, and nothing that another machine runs.
    """
    from pallas_kernels import native

    with native.portable():
        return jax.make_jaxpr(function, return_shape=True)(*arguments)


def flattened(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """``(closed jaxpr, shapes of the results)`` of a function, with the jaxprs that it calls in the place of the calls.

    Rules for derivatives are lost with the calls. Loops and branches stay.
    """
    closed, out = traced(function, *arguments)
    flat = jax.make_jaxpr(lambda *leaves: walk(closed, leaves))
    return flat(*jax.tree.leaves(arguments)), out
