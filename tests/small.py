"""A small random Llama in Hub format with a word tokenizer and a chat template, written without torch."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp

from jlora.io.load import Pretrained
from jlora.io.save import save
from jlora.models.llama import Llama, LlamaConfig, hf_tensors

WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", "Review", ":", "good", "bad", "fine", "awful", "film"]
WORDS += ["Sentiment", "positive", "negative", "user", "assistant"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} : {{ m.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant : {% endif %}"
)


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


def small_model(folder, seed=0):
    """Write it to `folder`."""
    config = LlamaConfig(len(WORDS), 32, 48, 2, 4, 2, 8)
    model = Llama(config)
    params = model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    base = Pretrained(model, params, config, tokenizer(), "small", hf_tensors(config))
    save(folder, base, params)
    return str(folder)


def rows(folder, count=60):
    """Write rows.jsonl whose answer can be learnt: the film's word decides."""
    path = folder / "rows.jsonl"
    moods = [("good", "positive"), ("fine", "positive"), ("bad", "negative"), ("awful", "negative")]
    lines = []
    for n in range(count):
        word, answer = moods[n % 4]
        film = " film" * (1 + n % 5)
        lines.append(json.dumps({"prompt": f"Review : {word}{film} Sentiment :", "completion": f" {answer}"}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)
