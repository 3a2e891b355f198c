"""How commands read their arguments."""

from typing import Any

import tyro


def parse(kind: Any, arguments: list[str], command: str, **options: Any) -> Any:
    """A dataclass from arguments; mistakes end the program with a message."""
    return tyro.cli(kind, args=arguments, prog=f"python -m experiments {command}", **options)


def name_argument(arguments: list[str], command: str, what: str) -> tuple[str, list[str]]:
    """``(the first argument, the rest)``; a ValueError that says ``what`` is missing."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"{command} needs {what} first: python -m experiments {command} {what.split()[-1]} ...")
    return arguments[0], arguments[1:]
