"""Executables are cached on disk: jobs of a sweep, and a run started again, compile a step once."""

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
LARGEST = 2_000_000_000  # bytes of the folder; beyond that the oldest files are removed

reads = 0  # executables that this process read instead of compiling them


def _count(event: str, **_: Any) -> None:
    global reads
    reads += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count)


@contextlib.contextmanager
def kept_executables(say: Callable[[str], None]) -> Iterator[None]:
    """Within the block JAX caches executables in JAX_COMPILATION_CACHE_DIR or in ~/.cache/chargpt.

    JAX_ENABLE_COMPILATION_CACHE=false turns this off. Whoever can write an executable can run code
    here, so a folder that others may write to is reported and not used. A damaged file, left by a
    process that was killed while writing, is reported, removed and compiled again.
    """
    if not JAX_CONFIG.jax_enable_compilation_cache:
        yield
        return
    folder = Path(JAX_CONFIG.jax_compilation_cache_dir or default_folder())
    problem = prepare(folder)
    if problem is not None:
        choice = "write JAX_COMPILATION_CACHE_DIR=DIR, a folder of your own"
        say(f"executables are not cached: {folder}: {problem}; {choice}")
    JAX_CONFIG.update("jax_enable_compilation_cache", problem is None)
    JAX_CONFIG.update("jax_compilation_cache_dir", str(folder))
    # On several GPUs, lowered attention has an address of this process in its text.
    JAX_CONFIG.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        JAX_CONFIG.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    with warnings.catch_warnings():
        show: Any = warnings.showwarning

        def remove_damaged(message: Warning | str, *rest: Any) -> None:
            pattern = r"reading persistent compilation cache entry for '(.*?)'"
            if (damaged := re.search(pattern, str(message))) is None:
                show(message, *rest)
                return
            for path in folder.glob(f"{glob.escape(damaged[1])}-*"):
                path.unlink(missing_ok=True)
            say(f"the executable of {damaged[1]} in {folder} is damaged: compiling it again")

        warnings.showwarning = remove_damaged  # type: ignore[assignment]
        yield


def default_folder() -> Path:
    """One folder per kind of processor: machines that share a home may need different code."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "chargpt" / f"compiled-{hashlib.sha256(processor().encode()).hexdigest()[:12]}"


def processor() -> str:
    """What this machine's processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.machine() + platform.processor()
    names = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))


def prepare(folder: Path) -> str | None:
    """Make the folder and prune it; why executables from it may not be run, None if they may."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid():
            return "belongs to another user"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "others may write to it (chmod 700 ends that)"
        prune(folder)
    except OSError as error:
        return str(error.strerror)
    return None


def prune(folder: Path) -> None:
    """Remove the oldest files until the others fit."""
    files = {path: path.stat() for path in folder.glob("*-cache")}
    size = sum(status.st_size for status in files.values())
    for path in sorted(files, key=lambda path: files[path].st_mtime):
        if size <= LARGEST:
            break
        path.unlink(missing_ok=True)
        size -= files[path].st_size
