"""Programs are compiled once, in whichever thread, and kept for the next process."""

import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clicktrain_jax import models
from experiments.train.programs import Programs, in_background, keep_on_disk


def test_a_program_is_compiled_once_and_who_waits_for_it_is_timed():
    programs, built = Programs({}), []
    begun, go_on = threading.Event(), threading.Event()

    def build():
        built.append(1)
        begun.set()
        go_on.wait(30)
        return lambda x: x + 1

    args = (jnp.float32(1),)
    thread = threading.Thread(target=lambda: programs.get("key", build, args, large=True, ahead=True))
    thread.start()
    assert begun.wait(30)
    waiting = []
    other = threading.Thread(target=lambda: waiting.append(programs.get("key", build, args)))
    other.start()
    go_on.set()
    thread.join(), other.join()
    assert waiting[0](*args) == 2 and built == [1] and programs.large == ["key"] and "key" in programs
    assert programs.seconds > 0
    waited = programs.seconds
    programs.get("key", build, args)
    assert programs.seconds == waited and programs.bytes > 0


@pytest.mark.slow
def test_first_weights_that_are_compiled_for_a_short_wait_have_the_same_bits(optimised):
    model, programs, key = models.build("small", num_classes=10), Programs({}), jax.random.key(3)

    def build():
        return lambda key: model.init(key, jnp.zeros((1, 8, 8, 1)), train=False)

    soon, fast = (programs.get(runs_once, build, (key,), runs_once=runs_once)(key) for runs_once in (True, False))
    jax.tree.map(np.testing.assert_array_equal, soon, fast)


def test_what_fails_is_raised_where_the_program_is_asked_for():
    programs = Programs({})

    def build():
        raise ValueError("no such net")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such net"):
            programs.get("key", build, ())


def test_what_was_interrupted_is_compiled_when_it_is_asked_for_again():
    programs, tries = Programs({}), []

    def build():
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return lambda x: x + 1

    with pytest.raises(KeyboardInterrupt):
        programs.get("key", build, (jnp.ones(()),))
    assert "key" not in programs
    assert programs.get("key", build, (jnp.ones(()),))(jnp.ones(())) == 2 and len(tries) == 2


def test_one_core_does_it_at_once(monkeypatch):
    done = []
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert in_background(lambda: done.append(1), "work") is None and done == [1]


def test_programs_are_kept_for_the_next_process(tmp_path, monkeypatch):
    from jax.experimental.compilation_cache import compilation_cache

    monkeypatch.setenv("CLICKTRAIN_CACHE", str(tmp_path))
    names = [
        f"jax_{name}"
        for name in (
            "compilation_cache_dir",
            "persistent_cache_min_compile_time_secs",
            "persistent_cache_enable_xla_caches",
        )
    ]
    before = {name: getattr(jax.config, name) for name in names}
    seen = []
    jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_on_disk()
        folder = Path(jax.config.jax_compilation_cache_dir)
        # Of this processor alone: what is compiled for another may not run.
        assert folder.parent == tmp_path and re.fullmatch("programs-[0-9a-f]{8}", folder.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        for _ in range(2):
            # New objects, as in another process: only what is on disk can be found.
            Programs({}).get("key", lambda: lambda x: jnp.sin(x) * 3, (jnp.ones(7),))
            jax.clear_caches()
        assert any(folder.iterdir())
        assert "/jax/compilation_cache/cache_hits" in seen
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        keep_on_disk()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
