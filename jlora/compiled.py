"""Compiled programs on disk, so that a second start does not compile again: JAX's compilation cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from jlora.io.pypi import cache_folder


def keep_compiled(output: str = "") -> str:
    """The folder in which programs are kept from now on: what JAX_COMPILATION_CACHE_DIR says; else `xla` beside the
    files of a remote run, where every host finds it; else `compiled` in jlora's cache folder.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    place = given or (f"{output}/xla" if "://" in output else str(cache_folder() / "compiled"))
    if place != jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        compilation_cache.reset_cache()  # JAX opens its folder once a process
        jax.config.update("jax_compilation_cache_dir", place)
    if not given:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return place


@contextlib.contextmanager
def none_kept() -> Iterator[None]:
    """Nothing is kept or read meanwhile: JAX writes what is compiled for chips that are not here, and cannot read it
    again without them.
    """

    def use(cache: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # JAX asks once a process whether there is one

    held = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    use(False)
    try:
        yield
    finally:
        use(held)
