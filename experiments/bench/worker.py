"""A process in which one engine runs, told what to do line by line: so engines of several Pythons are timed in turns.

Lines are JSON on standard input and output: a question ``{"do": ..., ...}``, and its answer, ``{"error": reason}``
where it failed. An engine that stands idle waits for a line and takes no core.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from experiments.bench.engines import ENGINES, PACKAGES, Job, Unavailable

_ROOT = Path(__file__).parents[2]
# A sample is the mean of as many calls as take about this long, after others for so long.
_SAMPLE_S, _WARM_S = 0.05, 0.02
_MOST_CALLS = 200


class Failed(Exception):
    """What an engine was asked to do went wrong, in words."""


class Process:
    """A process that answers line by line, to be used as a context.

    Args:
        command: starts it.
        env: its environment; this process's when None.

    Raises:
        Failed: what it needs is not installed, or does not work.
        OSError: there is no such command.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, cwd=_ROOT, env=env, stdin=pipe, stdout=pipe, stderr=self._errors, text=True
            )
        except OSError:
            self._errors.close()
            raise
        try:
            # Once it stands, with its library's version.
            self.version = self._answer()["version"]
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Let it do something, and wait for the answer.

        Raises:
            Failed: it could not.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # It has ended; its last words are read below.
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                stream.close()
            except BrokenPipeError:
                pass  # What was still to be sent has nobody to read it.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            words = self._errors.read().strip().splitlines()
            raise Failed(f"its process ended with {code}: {words[-1] if words else 'without a word'}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer


class Worker(Process):
    """The process of one engine.

    Args:
        engine: of `ENGINES`.
        job: what it runs.
        python: interpreter; this one's when None.

    Raises:
        Failed: the engine's library is not installed, or does not work.
    """

    def __init__(self, engine: str, job: Job, python: str | None = None) -> None:
        self.engine = engine
        places = [str(job.export.resolve()), str(job.folder.resolve())]
        arguments = [engine, *places, job.platform, *(["tuned"] if job.is_tuned else [])]
        super().__init__(
            [python or sys.executable, "-m", "experiments.bench.worker", *arguments],
            # Several processes of jax share a GPU only if none takes its memory beforehand.
            {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )


class Sampled:
    """The side that is timed: functions of no arguments, by the name of their form."""

    def __init__(self) -> None:
        self.calls: dict[str, Any] = {}

    def sample(self, form: str, calls: int | None) -> dict[str, Any]:
        """Seconds of a call, the mean of so many; of as many as make a sample when None."""
        call = self.calls[form]
        # Calls before find caches and threads as the engine before left them.
        begin = now = time.perf_counter()
        once_s = 0.0
        while not once_s or now - begin < _WARM_S:
            call()
            once_s, now = time.perf_counter() - now, time.perf_counter()
        calls = min(max(1, round(_SAMPLE_S / max(once_s, 1e-9))), _MOST_CALLS) if calls is None else calls
        if once_s > _SAMPLE_S and calls == 1:
            return {"seconds": once_s, "calls": 1}
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return {"seconds": (time.perf_counter() - begin) / calls, "calls": calls}


class _Served(Sampled):
    """An engine's side."""

    def __init__(self, engine: str, job: Job) -> None:
        super().__init__()
        self.job = job
        self.engine = ENGINES[engine](job)
        self.version = self.engine.version

    def start(self, images: str, form: str) -> dict[str, Any]:
        """From nothing but the library to the first answer."""
        array = np.load(images)
        before = resident_bytes(reset=True)
        begin = time.perf_counter()
        self.engine.load()
        self.engine.first(array, form)
        return {"seconds": time.perf_counter() - begin, "bytes_before": before, **self.memory()}

    def load(self) -> dict[str, Any]:
        """Without the clock."""
        self.engine.load()
        return {}

    def memory(self) -> dict[str, Any]:
        """The most that was in use since `start`."""
        return {"peak_bytes": resident_bytes(), "device_bytes": self.engine.device_bytes()}

    def prepare(self, images: str, without: Sequence[str] = (), only: str | None = None) -> dict[str, Any]:
        """Make the forms for these images in the place of earlier ones; logits are written beside the images."""
        self.calls = {}
        array = np.load(images)
        logits, failed = {}, {}
        for name, make in self.engine.forms(array).items():
            if name in without or name != (only or name):
                continue
            try:
                call = make()
                # The second call finds everything compiled, as all later ones do.
                call()
                logits[name] = np.array(call(), np.float32)
                self.calls[name] = call
            except Exception as error:  # one form of an engine may be broken here; the others shall be measured
                failed[name] = _words(error)
        path = str(Path(images).with_name(f"logits-{os.getpid()}.npz"))
        np.savez(path, **logits)
        return {"logits": path, "failed": failed}


def resident_bytes(reset: bool = False) -> int:
    """The most memory that this process has had resident, Linux's VmHWM.

    Not ``ru_maxrss``: a new process inherits that of the one that started it.

    Args:
        reset: begin anew: what is resident now is the most there was.
    """
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # Not allowed here: the most so far is nearly what is resident, nothing was freed yet.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise Unavailable("/proc/self/status tells no VmHWM")


def serve(package: str, make: Callable[[], Any]) -> None:
    """Answer until standard input ends.

    Args:
        package: what pip calls the library that is served.
        make: returns the object whose methods answer; it may tell its own ``version``.
    """
    # Libraries may print: only answers go where the answers are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        served = make()
        version = getattr(served, "version", None) or f"{package} {importlib.metadata.version(package)}"
        answer({"version": version})
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        answer({"error": f"{package} is not installed" if missing else f"{package} cannot be imported: {error}"})
        return
    except Exception as error:  # whatever another project's library raises
        answer({"error": _words(error)})
        return
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer(getattr(served, asked.pop("do"))(**asked))
        except Exception as error:
            answer({"error": _words(error)})


def main(engine: str, export: str, folder: str, platform: str, tuned: str = "") -> None:
    """Serve one engine until standard input ends."""
    serve(PACKAGES[engine], lambda: _Served(engine, Job(Path(export), Path(folder), platform, bool(tuned))))


def _words(error: Exception) -> str:
    words = str(error).strip() or "?"
    return words if isinstance(error, Unavailable) else f"{type(error).__name__}: {words.splitlines()[0]}"


if __name__ == "__main__":
    main(*sys.argv[1:])
