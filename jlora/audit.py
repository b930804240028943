"""`audit(step, ...)`: what the compiled step really does, against what LoRA promises.

The optimised program is read as text. A frozen matrix betrays itself by its shape: a product with that shape is its
gradient or A·B written out, a sum with that shape is W + A·B. Optimiser state betrays itself the same way.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Set as AbstractSet
from typing import Any

import jax

from jlora.leaves import is_implicit
from jlora.tree import nbytes, paths

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(\S+) = \(?(\w+)\[([\d,]*)\](?:\{[^}]*\})?(?:, .*?\))? ([\w\-]+)\((.*)$")
"""Of a tuple of results, as a library's product with its workspace has, the first."""
LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|conv)[^"]*"', re.IGNORECASE)
"""What stands for a product in a program for GPUs: "__cublas$gemm", "__cublas$lt$matmul", "__cudnn$convForward"."""
PRODUCTS = {"dot", "convolution"}
SUMS = {"add", "subtract"}

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found. `problems`: one sentence each; none if every promise is kept.

    flops: of the compiled step as XLA counts them (a loop's body once), None where the backend does not say.
    copies: of frozen weights, transposed or laid out anew, of 1 MB and more inside a loop: paid at every turn.
    bytes: arguments, outputs, temporaries, frozen weights, trained leaves and optimiser state, in bytes.
    unseen: frozen weights that have a trained leaf's shape, whose gradient theirs could not be told from.
    """

    problems: tuple[str, ...]
    flops: float | None
    bytes: dict[str, int]
    copies: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{name}: {count / 1e6:,.2f} MB" for name, count in self.bytes.items()]
        lines.append(f"FLOPs (loop bodies once): {self.flops:.3g}" if self.flops else "FLOPs: not told by this backend")
        lines += [f"copy: {copy}" for copy in self.copies]
        if self.unseen:
            lines.append(f"not looked at, being of a trained leaf's shape: {', '.join(self.unseen)}")
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or [
            "no gradient of a frozen weight, none materialised, no optimiser state for one"
        ]
        return "\n".join(lines)


def audit(step: Any, *args: Any, frozen: Any, lora: Any, opt_state: Any = ()) -> Audit:
    """Compile `step(*args)` and check it. args: arrays or `ShapeDtypeStruct`s (with shardings, for other devices).

    step: a function or a `jax.jit` of one. frozen, lora: the trees of `lorafy`; opt_state: the optimiser's.
    Matrices are recognised by shape, so audit with a batch whose number of tokens is no dimension of a weight.
    """
    compiled = (step if hasattr(step, "lower") else jax.jit(step)).lower(*args).compile()
    weights = {path: leaf for path, leaf in paths(frozen, is_implicit).items() if len(wide(shape_of(leaf))) > 1}
    arrays = {path: leaf for path, leaf in paths(lora).items() if shape_of(leaf)}
    known = signatures(weights)
    shared = known.keys() & signatures(arrays).keys()
    unseen = dict.fromkeys(path for shape, names in known.items() if shape in shared for path in names)
    problems = [*in_program(compiled.as_text() or "", weights, shared), *in_state(opt_state, weights, lora)]
    memory = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    counts = {
        "arguments": memory.argument_size_in_bytes if memory else 0,
        "outputs": memory.output_size_in_bytes if memory else 0,
        "temporaries": memory.temp_size_in_bytes if memory else 0,
        "frozen weights": nbytes(frozen),
        "trained": nbytes(lora),
        "optimiser state": nbytes(opt_state),
    }
    copies = copied(compiled.as_text() or "", weights)
    return Audit(tuple(dict.fromkeys(problems)), cost.get("flops"), counts, tuple(dict.fromkeys(copies)), tuple(unseen))


def shape_of(leaf: Any) -> Shape:
    """() for what is no array: an activation function or a number among the leaves."""
    return tuple(getattr(leaf, "shape", ()))


def wide(shape: Any) -> Shape:
    """The axes longer than 1, sorted: a shape up to transposition."""
    return tuple(sorted(size for size in shape if size > 1))


def signatures(weights: dict[str, Any]) -> dict[Shape, list[str]]:
    """Paths by the shapes their weight may have in the program: whole, a row of the stack, and a device's shard."""
    found: dict[Shape, list[str]] = {}
    for path, leaf in weights.items():
        shapes = {tuple(leaf.shape)}
        sharding = getattr(leaf, "sharding", None)
        if sharding is not None:
            shapes.add(tuple(sharding.shard_shape(tuple(leaf.shape))))
        shapes |= {shape[1:] for shape in shapes if len(shape) > 2}
        for shape in {wide(shape) for shape in shapes}:
            if len(shape) > 1:
                found.setdefault(shape, []).append(path)
    return found


def in_program(text: str, weights: dict[str, Any], shared: AbstractSet[Shape] = frozenset()) -> list[str]:
    """Instructions that compute something of a frozen matrix's shape, as sentences; but for the shapes that are
    `shared` with what trains."""
    lines = [match.groups() for match in map(INSTRUCTION.match, text.splitlines()) if match]
    dims = {name: [int(n) for n in size.split(",") if n] for name, _, size, _, _ in lines}
    known = {shape: names for shape, names in signatures(weights).items() if shape not in shared}
    problems: list[str] = []
    for name, kind, _, called, rest in lines:
        paths_here = known.get(wide(dims[name]))
        opcode = "dot" if called == "custom-call" and LIBRARY.search(rest) else called
        if not paths_here or opcode not in PRODUCTS | SUMS:
            continue
        if opcode in SUMS and "f" not in kind:  # of integers: the codes of a quantised weight, less their zero
            continue
        who = ", ".join(paths_here[:3]) + (" ..." if len(paths_here) > 3 else "")
        if opcode in SUMS:
            problems.append(f"a sum of the shape of {who} {dims[name]}: W + A·B is materialised, or W is updated")
        else:
            over = contracted(rest, dims)
            problems.append(f"a product of the shape of {who} {dims[name]}{over}: its gradient, or A·B written out")
    return problems


def copied(text: str, weights: dict[str, Any], least: int = 1_000_000) -> list[str]:
    """Copies and transposes in a loop that have a frozen matrix's shape and at least so many bytes, as sentences."""
    known, fused = signatures(weights), False
    found: list[str] = []
    for line in text.splitlines():
        if line.endswith("{"):
            fused = "fused_computation" in line.split("(")[0]  # what is inside a fusion is never written out
        match = INSTRUCTION.match(line)
        if match is None or fused or "while/body" not in line:
            continue
        name, _, size, opcode, _ = match.groups()
        shape = [int(n) for n in size.split(",") if n]
        owners = known.get(wide(shape), [])
        moves = opcode in ("copy", "transpose") or (opcode == "fusion" and re.match(r"(copy|transpose)(_|\.|$)", name))
        if moves and owners and math.prod(shape) * weights[owners[0]].dtype.itemsize >= least:
            found.append(f"{opcode} {name} of {', '.join(owners[:3])} {shape}")
    return found


def contracted(rest: str, dims: dict[str, list[int]]) -> str:
    axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", rest)
    names = re.findall(r"%([\w.\-]+)", rest)
    if axes is None or not names or names[0] not in dims:
        return ""
    return f" summed over {math.prod(dims[names[0]][int(n)] for n in axes[1].split(','))} elements"


def in_state(opt_state: Any, weights: dict[str, Any], lora: Any) -> list[str]:
    """Optimiser arrays that have a frozen matrix's shape and no trained leaf's."""
    trained = {shape_of(leaf) for leaf in jax.tree.leaves(lora)}
    problems: list[str] = []
    for path, leaf in paths(opt_state, is_implicit).items():
        shape = shape_of(leaf)
        owner = next((p for p, w in weights.items() if tuple(w.shape) == shape), None)
        if owner is not None and shape not in trained:
            problems.append(f"the optimiser keeps {path} {list(shape)} for the frozen {owner}")
    return problems
