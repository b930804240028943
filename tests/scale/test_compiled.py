"""Compiled programs on disk: where they are kept, and which are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.compiled import keep_compiled, none_kept
from jlora.plan.tpu import compile_step, devices_of

pytestmark = pytest.mark.usefixtures("compile_cache")


def test_programs_are_kept_where_a_restart_finds_them(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path))
    assert keep_compiled() == keep_compiled("run") == str(tmp_path / "compiled")
    assert keep_compiled("gs://bucket/run") == jax.config.jax_compilation_cache_dir == "gs://bucket/run/xla"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    assert keep_compiled("gs://bucket/run") == jax.config.jax_compilation_cache_dir == "mine"


def test_the_folder_may_change(monkeypatch, tmp_path):
    """After a first program was compiled: a remote run is known only once its settings are."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name in ("first", "second"):
        monkeypatch.setenv("JLORA_CACHE", str(tmp_path / name))
        keep_compiled()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.jit(lambda x: x + 1)(jnp.ones(3))
        assert list((tmp_path / name / "compiled").iterdir())
    kept = set(tmp_path.rglob("*"))
    with none_kept():
        jax.jit(lambda x: x + 2)(jnp.ones(4))
    assert set(tmp_path.rglob("*")) == kept
    jax.jit(lambda x: x + 2)(jnp.ones(4))
    assert set(tmp_path.rglob("*")) > kept


def test_a_program_for_chips_that_are_not_here_is_not_kept(tmp_path, monkeypatch):
    """JAX would write it and, the second time, warn that it cannot read it."""
    pytest.importorskip("libtpu", reason='pip install "jlora[tpu]" brings the compiler')
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    line = NamedSharding(Mesh(np.array(devices_of("v5e:2x4")), "x"), PartitionSpec("x"))
    keep_compiled()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for _ in range(2):
        assert compile_step(jax.jit(jnp.sin), jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=line))["peak"] > 0
    assert not list(tmp_path.iterdir())
