"""The plan: which leaves are pruned, what fraction of their kernels goes, in tiles of what size.

A `Plan` is plain hashable data, made once from the parameter tree's names and shapes. It holds no arrays,
so it can be closed over by a jitted step.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping

import jax.numpy as jnp

from clicktrain_jax.trees import Tree, check_same_names, is_kernel_shape, named_leaves

Tile = tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What happens to one convolution.

    Attributes:
        name: the leaf's name, ``"Conv_1/kernel"``.
        shape: its (kh, kw, cin, cout).
        fraction: share of its kernels (of its tiles, when tiles are wider than one kernel) to remove, in [0, 1).
        tile: (filters, channels) that share one pattern and one removal.
    """

    name: str
    shape: tuple[int, int, int, int]
    fraction: float
    tile: tuple[int, int] = (1, 1)

    @property
    def has_patterns(self) -> bool:
        """1x1 kernels have one tap: only whole kernels can be removed there."""
        return self.shape[0] * self.shape[1] > 1

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Number of tiles along (cin, cout); the last ones may be short."""
        filters, channels = self.tile
        return math.ceil(self.shape[2] / channels), math.ceil(self.shape[3] / filters)

    @property
    def num_removed(self) -> int:
        """How many tiles (kernels, at tile (1, 1)) are removed: method of the reference, ceil(round(f * n, 6)).

        The rounding keeps a product such as 0.55 * 1600 = 880.0000000000001 from giving 881.
        """
        rows, columns = self.tile_grid
        return math.ceil(round(self.fraction * rows * columns, 6))


@dataclasses.dataclass(frozen=True)
class Plan:
    """The layers to prune and the names of all leaves of the tree the plan was made for."""

    layers: tuple[LayerPlan, ...]
    leaf_names: tuple[str, ...]

    def by_name(self) -> dict[str, LayerPlan]:
        """The planned layers by their leaf's name."""
        return {layer.name: layer for layer in self.layers}

    def check_tree(self, tree: Tree, what: str = "params") -> None:
        """Raise a ValueError unless ``tree`` has the names, and the planned layers the shapes, of this plan."""
        leaves = named_leaves(tree)
        check_same_names(list(self.leaf_names), [name for name, _ in leaves], what)
        shapes = {name: jnp.shape(leaf) for name, leaf in leaves if leaf is not None}
        for layer in self.layers:
            if layer.name not in shapes:
                raise ValueError(f"{what} holds None at {layer.name!r}, which the plan prunes")
            if shapes[layer.name] != layer.shape:
                raise ValueError(
                    f"{what}: {layer.name!r} has shape {shapes[layer.name]}, the plan was made for {layer.shape}"
                )


def make_plan(
    params: Tree,
    rules: Mapping[str, float | None],
    *,
    tile: Tile = (1, 1),
    strict: bool = False,
    groups: Mapping[str, int] | None = None,
) -> Plan:
    """Choose the layers to prune by rules on the paths of their kernels.

    Args:
        params: the parameter tree (arrays or ``jax.ShapeDtypeStruct``); only names and shapes are read.
        rules: ``{regular expression: fraction}``. An expression must match a whole name (`re.fullmatch`), such
            as ``"Conv_1/kernel"``; the first that matches a leaf decides. A fraction in [0, 1) prunes the layer:
            that share of its kernels is removed and the rest keep one pattern each; 0.0 means patterns only.
            ``None`` leaves the layer dense. 1x1 convolutions get kernel removal only.
        tile: (filters, channels) that share one pattern and one removal; ``None`` stands for all. (1, 1), the
            paper's form, chooses for every kernel apart. Last tiles may be short.
        strict: when true, a convolution that no rule matches is an error rather than left dense.
        groups: ``{regular expression: feature_group_count}`` for grouped convolutions, which a kernel's shape
            does not show. Removing kernels is refused there (each filter sees few channels); patterns are not.
            A layer of one input channel is taken for depthwise unless declared here with 1.

    Returns:
        A hashable `Plan`.

    Raises:
        ValueError: a rule that is no regular expression or matches nothing; a fraction outside [0, 1); a rule
            that prunes a leaf which is not (kh, kw, cin, cout); an uncovered convolution when ``strict``;
            kernel removal in a grouped convolution; a bad tile; nothing to prune.
    """
    compiled = _compile_rules(rules)
    leaves = named_leaves(params)
    group_rules = _compile_groups(groups or {}, [name for name, _ in leaves])
    _check_tile(tile)
    used: set[str] = set()
    layers = []
    for name, leaf in leaves:
        if leaf is None:
            continue
        shape = tuple(int(size) for size in jnp.shape(leaf))
        rule = next((text for text, expression in compiled.items() if expression.fullmatch(name)), None)
        if rule is None:
            if strict and is_kernel_shape(shape):
                raise ValueError(
                    f"strict: no rule covers the convolution {name!r} {shape}; add one for it, None leaves it dense"
                )
            continue
        used.add(rule)
        fraction = rules[rule]
        if fraction is None:
            continue
        if not is_kernel_shape(shape):
            raise ValueError(
                f"rule {rule!r} prunes {name!r} of shape {shape}, which is not 4-D (kh, kw, cin, cout): "
                "only convolution kernels can be pruned; narrow the rule, or put one with None before it"
            )
        _check_groups(name, shape, fraction, group_rules)
        filters, channels = tile
        layers.append(LayerPlan(name, shape, float(fraction), (filters or shape[3], channels or shape[2])))
    names = [name for name, _ in leaves]
    unused = [rule for rule in rules if rule not in used]
    if unused:
        raise ValueError(_explain_unused(unused[0], compiled[unused[0]], names))
    if not layers:
        raise ValueError("the rules prune no layer: give at least one convolution a fraction in [0, 1)")
    return Plan(tuple(layers), tuple(names))


def _compile(text: str, what: str) -> re.Pattern[str]:
    if not isinstance(text, str):
        raise ValueError(f"{what}: key {text!r} is not a string; expected a regular expression on leaf names")
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{what}: {text!r} is not a regular expression: {error}") from error


def _compile_rules(rules: Mapping[str, float | None]) -> dict[str, re.Pattern[str]]:
    if not isinstance(rules, Mapping) or not rules:
        raise ValueError(f"rules={rules!r}: expected a non-empty mapping {{path regex: fraction or None}}")
    for text, fraction in rules.items():
        # numpy's scalars too.
        number = isinstance(fraction, numbers.Real) and not isinstance(fraction, bool)
        # Written so that NaN fails too.
        if fraction is not None and not (number and 0 <= fraction < 1):
            raise ValueError(
                f"rule {text!r}: fraction {fraction!r} is outside [0, 1); it is the share of kernels to remove, "
                "0.55 for 55 percent, or None to leave the layer dense"
            )
    return {text: _compile(text, "rules") for text in rules}


def _compile_groups(groups: Mapping[str, int], names: list[str]) -> list[tuple[re.Pattern[str], int]]:
    compiled = []
    for text, count in groups.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"groups: {text!r} has {count!r}; expected a feature_group_count of 1 or more")
        expression = _compile(text, "groups")
        if not any(expression.fullmatch(name) for name in names):
            raise ValueError(f"groups: {_explain_unused(text, expression, names)}")
        compiled.append((expression, count))
    return compiled


def _explain_unused(rule: str, expression: re.Pattern[str], names: list[str]) -> str:
    shadowed = [name for name in names if expression.fullmatch(name)]
    if shadowed:
        return f"rule {rule!r} never applies: rules before it match {shadowed[0]!r} and all else it would match"
    kernels = [name for name in names if name.endswith("kernel")] or names
    return f"rule {rule!r} matches nothing; names are matched whole, for example {kernels[:4]}"


def _check_tile(tile: Tile) -> None:
    valid = isinstance(tile, tuple) and len(tile) == 2
    if not valid or any(
        size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1) for size in tile
    ):
        raise ValueError(f"tile={tile!r}: expected (filters, channels), each a positive int or None for all")


def _check_groups(
    name: str, shape: tuple[int, ...], fraction: float, group_rules: list[tuple[re.Pattern[str], int]]
) -> None:
    declared = next((count for expression, count in group_rules if expression.fullmatch(name)), None)
    if fraction == 0:
        return
    if declared is not None and declared > 1:
        raise ValueError(
            f"{name!r} is a grouped convolution (feature_group_count={declared}): removing its kernels is not "
            "supported; use 0.0 for patterns only, or None"
        )
    if declared is None and shape[2] == 1 < shape[3]:
        raise ValueError(
            f"{name!r} of shape {shape} has one input channel, like a depthwise (grouped) convolution: removing "
            "its kernels would remove whole filters, and is not supported. Use 0.0 for patterns only or None; "
            f"if it is an ordinary convolution, say so with groups={{{name!r}: 1}}"
        )
