"""Four ways to give each row of a batch its own low-rank difference, compared in turn.

    python experiments/serving/products.py [--repeats 20]

gather: each row's factors, a batched product. dense: the products with all slots, each row keeps its own.
one-hot: a row's factors picked by a matmul with one-hot rows. ragged: rows sorted by adapter, `jax.lax.ragged_dot`.
Shapes are SmolLM2-135M's (d 576, f 1536), r 8. Prints the least of the repeats in microseconds, A B C D A B C D ...
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp


def gather(x, a, b, rows):
    h = jnp.einsum("bsi,bri->bsr", x, a[rows])
    return jnp.einsum("bsr,bro->bso", h, b[rows])


def dense(x, a, b, rows):
    n, r, _ = a.shape
    h = x @ a.reshape(n * r, -1).T
    h = h * jnp.repeat(jax.nn.one_hot(rows, n, dtype=x.dtype), r, axis=1)[:, None]
    return h @ b.reshape(n * r, -1)


def onehot(x, a, b, rows):
    pick = jax.nn.one_hot(rows, len(a), dtype=x.dtype)
    h = jnp.einsum("bsi,bri->bsr", x, jnp.einsum("bn,nri->bri", pick, a))
    return jnp.einsum("bsr,bro->bso", h, jnp.einsum("bn,nro->bro", pick, b))


def ragged(x, a, b, rows):
    order = jnp.argsort(rows)
    sizes = jnp.bincount(rows, length=len(a)) * x.shape[1]
    flat = x[order].reshape(-1, x.shape[-1])
    h = jax.lax.ragged_dot(flat, jnp.swapaxes(a, 1, 2), sizes)
    y = jax.lax.ragged_dot(h, b, sizes).reshape(*x.shape[:2], -1)
    return y[jnp.argsort(order)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    ways = {"gather": gather, "dense": dense, "one-hot": onehot, "ragged": ragged}
    print(f"{'batch':>5} {'seq':>4} {'slots':>5} {'base':>8} " + " ".join(f"{name:>8}" for name in ways))
    for batch, seq, slots in [(8, 1, 5), (8, 1, 9), (8, 1, 65), (64, 1, 65), (64, 1, 1001), (1, 128, 9), (8, 128, 9)]:
        keys = jax.random.split(jax.random.key(0), 5)
        x = jax.random.normal(keys[0], (batch, seq, 576))
        w = jax.random.normal(keys[1], (576, 1536))
        a = jax.random.normal(keys[2], (slots, 8, 576))
        b = jax.random.normal(keys[3], (slots, 8, 1536))
        rows = jax.random.randint(keys[4], (batch,), 0, slots)
        made = {"base": jax.jit(lambda x, a, b, rows, w=w: x @ w), **{name: jax.jit(way) for name, way in ways.items()}}
        want = made["gather"](x, a, b, rows)
        best = dict.fromkeys(made, float("inf"))
        for name in ways:
            error = float(jnp.abs(made[name](x, a, b, rows) - want).max() / jnp.abs(want).max())
            assert error < 1e-4, f"{name} differs from gather by {error}"
        made["base"](x, a, b, rows)
        for _ in range(repeats):
            for name, run in made.items():
                began = time.perf_counter()
                run(x, a, b, rows).block_until_ready()
                best[name] = min(best[name], time.perf_counter() - began)
        print(f"{batch:5} {seq:4} {slots:5} " + " ".join(f"{1e6 * best[name]:8.0f}" for name in made))


if __name__ == "__main__":
    main()
