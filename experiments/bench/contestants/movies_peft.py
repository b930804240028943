"""The movie-review task by PEFT with transformers' Trainer and its usual padding collator. Prints JSON as ours does."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(2)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(given["folder"])
    base = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0
    )
    model = get_peft_model(base, config)
    rows, tests = (
        [
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)],
            }
            for ids, mask in given[part]
        ]
        for part in ("train", "test")
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    seen = [0]

    def counted(features: list) -> dict:
        seen[0] += sum(len(f["input_ids"]) for f in features)
        return collator(features)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=given["steps"],
            per_device_train_batch_size=given["batch"],
            learning_rate=given["rate"],
            warmup_steps=5,
            weight_decay=0.0,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=counted)
        began = time.perf_counter()
        trainer.train()
        trained = time.perf_counter()
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(tests), given["batch"]):
            batch = counted(tests[start : start + given["batch"]])
            guess = model(**batch).logits[:, :-1].argmax(-1)
            labels = batch["labels"][:, 1:]
            first = (labels != -100).int().argmax(1)
            right += int((guess.gather(1, first[:, None]) == labels.gather(1, first[:, None])).sum())
    done = time.perf_counter()
    out = {"tokens": seen[0], "compile": 0.0, "train": trained - began, "evaluate": done - trained}
    print(json.dumps({**out, "right": right / len(tests)}))


if __name__ == "__main__":
    main()
