"""Named configs, one file for each family of table rows."""

import difflib

from experiments.configs import ablation, compare, demo, imagenet, modern, own, price, published, slim
from experiments.configs.base import LoopConfig, PruneConfig, TrainConfig, from_dict, to_dict

__all__ = ["LoopConfig", "PruneConfig", "TrainConfig", "all_configs", "from_dict", "get", "to_dict"]


def all_configs() -> dict[str, TrainConfig]:
    """Every named config, in the order of its family."""
    families = (demo, slim, published, imagenet, own, modern, price, ablation, compare)
    return {config.name: config for family in families for config in family.configs()}


def get(name: str) -> TrainConfig:
    """A config by name.

    Raises:
        ValueError: unknown name; close ones are offered.
    """
    known = all_configs()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown config {name!r}; "
            + (f"did you mean {', '.join(close)}? " if close else "")
            + "`python -m experiments list` shows all"
        )
    return known[name]
