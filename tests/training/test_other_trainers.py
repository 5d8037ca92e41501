"""Our results in the trainers that the page on them names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.helpers import load_folder
from tests.training.small import Place, weights

KINDS = ["gqa", "cla", "mla"]


def _settings(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out / "state"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _check(start: Path, trained: Path) -> None:
    old, new = weights(start), weights(trained)
    load_folder(trained)
    assert {name: tensor.shape for name, tensor in old.items()} == {
        name: tensor.shape for name, tensor in new.items()
    }
    assert any(not torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_of_transformers(kind: str, place: Place, tmp_path: Path) -> None:
    start = place.converted(kind)
    text = place.text.read_text()
    tokenizer = AutoTokenizer.from_pretrained(start)
    ids = tokenizer(text[:64], add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": ids[n : n + 16], "labels": ids[n : n + 16]} for n in range(0, 64, 16)]
    model = load_folder(start)
    trainer = Trainer(model, TrainingArguments(**_settings(tmp_path)), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    _check(start, tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_sft_trainer_of_trl(kind: str, place: Place, tmp_path: Path) -> None:
    start = place.converted(kind)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token = "<eos>"
    text = place.text.read_text()
    trainer = SFTTrainer(
        model=load_folder(start),
        args=SFTConfig(**_settings(tmp_path), max_length=16, bf16=False),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"text": [text[n : n + 16] for n in range(0, 64, 16)]}),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    _check(start, tmp_path / "out")
