"""The bodies that a config can express, against literal copies of the nets in the papers' code."""

import pytest
import torch
from tiny_models import make_images, make_model
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vq import SQVAEConfig, SQVAEModel, VQVAEConfig, VQVAEModel
from hf_vq.models.convolutional_body import Decoder, Encoder

AUTHORS = {
    "norm": "batch",
    "activation": "relu",
    "latent_projection": False,
    "hidden_channels": (32, 64),
    "residual_channels": 64,
    "codebook_dim": 64,
    "output_activation": "sigmoid",
    "initializer_range": 0.02,
}
SONNET = {
    "norm": "none",
    "activation": "relu",
    "hidden_channels": (64, 128),
    "residual_channels": 32,
    "codebook_dim": 64,
}
BLOCK = [
    "ReLU",
    "Conv2d 64->64 3x3/1",
    "BatchNorm2d 64",
    "ReLU",
    "Conv2d 64->64 1x1/1",
    "BatchNorm2d 64",
]
AUTHORS_ENCODER = [
    "Conv2d 3->32 4x4/2",
    "BatchNorm2d 32",
    "ReLU",
    "Conv2d 32->64 4x4/2",
    "BatchNorm2d 64",
    "ReLU",
    "Conv2d 64->64 3x3/1",
    "BatchNorm2d 64",
    "ReLU",
    *BLOCK,
    *BLOCK,
]
AUTHORS_DECODER = [
    *BLOCK,
    *BLOCK,
    "ConvTranspose2d 64->64 3x3/1",
    "BatchNorm2d 64",
    "ReLU",
    "ConvTranspose2d 64->32 4x4/2",
    "BatchNorm2d 32",
    "ReLU",
    "ConvTranspose2d 32->3 4x4/2",
]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def describe(layer: nn.Module) -> str:
    name = type(layer).__name__
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        height, width = layer.kernel_size
        return f"{name} {layer.in_channels}->{layer.out_channels} {height}x{width}/{layer.stride[0]}"
    return f"{name} {layer.num_features}" if isinstance(layer, nn.BatchNorm2d) else name


def executed_layers(module: nn.Module, inputs: Tensor) -> list[str]:
    """The leaves of `module` in the order in which they run."""
    seen: list[str] = []
    hooks = [
        leaf.register_forward_hook(lambda layer, *_: seen.append(describe(layer)))
        for leaf in module.modules()
        if not list(leaf.children()) and not isinstance(leaf, nn.Sequential)
    ]
    module(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_authors_cifar_net():
    torch.manual_seed(0)
    model = SQVAEModel(SQVAEConfig(**AUTHORS, variance_update="learned"))
    counts = (count(model.encoder), count(model.decoder), model.quantizer.codebook.weight.numel())
    assert counts == (154_336, 154_147, 32_768) and sum(counts) == 341_251
    variances = {"log_observation_variance", "quantizer.variance.log_ratio"}
    assert count(model) == 341_251 + len(variances)
    assert variances < {name for name, _ in model.named_parameters()}
    assert executed_layers(model.encoder, torch.randn(2, 3, 32, 32)) == AUTHORS_ENCODER
    assert executed_layers(model.decoder, torch.randn(2, 64, 8, 8)) == AUTHORS_DECODER


def test_the_authors_net_starts_like_theirs_and_is_bounded():
    torch.manual_seed(0)
    model = SQVAEModel(SQVAEConfig(**AUTHORS))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.02) and not layer.bias.any()
            assert 0.01 < layer.weight.std() < 0.03
    assert model.quantizer.codebook.weight.std().item() == pytest.approx(1, abs=0.02)
    huge = 1e4 * torch.randn(2, 64, 8, 8)
    images = model.eval().decode(quantized_last_hidden_state=huge).pixel_values
    assert images.abs().max() <= 1 and images.min() < -0.9 and images.max() > 0.9
    before = model.decoder.upsample(model.decoder.blocks(huge / 1e4))
    torch.testing.assert_close(model.decoder(huge / 1e4), 2 * torch.sigmoid(before) - 1)


class SonnetNet:
    """Sonnet's VQ-VAE example with the weights given in the order in which they are used."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = iter(weights)

    def conv(self, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, next(self.weights), next(self.weights), stride, padding)

    def deconv(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, next(self.weights), next(self.weights), 2, 1)

    def residual_stack(self, h: Tensor) -> Tensor:
        for _ in range(2):
            conv3_out = self.conv(torch.relu(h), padding=1)
            h = h + self.conv(torch.relu(conv3_out))
        return torch.relu(h)

    def encoder(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x, 2, 1))
        h = torch.relu(self.conv(h, 2, 1))
        h = torch.relu(self.conv(h, 1, 1))
        return self.conv(self.residual_stack(h))

    def decoder(self, x: Tensor) -> Tensor:
        h = self.residual_stack(self.conv(x, 1, 1))
        return self.deconv(torch.relu(self.deconv(h)))


def test_the_sonnet_net_equals_a_literal_copy():
    torch.manual_seed(0)
    model = VQVAEModel(VQVAEConfig(**SONNET)).double()
    assert not [name for name, _ in model.encoder.named_buffers()]
    images = make_images(2, 32, 32, dtype=torch.float64)
    latents = SonnetNet(list(model.encoder.parameters())).encoder(images)
    assert latents.shape == (2, 64, 8, 8)
    torch.testing.assert_close(model.encoder(images)[0], latents, rtol=1e-12, atol=1e-12)
    quantized = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    expected = SonnetNet(list(model.decoder.parameters())).decoder(quantized)
    torch.testing.assert_close(model.decoder(quantized), expected, rtol=1e-12, atol=1e-12)
    assert expected.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("model", [VQVAEModel(VQVAEConfig()), SQVAEModel(SQVAEConfig())], ids=["vqvae", "sqvae"])
def test_the_default_body_is_small_and_without_batch_statistics(model: VQVAEModel | SQVAEModel):
    assert count(model) < 1_000_000
    assert not list(model.encoder.buffers()) and not list(model.decoder.buffers())
    layers = executed_layers(model.encoder, torch.randn(1, 3, 32, 32))
    assert "GroupNorm" in layers and "SiLU" in layers and "ReLU" not in layers
    assert sum("4x4/2" in layer for layer in layers) == 2
    # Batch mates do not matter in training either.
    images = make_images(3, 32, 32)
    torch.testing.assert_close(model.train().encoder(images)[0][:1], model.encoder(images[:1])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize(("height", "width"), [(4, 12), (20, 8), (36, 44)])
def test_other_sizes(norm: str, height: int, width: int):
    model = make_model("gaussian", norm=norm).train()
    images = make_images(2, height, width)
    output = model(images)
    output.loss.backward()
    assert output.decoded_pixel_values.shape == images.shape
    assert output.image_tokens.shape == (2, height // 4, width // 4)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_other_depths_and_channels(stages: int, channels: int):
    config = VQVAEConfig(hidden_channels=(8,) * stages, residual_channels=4, num_channels=channels, image_size=32)
    images = torch.randn(2, channels, 32, 32)
    latents, _ = Encoder(config)(images)
    assert latents.shape == (2, 4, *config.grid_size)
    assert config.grid_size == (32 >> stages, 32 >> stages)
    assert Decoder(config)(latents).shape == images.shape


def test_gradient_checkpointing_changes_nothing():
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = make_model("ema").train()
        if checkpointing:
            # Renamed in transformers 5.23.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        loss = model(make_images(4)).loss
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert model.quantizer.pending_counts.sum() == 4 * 4
        assert model.pending_error[1] == 4
    assert torch.equal(*losses)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
