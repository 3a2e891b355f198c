"""The steps of a folded net, and how they are run: convolutions by whoever has them, all else as it was traced."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clicktrain_jax.deploy.kernels import Moves
from clicktrain_jax.jaxprs import bind

# Computes one convolution: its step, its images, its kernel, its bias (filters,) or None -> the step's result.
Convolve = Callable[["ConvStep", Any, Any, Any], Any]
# Computes any other step: its equation, its operands -> its results.
Compute = Callable[[Any, list[Any]], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class ConvStep:
    """A convolution of the folded net.

    Attributes:
        name: of its kernel among the arrays.
        leaf: the leaf of the variables that the kernel is; empty where it is computed from several.
        moves: that the leaf's entries made on their way to the kernel.
        equation: as it was traced; its operands are ``(images, kernel)``.
        images: the value that it takes.
        bias: name of its bias among the arrays; None without.
        dtype: of the result, once the bias is added.
        relu: whether what is negative becomes 0 then.
        result: the value that it gives.
    """

    name: str
    leaf: str
    moves: Moves
    equation: Any
    images: Any
    bias: str | None
    dtype: Any
    relu: bool
    result: Any

    def finished(self, y: Any, bias: Any) -> Any:
        """The step's result from the convolution's: in its dtype, with the bias (filters,), or None, and the ReLU."""
        y = y.astype(self.dtype)
        if bias is not None:
            filters = self.equation.params["dimension_numbers"].out_spec[1]
            y = y + jnp.asarray(bias).reshape([-1 if axis == filters else 1 for axis in range(y.ndim)])
        return jax.nn.relu(y) if self.relu else y


@dataclasses.dataclass(frozen=True)
class OtherStep:
    """Any other step: an equation and its operands, ``("array", name)``, ``("value", variable)`` or a literal."""

    equation: Any
    operands: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Steps:
    """A folded net for images of one shape.

    Attributes:
        input: the value that the images are.
        steps: in order.
        output: the operand that is the result.
    """

    input: Any
    steps: tuple[Any, ...]
    output: tuple[str, Any]

    @property
    def convolutions(self) -> tuple[ConvStep, ...]:
        """The convolutions, in order."""
        return tuple(step for step in self.steps if isinstance(step, ConvStep))

    @property
    def arrays(self) -> set[Any]:
        """Names of the arrays that are read."""
        convolutions = {name for step in self.convolutions for name in (step.name, step.bias)}
        others = [step.operands for step in self.steps if not isinstance(step, ConvStep)]
        return convolutions | {what for each in (*others, (self.output,)) for kind, what in each if kind == "array"}

    def run(self, arrays: Mapping[str, Any], images: Any, convolve: Convolve, compute: Compute = bind) -> Any:
        """The result for ``images``, or what stands for them: convolutions by ``convolve``, all else by ``compute``."""
        values = {self.input: images}

        def read(operand: tuple[str, Any]) -> Any:
            kind, what = operand
            return arrays[what] if kind == "array" else values[what] if kind == "value" else what

        for step in self.steps:
            if isinstance(step, ConvStep):
                bias = None if step.bias is None else arrays[step.bias]
                values[step.result] = convolve(step, values[step.images], arrays[step.name], bias)
                continue
            values.update(zip(step.equation.outvars, compute(step.equation, [read(each) for each in step.operands])))
        return read(self.output)
