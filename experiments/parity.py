"""Every model family against transformers (torch, CPU): the largest difference of logits, relative to their scale.

    pip install "jlora[test]" torch && python experiments/parity.py

Checkpoints are random, in exact Hub format, written by transformers and loaded here in float32; batches are padded on
the right. `tests/models` holds the same to 1e-4 with padding on both sides, packing and generation.
"""

from __future__ import annotations

import tempfile

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jlora.io import load

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LONG = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
V3 = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
V3 |= {"pos_att_type": ["p2c", "c2p"], "relative_attention": True, "type_vocab_size": 0}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 4, "n_head": 4}
GEMMA = {**GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
FAMILIES = {
    "Llama 2": ("LlamaForCausalLM", "LlamaConfig", GROUPED, None),
    "Llama 3.1 (long rope)": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "rope_parameters": LONG}, None),
    "Mistral (window)": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}, None),
    "Qwen 2, 2.5": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, None),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, None),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, None),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2, None),
    "BERT, MiniLM": ("BertForMaskedLM", "BertConfig", SIZES, "mlm"),
    "RoBERTa": ("RobertaForSequenceClassification", "RobertaConfig", SIZES, "classify"),
    "DeBERTa v3": ("DebertaV2ForSequenceClassification", "DebertaV2Config", {**SIZES, **V3}, "classify"),
    "DeBERTa v2 XXL's kind": (
        "DebertaV2ForMaskedLM", "DebertaV2Config", {**SIZES, **V3, "conv_kernel_size": 3, "conv_act": "gelu"}, "mlm",
    ),
}  # fmt: skip


def difference(name: str) -> float:
    model, config, sizes, head = FAMILIES[name]
    torch.manual_seed(0)
    theirs = getattr(transformers, model)(getattr(transformers, config)(**sizes, initializer_range=0.1)).eval()
    tokens = np.random.default_rng(0).integers(3, 97, (4, 24))
    mask = np.arange(24)[None] < np.array([[24], [9], [17], [24]])
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load(folder, **({} if head is None else {"head": head}))
        got = np.asarray(ours.model.apply({"params": ours.params}, jnp.asarray(tokens), mask=jnp.asarray(mask)))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits.numpy()
    if want.ndim == 3:
        got, want = got[mask], want[mask]
    return float(np.abs(got - want).max() / np.abs(want).max())


def main() -> None:
    print("| family | largest difference |\n|---|---|")
    for name in FAMILIES:
        print(f"| {name} | {difference(name):.1e} |")


if __name__ == "__main__":
    main()
