"""What families of runs share: finding one of their cells."""

from collections.abc import Sequence
from typing import Any


def by_name(cells: Sequence[Any], name: str) -> Any:
    """The cell of this name.

    Raises:
        ValueError: there is none.
    """
    for cell in cells:
        if cell.name == name:
            return cell
    raise ValueError(f"no cell {name!r}; the cells are {', '.join(cell.name for cell in cells)}")
