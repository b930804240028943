"""Entering control flow with implicit leaves: each rule rebuilds the primitive by its public function.

A rule takes `(eqn, operands, run, strict)`, `run(jaxpr, consts, args)` being the interpreter, and returns the
equation's results, or `NotImplemented` where the weights are materialised instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax
from jax.sharding import NamedSharding

from jlora.compat import manual_axes, scan_sizes
from jlora.leaves import is_implicit, materialise, specs_of, unstacked
from jlora.placing import specs_on

Run = Callable[..., list[Any]]


def dense(values: Sequence[Any], where: str, strict: bool) -> list[Any]:
    return [materialise(value, where, strict) for value in values]


def jit(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    closed = eqn.params["jaxpr"]
    operands = [constrain(v, s) for v, s in zip(operands, eqn.params["in_shardings"], strict=True)]
    outs = jitted(closed, run.keywords["strict"], run.func)(*operands)  # pyright: ignore[reportFunctionMemberAccess]
    return [constrain(v, s) for v, s in zip(outs, eqn.params["out_shardings"], strict=True)]


@functools.lru_cache(maxsize=512)
def jitted(closed: jex.ClosedJaxpr, strict: bool, run: Run) -> Callable[..., list[Any]]:
    """One jitted function a traced one, so that calling a jitted model again outside `jit` does not compile again."""
    return jax.jit(lambda *args: run(closed.jaxpr, closed.consts, args, strict=strict))


def constrain(value: Any, sharding: Any) -> Any:
    """`value` under the sharding a nested `jit` asked for, if it asked."""
    if is_implicit(value) or not isinstance(sharding, jax.sharding.Sharding):
        return value
    return lax.with_sharding_constraint(value, sharding)


def remat(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    body = functools.partial(run, eqn.params["jaxpr"], ())
    kept = jax.checkpoint(lambda *args: body(args), prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return kept(*operands)


def call(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    closed = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    if not isinstance(closed, jex.ClosedJaxpr):
        return NotImplemented
    return run(closed.jaxpr, closed.consts, operands)


def hoist(carry: list[Any], body: jex.Jaxpr, skip: int, name: str, strict: bool) -> tuple[list[Any], dict[int, Any]]:
    """(carry with None for each leaf that the loop hands on unchanged, those leaves by position)."""
    fixed: dict[int, Any] = {}
    for n, value in enumerate(carry):
        if is_implicit(value):
            if body.outvars[n] is body.invars[skip + n]:
                fixed[n] = value
            else:
                carry[n] = materialise(value, f"a {name} that changes it", strict)
    return [None if n in fixed else value for n, value in enumerate(carry)], fixed


def filled(carry: Sequence[Any], fixed: dict[int, Any]) -> list[Any]:
    return [fixed.get(n, value) for n, value in enumerate(carry)]


def emptied(carry: Sequence[Any], fixed: dict[int, Any], name: str, strict: bool) -> list[Any]:
    return dense([None if n in fixed else value for n, value in enumerate(carry)], name, strict)


def scan(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    params = eqn.params
    closed = params["jaxpr"]
    n_consts, n_carry = scan_sizes(params)
    consts = operands[:n_consts]
    init, fixed = hoist(operands[n_consts : n_consts + n_carry], closed.jaxpr, n_consts, "scan", strict)
    stacked, rebuilds = [], []
    for value in operands[n_consts + n_carry :]:
        rows, rebuild = unstacked(value) or (materialise(value, "a scan over it", strict), lambda row: row)
        stacked.append(rows)
        rebuilds.append(rebuild)

    def body(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        xs = [rebuild(row) for rebuild, row in zip(rebuilds, rows, strict=True)]
        outs = run(closed.jaxpr, closed.consts, [*consts, *filled(carry, fixed), *xs])
        return emptied(outs[:n_carry], fixed, "scan", strict), dense(outs[n_carry:], "a scan's output", strict)

    carry, ys = lax.scan(
        body,
        init,
        stacked,
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*filled(carry, fixed), *ys]


def while_(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    cond_consts, body_consts = operands[:n_cond], operands[n_cond : n_cond + n_body]
    init, fixed = hoist(operands[n_cond + n_body :], body.jaxpr, n_body, "while loop", strict)

    def proceed(carry: list[Any]) -> Any:
        return run(cond.jaxpr, cond.consts, [*cond_consts, *filled(carry, fixed)])[0]

    def step(carry: list[Any]) -> list[Any]:
        outs = run(body.jaxpr, body.consts, [*body_consts, *filled(carry, fixed)])
        return emptied(outs, fixed, "while loop", strict)

    return filled(lax.while_loop(proceed, step, init), fixed)


def cond(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    index, *rest = operands

    def branch(closed: jex.ClosedJaxpr) -> Callable[..., list[Any]]:
        return lambda *args: dense(run(closed.jaxpr, closed.consts, args), "a branch's output", strict)

    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:  # of lax.platform_dependent: a branch is lowered for its own platforms alone
        named = [
            (name, branch(closed))
            for closed, names in zip(eqn.params["branches"], platforms, strict=True)
            for name in names or ("default",)
        ]
        return lax.platform_dependent(*rest, **dict(named))
    return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *rest)


def custom_jvp(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    """The function is interpreted; its own derivative rule is kept, traced on dense primals and tangents."""
    closed = eqn.params["call_jaxpr"]
    original = as_function(eqn)

    @jax.custom_jvp
    def f(*args: Any) -> list[Any]:
        return dense(run(closed.jaxpr, closed.consts, args), "custom_jvp", strict)

    @f.defjvp
    def f_jvp(primals: Any, tangents: Any) -> Any:
        full, full_t = jax.jvp(lambda *args: dense(args, "custom_jvp's own derivative", strict), primals, tangents)
        return jax.jvp(original, full, full_t)

    return f(*operands)


def custom_vjp(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    """The function is interpreted; differentiated, its own rule runs on dense weights and their gradients."""
    closed = eqn.params["call_jaxpr"]
    original = as_function(eqn)

    @jax.custom_vjp
    def f(*args: Any) -> list[Any]:
        return dense(run(closed.jaxpr, closed.consts, args), "custom_vjp", strict)

    def forward(*args: Any) -> Any:
        return jax.vjp(lambda *args: original(*dense(args, "custom_vjp's own derivative", strict)), *args)

    f.defvjp(forward, lambda pullback, cotangents: pullback(cotangents))
    return f(*operands)


def as_function(eqn: Any) -> Callable[..., list[Any]]:
    """The equation as a function of all its operands, its derivative rule included."""
    invars = [jex.Var(atom.aval) for atom in eqn.invars]
    jaxpr = eqn.params["call_jaxpr"].jaxpr.replace(
        constvars=(), invars=invars, outvars=eqn.outvars, eqns=[eqn.replace(invars=invars)], effects=eqn.effects
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))


def shard_map(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    """Each factor is cut along the axes it shares with the weight, so a shard's product is the weight's shard."""
    params = eqn.params
    specs = []
    for value, spec in zip(operands, params["in_specs"], strict=True):
        specs.append(specs_of(value, spec))
        if specs[-1] is None:
            return NotImplemented

    def body(*args: Any) -> tuple[Any, ...]:
        return tuple(dense(run(params["jaxpr"], (), args), "a shard_map's output", strict))

    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        axis_names=manual_axes(params),
        check_vma=params["check_vma"],
    )
    return list(mapped(*operands))


def moved(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    """`device_put` and `reshard`: each array of a leaf goes to the weight's memory or device, or to its axes' part of
    the weight's sharding."""
    reshard = eqn.primitive.name == "reshard"
    put: Callable[..., Any] = jax.sharding.reshard if reshard else jax.device_put
    outs: list[Any] = []
    for value, where in zip(operands, [eqn.params["dst_sharding"]] if reshard else eqn.params["devices"], strict=True):
        if not is_implicit(value) or not isinstance(where, NamedSharding):
            outs.append(jax.tree.map(lambda x, where=where: put(x, where), value))
            continue
        specs = specs_on(where.mesh, value, where.spec)
        if specs is None:
            return NotImplemented

        def at(x: Any, spec: Any, where: NamedSharding = where) -> Any:
            return put(x, NamedSharding(where.mesh, spec, memory_kind=where.memory_kind))

        outs.append(jax.tree.map(at, value, specs))
    return outs


def barrier(eqn: Any, operands: list[Any], run: Run, strict: bool) -> list[Any]:
    return list(lax.optimization_barrier(tuple(operands)))


RULES: dict[str, Callable[[Any, list[Any], Run, bool], list[Any]]] = {
    "jit": jit,
    "pjit": jit,
    "remat": remat,
    "remat2": remat,
    "checkpoint": remat,
    "closed_call": call,
    "core_call": call,
    "scan": scan,
    "while": while_,
    "cond": cond,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
    "custom_vjp_call_jaxpr": custom_vjp,
    "shard_map": shard_map,
    "device_put": moved,
    "reshard": moved,
    "optimization_barrier": barrier,
}
