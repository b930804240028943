"""`lift(f)`: run any JAX function on weights that know how they are used.

The function is traced once to a jaxpr, and its equations are run again in order. An equation that no implicit leaf
reaches runs untouched. One that a leaf reaches is handed to the leaf (`ImplicitLeaf.rules`); control flow is entered
(`jlora/control.py`); anything else gets the weight itself, materialised, and a warning that names it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

# the rules are imported to fill LoraLeaf.rules
from jlora import control, rules_experts, rules_scalar, rules_structure  # noqa: F401  # pyright: ignore[reportUnusedImport]
from jlora.leaves import ImplicitLeaf, is_implicit, materialise, whole
from jlora.placing import on_explicit_mesh

F = TypeVar("F", bound=Callable[..., Any])


def lift(f: F, *, strict: bool = False) -> F:
    """`f`, taking implicit leaves (`LoraLeaf` and others) anywhere in its arguments in place of arrays.

    The result is what `f` would return on the materialised weights. `f` is not edited and needs no adapter code; it
    must be traceable (arrays in its arguments arrive as tracers; anything else is passed as it is). Works inside and
    outside `jit`, `grad`, `vmap`. Without a leaf in the arguments `f` is called directly.
    `strict`: raise `ValueError` instead of materialising a weight.
    """

    @functools.wraps(f)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        values, treedef = cast("tuple[list[Any], Any]", jax.tree.flatten((args, kwargs), is_leaf=is_implicit))
        if not any(map(is_implicit, values)):
            return f(*args, **kwargs)
        check_axes(values)
        traced = [n for n, value in enumerate(values) if is_implicit(value) or is_array(value)]

        def flat(*arrays: Any) -> Any:
            full = list(values)
            for n, array in zip(traced, arrays, strict=True):
                full[n] = array
            args, kwargs = jax.tree.unflatten(treedef, full)
            return f(*args, **kwargs)

        inputs = [v if is_implicit(v := values[n]) else jnp.asarray(v) for n in traced]
        shapes = [stand_in(v) if is_implicit(v) else v for v in inputs]
        closed, out_shape = jax.make_jaxpr(flat, return_shape=True)(*shapes)
        outs = run(closed.jaxpr, closed.consts, inputs, strict)
        outs = [materialise(out, "the function's result", strict) for out in outs]
        return jax.tree.unflatten(cast(Any, jax.tree.structure(out_shape)), outs)

    return lifted  # pyright: ignore[reportReturnType]


def stand_in(leaf: Any) -> jax.ShapeDtypeStruct:
    """The weight's type, its place on an explicit mesh and, inside a `shard_map`, the axes it varies over included."""
    if jax.sharding.get_abstract_mesh().manual_axes or on_explicit_mesh(*jax.tree.leaves(leaf)):
        try:
            return jax.eval_shape(leaf.materialise)
        except ValueError:  # a leaf of many adapters is no one weight
            pass
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def check_axes(values: Sequence[Any]) -> None:
    for leaf in filter(is_implicit, values):
        if not whole(leaf):
            raise ValueError(
                f"{leaf.path}: an axis was mapped away outside lift: write lift(vmap(f)), not vmap(lift(f)), and let"
                " scan and the index of a stack be inside too"
            )


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic)


def run(jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any], strict: bool) -> list[Any]:
    """The outputs of `jaxpr` on arrays and implicit leaves; an output may itself be an implicit leaf."""
    values: dict[jex.Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    last_use = last_uses(jaxpr)
    for n, eqn in enumerate(jaxpr.eqns):
        outs = run_equation(jaxpr, eqn, [read(atom) for atom in eqn.invars], strict)
        values.update(zip(eqn.outvars, outs, strict=True))
        for var in last_use.get(n, ()):
            del values[var]
    return [read(atom) for atom in jaxpr.outvars]


def last_uses(jaxpr: jex.Jaxpr) -> dict[int, list[jex.Var]]:
    """Variables by the equation after which nothing reads them: out of `jit` they would hold memory to the end."""
    keep = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
    last: dict[jex.Var, int] = {}
    for n, eqn in enumerate(jaxpr.eqns):
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, jex.Literal) and atom not in keep:
                last[atom] = n
    by_equation: dict[int, list[jex.Var]] = {}
    for var, n in last.items():
        by_equation.setdefault(n, []).append(var)
    return by_equation


def run_equation(jaxpr: jex.Jaxpr, eqn: Any, operands: list[Any], strict: bool) -> list[Any]:
    """The results of one equation, by its own primitive, by the first leaf among its operands, or by control flow."""
    position = next((n for n, value in enumerate(operands) if is_implicit(value)), None)
    if position is None:
        return emit(jaxpr, eqn, operands)
    with eqn.ctx.manager:  # its mesh, memory and precision, as `emit` has them
        return with_leaf(jaxpr, eqn, operands, position, strict)


def with_leaf(jaxpr: jex.Jaxpr, eqn: Any, operands: list[Any], position: int, strict: bool) -> list[Any]:
    """`run_equation` where operand number `position` is the first leaf."""
    name = eqn.primitive.name
    if name in control.RULES:
        out = control.RULES[name](eqn, operands, functools.partial(run, strict=strict), strict)
        if out is not NotImplemented:
            return out
    leaf: ImplicitLeaf = operands[position]
    if name in leaf.rules:
        # a second leaf among the operands (a product of two weights) is an ordinary operand to the first
        others = [v if n == position else materialise(v, name, strict) for n, v in enumerate(operands)]

        def bind(*values: Any) -> Any:
            outs = run_equation(jaxpr, eqn, list(values), strict)
            return outs if eqn.primitive.multiple_results else outs[0]

        out = leaf.rules[name](eqn, bind, position, *others)
        if out is not NotImplemented:
            return list(out) if eqn.primitive.multiple_results else [out]
    return emit(jaxpr, eqn, [materialise(value, name, strict) for value in operands])


def emit(jaxpr: jex.Jaxpr, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """One equation on arrays, exactly as traced: a jaxpr of one equation, so no calling convention is assumed."""
    inputs: list[tuple[jex.Var, Any]] = []
    atoms: list[Any] = []
    for given, value in zip(eqn.invars, operands, strict=True):
        atom = given
        if isinstance(atom, jex.Literal):
            atoms.append(atom)
            continue
        # one variable may stand for two values here: both operands of W·W, one of them materialised
        if any(atom is var and value is not other for var, other in inputs):
            atom = jex.Var(atom.aval)
        atoms.append(atom)
        if not any(atom is var for var, _ in inputs):
            inputs.append((atom, value))
    eqn = eqn.replace(invars=atoms)
    invars, values = zip(*inputs, strict=True) if inputs else ((), ())
    single = jaxpr.replace(constvars=(), invars=invars, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    one = cast("Callable[..., list[Any]]", jex.jaxpr_as_fun(jex.ClosedJaxpr(single, ())))
    return one(*values)
