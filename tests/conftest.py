"""What every file of tests shares."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_file():
    """A process of the whole suite would hold 6 to 8 GB of them."""
    yield
    jax.clear_caches()


@pytest.fixture
def compile_cache():
    """What a test does to JAX's cache of compiled programs ends with it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    held = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in held.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
