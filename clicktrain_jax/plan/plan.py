"""The plan: which leaves are pruned, how much of them goes, and in what shapes.

A `Plan` is plain hashable data, made once from the parameter tree's names and shapes. It holds no arrays,
so it can be closed over by a jitted step.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from clicktrain_jax.latency import LayerTimes
from clicktrain_jax.plan import convolutions
from clicktrain_jax.plan import rules as rule_lib
from clicktrain_jax.plan.convolutions import Axes
from clicktrain_jax.plan.layer_plan import LayerPlan, check_layer
from clicktrain_jax.plan.targets import Target, least_kernels, make_target
from clicktrain_jax.trees import Tree, check_names_of, is_kernel_shape, map_named, named_leaves, nest

Tile = tuple[int | None, int | None]
Fraction = float | Literal["auto"] | None


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What is pruned; `print` shows it layer by layer.

    Attributes:
        layers: the layers to prune.
        leaf_names: the names of all leaves of the tree that the plan was made for.
        target: what the whole net is to reach, if any.
        left_out: ``((name, why), ...)`` of what stays dense, among the leaves that are convolutions or could be.
        containers: the tree that the plan was made for, a name at each leaf; None for nested dictionaries.
    """

    layers: tuple[LayerPlan, ...]
    leaf_names: tuple[str, ...]
    target: Target | None = None
    left_out: tuple[tuple[str, str], ...] = ()
    # No part of what a plan says, and not hashable.
    containers: Tree = dataclasses.field(default=None, compare=False)

    @property
    def axes(self) -> Axes:
        """The layout of the planned leaves."""
        return self.layers[0].axes

    def by_name(self) -> dict[str, LayerPlan]:
        """The planned layers by their leaf's name."""
        return {layer.name: layer for layer in self.layers}

    def check_tree(self, tree: Tree, what: str = "params") -> None:
        """Raise a ValueError unless ``tree`` has the names, and the planned layers the shapes, of this plan."""
        leaves = named_leaves(tree)
        check_names_of(tree, list(self.leaf_names), what)
        shapes = {name: jnp.shape(leaf) for name, leaf in leaves if leaf is not None}
        for layer in self.layers:
            if layer.name not in shapes:
                raise ValueError(f"{what} holds None at {layer.name!r}, which the plan prunes")
            if shapes[layer.name] != layer.leaf_shape:
                raise ValueError(
                    f"{what}: {layer.name!r} has shape {shapes[layer.name]}, the plan was made for {layer.leaf_shape}"
                )

    def tree_of(self, params: Tree) -> Tree:
        """The parameters, checked; zeros in this plan's containers for what stands in their place where
        `optax.tree_map_params` asks ``init`` which parts of a state are copies of them.

        Raises:
            ValueError: as `check_tree`.
        """
        if type(params).__name__ != "_ParamsPlaceholder":  # optax tells no other way
            self.check_tree(params)
            return params
        shapes = {layer.name: layer.leaf_shape for layer in self.layers}
        zeros = {name: np.zeros(shapes.get(name, ()), np.float32) for name in self.leaf_names}
        return nest(zeros) if self.containers is None else jax.tree.map(zeros.get, self.containers)

    def __str__(self) -> str:
        rows = [f"{'layer':<40}{'shape':<20}{'removed':>8}  patterns, and what is shared"]
        for layer in self.layers:
            removed = "auto" if layer.fraction is None else f"{layer.fraction:.1%}"
            rows.append(f"{layer.name:<40}{'x'.join(map(str, layer.leaf_shape)):<20}{removed:>8}  {layer.in_words()}")
        if self.target is not None:
            rows.append(f"target: {self.target.ratio:g}x over {self.target.of}, which decides every 'auto'")
        if self.left_out:
            rows += ["left dense (a rule that names one declares it a convolution to be pruned):"]
            rows += [f"  {name}: {why}" for name, why in self.left_out]
        return "\n".join(rows)

    __repr__ = __str__


def check_plan(plan: Any) -> None:
    """Raise a ValueError for what is no `Plan`."""
    if not isinstance(plan, Plan):
        raise ValueError(
            f"plan is a {type(plan).__name__}: expected what clicktrain_jax.make_plan(params, rules) returns"
        )


def make_plan(
    params: Tree,
    rules: Mapping[str, Fraction] | None = None,
    *,
    tile: Tile = (1, 1),
    removal_tile: Tile | None = None,
    entries: int | Mapping[str, int | None] = 4,
    superset: int | None = None,
    quads: bool = False,
    removal_score: Literal["whole", "retained"] = "whole",
    removal_scope: Literal["layer", "filter", "tile"] = "layer",
    floor: bool | None = None,
    target: float | None = None,
    target_of: Literal["convolutions", "model", "multiply_adds", "latency"] = "convolutions",
    output_sizes: Mapping[str, tuple[int, int]] | None = None,
    costs: LayerTimes | None = None,
    strict: bool = False,
    groups: Mapping[str, int] | None = None,
    axes: Axes | None = None,
) -> Plan:
    """Choose the layers to prune by rules on the paths of their kernels, and the shapes of the choice.

    The defaults are the choices of the authors' code.

    Args:
        params: the parameter tree (arrays or ``jax.ShapeDtypeStruct``); only names, shapes and containers are
            read. A run may have others, but `optax.tree.map_params` goes by those of the plan.
        rules: ``{regular expression: fraction}``. An expression must match a whole name (`re.fullmatch`), such
            as ``"Conv_1/kernel"``; the first that matches a leaf decides. A fraction in [0, 1) prunes the layer:
            that share of its kernels is removed and the rest keep one pattern each; 0.0 means patterns only.
            ``None`` leaves the layer dense. ``"auto"``: the target decides. 1x1 convolutions get kernel removal
            only. With a target the rules may be None: ``"auto"`` then holds for every leaf that looks like a
            convolution's kernel, but for those of 4 or fewer input channels (the image), grouped ones, and shortcuts
            (names with "shortcut" or "downsample", 1x1 ones with "proj", "skip" or "identity"). Kernels of other
            sizes than 1x1 and 3x3 lose whole kernels alone then, unless ``entries`` names them. `Plan.left_out` lists
            the rest, and why: a 4-D leaf may be a position embedding, an attention's or a local convolution's
            kernels, or one-dimensional ones in a stack. A rule that names such a leaf declares it a convolution.
        tile: (filters, channels) that share one pattern, and one removal unless ``removal_tile`` says otherwise;
            ``None`` stands for all. (1, 1), the paper's form, chooses for every kernel apart. Last tiles may be short.
        removal_tile: (filters, channels) that are removed together.
        entries: taps kept by each pattern that is generated (`clicktrain_jax.patterns.Generated`), or
            ``{regular expression: number}``, 4 where none matches; None for no patterns: only whole kernels go. So it
            is in kernels of more than 32 taps.
        superset: two levels: every tile keeps so many taps in all, and each kernel in it has its own pattern among
            them. Speed follows the superset, compression the patterns.
        quads: the patterns of 4 neighbouring input channels are chosen jointly so that at every tap at most two of
            the four stay: kernels with their own patterns that are 2:4 sparse along the channels.
        removal_score: "whole": kernels compete by the score of all their taps; "retained": by what their pattern keeps.
        removal_scope: "layer": the units of a layer compete; "filter": the same number goes in every filter (tile of
            filters); "tile": in every pattern tile. In short last blocks the number is in proportion, rounded down.
            "tile", or "filter" where tiles are removed whole, is the balanced choice: every tile of filters is then
            as much work, and every multiprocessor of a GPU gets the same.
        floor: keep the best unit of every filter and of every input channel. For the scope "layer" alone: the
            others leave something of every filter by themselves, and may empty an input channel. By default on with a
            target, off with fractions, as in the authors' code.
        target: compression to reach over ``target_of``; resolved at the selection, from the scores, as near as one
            unit of removal allows (one unit of every block with the scopes "filter" and "tile").
        target_of: "convolutions": weights of every 4-D leaf. "model": of every leaf. "multiply_adds": of the leaves
            in ``output_sizes``. "latency": seconds of the whole net, by ``costs``; 2.0 asks for half of the dense
            net's. Kernels go by their importance per second, and an "auto" layer that gains nothing stays dense.
        output_sizes: ``{leaf name: (height, width)}``, for multiply-adds (`clicktrain_jax.models.output_sizes`).
        costs: measured seconds of the layers by what they retain, for "latency" (`clicktrain_jax.layer_times`, of a
            plan with the same layers and shapes).
        strict: when true, a convolution that no rule matches is an error rather than left dense.
        groups: ``{regular expression: feature_group_count}`` for grouped convolutions, which a kernel's shape
            does not show. Removing kernels is refused there (each filter sees few channels); patterns are not.
            A layer of one input channel is taken for depthwise unless declared here with 1.
        axes: the layout of the 4-D leaves, "HWIO" (kh, kw, cin, cout) or "OIHW" (Equinox, PyTorch), in which masks
            come back too. None: HWIO, and kernels that do not look like it are refused.

    Returns:
        A hashable `Plan`.

    Raises:
        ValueError: a rule that is no regular expression or matches nothing; a fraction outside [0, 1); a rule
            that prunes a leaf which is not (kh, kw, cin, cout); an uncovered convolution when ``strict``;
            kernel removal in a grouped convolution; a bad tile or option, or options that exclude one another;
            a fraction that leaves nothing of what competes, or less than the floor holds; a target out of reach (the
            reachable maximum is named); nothing to prune; kernels that look like OIHW, or could be, without ``axes``.

    Warns:
        UserWarning: a fraction that removes all kernels of a layer; the layer is named.
    """
    leaves = named_leaves(params)
    leaf_shapes = {name: tuple(int(n) for n in jnp.shape(leaf)) for name, leaf in leaves if leaf is not None}
    names = [name for name, _ in leaves]
    convolutions.check_axes(axes)
    shapes = convolutions.in_hwio(leaf_shapes, axes or "HWIO")
    found: dict[str, Axes | None] = dict.fromkeys(leaf_shapes, "HWIO")
    if axes is None:
        found = convolutions.layouts(leaf_shapes)
    doubts = convolutions.convolutions(shapes)
    group_rules = rule_lib.compile_numbers(groups or {}, names, "groups", "a feature_group_count")
    plain = entries is None or isinstance(entries, numbers.Integral) and not isinstance(entries, bool)
    by_rule: Any = entries
    entry_rules = None if plain else rule_lib.compile_numbers(by_rule, names, "entries", "taps", none="no patterns")
    default, left_out = not rules and target is not None, []
    if default:
        chosen, left_out = rule_lib.default_choice(shapes, doubts, group_rules)
        if not chosen:
            for name, layout in found.items():
                if layout == "OIHW":
                    convolutions.check_layout(name, leaf_shapes[name], layout)
            raise ValueError(
                "rules=None: there is no convolution of more than 4 input channels to prune by the target"
                + "".join(f"; {name!r}: {why}" for name, why in left_out[:4])
            )
        rules = {rule_lib.exactly(name): "auto" for name in chosen}
    if (target_of == "latency") != (costs is not None):
        raise ValueError(
            f"target_of={target_of!r} with costs={costs!r}: a target in time needs the measured times of the layers, "
            "costs=clicktrain_jax.layer_times(...), and no other takes them"
        )
    compiled = rule_lib.compile_rules(rules)
    assert rules is not None
    if target is None and "auto" in rules.values():
        raise ValueError("a rule says 'auto', but there is no target: give target=8.0, or a fraction in the rule")
    for which, value in (("tile", tile), ("removal_tile", removal_tile)):
        if value is not None or which == "tile":
            _check_tile(which, value)
    _check_options(tile, superset, quads, removal_score, removal_scope)
    used: set[str] = set()
    layers = []
    for name, shape in shapes.items():
        rule = next((text for text, expression in compiled.items() if expression.fullmatch(name)), None)
        if rule is None:
            if strict and doubts.get(name, "") is None:
                raise ValueError(
                    f"strict: no rule covers the convolution {name!r} {shape}; add one for it, None leaves it dense"
                )
            if not default and doubts.get(name, "") is None:
                left_out.append((name, rule_lib.explain_unmatched(name, compiled)))
            continue
        used.add(rule)
        fraction = rules[rule]
        if fraction is None:
            if name in doubts:
                left_out.append((name, f"rule {rule!r} says so"))
            continue
        if not is_kernel_shape(shape):
            raise ValueError(
                f"rule {rule!r} prunes {name!r} of shape {shape}, which is not 4-D (kh, kw, cin, cout): "
                "only convolution kernels can be pruned; narrow the rule, or put one with None before it"
            )
        convolutions.check_layout(name, shape, found[name])
        rule_lib.check_groups(name, shape, fraction, group_rules)
        taps = shape[0] * shape[1]
        number: Any = entries if entry_rules is None else rule_lib.first_match(entry_rules, name, 4)
        named = entry_rules is not None and rule_lib.first_match(entry_rules, name, "") != ""
        whole = taps > 1 and (number is None or taps > 32 or default and shape[:2] != (3, 3) and not named)
        layer = LayerPlan(
            name,
            shape,
            None if fraction == "auto" else float(fraction),
            tile=_whole(tile, shape),
            removal_tile=_whole(tile if removal_tile is None else removal_tile, shape),
            entries=taps if whole or number is None else int(number),
            superset=superset,
            quads=quads,
            removal_score=removal_score,
            removal_scope=removal_scope,
            floor=target is not None and removal_scope == "layer" if floor is None else bool(floor),
            cost=rule_lib.positions(name, output_sizes) if target_of == "multiply_adds" and target else 1,
            whole_kernels=whole,
            axes=axes or "HWIO",
        )
        check_layer(layer)
        if costs is not None:
            times = costs.of(name)
            layer = dataclasses.replace(layer, times=times)
            least = least_kernels(layer) / (shape[2] * shape[3])
            if layer.fraction is None and not times.gains(least):
                left_out.append((name, "measured: it gains no time, whatever is removed"))
                continue
        layers.append(layer)
    unused = [rule for rule in rules if rule not in used]
    if unused:
        raise ValueError(rule_lib.explain_unused(unused[0], compiled[unused[0]], names))
    if not layers and costs is not None:
        raise ValueError(
            f"target={target} over latency is out of reach: no layer gets faster by what may be removed of it, the "
            "reachable maximum is 1.00; use tiles, floor=False, or another device or batch size"
        )
    if not layers:
        raise ValueError("the rules prune no layer: give at least one convolution a fraction in [0, 1)")
    counted = {name for name, why in doubts.items() if why is None} | {layer.name for layer in layers}
    resolved = None if target is None else make_target(target, target_of, shapes, layers, output_sizes, counted, costs)
    containers = map_named(lambda name, _: name, params)
    return Plan(tuple(layers), tuple(names), resolved, tuple(left_out), containers)


def _whole(tile: Tile, shape: tuple[int, ...]) -> tuple[int, int]:
    """A tile with None, or more than there is, replaced by all there is."""
    filters, channels = tile
    return min(filters or shape[3], shape[3]), min(channels or shape[2], shape[2])


def _check_tile(which: str, tile: Any) -> None:
    valid = isinstance(tile, tuple) and len(tile) == 2
    if not valid or any(
        size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1) for size in tile
    ):
        raise ValueError(f"{which}={tile!r}: expected (filters, channels), each a positive int or None for all")


def _check_options(tile: Tile, superset: int | None, quads: bool, removal_score: str, removal_scope: str) -> None:
    for field, value, known in (
        ("removal_score", removal_score, ("whole", "retained")),
        ("removal_scope", removal_scope, ("layer", "filter", "tile")),
    ):
        if value not in known:
            raise ValueError(f"{field}={value!r}: expected one of {known}")
    if quads and (tile != (1, 1) or superset is not None):
        raise ValueError(f"quads choose a pattern for each kernel: tile={tile}, superset={superset} exclude them")
    if superset is not None and (isinstance(superset, bool) or not isinstance(superset, numbers.Integral)):
        raise ValueError(f"superset={superset!r}: expected a number of taps, 5 or 6 for 4-tap patterns")
