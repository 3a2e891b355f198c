"""Several processes that are one run, by `jax.distributed`: who they are, and what they agree on.

Each process does the same host work and the same updates; the first alone keeps the run folder. What they must have
alike they tell each other before the first update, through the coordinator's key-value store, so that a run that cannot
be is refused by all of them with the reason.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the store has no public name
from jax.experimental import multihost_utils

from experiments.configs.base import LoopConfig, TrainConfig, from_dict, to_dict
from experiments.records import differences, plain

# Seconds: to come, and to say what is asked for; of silence after which a process is taken for dead; to load data.
COME_WITHIN, SILENCE, LOAD_WITHIN = 45, 30, 1800
_numbers = itertools.count()


def join(loop: LoopConfig) -> None:
    """Become one of the processes that a config or the cluster tells of; does nothing where it tells of none.

    It comes before anything else is done with jax.

    Raises:
        ValueError: the others did not come, or the cluster tells nothing.
    """
    if loop.coordinator is None or jax.distributed.is_initialized():
        return
    if loop.coordinator == "auto":
        asked = {}
    else:
        asked = {
            "coordinator_address": loop.coordinator,
            "num_processes": loop.processes,
            "process_id": loop.process_id,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **asked,
            initialization_timeout=COME_WITHIN,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )
    except Exception as error:  # whatever its client, or a cluster's environment, makes of it
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ValueError(
            f"loop.coordinator={loop.coordinator!r}, processes={loop.processes}, process_id={loop.process_id}: no run "
            f"of several processes began ({reason}). Start all of them within {COME_WITHIN} seconds, each with a "
            "process_id of its own, and let each reach the coordinator"
        ) from error


def is_first() -> bool:
    """Whether this process keeps the run folder."""
    return jax.process_index() == 0


def check_config(config: TrainConfig, *, lengthen: bool = False) -> None:
    """Have all processes ask for the same run, and agree whether it is lengthened first.

    Raises:
        ValueError: on every process, where one asks for another.
    """
    if jax.process_count() == 1:
        return
    mine = {
        "config": plain(to_dict(config)),
        "jax": jax.__version__,
        "devices": jax.local_device_count(),
        "--lengthen": lengthen,
    }
    told = _exchange(mine, COME_WITHIN)
    for process, theirs in enumerate(told):
        for field, first, other in differences(told[0]["config"], from_dict(theirs["config"])):
            raise ValueError(
                f"process {process} asks for another run than process 0: {field} is {other!r}, not {first!r}"
            )
        for field in ("jax", "devices", "--lengthen"):
            if theirs[field] != told[0][field]:
                raise ValueError(
                    f"process {process} has {field} {theirs[field]}, process 0 has {told[0][field]}: make them alike"
                )
    if config.channels is not None or config.prune is not None and config.prune.target_of == "latency":
        raise ValueError(
            f"{config.method.kind} with {jax.process_count()} processes: a net that becomes narrower, and a target in "
            "measured seconds, are for one process"
        )


def together(work: Callable[[], Any], same: Callable[[Any], Any] = lambda found: None) -> Any:
    """Do something that may be refused on each process; returns what it returns here.

    Args:
        work: what is done.
        same: of what it returns, plain data that all must have alike.

    Raises:
        ValueError: what it raised here or elsewhere; on every process, where two have other data.
    """
    if jax.process_count() == 1:
        return work()
    found = problem = None
    try:
        found = work()
    except ValueError as error:
        problem = error
    told = _exchange({"problem": None if problem is None else str(problem), "same": same(found)}, LOAD_WITHIN)
    if problem is not None:
        raise problem
    for process, theirs in enumerate(told):
        if theirs["problem"] is not None:
            raise ValueError(f"process {process}: {theirs['problem']}")
    for process, theirs in enumerate(told):
        if theirs["same"] != told[0]["same"]:
            raise ValueError(
                f"process {process} has other images than process 0 (fingerprint {theirs['same']}, not "
                f"{told[0]['same']}): give all of them the same data"
            )
    return found


def explain(error: Exception, epochs_saved: int) -> None:
    """Raise a ConnectionError where jax raised an error in an update because another process is gone."""
    said = str(error)
    if jax.process_count() > 1 and any(word in said for word in ("Gloo", "NCCL", "peer", "UNAVAILABLE")):
        raise ConnectionError(
            f"another process of the run is gone, or cannot be reached ({said.splitlines()[0][:200]}). The newest "
            f"checkpoint, of {epochs_saved} whole epochs, is kept: start all processes again, by the same commands"
        ) from error


def from_first(work: Callable[[], Any]) -> Any:
    """What the first process finds, plain data, on every process; a ValueError of its likewise."""
    if jax.process_count() == 1:
        return work()
    found = together(lambda: work() if is_first() else None)
    return _exchange(found, LOAD_WITHIN)[0]


def bytes_from_first(tree: Any) -> Any:
    """A tree of arrays with the values that the first process has, to the bit, on the host of every process."""
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    flat = np.concatenate([np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8) for leaf in leaves])
    flat = np.asarray(multihost_utils.broadcast_one_to_all(flat))
    ends = np.cumsum([leaf.nbytes for leaf in leaves])
    parts = np.split(flat, ends[:-1])
    return structure.unflatten(
        np.frombuffer(part.tobytes(), leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves)
    )


def _exchange(mine: Any, seconds: int) -> list[Any]:
    """What each process says, by its number."""
    store, name = distributed.global_state.client, f"clicktrain/{next(_numbers)}"
    store.key_value_set(f"{name}/{jax.process_index()}", json.dumps(mine))
    told = []
    for process in range(jax.process_count()):
        try:
            told.append(json.loads(store.blocking_key_value_get(f"{name}/{process}", 1000 * seconds)))
        except RuntimeError as error:
            raise ValueError(f"process {process} said nothing for {seconds} seconds: is it still running?") from error
    return told
