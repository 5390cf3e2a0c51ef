"""A VQModel of diffusers and what it becomes: the same tokens and pixels, and what cannot be said is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vq import ImageTokenizer
from hf_vq.cli import main
from hf_vq.convert import convert, from_diffusers, to_config
from hf_vq.reference_tokens import compare_tokens

diffusers = pytest.importorskip("diffusers")

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {"norm_num_groups": 8, "block_out_channels": (16,)},
    "two levels": {
        "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 2, "norm_num_groups": 8,
        "num_vq_embeddings": 64, "vq_embed_dim": 5, "latent_channels": 7,
    },
    "attention": {
        "block_out_channels": (16, 16, 32), "norm_num_groups": 4, "in_channels": 1, "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "sample_size": 16,
    },
    "no attention": {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "layers_per_block": 3,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 2, "mid_block_add_attention": False,
    },
    "a larger codebook": {
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "num_vq_embeddings": 1024, "vq_embed_dim": 4, "act_fn": "swish",
    },
}  # fmt: skip


def original(name: str) -> Any:
    """A VQModel with random weights and codes as far apart as its latents are."""
    torch.manual_seed(0)
    model = diffusers.VQModel(**CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        config = model.config
        images = torch.rand(4, config.in_channels, config.sample_size, config.sample_size) * 2 - 1
        rows = model.encode(images).latents.movedim(1, -1).flatten(0, -2)
        codes = model.quantize.embedding.weight
        codes.copy_(rows.mean(0) + rows.std(0) * torch.randn_like(codes))
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_tokens_and_pixels_are_those_of_the_original(name: str, dtype: torch.dtype, tmp_path: Path):
    model = original(name)
    model.save_pretrained(tmp_path / "original")
    convert(tmp_path / "original").save_pretrained(tmp_path / "ours")
    ours: Any = ImageTokenizer.from_pretrained(tmp_path / "ours").model.to(dtype)
    model, config = model.to(dtype), model.config
    images = torch.rand(8, config.in_channels, config.sample_size, config.sample_size, dtype=dtype) * 2 - 1
    latents = model.encode(images).latents
    quantized, _, (_, _, tokens) = model.quantize(latents)
    encoded = ours.encode(images)
    close: dict[str, float] = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(encoded.last_hidden_state, latents, **close)
    found = compare_tokens(
        ours, encoded.last_hidden_state, None, encoded.image_tokens, tokens.view(encoded.image_tokens.shape)
    )
    # In float32 the original's own distances are rounded.
    assert found.num_differing == 0 or (
        dtype == torch.float32 and found.num_differing < 3 and found.largest_margin < 1e-4
    )
    assert len(tokens.unique()) > 8
    expected = model.decode(quantized, force_not_quantize=True).sample
    torch.testing.assert_close(ours.decode(quantized_last_hidden_state=quantized).pixel_values, expected, **close)
    whole = model(images).sample
    if not found.num_differing:
        torch.testing.assert_close(ours.decode(encoded.image_tokens).pixel_values, whole, **close)
    assert ours.config.commitment_weight == 1.0 and "0.25" in ours.config.converted_from["loss"]


def test_the_command_converts_a_model_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    original("defaults").save_pretrained(tmp_path / "pipeline" / "vqvae")
    arguments = [str(tmp_path / "pipeline"), "--subfolder", "vqvae", "--output", str(tmp_path / "ours")]
    assert main(["convert", *arguments]) == 0
    assert "ImageTokenizer(VQVAEModel, vocab_size=256, grid=32x32)" in capsys.readouterr().out
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "ours")
    assert len(tokenizer) == 256 and tokenizer.model.config.image_size == 32
    assert main(["convert", *arguments, "--image_size", "64"]) == 0
    assert ImageTokenizer.from_pretrained(tmp_path / "ours").model.config.image_size == 64


@pytest.mark.parametrize("where", [["pipeline", "--subfolder", "vqvae"], ["pipeline/vqvae"]])
def test_a_model_of_a_pipeline_with_other_pixels_is_refused(
    where: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    original("defaults").save_pretrained(tmp_path / "pipeline" / "vqvae")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}')
    assert main(["convert", *where, "--output", "ours"]) == 2
    assert "is a AmusedPipeline, whose VQModel takes pixels in [0, 1]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_type": "spatial"}, "norm_type 'spatial' of the VQModel has no counterpart"),
        ({"act_fn": "relu"}, "act_fn 'relu' of the VQModel has no counterpart"),
        ({"out_channels": 4}, "in_channels 3 and out_channels 4 differ"),
        ({"down_block_types": ["DownBlock2D"]}, "block type DownBlock2D of the VQModel has no counterpart"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "attention stands at other levels"),
        ({"block_out_channels": [32, 32]}, "differ in length"),
        ({"sample_size": [32, 16]}, r"sample_size \[32, 16\] of the VQModel is no side of a square"),
        ({"down_block_types": "DownEncoderBlock2D"}, "down_block_types of the VQModel is 'Down.*, and must be a list"),
        ({"block_out_channels": 64}, "block_out_channels of the VQModel is 64, and must be a list"),
        ({"sample_size": None}, "sample_size None of the VQModel is no side of a square"),
        ({"brightness": 1}, "the VQModel's config has brightness, which this converter does not know"),
        ({"_class_name": "AutoencoderKL"}, "_class_name is AutoencoderKL"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        to_config(config)


def test_weights_that_do_not_fit_their_config_are_refused():
    model = original("defaults")
    weights = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"quantizer.codebook.weight \(\), not \(256, 3\)"):
        from_diffusers(model.config, {name: w for name, w in weights.items() if "quantize." not in name})
    for name in ("decoder.extra.weight", "encoder.down_blocks.0.resnets.0.time_emb_proj.weight"):
        with pytest.raises(ValueError, match=f"{name} of the VQModel has no counterpart"):
            from_diffusers(model.config, weights | {name: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"encoder.stem.weight \(1,\), not \(16, 3, 3, 3\)"):
        from_diffusers(model.config, weights | {"encoder.conv_in.weight": torch.zeros(1)})


def test_a_pickle_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    assert main(["convert", str(tmp_path), "--output", str(tmp_path / "ours")]) == 2
    assert "pickles are not read" in capsys.readouterr().err


def test_a_model_that_is_not_there_or_would_be_lost_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    original("defaults").save_pretrained(tmp_path / "pipeline" / "vqvae")
    pipeline, model = str(tmp_path / "pipeline"), str(tmp_path / "pipeline" / "vqvae")
    assert main(["convert", pipeline, "--output", str(tmp_path / "ours")]) == 2
    assert "--subfolder vqvae" in capsys.readouterr().err
    for given in ([model], [pipeline, "--subfolder", "vqvae"]):
        assert main(["convert", *given, "--output", model]) == 2
        assert "is the model itself, which would be lost" in capsys.readouterr().err
    for size in ("0", "-3"):
        assert main(["convert", model, "--image_size", size, "--output", str(tmp_path / "ours")]) == 2
        assert f"image_size must be positive and finite, got {size}" in capsys.readouterr().err
    for content, message in (("{", "config.json is not JSON"), ("[]", "holds [], and an object was to come")):
        (tmp_path / "pipeline" / "vqvae" / "config.json").write_text(content)
        assert main(["convert", model, "--output", str(tmp_path / "ours")]) == 2
        assert message in capsys.readouterr().err
