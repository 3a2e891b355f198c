"""How commands read their arguments: a command is a function, its parameters are the fields, its docstring the help."""

import contextlib
import functools
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

PROGRAM = "python -m experiments"
# A parameter data_dir is asked for as the config's field is.
Run = tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
DataDir = Annotated[str | None, tyro.conf.arg(name="data.dir")]


def call(function: Callable[..., Any], arguments: list[str], command: str, **options: Any) -> Any:
    """Call a function with what the arguments say; returns what it returns.

    Args:
        function: its parameters are annotated, and explained in its docstring.
        arguments: of the command line, after the command.
        command: what came before them.
        options: for `tyro.cli`.

    Raises:
        ValueError: arguments that it does not take, in one sentence.
        SystemExit: help was asked for and printed.
    """

    @functools.wraps(function)
    def take(*given: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        return given, named

    # A partial's own docstring tells of partials.
    take.__doc__ = getattr(function, "func", function).__doc__
    given, named = parse(take, arguments, command, **options)
    return function(*given, **named)


def parse(kind: Any, arguments: list[str], command: str, **options: Any) -> Any:
    """What `tyro.cli` makes of a class or function; mistakes are a ValueError in one sentence."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=arguments, prog=f"{PROGRAM} {command}", **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_sentence(said.getvalue())} (all fields: {PROGRAM} {command} --help)") from None


def _sentence(box: str) -> str:
    """What a box of tyro's says between its title and its first rule.

    The title is in the box's frame, or, where stdout's encoding has no frames, above a rule of its own.
    """
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    is_rule = [len(line) > 3 and not line.strip("─-") for line in lines]
    if is_rule[1:2] == [True]:
        lines, is_rule = lines[2:], is_rule[2:]
    said = itertools.takewhile(lambda pair: not pair[1], zip(lines, is_rule))
    return " ".join(line for line, _ in said if line).rstrip(". ")
