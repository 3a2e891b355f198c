"""Optional packages: imported where they are used, and said to be missing by the name of the extra that brings them."""

import contextlib
from collections.abc import Iterator


def hint(extra: str) -> str:
    """How to get an extra, as ``pip install 'clicktrain-jax[EXTRA]'``."""
    return f"pip install 'clicktrain-jax[{extra}]'"


@contextlib.contextmanager
def brings(extra: str) -> Iterator[None]:
    """Around imports of what an extra brings.

        with extras.brings("deploy"):
            import safetensors

    Raises:
        ModuleNotFoundError: a package is not installed; the message names it and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed: {hint(extra)}", name=error.name) from error
