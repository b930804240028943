"""Eight simulated devices against one: losses, adapters, what crosses the wires."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jlora
from jlora import batch_parts, sharding
from jlora.collectives import by_kind, collectives
from jlora.data import BatchSource, Example, PackedSource
from jlora.leaves import LoraLeaf
from tests.devices import on_eight

MESHES = ["data=8/1000000", "fsdp=8", "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2", "tensor=2,sequence=2,data=2"]
RING = "tensor=2,sequence=4/0/gemma/lora"
OTHERS = ["fsdp=2,tensor=2,sequence=2/0/gemma/qlora", RING, "fsdp=4,tensor=2/0/bert/labels"]
OTHERS += ["data=2,fsdp=2,sequence=2/0/deberta/labels", "fsdp=2,data=2,tensor=2/0/llama/dpo"]
RINGS = ["ring/packed", "ring/some layers' window"]


@pytest.fixture(scope="module")
def eight():
    """One report a mesh; "/SIZE" after a mesh is `min_size`."""
    return on_eight("tests.scale.eight", *MESHES, *OTHERS, *RINGS, key="mesh")


@pytest.mark.parametrize("mesh", MESHES + OTHERS)
def test_same_losses_and_adapter_as_one_device(eight, mesh):
    assert eight[mesh]["compiled"] == 1  # the new state lies as the old one did
    assert eight[mesh]["losses"] < 1e-5
    assert eight[mesh]["adapter"] < 1e-5


@pytest.mark.parametrize("sight", RINGS)
def test_a_ring_is_plain_attention(eight, sight):
    assert max(eight[sight]["off"]) < 1e-5


def test_keys_go_round_where_there_are_too_few_heads(eight):
    """4 heads over 8 devices: nothing is exchanged for heads, and no device holds a whole row."""
    kinds = {one[0] for one in eight[RING]["collectives"] if "ppermute" in one[4] or "all_to_all" in one[4]}
    assert kinds == {"collective-permute"}


def test_a_data_parallel_step_moves_the_adapter_and_nothing_else(eight):
    report = eight[MESHES[0]]
    moved = {}
    for kind, dtypes, total, known, _ in report["collectives"]:
        assert known and dtypes == ["f32"]
        moved[kind] = moved.get(kind, 0) + total
    sums = 6 * 4  # `Sums`: six f32
    assert moved == {"all-reduce": report["adapter_bytes"] + sums}


def test_fsdp_splits_weights_and_state_and_gathers_no_activation(eight):
    report = eight["fsdp=8"]
    assert report["specs"]["layers/self_attn/q_proj/kernel"] == str(P(None, "fsdp", None))
    assert report["state_split"]
    in_layers = [one for one in report["collectives"] if "/while/" in one[4]]
    assert {"all-gather"} <= {one[0] for one in in_layers}
    assert not [one for one in in_layers if one[0] in ("all-to-all", "collective-permute")]


def test_tensor_axes_follow_the_block(eight):
    specs = eight["fsdp=4,tensor=2"]["specs"]
    assert specs["layers/mlp/up_proj/kernel"] == str(P(None, "fsdp", "tensor"))
    assert specs["layers/mlp/down_proj/kernel"] == str(P(None, "tensor", "fsdp"))
    assert specs["embed_tokens/embedding"] == str(P("tensor", "fsdp"))
    assert specs["norm/scale"] == str(P())


def mesh_of(**sizes):
    return jax.sharding.AbstractMesh(
        tuple(sizes.get(name, 1) for name in sharding.AXES),
        sharding.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
    )


def test_a_mesh_is_one_line_and_says_what_does_not_fit():
    mesh = sharding.make_mesh("fsdp=-1", jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1}
    with pytest.raises(ValueError, match="the product must be that"):
        sharding.make_mesh("fsdp=4,tensor=2", jax.devices()[:1])
    with pytest.raises(ValueError, match="'model=2' is not AXIS=SIZE"):
        sharding.make_mesh("model=2")


def test_a_mesh_of_other_axes_says_which_it_lacks():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    says = "has the axes model and lacks data, fsdp, tensor, sequence, expert: make it by jlora.sharding.make_mesh"
    with pytest.raises(ValueError, match=says):
        sharding.specs({"kernel": jnp.zeros((64, 32))}, None, mesh)
    with pytest.raises(ValueError, match=says):
        batch_parts.split_batch({"tokens": np.zeros((4, 8), np.int32)}, mesh)


def test_state_follows_the_longest_path_that_ends_its_own():
    """Where a weight's path ends in another's."""
    tree = {"dense": {"kernel": jnp.ones((4, 4))}, "enc": {"dense": {"kernel": jnp.ones((4, 4))}}}
    own = {"dense": {"kernel": P(None, "tensor")}, "enc": {"dense": {"kernel": P("tensor", None)}}}
    state = optax.adam(1e-3).init(tree)
    got = sharding.like(state, tree, own)
    assert got[0].mu == own and got[0].nu == own and got[0].count == P()


def test_factors_follow_their_weight_and_small_ones_are_replicated():
    params = {"layers": {"q_proj": {"kernel": jnp.zeros((2, 64, 32))}}}
    _, lora = jlora.lorafy(params, 4, layouts={"kernel": "sio"})
    mesh = mesh_of(fsdp=4, tensor=2)
    node = sharding.specs(lora, None, mesh, min_size=0)["layers"]["q_proj"]["kernel"]
    assert (node.lora_a, node.lora_b) == (P(None, "fsdp", None), P(None, None, "tensor"))
    node = sharding.specs(lora, None, mesh, min_size=400)["layers"]["q_proj"]["kernel"]
    assert (node.lora_a, node.lora_b) == (P(None, "fsdp", None), P())


def test_letters_alone_decide_for_a_model_of_somebody_else():
    params = {"w": jnp.zeros((6, 64, 8)), "experts": jnp.zeros((4, 64, 64)), "odd": jnp.zeros((9, 7))}
    got = sharding.specs(params, {"w": "osi", "experts": "soi"}, mesh_of(fsdp=2, expert=4), min_size=0)
    assert got["w"] == P(None, None, "fsdp")
    assert got["experts"] == P("expert", None, "fsdp")
    assert got["odd"] == P(None, None)


def test_a_quantised_stack_tells_its_own_axes():
    params = {"layers": {"q_proj": {"kernel": jnp.ones((2, 64, 32))}}}
    quantised = jlora.quantise(params, "int8", layouts={"kernel": "sio"})
    mesh = mesh_of(fsdp=4, tensor=2)
    leaf = sharding.specs(quantised, None, mesh, min_size=0)["layers"]["q_proj"]["kernel"]
    assert leaf.parts["codes"] == P(None, "fsdp", "tensor")
    assert sharding.specs(params, None, mesh, min_size=0)["layers"]["q_proj"]["kernel"] == P()  # nobody says


def test_a_stack_of_vectors_is_not_split():
    params = {"layers": {"q_proj": {"bias": jnp.zeros((4, 64))}, "norm": {"scale": jnp.zeros((4, 64))}}}
    for spec in jlora.tree.paths(sharding.specs(params, None, mesh_of(fsdp=2, tensor=2), min_size=0)).values():
        assert spec == P()


def test_a_lora_leaf_in_the_tree_gets_specs_for_its_parts():
    params = {"kernel": jnp.zeros((64, 32))}
    tree = jlora.combine(*jlora.lorafy(params, 2))
    leaf = sharding.specs(tree, None, mesh_of(fsdp=2), min_size=0)["kernel"]
    assert isinstance(leaf, LoraLeaf) and leaf.w == P("fsdp", None) and leaf.lora_a == P("fsdp", None)


def test_rows_that_do_not_divide_are_refused():
    batch = {"tokens": jnp.zeros((6, 4), jnp.int32)}
    with pytest.raises(ValueError, match="a batch of 6 rows does not split into 4"):
        batch_parts.split_batch(batch, mesh_of(fsdp=4))


SIZES = [5, 7, 6, 7, 20, 4]  # plain: a batch of 4 and one of 2 rows; packed into 24: rows of many labels and of few
EXAMPLES = [Example(np.arange(n, dtype=np.int32) + 50 * i, np.arange(n) >= n - 2) for i, n in enumerate(SIZES)]
SOURCES = {
    "plain": lambda own: BatchSource(EXAMPLES, 4, [24], own=own),
    "packed": lambda own: PackedSource(EXAMPLES, 4, 24, own=own),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_process_cuts_a_batch_into_the_same_shapes_and_fills_its_own_rows(kind):
    whole, sides = SOURCES[kind](None), [SOURCES[kind](own) for own in ({0, 1}, {2, 3})]
    for step in range(whole.per_epoch):
        want = batch_parts.split_batch(whole[step], mesh_of(fsdp=2))
        assert want["labels"].shape[1] % 8 == 0 and want["weights"].sum() == whole[step]["weights"].sum()
        for part, side in enumerate(sides):
            got = batch_parts.split_batch(side[step], mesh_of(fsdp=2))
            assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in want.items()}
            for name, array in want.items():  # what a process puts on its devices is its part
                np.testing.assert_array_equal(got[name][part], array[part])
            assert not got["mask"][1 - part].any()


TEXT = """HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %g = f32[8,4]{1,0} all-gather(%x), dimensions={0}, metadata={op_name="in/loop"}
  %h = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%y), dimensions={0}
  %d = bf16[8,4]{1,0} all-gather-done(%h)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %r = (f32[4]{0}, pred[3]{0}) all-reduce(%a, %b), to_apply=%add
}
"""


def test_collectives_are_counted_through_loops():
    found = collectives(TEXT)
    assert by_kind(found) == {"all-gather": 5 * (8 * 4 * 4 + 8 * 4 * 2), "all-reduce": 4 * 4 + 3}
    assert sorted(one.times for one in found) == [1, 5, 5]
    assert "in/loop" in {one.where for one in found}


def test_a_trip_count_is_read_off_the_condition_where_it_is_not_annotated():
    condition = """%cond (p: (s32[], f32[4])) -> pred[] {
  %n = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

"""
    text = TEXT.replace('backend_config={"known_trip_count":{"n":"5"}}', "metadata={}").replace(
        "ENTRY", condition + "ENTRY"
    )
    assert by_kind(collectives(text))["all-gather"] == 7 * (8 * 4 * 4 + 8 * 4 * 2)
    assert not all(one.known for one in collectives(text.replace("direction=LT", "direction=GE")))


@pytest.mark.parametrize(
    ("alone", "pairs"),
    [
        ("{{0},{1}}", "{{0,1}}"),
        ("[2,1]<=[2]", "[1,2]<=[2]"),
        ("mesh['data'=2,'expert'=1] {'expert'}", "mesh['data'=2,'expert'=1] {'data','expert'}"),
    ],
)
def test_groups_of_one_device_send_nothing(alone, pairs):
    found = lambda groups: by_kind(collectives(TEXT.replace("all-reduce(%a, %b),", f"all-reduce(%a, %b), {groups},")))
    assert set(found(f"replica_groups={alone}")) == {"all-gather"}
    assert found(f"replica_groups={pairs}") == by_kind(collectives(TEXT))


def test_a_transfer_spread_over_fusions_counts_once():
    one = "%fused.{n} (p: f32[4]) -> f32[8] {{\n  %c.{n} = f32[8]{{0}} all-gather(%p), channel_id=3\n}}\n\n"
    calls = "".join(f"  %f.{n} = f32[8]{{0}} fusion(%a), kind=kCustom, calls=%fused.{n}\n" for n in (1, 2))
    text = TEXT.replace("ENTRY", one.format(n=1) + one.format(n=2) + "ENTRY").replace("  %w =", calls + "  %w =")
    before = by_kind(collectives(TEXT))
    assert by_kind(collectives(text)) == {**before, "all-gather": before["all-gather"] + 8 * 4}
    alone = TEXT.replace("  %w =", "  %c.1 = f32[8]{0} all-to-all(%a), channel_id=1\n" * 3 + "  %w =")
    assert by_kind(collectives(alone))["all-to-all"] == 3 * 8 * 4  # one channel, and three transfers
