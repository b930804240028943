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


def lookup(w, x):
    return w.at[jax.sharding.reshard(jnp.arange(8) * 3 % 16, P("data"))].get(out_sharding=P("data", "model"))


WHOLE = P("data", None)
SPLIT = {"layers": P(None, None, "model"), "up": P(None, "model"), "down": P("model", None)}
FORMS = {
    "a scan": lambda p, x: jax.lax.scan(
        lambda h, w: (jnp.tanh(jax.sharding.reshard(h, WHOLE) @ w), None), jnp.tanh(x @ p["layers"][0]), p["layers"]
    )[0],
    "a loop": lambda p, x: jax.lax.fori_loop(
        0, 2, lambda n, h: jnp.tanh(jax.sharding.reshard(h, WHOLE) @ p["layers"][n]), jnp.tanh(x @ p["layers"][0])
    ),
    "a branch": lambda p, x: jax.lax.cond(x.sum() > 0, lambda x: x @ p["up"], lambda x: x @ (2 * p["up"]), x),
    "a lookup": lambda p, x: lookup(p["up"], x),
    "automatic axes": lambda p, x: jax.sharding.auto_axes(jnp.dot, out_sharding=WHOLE)(x, p["up"]),
    "a weight moved": lambda p, x: x @ jax.sharding.reshard(p["up"], P("model", None)),
}


def sliced(p, x):
    """Two products over a model axis, from within a `shard_map`."""
    return jax.lax.psum(jnp.tanh(x @ p["up"]) @ p["down"], "model")


def against_merged(frozen, lora, mesh):
    """Each form lifted, against itself on merged weights, in `jit`: values, gradients and types."""
    put = lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec))
    at, x = {path: put(w, SPLIT[path]) for path, w in frozen.items()}, put(X, WHOLE)
    inside = {path: followed(entry, frozen[path], SPLIT[path]) for path, entry in lora.items()}
    into = {"mesh": mesh, "out_specs": WHOLE}
    cases = {name: (jlora.lift(f, strict=True), f, at) for name, f in FORMS.items()}
    coded = jlora.quantise(at, "int8", layouts={"layers": "sio", "up": "io", "down": "io"})
    cases["automatic axes, codes"] = (jlora.lift(FORMS["automatic axes"], strict=True), FORMS["automatic axes"], coded)
    with jax.set_mesh(mesh):
        for name, (lifted, f, base) in cases.items():
            one = jax.jit(jax.value_and_grad(lambda lora: jnp.sin(lifted(jlora.combine(base, lora), x)).sum()))
            two = jax.jit(jax.value_and_grad(lambda lora: jnp.sin(f(on_mesh(base, lora), x)).sum()))
            report(name, one(lora), two(lora))
        lifted = jax.shard_map(
            lambda frozen, lora, x: jlora.lift(sliced, strict=True)(jlora.combine(frozen, lora), x),
            in_specs=(SPLIT, inside, WHOLE),
            **into,
        )
        plain = jax.shard_map(sliced, in_specs=(SPLIT, WHOLE), **into)
        one = jax.jit(
            jax.value_and_grad(
                lambda lora: jnp.sin(lifted(at, jax.tree.map(jax.sharding.reshard, lora, inside), x)).sum()
            )
        )
        two = jax.jit(jax.value_and_grad(lambda lora: jnp.sin(plain(on_mesh(at, lora), x)).sum()))
        report("lifted inside shard_map", one(lora), two(lora))


def on_mesh(base, lora):
    merged = jlora.merge(base, lora)
    return {path: jax.sharding.reshard(w, SPLIT[path]) for path, w in merged.items()}


def report(case, got, want, lies=True):
    pairs = zip(*map(jax.tree.leaves, (got, want)), strict=True)
    off = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    print(json.dumps({"case": case, "off": off, "lies": lies}))


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
            pairs = zip(jax.tree.leaves(got[1]), jax.tree.leaves(placed), strict=True)
            lies = all(g.sharding.is_equivalent_to(w.sharding, w.ndim) for g, w in pairs)
            report(f"{name}, factors {factors}", got, want, lies)
    against_merged(frozen, lora, mesh)


if __name__ == "__main__":
    main()
