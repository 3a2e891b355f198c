"""PruneTrain in a run: a net that gets smaller between epochs, and can be restored at the width it had.

A reconfiguration takes the state to the host, drops the channels that are dead, and brings back what is left. The
trainer's programs are compiled anew for the new shapes; its optimizer is the same all along. What a reconfiguration
did is written down as plain numbers, `facts`; the last ones are enough to know the shapes of a checkpoint after them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import clicktrain_jax as ct
from clicktrain_jax import models
from clicktrain_jax.channels import channel_nodes, narrow, narrow_shapes, widths
from clicktrain_jax.methods import living_channels, prunetrain
from experiments.configs.methods import ChannelConfig
from experiments.train.state import TrainState

_PARAMS, _STATS = "params/", "batch_stats/"


class ChannelPruning:
    """What PruneTrain does to a run.

    Args:
        model: the whole net; its convolutions must have the width of their stored kernels.
        variables: its variables, as `jax.ShapeDtypeStruct` (`clicktrain_jax.models.abstract_variables`).
        image_shape: (height, width, channels).
        settings: of the run.

    Raises:
        ValueError: the net does not run with fewer channels.
    """

    def __init__(
        self, model: nn.Module, variables: Mapping[str, Any], image_shape: Sequence[int], settings: ChannelConfig
    ) -> None:
        def apply(variables: Any, images: Any) -> Any:
            return model.apply(variables, images, train=False)

        self.settings = settings
        self._nodes = channel_nodes(apply, variables, tuple(image_shape))
        self._output_sizes = models.output_sizes(model, image_shape)
        self._check(apply, variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))

    def _check(self, apply: Callable[..., Any], variables: Any, images: Any) -> None:
        """Better said now than at the first reconfiguration, epochs later."""
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables["params"])
        fewest = widths(living_channels(zeros, self._nodes, multiple=1, prefix=_PARAMS))
        try:
            jax.eval_shape(apply, narrow_shapes(variables, fewest, self._nodes), images)
        except Exception as error:  # whatever a layer raises that is given other shapes than it expects
            raise ValueError(
                "the net does not run with fewer channels: build it with conv=clicktrain_jax.models.NarrowConv "
                f"({str(error).splitlines()[0][:300]})"
            ) from error

    def optimizer(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """The optimizer with the channels' lasso, for a net of any width on the way; its update takes ``value=``."""
        return prunetrain(inner, self._nodes, ratio=self.settings.ratio, prefix=_PARAMS)

    def is_due(self, epoch: int) -> bool:
        """Whether the net is reconfigured before this epoch's first update."""
        return epoch > 0 and epoch % self.settings.every_epochs == 0

    def reconfigure(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Drop the dead channels.

        Args:
            state: concrete, at any width. Its buffers stay.

        Returns:
            ``(state, facts)``: parameters, statistics and what the optimizer keeps for each parameter, sliced; and JSON
            data: "channels" (all that are left, by the kernel that writes them first), "conv_weights",
            "model_weights", "multiply_adds" of one image.
        """
        # Slices on the host are copies of a few megabytes; on the device each would be a program to compile.
        host = jax.device_get(state)
        kept = living_channels(
            host.params, self._nodes, threshold=self.settings.threshold, multiple=self.settings.multiple, prefix=_PARAMS
        )
        host = host._replace(
            params=narrow(host.params, kept, self._nodes, prefix=_PARAMS),
            batch_stats=narrow(host.batch_stats, kept, self._nodes, prefix=_STATS),
            opt_state=narrow(host.opt_state, kept, self._nodes, prefix=_PARAMS),
        )
        report = ct.report(host.params, None, output_sizes=self._output_sizes)
        facts = {
            "channels": widths(kept),
            "conv_weights": report.conv_weights,
            "model_weights": report.model_weights,
            "multiply_adds": report.multiply_adds,
        }
        return jax.device_put(host), facts

    def template(self, state: TrainState, facts: Mapping[str, Any]) -> TrainState:
        """A state of zeros with the shapes after a reconfiguration, to restore a checkpoint into.

        Args:
            state: of the whole net; arrays or `jax.ShapeDtypeStruct`.
            facts: the last ones that `reconfigure` gave before the checkpoint.

        Raises:
            ValueError: channels that this net does not have.
        """
        shapes = state._replace(
            params=narrow_shapes(state.params, facts["channels"], self._nodes, prefix=_PARAMS),
            batch_stats=narrow_shapes(state.batch_stats, facts["channels"], self._nodes, prefix=_STATS),
            opt_state=narrow_shapes(state.opt_state, facts["channels"], self._nodes, prefix=_PARAMS),
        )
        return jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
