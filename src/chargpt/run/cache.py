"""What XLA compiled is kept from one process to the next: the jobs of a sweep, and a run begun again, compile a step once."""

import contextlib
import glob
import hashlib
import os
import platform
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

JAX_CONFIG: Any = jax.config  # its options are set at run time
WORTH_KEEPING = 0.3  # seconds of compilation
LARGEST = 2_000_000_000  # bytes of the whole folder: beyond it, what was written first goes first

reads = 0  # executables that this process read instead of compiling them


def _count(event: str, **_: Any) -> None:
    global reads
    reads += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count)


@contextlib.contextmanager
def kept_executables(say: Callable[[str], None]) -> Iterator[None]:
    """Within the block JAX keeps executables in ~/.cache/chargpt, in JAX_COMPILATION_CACHE_DIR where that is set, and nowhere
    with JAX_ENABLE_COMPILATION_CACHE=false.

    Whoever can write an executable can run code here: a folder that others may write to is said and not used. One that is
    damaged, because a process was killed while it wrote it, is said, thrown away and compiled anew.
    """
    if not JAX_CONFIG.jax_enable_compilation_cache:
        yield
        return
    folder = Path(JAX_CONFIG.jax_compilation_cache_dir or default_folder())
    reason = None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        reason = distrusted(folder)
        if reason is None:
            prune(folder)
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        say(
            f"what is compiled is not kept: {folder}: {reason}; write JAX_COMPILATION_CACHE_DIR=DIR, a folder of your own"
        )
    settings = {
        "jax_enable_compilation_cache": reason is None,
        "jax_compilation_cache_dir": str(folder),
    }
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        settings["jax_persistent_cache_min_compile_time_secs"] = WORTH_KEEPING
    for name, value in settings.items():
        jax.config.update(name, value)
    with warnings.catch_warnings():
        show = warnings.showwarning

        def throw_away_damaged(message: Warning | str, *rest: Any) -> None:
            if damaged := re.search(
                r"reading persistent compilation cache entry for '(.*?)'", str(message)
            ):
                for path in folder.glob(f"{glob.escape(damaged.group(1))}-*"):
                    path.unlink(missing_ok=True)
                say(
                    f"what was kept of {damaged.group(1)} in {folder} is damaged: it is compiled anew"
                )
            else:
                show(message, *rest)

        warnings.showwarning = throw_away_damaged  # type: ignore[assignment]
        yield


def default_folder() -> Path:
    """One for each kind of processor: on a cluster homes are shared, and code for one processor may fail on another."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "chargpt" / f"compiled-{hashlib.sha256(processor().encode()).hexdigest()[:12]}"


def processor() -> str:
    """What this machine's processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return platform.machine() + platform.processor()
    told = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(told)}))


def distrusted(folder: Path) -> str | None:
    """Why executables from `folder` may not be run; None where only its owner, who is the user, can write to it."""
    status = folder.stat()
    if status.st_uid != os.getuid():
        return "belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write to it (chmod 700 ends that)"
    return None


def prune(folder: Path) -> None:
    """Remove what was written first until the rest is small enough."""
    entries = sorted(
        ((path.stat(), path) for path in folder.glob("*-cache")),
        key=lambda entry: entry[0].st_mtime,
    )
    size = sum(status.st_size for status, _ in entries)
    for status, path in entries:
        if size <= LARGEST:
            break
        path.unlink(missing_ok=True)
        size -= status.st_size
