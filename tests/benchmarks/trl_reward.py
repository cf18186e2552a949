"""The peer's side of reward_model.py: TRL's RewardTrainer, run by the peers' own Python on a plan written as JSON.

python trl_reward.py PLAN.json RESULT.json
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer


def main(plan_file: str, result_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    torch.set_num_threads(plan["threads"])
    train, test = (Dataset.from_list(json.loads(Path(plan[name]).read_text())) for name in ("train", "test"))
    tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    model = AutoModelForSequenceClassification.from_pretrained(plan["model"], num_labels=1, dtype=torch.float32)
    config = RewardConfig(
        output_dir=plan["output"], use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=plan["batch"], per_device_eval_batch_size=32,
        num_train_epochs=plan["epochs"], learning_rate=plan["learning_rate"],
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": plan["final_share"]},
        warmup_steps=plan["warmup_steps"], weight_decay=plan["weight_decay"], adam_beta2=plan["beta2"],
        max_grad_norm=plan["gradient_clip"], max_length=plan["tokens"], seed=plan["seed"],
        logging_steps=1000, save_strategy="no", report_to=[], dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(
        model=model, args=config, train_dataset=train, eval_dataset=test, processing_class=tokenizer
    )
    kept = {"train": len(trainer.train_dataset), "test": len(trainer.eval_dataset)}
    started = time.monotonic()
    trained = trainer.train()
    seconds = time.monotonic() - started
    first = trainer.train_dataset[0]
    told = {
        "accuracy": accuracy(trainer), "seconds": seconds, "rows": kept, "steps": trained.global_step,
        "first": {name: list(first[name]) for name in ("chosen_ids", "rejected_ids")},
    }  # fmt: skip
    Path(result_file).write_text(json.dumps(told))


def accuracy(trainer: RewardTrainer) -> float:
    """Share of the test pairs whose chosen side scores higher; equal scores are half right, as on our side."""
    trainer.model.eval()
    right = []
    with torch.no_grad():
        for row in trainer.eval_dataset:
            better, worse = (
                float(trainer.model(input_ids=torch.tensor([list(row[name])])).logits)
                for name in ("chosen_ids", "rejected_ids")
            )
            right.append((np.sign(better - worse) + 1) / 2)
    return float(np.mean(right))


if __name__ == "__main__":
    main(*sys.argv[1:])
