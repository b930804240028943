"""An adapter alone as GGUF, as llama.cpp loads it beside a base (`--lora`): A and B by the base tensors' names.

Tensors are `<base tensor>.lora_a` [r, in] and `.lora_b` [out, r]; llama.cpp's scaling is adapter.lora.alpha / r. Like
the base's, rows of q and k are reordered for architecture "llama" (its rotary halves are interleaved).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.io.beside import beside, naming
from jlora.io.gguf import gguf_name
from jlora.io.peft import module_of, modules
from jlora.lora import LoraFactors
from jlora.models.llama import LlamaConfig
from jlora.models.tensors import HFTensor


def save_gguf_adapter(path: str | Path, lora: Any, config: LlamaConfig, tensors: Sequence[HFTensor], base: str) -> Path:
    """Write it beside, then rename. Raises ValueError for what the format cannot hold, ImportError without gguf."""
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF needs the gguf package: pip install 'jlora[gguf]'") from None
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"GGUF adapters are written for the Llama family, not {type(config).__name__}")
    found = modules(lora, tensors)
    other = [name for name, (entry, _) in found.items() if not isinstance(entry, LoraFactors)]
    if other:
        raise ValueError(f"a GGUF adapter holds LoRA factors only, not {', '.join(other[:4])}: merge, and convert that")
    pairs = [(entry, tensor) for entry, tensor in found.values()]
    alphas = {entry.scaling * entry.lora_a.shape[-1] for entry, _ in pairs}
    if len(alphas) != 1:
        raise ValueError(f"a GGUF adapter has one alpha for all tensors; here are {sorted(alphas)}")
    path = Path(path)
    writer = gguf.GGUFWriter(None, config.model_type if config.model_type != "mistral" else "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alphas.pop()))
    writer.add_string("general.name", f"LoRA adapter for {base}")
    for entry, tensor in pairs:
        a, b = (np.asarray(x if tensor.layer is None else x[tensor.layer]) for x in (entry.lora_a, entry.lora_b))
        name = gguf_name(tensor.name)
        a, b = a.T.astype(np.float32), b.T.astype(np.float32)
        if config.model_type in ("llama", "mistral") and name.endswith(("attn_q.weight", "attn_k.weight")):
            half = config.head_dim // 2
            b = b.reshape(-1, 2, half, b.shape[-1]).swapaxes(1, 2).reshape(b.shape)
        if module_of(tensor).endswith("embed_tokens"):  # llama.cpp looks rows up: A is kept by tokens
            a = a.T
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b))
    with beside(path) as (part,), naming(path):
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path
