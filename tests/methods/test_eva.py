"""EVA against the activations themselves: captured by Flax, written out in numpy, and PEFT's incremental PCA."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import KEY, TOKENS, encoder, llama, stacks

import jlora
from jlora.methods import eva
from jlora.methods.plant import entries_of
from jlora.models.deberta import Deberta, DebertaConfig
from jlora.tree import size

X = jax.random.normal(KEY, (4, 50, 12)) * jnp.linspace(3, 0.1, 12) + 2.0
PARAMS = {"one": {"kernel": jax.random.normal(KEY, (12, 7))}, "two": {"kernel": jax.random.normal(KEY, (7, 9))}}


def mlp(p, x):
    return jnp.tanh(x @ p["one"]["kernel"]) @ p["two"]["kernel"]


def pca(x, centre=True):
    """(V [i, m], ratios) by numpy, f64."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    x = x - x.mean(0) if centre else x
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    return vt.T, s**2 / (s**2).sum()


def same_space(a, v, tol=1e-3):
    """Columns equal up to their signs."""
    overlap = np.abs(np.asarray(a, np.float64).T @ v)
    np.testing.assert_allclose(overlap, np.eye(v.shape[1]), atol=tol)


@pytest.mark.parametrize("centre", [True, False])
def test_directions_and_ranks(centre):
    frozen, lora = eva.make(PARAMS, 2, mlp, X, rho=2.0, centre=centre, alpha=4, key=KEY)  # four batches
    v1, r1 = pca(X, centre)
    v2, r2 = pca(jnp.tanh(X @ PARAMS["one"]["kernel"]), centre)
    best = sorted([*r1[:4], *r2[:4]])[-4:]
    for name, v, r in (("one", v1, r1), ("two", v2, r2)):
        n, entry = int((r[:4] >= best[0]).sum()), lora[name]["kernel"]
        assert n > 0 and entry.lora_a.shape[-1] == n and entry.scaling == 2.0 and not entry.lora_b.any()
        same_space(entry.lora_a, v[:, :n])
    assert sum(lora[name]["kernel"].lora_a.shape[-1] for name in lora) == 4
    jax.tree.map(np.testing.assert_array_equal, frozen, PARAMS)
    _, even = eva.make(PARAMS, 2, mlp, X, rho=1.0)
    assert [e.lora_a.shape[-1] for e in jax.tree.leaves(even, is_leaf=lambda x: hasattr(x, "lora_a"))] == [2, 2]


def ranks_of(lora):
    return {path: e.lora_a.shape[-1] for path, e in entries_of(lora).items()}


@pytest.mark.parametrize("sketch", [None, 8])
def test_an_input_that_never_varies_has_one_direction(sketch):
    """Its variance is 0 of 0: no other weight loses its ranks to that, and what is multiplied still learns."""
    how = {"rho": 2.0, "targets": "kernel", "sketch": sketch}
    for still in (jnp.ones(12), 0.3 * jax.random.normal(KEY, (12,)) + 100):
        apply = lambda p, x, still=still: mlp(p, x) + still @ p["still"]["kernel"]
        _, lora = eva.make(PARAMS | {"still": {"kernel": jnp.ones((12, 9))}}, 2, apply, X, **how)
        assert ranks_of(lora)["still/kernel"] == 1 and sum(ranks_of(lora).values()) == 6
        same_space(lora["still"]["kernel"].lora_a, np.asarray(still / jnp.linalg.norm(still))[:, None])
    off = lambda p, x: mlp(p, x) + jnp.zeros(12) @ p["still"]["kernel"]
    _, lora = eva.make(PARAMS | {"still": {"kernel": jnp.ones((12, 9))}}, 2, off, X, **how)
    assert sum(ranks_of(lora).values()) == 6 and "still/kernel" not in ranks_of(lora)
    _, lora = eva.make(PARAMS, 2, mlp, 0 * X, **how)  # nothing to tell one from another by
    assert ranks_of(lora) == {"one/kernel": 2, "two/kernel": 2}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lora))


def test_ranks_stay_within_their_number_where_directions_are_lacking():
    _, lora = eva.make(PARAMS, 4, mlp, X[:1, :3], rho=1.5)
    assert sum(ranks_of(lora).values()) == 8


def test_sketch_and_mask():
    low = X @ jnp.diag(jnp.arange(12) < 5).astype(float)  # of rank 5
    _, lora = eva.make(PARAMS, 3, mlp, low, rho=1.0, sketch=6, targets="one")
    same_space(lora["one"]["kernel"].lora_a, pca(low)[0][:, :3])
    padded = jnp.concatenate([X, 100 * jnp.ones((4, 5, 12))], 1)
    mask = lambda batch: jnp.arange(55) < 50
    _, lora = eva.make(PARAMS, 3, mlp, padded, rho=1.0, mask=mask, targets="one")
    same_space(lora["one"]["kernel"].lora_a, pca(X)[0][:, :3])
    with pytest.raises(ValueError, match="one/kernel multiplied no activation of these batches, or none that `mask` f"):
        eva.make(PARAMS, 3, mlp, padded, mask=lambda batch: jnp.ones((2, 3), bool))


def test_every_layer_of_a_scanned_model():
    """What Flax's own interception sees at each Dense, layer by layer, with the layers in a loop."""
    apply, params = encoder(True)
    names = ("query", "key", "value", "dense")
    _, lora = eva.make(params, 2, apply, [TOKENS], rho=1.0, layouts=stacks(params), targets="all-linear")
    assert size(lora) == size(jlora.lorafy(params, 2, layouts=stacks(params))[1])
    seen = {}

    def watch(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.module.name in names:
            seen["/".join(context.module.path)] = np.asarray(args[0])
        return next_fun(*args, **kwargs)

    loop, _ = encoder(False)
    one = {k: v for k, v in params.items() if k != "layers"}
    one |= {f"layers_{n}": jax.tree.map(lambda x, n=n: x[n], params["layers"]) for n in range(3)}
    with nn.intercept_methods(watch):
        loop(one, TOKENS)
    assert len(seen) == 3 * 6
    entries = jlora.tree.paths(lora, lambda x: isinstance(x, jlora.LoraFactors))
    for module, x in seen.items():
        layer, rest = module.split("/", 1)
        same_space(entries[f"layers/{rest}/kernel"].lora_a[int(layer[-1])], pca(x)[0][:, :2], 1e-2)


def test_a_weight_that_reads_a_table_too():
    """DeBERTa's queries also read its relative positions, which are no rows of the batch: not counted under a mask."""
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = DebertaConfig(**sizes, num_attention_heads=2, position_buckets=4, share_att_key=True, norm_rel_ebd=True)
    model = Deberta(config, scan_layers=False)
    params = model.init(KEY, TOKENS)["params"]
    mask = jnp.arange(TOKENS.shape[1]) < TOKENS.shape[1] - 2
    mask = jnp.broadcast_to(mask, TOKENS.shape)
    apply = lambda p, batch: model.apply({"params": p}, batch, mask=mask)
    seen = []

    def watch(next_fun, args, kwargs, context):
        if context.module.name == "query_proj":
            seen.append(args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        apply(params, TOKENS)
    (x,) = [x for x in seen if x.shape[:2] == TOKENS.shape][:1]
    how = {"rho": 1.0, "targets": "query_proj", "sketch": 16, "mask": lambda batch: mask}
    _, lora = eva.make(params, 2, apply, [TOKENS], **how)
    (entry,) = jax.tree.leaves(lora, is_leaf=lambda e: hasattr(e, "lora_a"))
    same_space(entry.lora_a.reshape(16, 2), pca(x[:, :-2])[0][:, :2], 1e-2)


def test_ranks_in_a_stack_share_its_largest():
    apply, params = llama(True)
    _, lora = eva.make(params, 2, apply, [TOKENS], rho=2.0, layouts=stacks(params), targets=["q_proj", "down_proj"])
    entries = [e for e in jax.tree.leaves(lora, is_leaf=lambda x: hasattr(x, "lora_a"))]
    used = [np.abs(e.lora_a).max(1) > 0 for e in entries]
    assert sum(u.sum() for u in used) == 2 * 6
    assert all(u[:, : u.shape[1]].any(0).all() for u in used)  # no column that no layer uses


def test_refusals():
    with pytest.raises(ValueError, match="at least one batch"):
        eva.make(PARAMS, 2, mlp, [])
    with pytest.raises(ValueError, match=r"rho 0\.5"):
        eva.make(PARAMS, 2, mlp, X, rho=0.5)
    with pytest.raises(ValueError, match="two/kernel multiplied no activation"):
        eva.make(PARAMS, 2, lambda p, x: x @ p["one"]["kernel"], X)
    for options in ({"init": "pissa"}, {"config": jlora.LoraConfig(init_lora_weights="olora")}):
        with pytest.raises(ValueError, match=r"init '(pissa|olora)' takes its factors out of the base, and EVA has"):
            eva.make(PARAMS, 2, mlp, X, **options)
    eva.make(PARAMS, 2, mlp, X, init="kaiming", config=jlora.LoraConfig(init_lora_weights="olora"))  # init goes first


def test_peft_finds_the_same_directions():
    pytest.importorskip("torch")
    pca_of = pytest.importorskip("peft.utils.incremental_pca").IncrementalPCA
    import torch

    theirs = pca_of(n_components=4, copy=True, lowrank=False)
    for batch in np.asarray(X):
        theirs.partial_fit(torch.tensor(batch))
    _, lora = eva.make(PARAMS, 4, mlp, X, rho=1.0, targets="one")
    same_space(lora["one"]["kernel"].lora_a[:, :3], theirs.components_.numpy().T[:, :3], 2e-2)
