"""Every way of attention against the plain one, values and gradients, and the plain one against torch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models import attention as ways
from jlora.models.attention import Sight, attend, attending, blockwise, cudnn, fitting, plain, splash
from jlora.models.causal import causal_inputs

B, S, H, G, K = 2, 256, 4, 2, 32


def drawn(padded=True, packed=False, left=5, **more):
    """(q, keys, values), sight: a row padded on the right and one on the left, or packed."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(B, S, n, K)), jnp.float32) for n in (H, G, G)]
    ids = np.ones((B, S), np.int32)
    if packed:
        ids = np.sort(rng.integers(1, 4, (B, S))).astype(np.int32)
    keys = ids.copy()
    if padded:
        keys[0, -37:] = -1
        keys[1, :left] = -1
    return arrays, Sight(jnp.asarray(ids), jnp.asarray(keys), jnp.zeros((), jnp.int32), packed=packed, **more)


def out_and_grads(attention, arrays, sight):
    """Queries that see nothing, and padding, may hold anything: they carry no weight."""
    weight = jnp.cos(jnp.arange(B * S * H * K, dtype=jnp.float32)).reshape(B, S, H, K)
    counts = jnp.any(sight.dense(), -1) & (sight.q_ids == sight.k_ids)
    weight = weight * counts[:, :, None, None]

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
    "padding after": {"left": 0},
    "padding after, window": {"left": 0, "window": 70},
    "a row of padding": {"left": S},
}
BY_XLA = functools.partial(cudnn, implementation="xla")  # the call that cuDNN gets, carried out by XLA
BLOCKS = functools.partial(blockwise, block=96)  # 256 is no multiple of it


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("packed", "blockwise"),
        ("some layers' window", "blockwise"),
        ("padding", "splash"),
        ("window", "splash"),
        ("padding after", "cudnn"),
        ("padding after, window", "cudnn"),
        ("a row of padding", "cudnn"),
        ("window", "cudnn"),
        ("some layers' window", "cudnn"),
    ],
)
def test_the_same_values_and_gradients_as_plain_attention(name, way):
    arrays, sight = drawn(**SIGHTS[name])
    attention = {"blockwise": BLOCKS, "splash": functools.partial(splash, interpret=True), "cudnn": BY_XLA}[way]
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


@pytest.fixture
def gpu(monkeypatch):
    """gpu("8.0"): what is traced takes itself to be on such a GPU with cuDNN."""
    kernel = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

    def have(capability):
        monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91200)
        monkeypatch.setattr(kernel, "check_compute_capability", lambda least: float(least) <= float(capability))
        device = type("GPU", (), {"compute_capability": capability})
        monkeypatch.setattr(ways.jax, "devices", lambda *_: [device])

    return have


def traced(size, segments=None):
    """A gradient through the attention of a GPU as a mesh runs it, over parts of a batch: rows of 2,048 tokens."""
    rows = (2, B, 2048)
    q, keys = (jax.ShapeDtypeStruct((*rows, n, size), jnp.bfloat16) for n in (H, G))

    def part(q, keys, values, mask):
        _, sight, _, _ = causal_inputs(jnp.zeros(mask.shape, int), None, mask, segments, None)
        return fitting("gpu")(q, keys, values, sight, 1.0)

    f = lambda *arrays: jax.vmap(part)(*arrays).astype(jnp.float32).sum()
    return str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, keys, keys, jax.ShapeDtypeStruct(rows, bool)))


def test_the_kernel_of_gpus_gets_lengths_and_no_bias(gpu):
    gpu("8.0")
    text = traced(64)
    assert "dot_product_attention_bwd" in text and "PADDING_CAUSAL" in text and "2048,2048]" not in text
    text = traced(64, segments=jnp.ones((B, 2048), int))
    assert "dot_product_attention" not in text and "2048,2048]" not in text


@pytest.mark.parametrize(
    "capability, size, taken",
    [("8.0", 128, True), ("8.9", 256, False), ("9.0", 256, True), ("9.0", 60, False), ("gfx942", 64, False)],
)
def test_head_sizes_that_the_kernel_refuses_go_by_blocks(gpu, capability, size, taken):
    gpu(capability)
    assert ("dot_product_attention" in traced(size)) == taken


def test_rows_that_the_kernel_cannot_do_are_no_numbers():
    arrays, sight = drawn()
    out = BY_XLA(*arrays, sight, K**-0.5)
    assert bool(jnp.isfinite(out[0]).all()) and bool(jnp.isnan(out[1]).all())
    arrays, sight = drawn(padded=False, packed=True)
    out = BY_XLA(*arrays, Sight(sight.q_ids, sight.k_ids), K**-0.5)  # packed, and not said to be
    assert bool(jnp.isnan(out).all())


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
