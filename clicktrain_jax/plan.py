"""The plan: which leaves are pruned, how much of them goes, and in what shapes.

A `Plan` is plain hashable data, made once from the parameter tree's names and shapes. It holds no arrays,
so it can be closed over by a jitted step.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp

from clicktrain_jax import rules as rule_lib
from clicktrain_jax.targets import Target, make_target
from clicktrain_jax.trees import Tree, check_same_names, is_kernel_shape, named_leaves

Tile = tuple[int | None, int | None]
Fraction = float | Literal["auto"] | None


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What happens to one convolution.

    Attributes:
        name: the leaf's name, ``"Conv_1/kernel"``.
        shape: its (kh, kw, cin, cout).
        fraction: share of its units of removal to remove, in [0, 1); None when the plan's target decides.
        tile: (filters, channels) that share one pattern (with ``superset``: that share a superset).
        removal_tile: (filters, channels) that are removed together: the unit of removal.
        entries: taps that a generated pattern keeps.
        superset: taps that a whole tile may use, each kernel having its own pattern among them; None for off.
        quads: patterns of 4 neighbouring input channels are chosen jointly, at most two of them using any tap.
        removal_score: units compete by their "whole" score, or by what is "retained" under their pattern.
        removal_scope: where the same share goes: the "layer", each "filter" (tile of filters), each pattern "tile".
        floor: no filter and no input channel is emptied.
        cost: what one weight counts for the plan's target: 1, or the number of places it is applied at.
    """

    name: str
    shape: tuple[int, int, int, int]
    fraction: float | None
    tile: tuple[int, int] = (1, 1)
    removal_tile: tuple[int, int] = (1, 1)
    entries: int = 4
    superset: int | None = None
    quads: bool = False
    removal_score: str = "whole"
    removal_scope: str = "layer"
    floor: bool = False
    cost: int = 1

    @property
    def has_patterns(self) -> bool:
        """1x1 kernels have one tap: only whole kernels can be removed there."""
        return self.shape[0] * self.shape[1] > 1

    @property
    def tile_grid(self) -> tuple[int, int]:
        """Number of pattern tiles along (cin, cout); the last ones may be short."""
        return self._grid(self.tile)

    @property
    def unit_grid(self) -> tuple[int, int]:
        """Number of units of removal along (cin, cout); the last ones may be short."""
        return self._grid(self.removal_tile)

    def _grid(self, tile: tuple[int, int]) -> tuple[int, int]:
        filters, channels = tile
        return math.ceil(self.shape[2] / channels), math.ceil(self.shape[3] / filters)

    @property
    def scope_block(self) -> tuple[int, int]:
        """Units along (cin, cout) of one block of the removal's scope."""
        rows, columns = self.unit_grid
        if self.removal_scope == "layer":
            return rows, columns
        if self.removal_scope == "filter":
            return rows, 1
        filters, channels = (tile // unit for tile, unit in zip(self.tile, self.removal_tile))
        return min(channels, rows), min(filters, columns)

    @property
    def num_removed(self) -> int:
        """Units removed in each block of the scope: the reference's count, ceil(round(f * n, 6)).

        The rounding keeps a product such as 0.55 * 1600 = 880.0000000000001 from giving 881.
        """
        return math.ceil(round(self.fraction * math.prod(self.scope_block), 6))

    @property
    def num_protected(self) -> int:
        """At most so many units are held back by the floor: the best of every row and of every column."""
        return sum(self.unit_grid) - 1 if self.floor else 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The layers to prune, the names of all leaves of the tree the plan was made for, and the target if any."""

    layers: tuple[LayerPlan, ...]
    leaf_names: tuple[str, ...]
    target: Target | None = None

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
    rules: Mapping[str, Fraction] | None = None,
    *,
    tile: Tile = (1, 1),
    removal_tile: Tile | None = None,
    entries: int | Mapping[str, int] = 4,
    superset: int | None = None,
    quads: bool = False,
    removal_score: Literal["whole", "retained"] = "whole",
    removal_scope: Literal["layer", "filter", "tile"] = "layer",
    floor: bool | None = None,
    target: float | None = None,
    target_of: Literal["convolutions", "model", "multiply_adds"] = "convolutions",
    output_sizes: Mapping[str, tuple[int, int]] | None = None,
    strict: bool = False,
    groups: Mapping[str, int] | None = None,
) -> Plan:
    """Choose the layers to prune by rules on the paths of their kernels, and the shapes of the choice.

    The defaults are the choices of the authors' code.

    Args:
        params: the parameter tree (arrays or ``jax.ShapeDtypeStruct``); only names and shapes are read.
        rules: ``{regular expression: fraction}``. An expression must match a whole name (`re.fullmatch`), such
            as ``"Conv_1/kernel"``; the first that matches a leaf decides. A fraction in [0, 1) prunes the layer:
            that share of its kernels is removed and the rest keep one pattern each; 0.0 means patterns only.
            ``None`` leaves the layer dense. ``"auto"``: the target decides. 1x1 convolutions get kernel removal
            only. With a target the rules may be None: ``"auto"`` then holds for every convolution but those of
            4 or fewer input channels (the image) and shortcuts (names with "shortcut" or "downsample").
        tile: (filters, channels) that share one pattern, and one removal unless ``removal_tile`` says otherwise;
            ``None`` stands for all. (1, 1), the paper's form, chooses for every kernel apart. Last tiles may be short.
        removal_tile: (filters, channels) that are removed together.
        entries: taps kept by each pattern that is generated (`clicktrain_jax.patterns.Generated`), or
            ``{regular expression: number}``, 4 where none matches.
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
            in ``output_sizes``.
        output_sizes: ``{leaf name: (height, width)}``, for multiply-adds (`clicktrain_jax.models.output_sizes`).
        strict: when true, a convolution that no rule matches is an error rather than left dense.
        groups: ``{regular expression: feature_group_count}`` for grouped convolutions, which a kernel's shape
            does not show. Removing kernels is refused there (each filter sees few channels); patterns are not.
            A layer of one input channel is taken for depthwise unless declared here with 1.

    Returns:
        A hashable `Plan`.

    Raises:
        ValueError: a rule that is no regular expression or matches nothing; a fraction outside [0, 1); a rule
            that prunes a leaf which is not (kh, kw, cin, cout); an uncovered convolution when ``strict``;
            kernel removal in a grouped convolution; a bad tile or option, or options that exclude one another;
            a fraction that leaves nothing of what competes, or less than the floor holds; a target out of reach (the
            reachable maximum is named); nothing to prune.
    """
    leaves = named_leaves(params)
    shapes = {name: tuple(int(n) for n in jnp.shape(leaf)) for name, leaf in leaves if leaf is not None}
    names = [name for name, _ in leaves]
    if not rules and target is not None:
        grouped = rule_lib.compile_numbers(groups or {}, names, "groups", "a feature_group_count")
        rules = _default_rules(shapes, grouped)
    compiled = rule_lib.compile_rules(rules)
    if target is None and "auto" in rules.values():
        raise ValueError("a rule says 'auto', but there is no target: give target=8.0, or a fraction in the rule")
    group_rules = rule_lib.compile_numbers(groups or {}, names, "groups", "a feature_group_count")
    plain = isinstance(entries, numbers.Integral) and not isinstance(entries, bool)
    entry_rules = None if plain else rule_lib.compile_numbers(entries, names, "entries", "taps")
    for which, value in (("tile", tile), ("removal_tile", removal_tile)):
        if value is not None or which == "tile":
            _check_tile(which, value)
    _check_options(tile, superset, quads, removal_score, removal_scope)
    used: set[str] = set()
    layers = []
    for name, shape in shapes.items():
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
        rule_lib.check_groups(name, shape, fraction, group_rules)
        layer = LayerPlan(
            name,
            shape,
            None if fraction == "auto" else float(fraction),
            tile=_whole(tile, shape),
            removal_tile=_whole(tile if removal_tile is None else removal_tile, shape),
            entries=int(entries) if entry_rules is None else rule_lib.first_match(entry_rules, name, 4),
            superset=superset,
            quads=quads,
            removal_score=removal_score,
            removal_scope=removal_scope,
            floor=target is not None and removal_scope == "layer" if floor is None else bool(floor),
            cost=rule_lib.positions(name, output_sizes) if target_of == "multiply_adds" and target else 1,
        )
        _check_layer(layer)
        layers.append(layer)
    unused = [rule for rule in rules if rule not in used]
    if unused:
        raise ValueError(rule_lib.explain_unused(unused[0], compiled[unused[0]], names))
    if not layers:
        raise ValueError("the rules prune no layer: give at least one convolution a fraction in [0, 1)")
    resolved = None if target is None else make_target(target, target_of, shapes, layers, output_sizes)
    return Plan(tuple(layers), tuple(names), resolved)


def _default_rules(shapes: Mapping[str, tuple[int, ...]], groups: rule_lib.NumberRules) -> dict[str, Fraction]:
    """"auto" for every convolution but the first, which sees the image, shortcuts and grouped ones."""
    chosen = [
        name
        for name, shape in shapes.items()
        if is_kernel_shape(shape) and shape[2] > 4 and "shortcut" not in name and "downsample" not in name
        and rule_lib.first_match(groups, name, 1) == 1
    ]
    if not chosen:
        raise ValueError("rules=None: there is no convolution of more than 4 input channels to prune by the target")
    return {rule_lib.exactly(name): "auto" for name in chosen}


def _whole(tile: Tile, shape: tuple[int, ...]) -> tuple[int, int]:
    """A tile with None, or more than there is, replaced by all there is."""
    filters, channels = tile
    return min(filters or shape[3], shape[3]), min(channels or shape[2], shape[2])


def _check_tile(which: str, tile: Tile) -> None:
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


def _check_layer(layer: LayerPlan) -> None:
    taps = layer.shape[0] * layer.shape[1]
    if layer.has_patterns:
        # Given patterns may have any number of taps; the number only counts where it is used.
        used = layer.fraction is None or layer.superset is not None or layer.quads
        if layer.entries < 1 or (used and layer.entries >= taps):
            raise ValueError(f"{layer.name!r}: entries={layer.entries}, expected 1 to {taps - 1} of its {taps} taps")
        if layer.superset is not None and not layer.entries <= layer.superset < taps <= 9:
            raise ValueError(
                f"{layer.name!r}: superset={layer.superset}, expected {layer.entries} (entries) to {taps - 1} taps, on "
                "kernels of at most 9"
            )
        if layer.quads and 4 * layer.entries > 2 * taps:
            raise ValueError(
                f"{layer.name!r}: quads cannot hold 4 patterns of {layer.entries} taps, each of {taps} taps used at "
                f"most twice; use at most {taps // 2} entries"
            )
    if layer.removal_scope == "tile" and any(
        tile % unit and tile != size
        for tile, unit, size in zip(layer.tile, layer.removal_tile, (layer.shape[3], layer.shape[2]))
    ):
        raise ValueError(
            f"{layer.name!r}: removal_scope='tile' needs pattern tiles {layer.tile} that are multiples of the "
            f"removal tiles {layer.removal_tile}"
        )
    if layer.floor and layer.removal_scope != "layer":
        raise ValueError(
            f"floor=True with removal_scope={layer.removal_scope!r}: equal counts leave something of every filter, but "
            "cannot promise it for input channels; use removal_scope='layer', or floor=False"
        )
    if not layer.fraction:
        return
    units = math.prod(layer.scope_block)
    # The authors' own form keeps their count, whatever it leaves of a tiny layer.
    reference = layer.removal_tile == (1, 1) and layer.removal_scope == "layer"
    if layer.num_removed >= units and not reference:
        raise ValueError(
            f"{layer.name!r}: a fraction of {layer.fraction} removes all of the {units} unit(s) of "
            f"{layer.removal_tile} (filters, channels) that compete with each other; use a smaller removal_tile, a "
            "wider removal_scope or a smaller fraction"
        )
    if units - layer.num_removed < layer.num_protected:
        raise ValueError(
            f"{layer.name!r}: a fraction of {layer.fraction} leaves {units - layer.num_removed} of {units} units that "
            f"compete, and the floor may hold {layer.num_protected}; use a fraction up to "
            f"{1 - layer.num_protected / units:.4f}, or floor=False"
        )
