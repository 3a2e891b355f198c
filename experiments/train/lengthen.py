"""More epochs for a run folder: what is trained stays, the longer config takes over from there.

The longer run goes on from the newest checkpoint. A step schedule stays at its last rate unless later milestones are
given; a cosine is that of the longer run, so its rate jumps up where the run goes on: not what one run of that length
would have had. Selection and prune stay where they were. What the folder said before is kept beside it, in
``before-N-epochs/``, and its setting.json says from where it was lengthened.
"""

import shutil

from experiments.configs.base import TrainConfig
from experiments.records import RunFolder, differences, read_config, read_json, read_metrics, write_json

_KEPT = ("config.json", "setting.json", "metrics.jsonl", "summary.json")


def lengthen(folder: RunFolder, config: TrainConfig) -> bool:
    """Make a run folder that of a longer run; its next training goes on. Returns whether anything was to be done.

    Args:
        folder: of a run, finished or not.
        config: the same run with more ``epochs``; ``lr_milestones`` may have later ones.

    Raises:
        ValueError: no run folder; anything else differs, fewer epochs, a run with epochs after the dense ones; nothing
            is changed then.
    """
    before = read_config(folder.path)
    changed = differences(read_json(folder.path / "config.json"), config)
    if not changed:
        return False
    done = len(read_metrics(folder.path))
    for field, old, new in changed:
        if field not in ("epochs", "lr_milestones"):
            raise ValueError(f"{folder.path} cannot be lengthened to another config: {field} is {old!r}, not {new!r}")
    if config.epochs <= before.epochs:
        raise ValueError(f"{folder.path} has {before.epochs} epochs: expected more of them, not {config.epochs}")
    if config.ema_epochs and done == before.total_epochs:
        raise ValueError(f"{folder.path} ended with averaged weights (ema_epochs): it cannot be lengthened")
    if config.total_epochs != config.epochs:
        raise ValueError(f"{folder.path} is pruned after its {config.epochs} dense epochs: it cannot be lengthened")
    past = [tuple(one for one in run.lr_milestones if one < done) for run in (before, config)]
    if past[0] != past[1]:
        raise ValueError(f"lr_milestones={config.lr_milestones}: the {done} epochs that are trained had {past[0]}")
    kept = folder.path / f"before-{before.epochs}-epochs"
    kept.mkdir(exist_ok=True)
    for name in _KEPT:
        if (folder.path / name).exists():
            shutil.copyfile(folder.path / name, kept / name)
    # Of an epoch of the shorter run's schedules; what it did of it is done again.
    shutil.rmtree(folder.within, ignore_errors=True)
    # In this order a kill leaves a run that is unfinished at most, and can be lengthened again.
    (folder.path / "summary.json").unlink(missing_ok=True)
    setting = folder.path / "setting.json"
    told = read_json(setting)
    mark = {"from_epochs": before.epochs, "after_epochs": done}
    write_json(setting, told | {"lengthened": [*told.get("lengthened", []), mark]})
    folder.write_config(config)
    return True
