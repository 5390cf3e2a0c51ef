"""The table of what rounds of refinement bring."""

from pathlib import Path

import pytest
import refinement
import torch
from recipes import write_parquet

import hf_vq


def test_each_number_of_rounds_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_parquet(tmp_path / "data")
    config = hf_vq.SQVAEConfig(image_size=8, codebook_size=16, hidden_channels=[8], residual_channels=8)
    model = hf_vq.SQVAEModel(config)
    hf_vq.ImageTokenizer(model, hf_vq.VQImageProcessor.for_config(config)).save_pretrained(tmp_path / "tok")
    monkeypatch.setattr(refinement, "BATCH_SIZE", 2)
    monkeypatch.setattr(refinement, "share_cores", torch.get_num_threads)
    refinement.main(
        [str(tmp_path / "tok"), "--dataset_name", str(tmp_path / "data"), "--limit", "3", "--rounds", "0", "2"]
    )
    head, _, plain, refined = capsys.readouterr().out.strip().splitlines()
    assert head == "| refine | num_images | psnr | psnr_of_mse | perplexity | images_per_second |"
    (rounds, images, before, *_), (more_rounds, _, after, *_) = (
        line.strip("| ").split(" | ") for line in (plain, refined)
    )
    assert (rounds, images, more_rounds) == ("0", "3", "2") and float(after) > float(before)
