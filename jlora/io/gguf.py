"""GGUF files (llama.cpp's format): tensors dequantised to plain trees, config and tokenizer from the metadata."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jlora.io.gguf_check import check_gguf
from jlora.io.sizes import checked_config
from jlora.io.tensors import Source, some
from jlora.io.text import one_line
from jlora.models.llama import LlamaConfig, hf_tensors

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
UNREAD = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")
"""The angles of rotary positions, which the config gives."""


def gguf_name(hub: str) -> str:
    """The GGUF name of a Hub tensor: model.layers.3.self_attn.q_proj.weight is blk.3.attn_q.weight."""
    module, kind = hub.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{kind}"


def open_gguf(path: str | Path) -> Any:
    """The reader of the file. Raises ImportError saying which extra brings it, ValueError for another format."""
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the gguf package: pip install 'jlora[gguf]'") from None
    with Path(path).open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with the letters GGUF")
    try:
        check_gguf(Path(path), {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()})
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is cut short or damaged: {one_line(error)}") from None


def metadata(reader: Any) -> Callable[..., Any]:
    """get(key, type, default) over the file's key-value pairs. Raises ValueError for none, or one of another type."""

    def get(key: str, kind: type, *default: Any) -> Any:
        field = reader.get_field(key)
        if field is None:
            if default:
                return default[0]
            raise ValueError(f"the GGUF file has no key {key!r}")
        try:
            value = field.contents()
        except UnicodeDecodeError:
            raise ValueError(f"the GGUF file's {key!r} is not UTF-8") from None
        wants = (int, float) if kind is float else kind
        if not isinstance(value, wants) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"the GGUF file's {key!r} is {value!r:.60}, not of type {kind.__name__}")
        return value

    return get


def config_of(reader: Any) -> LlamaConfig:
    """The sizes. Raises ValueError for an architecture or a rope scaling that is not supported."""
    get = metadata(reader)
    arch = get("general.architecture", str)
    if arch not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"GGUF architecture {arch!r:.60} is not supported: llama, qwen2 and qwen3 are")
    scaling = get(f"{arch}.rope.scaling.type", str, "linear")  # llama.cpp's default: a factor alone divides too
    if scaling not in ("none", "linear"):
        raise ValueError(f"GGUF rope scaling {scaling!r:.60} is not supported: linear is")
    older = get(f"{arch}.rope.scale_linear", float, 1.0)
    factor = float(get(f"{arch}.rope.scaling.factor", float, older)) if scaling == "linear" else 1.0
    names = {tensor.name for tensor in reader.tensors}
    if "rope_freqs.weight" in names:
        raise ValueError("rope_freqs.weight (Llama 3.1's long rope) is not read from GGUF: use the Hub's checkpoint")
    heads = get(f"{arch}.attention.head_count", int)
    d = get(f"{arch}.embedding_length", int)
    return checked_config(
        LlamaConfig,
        {
            "model_type": arch,
            "vocab_size": len(get("tokenizer.ggml.tokens", list)),
            "hidden_size": d,
            "intermediate_size": get(f"{arch}.feed_forward_length", int),
            "num_hidden_layers": get(f"{arch}.block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": get(f"{arch}.attention.head_count_kv", int, heads),
            "head_dim": get(f"{arch}.attention.key_length", int, d // max(heads, 1)),
            "max_position_embeddings": get(f"{arch}.context_length", int, None),
            "rms_norm_eps": float(get(f"{arch}.attention.layer_norm_rms_epsilon", float)),
            "rope_theta": float(get(f"{arch}.rope.freq_base", float, 10000.0)),
            "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
            "tie_word_embeddings": "output.weight" not in names,
        },
        "the GGUF file",
    )


def read_gguf(path: str | Path) -> tuple[LlamaConfig, Source, Any]:
    """(config, source, reader): the tensors under the Hub's names in torch's orientation, dequantised to f32.

    llama.cpp interleaves the two halves of each rotary head in the rows of q and k for architecture "llama"; that
    is undone here. Raises ValueError for a file that is cut short or no GGUF, or holds tensors that the model lacks.
    """
    import gguf

    reader = open_gguf(path)
    config = config_of(reader)
    held = {tensor.name: tensor for tensor in reader.tensors}
    names = {t.name: gguf_name(t.name) for t in hf_tensors(config)}
    other = sorted(name for name in {*held} - {*names.values()} if not UNREAD.fullmatch(name))
    if other:
        raise ValueError(f"{path} holds tensors that have no place in a {config.model_type} model: {some(other, 6)}")
    shapes = {hub: tuple(int(n) for n in held[name].shape[::-1]) for hub, name in names.items() if name in held}

    @functools.lru_cache(maxsize=1)  # the parts of one tensor are asked for one after the other
    def whole(hub: str) -> np.ndarray:
        name = names[hub]
        w = np.asarray(gguf.dequantize(held[name].data, held[name].tensor_type), np.float32)
        if config.model_type == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            half = config.head_dim // 2
            w = w.reshape(-1, half, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
        return w

    return config, Source(str(path), shapes, lambda name, index: whole(name)[index]), reader


def tokenizer_of(reader: Any) -> Any:
    """A `transformers` fast tokenizer with the chat template, from the metadata (byte-level BPE).

    Raises ValueError for another kind of vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    get = metadata(reader)
    if get("tokenizer.ggml.model", str) != "gpt2":
        raise ValueError(
            f"GGUF tokenizer {get('tokenizer.ggml.model', str)!r:.60} is not supported: byte-level BPE (gpt2) is"
        )
    tokens, kinds = get("tokenizer.ggml.tokens", list), get("tokenizer.ggml.token_type", list)
    merges: Any = [tuple(str(merge).split(" ", 1)) for merge in get("tokenizer.ggml.merges", list)]
    if not all(isinstance(token, str) for token in tokens) or len(kinds) != len(tokens):
        raise ValueError(f"the GGUF file has {len(tokens)} tokens and {len(kinds)} token types")
    if any(len(pair) != 2 for pair in merges):
        raise ValueError("a merge of the GGUF file's tokenizer is not two tokens with a space between")
    pre = get("tokenizer.ggml.pre", str, "default")
    try:
        vocabulary = {token: n for n, token in enumerate(tokens)}
        # of Llama 3 a word that is a token is that token, whatever its merges
        bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library raises plain Exception, for a merge of what is no token
        raise ValueError(f"the GGUF file's merges do not fit its tokens: {one_line(error)}") from None
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("smollm", "gpt-2", "default"))
    if pre == "smollm":  # digits one by one
        bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    elif pre in ("gpt-2", "default"):
        bpe.pre_tokenizer = bytes_
    elif pre in SPLITS:
        split = pre_tokenizers.Split(_regex(SPLITS[pre]), behavior="isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    else:
        raise ValueError(
            f"GGUF pre-tokenizer {pre!r:.60} is not supported: {', '.join(['smollm', 'gpt-2', *SPLITS])} are"
        )
    bpe.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, kinds, strict=True))
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in typed if kind == 3])
    # type 4: whole tokens, but shown when decoded
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in typed if kind == 4])

    def special(name: str) -> str | None:
        number = get(f"tokenizer.ggml.{name}_token_id", int, None)
        if number is not None and not 0 <= number < len(tokens):
            raise ValueError(f"the GGUF file's {name} token is number {number} of {len(tokens)}")
        return None if number is None else tokens[number]

    bos = special("bos")
    if bos is not None and get("tokenizer.ggml.add_bos_token", bool, pre == "llama-bpe"):  # llama.cpp's default
        # by an id of its own: the token's text may be anything
        begin = {"id": "begin", "ids": [get("tokenizer.ggml.bos_token_id", int)], "tokens": [bos]}
        pair = "begin $A begin:1 $B:1"
        bpe.post_processor = processors.TemplateProcessing("begin $A", pair, special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=special("eos"),
        unk_token=special("unknown"),
        pad_token=special("padding") or special("eos"),
        chat_template=get("tokenizer.chat_template", str, None),
        clean_up_tokenization_spaces=False,
    )


SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # noqa: E501
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # noqa: E501
}


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)
