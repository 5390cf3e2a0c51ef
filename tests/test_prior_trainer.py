"""A prior in transformers' Trainer."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

import hf_vq

CODES, CLASSES = 11, 3
PRIORS = {"transformer": hf_vq.TransformerPrior, "pixelcnn": hf_vq.PixelCNNPrior}


def rows(prior: hf_vq.TransformerPrior, with_classes: bool, count: int = 32) -> list[dict[str, Tensor]]:
    """Images whose tokens all equal their class."""
    labels = torch.arange(count) % CLASSES
    sequences = prior.sequences(labels[:, None].expand(count, 16))
    pages = [{"input_ids": sequence, "labels": sequence} for sequence in sequences]
    return (
        [page | {"class_labels": label} for page, label in zip(pages, labels, strict=True)] if with_classes else pages
    )


@pytest.mark.parametrize("with_classes", [False, True], ids=["no_classes", "classes"])
@pytest.mark.parametrize("family", PRIORS)
def test_trainer_trains_and_evaluates(family: str, with_classes: bool, tmp_path: Path):
    set_seed(0)
    sizes = {"codebook_size": CODES, "grid_size": 4, "hidden_size": 16, "num_hidden_layers": 2}
    prior = PRIORS[family](PRIORS[family].config_class(num_classes=CLASSES if with_classes else 0, **sizes))
    data = rows(prior, with_classes)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        label_names=["labels"],
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(prior, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
