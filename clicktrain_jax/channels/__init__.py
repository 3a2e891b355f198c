"""Channels: who writes, follows and reads each group of a net's channels, and nets with fewer of them."""

from clicktrain_jax.channels.narrowing import narrow, narrow_shapes, widths
from clicktrain_jax.channels.nodes import ChannelNode, channel_nodes, find_node

__all__ = ["ChannelNode", "channel_nodes", "find_node", "narrow", "narrow_shapes", "widths"]
