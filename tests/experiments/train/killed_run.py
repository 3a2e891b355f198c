"""A run that kills itself: ``python killed_run.py FOLDER [EPOCH:FRACTION...]``.

It trains a longer tiny config in FOLDER and says its weights' digest. With EPOCHs, a process for each, one after
another, begins or resumes the run and sends itself SIGKILL (no handler, no cleaning up) some time after the first
update that it does in that epoch or a later one: FRACTION of the time that an epoch, its evaluation and its checkpoint
take. Then each one's exit code is said, and how many epochs are whole.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import tiny

from experiments.records import read_metrics
from experiments.train import loop
from experiments.train.step import Trainer


def main() -> None:
    folder = Path(sys.argv[1])
    for kill in sys.argv[2:]:
        # Forked before jax has begun anything, so that two dozen processes need not import it again.
        process = os.fork()
        if process == 0:
            epoch, fraction = kill.split(":")
            _arm(int(epoch), float(fraction))
            loop.train(CONFIG, folder)
            return
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(code, len(read_metrics(folder)), flush=True)
    if len(sys.argv) == 2:
        print(loop.train(CONFIG, folder)["params_sha256"])


def _arm(epoch: int, fraction: float) -> None:
    original = Trainer.run_epoch
    started = {}
    armed_once = threading.Event()

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run_epoch(self, state, now, seed, on_step=lambda _: None):
        started[now] = time.perf_counter()

        def armed(done):
            if now >= epoch and not armed_once.is_set():
                armed_once.set()
                # A process's first epochs compile: their length says nothing.
                length = min(started[now] - started[now - 1] if now - 1 in started else 0.2, 0.4)
                threading.Timer(fraction * length, kill).start()
            on_step(done)

        return original(self, state, now, seed, armed)

    Trainer.run_epoch = run_epoch


CONFIG = tiny.changed(
    epochs=64,  # far beyond the last kill: a slow machine may pass several epochs before it comes
    method=dataclasses.replace(tiny.CONFIG.prune, select_epoch=14, prune_epoch=26),
    mixup_epoch=32,
)

if __name__ == "__main__":
    main()
