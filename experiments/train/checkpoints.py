"""Checkpoints: orbax files, with a digest of their content beside them.

A checkpoint that cannot be read, or whose content is not what was written, is set aside and the one before
it is used; the caller is told.
"""

import hashlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints of one run at epoch ends; a checkpoint's number is the count of epochs done.

    Args:
        path: their folder, made when missing unless ``read_only``.
        keep: how many of the newest stay.
        read_only: change nothing, broken ones included.
    """

    def __init__(self, path: Path, keep: int = 1, *, read_only: bool = False) -> None:
        self.path = Path(path).resolve()
        self._read_only = read_only
        alone = ocp.options.MultiprocessingOptions()
        if jax.process_count() > 1:
            # This process alone writes and reads. Orbax then wants the folder to be there.
            alone = ocp.options.MultiprocessingOptions(active_processes={jax.process_index()})
            self.path.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            create=not read_only and jax.process_count() == 1,
            read_only=read_only,
            multiprocessing_options=alone,
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def save(self, epochs_done: int, tree: Any, facts: dict[str, Any] | None = None) -> None:
        """Write one, and plain data beside it; it is complete on disk, or not there, whenever the process dies."""
        # Of several processes only this one writes: an array of all would be waited for.
        tree = jax.device_get(tree) if jax.process_count() > 1 else tree
        told = {"sha256": digest(tree)} | ({} if facts is None else {"facts": facts})
        args = ocp.args.Composite(state=ocp.args.StandardSave(_named_arrays(tree)), digest=ocp.args.JsonSave(told))
        self._manager.save(epochs_done, args=args)

    def numbers(self) -> list[int]:
        """Of all that are there."""
        return sorted(self._manager.all_steps())

    def facts(self, number: int) -> dict[str, Any]:
        """What was saved beside one."""
        return self._manager.restore(number, args=ocp.args.Composite(digest=ocp.args.JsonRestore())).digest["facts"]

    def clear(self) -> None:
        """Take all of them away."""
        for number in self.numbers():
            self._manager.delete(number)

    def restore_newest(self, template: Any) -> tuple[int, Any] | None:
        """``(epochs done, tree)`` of the newest good checkpoint; None when there are no checkpoints.

        Args:
            template: a tree of the same structure, shapes and dtypes; or a function that makes it from the number of
                epochs done, where shapes change along the run.

        Raises:
            ValueError: there are checkpoints, and none can be read; they stay where they are.

        Warns:
            UserWarning: a checkpoint was broken and an older one is used; the broken one is renamed to
                "NUMBER.broken".
        """
        broken: dict[int, str] = {}
        for number in reversed(self.numbers()):
            try:
                tree = self._restore(number, template(number) if callable(template) else template)
            except Exception as error:  # whatever a damaged file makes orbax raise
                broken[number] = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
                continue
            for bad, reason in broken.items():
                self._set_aside(bad)
                warnings.warn(
                    f"checkpoint {bad} in {self.path} is broken ({reason}); falling back to {number}", stacklevel=2
                )
            return number, tree
        if broken:
            number, reason = next(iter(broken.items()))
            raise ValueError(f"no checkpoint in {self.path} can be read; number {number}: {reason}")
        return None

    def _restore(self, number: int, template: Any) -> Any:
        arrays = _named_arrays(template)
        # Onto the template's devices, wherever the checkpoint was written; onto one that is this process's own where
        # others have theirs.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if jax.process_count() > 1 else None
        abstract = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here or getattr(array, "sharding", None))
            for name, array in arrays.items()
        }
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), digest=ocp.args.JsonRestore())
        restored = self._manager.restore(number, args=args)
        for name, array in arrays.items():
            if restored.state[name].shape != array.shape:
                raise ValueError(f"{name} has shape {restored.state[name].shape}, expected {array.shape}")
        structure = jax.tree.structure(template)
        tree = structure.unflatten([restored.state[name] for name in arrays])
        if digest(tree) != restored.digest["sha256"]:
            raise ValueError("its content differs from what was written")
        return tree

    def _set_aside(self, number: int) -> None:
        if self._read_only:
            return
        folder = self.path / str(number)
        aside = self.path / f"{number}.broken"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        self._manager.reload()

    def close(self) -> None:
        """Release what orbax holds."""
        self._manager.close()


def digest(tree: Any) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all arrays: equal digests mean equal bits."""
    sha = hashlib.sha256()
    for name, array in _named_arrays(tree).items():
        array = np.ascontiguousarray(jax.device_get(array))
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _named_arrays(tree: Any) -> dict[str, Any]:
    """Arrays by their position and path: plain names, whatever containers the tree has."""
    with_paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {f"{index:04d}{jax.tree_util.keystr(path)}": leaf for index, (path, leaf) in enumerate(with_paths)}
