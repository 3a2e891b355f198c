"""Rules on leaf names: regular expressions that must match a whole name, the first match deciding."""

import numbers
import re
from collections.abc import Mapping
from typing import Any

from clicktrain_jax.plan.convolutions import is_shortcut

NumberRules = list[tuple[re.Pattern[str], int | None]]


def exactly(name: str) -> str:
    """A rule that matches one name alone."""
    return re.escape(name)


def compile_rules(rules: Mapping[str, Any] | None) -> dict[str, re.Pattern[str]]:
    """The expressions of ``{expression: fraction, None or "auto"}``, validated, by their text.

    Raises:
        ValueError: no mapping, an empty one, no regular expression, or a fraction outside [0, 1).
    """
    if not isinstance(rules, Mapping) or not rules:
        raise ValueError(f"rules={rules!r}: expected a non-empty mapping {{path regex: fraction or None}}")
    for text, fraction in rules.items():
        # numpy's scalars too.
        number = isinstance(fraction, numbers.Real) and not isinstance(fraction, bool)
        # Written so that NaN fails too.
        if fraction is not None and fraction != "auto" and not (number and 0 <= float(fraction) < 1):
            raise ValueError(
                f"rule {text!r}: fraction {fraction!r} is outside [0, 1); it is the share of kernels to remove, "
                "0.55 for 55 percent, None to leave the layer dense, or 'auto' when a target decides"
            )
    return {text: _compile(text, "rules") for text in rules}


def compile_numbers(
    rules: Mapping[str, int | None], names: list[str], what: str, unit: str, none: str = ""
) -> NumberRules:
    """The expressions of ``{expression: positive integer}``, each of which must match a name.

    ``none`` says what None stands for where it may stand in place of a number.

    Raises:
        ValueError: another value, no regular expression, or one that matches nothing.
    """
    if not isinstance(rules, Mapping):
        raise ValueError(f"{what}={rules!r}: expected a mapping {{path regex: {unit} of 1 or more}}")
    compiled = []
    for text, count in rules.items():
        allowed = count is None and none
        if not allowed and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            otherwise = f", or None for {none}" if none else ""
            raise ValueError(f"{what}: {text!r} has {count!r}; expected {unit} of 1 or more{otherwise}")
        expression = _compile(text, what)
        if not any(expression.fullmatch(name) for name in names):
            raise ValueError(f"{what}: {explain_unused(text, expression, names)}")
        compiled.append((expression, count))
    return compiled


def first_match(rules: NumberRules, name: str, default: Any) -> Any:
    """The number of the first rule that matches a name."""
    return next((number for expression, number in rules if expression.fullmatch(name)), default)


def explain_unused(rule: str, expression: re.Pattern[str], names: list[str]) -> str:
    """Why a rule applies to nothing."""
    shadowed = [name for name in names if expression.fullmatch(name)]
    if shadowed:
        return f"rule {rule!r} never applies: rules before it match {shadowed[0]!r} and all else it would match"
    kernels = [name for name in names if name.endswith("kernel")] or names
    hint = next((hint for name in kernels if (hint := near_miss(name, rule, expression))), "")
    return f"rule {rule!r} matches nothing; names are matched whole, for example {kernels[:4]}{hint}"


def explain_unmatched(name: str, rules: Mapping[str, re.Pattern[str]]) -> str:
    """Why a convolution is left dense when no rule matches it, with the rule that nearly does."""
    hint = next((hint for rule, expression in rules.items() if (hint := near_miss(name, rule, expression))), "")
    return f"no rule matches it{hint}"


def near_miss(name: str, rule: str, expression: re.Pattern[str]) -> str:
    """The rule that was probably meant, when one matches a part of a name; "" when it does not."""
    keys = name.split("/")
    ends = ["/".join(keys[start:]) for start in range(1, len(keys))]
    if any(expression.fullmatch(end) for end in ends):
        meant = f"(.*/)?{rule}" if "|" not in rule else f"(.*/)?({rule})"
    elif len(keys) > 1 and expression.fullmatch("/".join(keys[:-1])):
        meant = f"{rule}/{keys[-1]}"
    elif expression.fullmatch("params/" + name):
        meant = rule.removeprefix("params/")
    elif re.fullmatch(rule, name, re.IGNORECASE):
        meant = exactly(name)
    else:
        return ""
    return f" (rule {rule!r} nearly does: did you mean {meant!r}?)"


def default_choice(
    shapes: Mapping[str, tuple[int, ...]], doubts: Mapping[str, str | None], groups: NumberRules
) -> tuple[list[str], list[tuple[str, str]]]:
    """What a target decides when there are no rules.

    Args:
        shapes: of all leaves, kernels as (kh, kw, cin, cout).
        doubts: from `clicktrain_jax.plan.convolutions.convolutions`.
        groups: declared feature_group_counts.

    Returns:
        The names to prune, and ``[(name, why)]`` of the other leaves of 4 or more axes.
    """
    chosen, left_out = [], []
    for name, shape in shapes.items():
        if len(shape) < 4:
            continue
        if len(shape) > 4:
            why = f"{len(shape)}-D: three-dimensional, or a stack of kernels; only 4-D kernels can be pruned"
        elif doubts[name] is not None:
            why = doubts[name]
        elif shape[2] <= 4:
            why = f"{shape[2]} input channel(s): reads the image, or is depthwise"
        elif is_shortcut(name, shape):
            why = "a shortcut, by its name"
        elif (first_match(groups, name, 1) or 1) > 1:
            why = "a grouped convolution"
        else:
            chosen.append(name)
            continue
        left_out.append((name, why))
    return chosen, left_out


def check_groups(name: str, shape: tuple[int, ...], fraction: Any, group_rules: NumberRules) -> None:
    """Refuse the removal of kernels in grouped convolutions.

    Raises:
        ValueError: the layer is declared grouped, or looks depthwise, and its kernels would be removed.
    """
    declared = first_match(group_rules, name, None)
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


def positions(name: str, output_sizes: Mapping[str, tuple[int, int]] | None) -> int:
    """How many places a kernel is applied at.

    Raises:
        ValueError: its output size is not given.
    """
    if output_sizes is None or name not in output_sizes:
        raise ValueError(
            f"target_of='multiply_adds' needs output_sizes with {name!r}: (height, width) of what it computes; "
            "clicktrain_jax.models.output_sizes gives them for the models here"
        )
    height, width = output_sizes[name]
    return int(height) * int(width)


def _compile(text: str, what: str) -> re.Pattern[str]:
    if not isinstance(text, str):
        raise ValueError(f"{what}: key {text!r} is not a string; expected a regular expression on leaf names")
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{what}: {text!r} is not a regular expression: {error}") from error
