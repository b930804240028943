"""Adapters on meshes whose axes are part of types, as `jax.make_mesh` makes them, against one device: run in a process
of its own with eight simulated devices, it prints one JSON object a case."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "layers": jax.random.normal(KEYS[0], (3, 16, 16)) / 4,
    "up": jax.random.normal(KEYS[1], (16, 32)) / 4,
    "down": jax.random.normal(KEYS[2], (32, 16)) / 6,
}
X = jax.random.normal(KEYS[3], (8, 16))
CASES = {
    "rows split": (P("data"), {}),
    "outputs split": (P("data"), {"up": P(None, "model")}),
    "inputs and outputs split": (P("data"), {"up": P(None, "model"), "down": P("model", None)}),
    "only weights split": (P(), {"up": P(None, "model"), "down": P("model", None)}),
}


def model(p, x):
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    spec = jax.typeof(x).sharding.spec if jax.typeof(x).sharding.mesh.axis_types else None
    dot = {} if spec is None else {"out_sharding": P(spec[0], None)}
    return jnp.einsum("bf,fo->bo", jnp.tanh(x @ p["up"]), p["down"], **dot)


def loss(lora, frozen, x, key):
    out = jlora.lift(model, strict=True)(jlora.combine(frozen, lora, dropout=0.0 if key is None else 0.5, key=key), x)
    return jnp.mean(jnp.sin(out))


def followed(entry, w, spec):
    leaf = entry.attach(w, "").shard_specs(spec)
    return dataclasses.replace(entry, lora_a=leaf.lora_a, lora_b=leaf.lora_b)


def main():
    frozen, lora = jlora.lorafy(PARAMS, 4, layouts={"layers": "sio", "up": "io", "down": "io"})
    lora = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size).reshape(w.shape)), lora)
    step = jax.jit(jax.value_and_grad(loss))
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    for name, (rows, split) in CASES.items():
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        at = {path: put(w, split.get(path, P())) for path, w in frozen.items()}
        like = {path: P(*split.get(path, P())) for path in frozen}
        for factors in ("whole", "split"):
            specs = {path: followed(entry, frozen[path], like[path]) for path, entry in lora.items()}
            specs = specs if factors == "split" else jax.tree.map(lambda _: P(), lora)
            placed = jax.tree.map(put, lora, specs)
            key = jax.random.key(1) if name == "rows split" else None  # with dropout
            want = step(lora, frozen, X, key)
            with jax.set_mesh(mesh):
                got = step(placed, at, put(X, rows), key)
            pairs = list(zip(*map(jax.tree.leaves, (got, want)), strict=True))
            off = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
            pairs = zip(jax.tree.leaves(got[1]), jax.tree.leaves(placed), strict=True)
            lies = all(g.sharding.is_equivalent_to(w.sharding, w.ndim) for g, w in pairs)
            print(json.dumps({"case": f"{name}, factors {factors}", "off": off, "lies": lies}))


if __name__ == "__main__":
    main()
