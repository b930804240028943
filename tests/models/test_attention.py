"""Every way of attention against the plain one, values and gradients, and the plain one against torch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.attention import Sight, attend, attending, blockwise, plain, splash

B, S, H, G, K = 2, 256, 4, 2, 32


def drawn(padded=True, packed=False, **more):
    """(q, keys, values), sight: rows padded on the left and right, or packed."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, S, n, K)), jnp.float32) for n in (H, G, G)]
    ids = np.ones((B, S), np.int32)
    if packed:
        ids = np.sort(rng.integers(1, 4, (B, S))).astype(np.int32)
    keys = ids.copy()
    if padded:
        keys[0, -37:] = -1
        keys[1, :5] = -1
    return arrays, Sight(jnp.asarray(ids), jnp.asarray(keys), jnp.zeros((), jnp.int32), **more)


def out_and_grads(attention, arrays, sight):
    """Queries that see nothing may hold anything: they carry no weight."""
    weight = jnp.cos(jnp.arange(B * S * H * K, dtype=jnp.float32)).reshape(B, S, H, K)
    weight = weight * jnp.any(sight.dense(), -1)[:, :, None, None]

    def f(*arrays):
        out = attention(*arrays, sight, K**-0.5) * weight
        return out.sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [out, *grads]


SIGHTS = {
    "padding": {},
    "packed": {"packed": True},
    "window": {"window": 70, "packed": True},
    "some layers' window": {"window": 70, "local": jnp.asarray(True)},
}
BLOCKS = functools.partial(blockwise, block=96)  # 256 is no multiple of it


@pytest.mark.parametrize(
    ("name", "way"),
    [("packed", "blockwise"), ("some layers' window", "blockwise"), ("padding", "splash"), ("window", "splash")],
)
def test_the_same_values_and_gradients_as_plain_attention(name, way):
    arrays, sight = drawn(**SIGHTS[name])
    attention = {"blockwise": BLOCKS, "splash": functools.partial(splash, interpret=True)}[way]
    for want, got in zip(out_and_grads(plain, arrays, sight), out_and_grads(attention, arrays, sight), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_plain_attention_is_torchs():
    torch = pytest.importorskip("torch")
    (q, keys, values), sight = drawn(padded=False)
    turn = lambda x: torch.from_numpy(np.array(x)).transpose(1, 2)
    want = torch.nn.functional.scaled_dot_product_attention(
        turn(q), *(turn(x).repeat_interleave(H // G, 1) for x in (keys, values)), is_causal=True
    )
    np.testing.assert_allclose(attend(q, keys, values, sight), want.transpose(1, 2).numpy(), atol=1e-5)


def test_no_array_of_all_scores_is_held():
    arrays, sight = drawn()
    text = lambda attention: str(jax.make_jaxpr(lambda *x: attention(*x, sight, 1.0))(*arrays))
    assert f"{S},{S}]" in text(plain) and f"{S},{S}]" not in text(BLOCKS)


def test_the_context_chooses_for_whole_rows_only():
    seen = []

    def spy(q, keys, values, sight, scale):
        seen.append(q.shape[1])
        return plain(q, keys, values, sight, scale)

    (q, keys, values), sight = drawn()
    with attending(spy):
        attend(q, keys, values, sight)
        one = Sight(sight.q_ids[:, :1], sight.k_ids, jnp.asarray(S - 1))
        attend(q[:, :1], keys, values, one)
    attend(q, keys, values, sight)
    assert seen == [S]
