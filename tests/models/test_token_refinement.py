"""Refined tokens: equal to loops written from the docstring, never worse than the encoder's, the same in any batch."""

import itertools

import pytest
import torch
from tiny_models import FAMILIES, make_images, make_model
from torch import Tensor

from hf_vq.models.modeling_autoencoder import AutoencoderModel
from hf_vq.models.token_refinement import PROBE, TokenRefinement

every_family = pytest.mark.parametrize("family", FAMILIES)
ROUNDS = 2


def error_of(model: AutoencoderModel, image_tokens: Tensor, pixel_values: Tensor) -> Tensor:
    """Squared error (B, H, W), summed over channels."""
    return (model.decode(image_tokens).pixel_values.clamp(-1, 1) - pixel_values).square().sum(1)


def refine_by_loops(model: AutoencoderModel, pixel_values: Tensor, rounds: int) -> Tensor:
    """One image after the other, one position after the other; all in float64."""
    return torch.cat([refine_one(model, image.unsqueeze(0), rounds) for image in pixel_values])


def refine_one(model: AutoencoderModel, image: Tensor, rounds: int) -> Tensor:
    tokens = model.encode(image).image_tokens
    _, height, width = tokens.shape[:3]
    curvature = curvature_of(model, tokens)
    for _ in range(rounds):
        for first_row in range(2):
            for first_column in range(2):
                group = [(i, j) for i in range(first_row, height, 2) for j in range(first_column, width, 2)]
                proposed = propose(model, tokens, image, curvature)
                trial = tokens.clone()
                for i, j in group:
                    trial[0, i, j] = proposed[0, i, j]
                before, after = error_of(model, tokens, image)[0], error_of(model, trial, image)[0]
                kept = tokens.clone()
                for i, j in group:
                    rows, columns = slice(4 * max(0, i - 1), 4 * (i + 2)), slice(4 * max(0, j - 1), 4 * (j + 2))
                    if after[rows, columns].sum() < before[rows, columns].sum():
                        kept[0, i, j] = proposed[0, i, j]
                if error_of(model, kept, image).sum() < before.sum():
                    tokens = kept
    return tokens


def curvature_of(model: AutoencoderModel, tokens: Tensor) -> Tensor:
    quantized = model.quantizer.lookup(tokens).detach()
    size = PROBE * model.quantizer.vectors().detach().square().mean().sqrt()
    signs = torch.randint(0, 2, quantized.shape[1:], generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved, still = (
        model.decode(quantized_last_hidden_state=q).pixel_values.clamp(-1, 1)
        for q in (quantized + size * signs, quantized)
    )
    return (moved - still).detach().square().sum() / (size**2 * signs.numel())


def propose(model: AutoencoderModel, tokens: Tensor, image: Tensor, curvature: Tensor) -> Tensor:
    quantized = model.quantizer.lookup(tokens).detach().requires_grad_()
    decoded = model.decode(quantized_last_hidden_state=quantized).pixel_values
    (decoded.clamp(-1, 1) - image).square().sum().backward()
    target = (quantized - quantized.grad / (2 * curvature)).detach()
    proposed, codebooks = tokens.clone(), model.config.num_codebooks
    for i in range(tokens.shape[1]):
        for j in range(tokens.shape[2]):
            parts = target[0, :, i, j].chunk(codebooks)
            codes = [
                (vectors - part).square().sum(1).argmin()
                for part, vectors in zip(parts, model.quantizer.vectors().detach(), strict=True)
            ]
            proposed[0, i, j] = torch.stack(codes) if codebooks > 1 else codes[0]
    return proposed


@every_family
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20), (4, 12)])
def test_refined_tokens_are_those_of_the_loops(family: str, height: int, width: int):
    model = make_model(family, observation="gaussian").double()
    images = make_images(3, height, width, dtype=torch.float64)
    refined = model.encode(images, refine=ROUNDS).image_tokens
    assert torch.equal(refined, refine_by_loops(model, images, ROUNDS))
    assert not torch.equal(refined, model.encode(images).image_tokens)


@every_family
def test_an_images_error_never_rises_and_falls_in_the_mean(family: str):
    model, images = make_model(family), make_images(8, 16, 12)
    errors = [
        error_of(model, model.encode(images, refine=rounds).image_tokens, images).sum((1, 2)) for rounds in range(4)
    ]
    for earlier, later in itertools.pairwise(errors):
        assert bool((later <= earlier * (1 + 1e-6)).all())
    assert errors[1].mean() < errors[0].mean()


def test_what_is_returned_belongs_to_the_refined_tokens():
    model, images = make_model("gaussian"), make_images(4)
    encoded, plain = model.encode(images, refine=1), model.encode(images)
    assert torch.equal(encoded.quantized_last_hidden_state, model.quantizer.lookup(encoded.image_tokens))
    assert torch.equal(encoded.last_hidden_state, plain.last_hidden_state)


def test_an_images_tokens_do_not_depend_on_its_batch():
    model, images = make_model("ema").double(), make_images(6, dtype=torch.float64)
    together = model.encode(images, refine=ROUNDS).image_tokens
    assert torch.equal(together, torch.cat([model.encode(one, refine=ROUNDS).image_tokens for one in images.split(1)]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_refinement_leaves_no_gradient_and_works_without_autograd(context: type):
    model = make_model("gaussian")
    expected = model.encode(make_images(3), refine=ROUNDS).image_tokens
    with context():
        assert torch.equal(model.encode(make_images(3), refine=ROUNDS).image_tokens, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mean_of_a_mixture_is_what_is_compared():
    model, images = make_model("gaussian", observation="logistic_mixture", num_mixtures=2), make_images(8)
    before, after = (error_of(model, model.encode(images, refine=r).image_tokens, images).sum() for r in (0, ROUNDS))
    assert after < before


def test_a_narrow_model_refines_too():
    model, images = make_model("gaussian").to(torch.bfloat16), make_images(8)
    before, after = (error_of(model, model.encode(images, refine=r).image_tokens, images).sum() for r in (0, ROUNDS))
    assert after < before


def test_a_decoder_that_ignores_its_tokens_leaves_them_as_they_are():
    model, images = make_model("gaussian"), make_images(3)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    tokens = model.encode(images).image_tokens
    assert torch.equal(model.encode(images, refine=1).image_tokens, tokens)
    with torch.no_grad():
        curvature = TokenRefinement(model, images).curvature(tokens)
    assert bool((curvature > 0).all()) and bool(curvature.isfinite().all())


def test_a_default_device_is_not_where_the_step_is_drawn():
    model, images = make_model("gaussian"), make_images(2)
    expected = model.encode(images, refine=1).image_tokens
    with torch.device("meta"):
        assert torch.equal(model.encode(images, refine=1).image_tokens, expected)


def test_weights_without_gradients_are_refused():
    with torch.inference_mode():
        model = make_model("gaussian")
    with pytest.raises(ValueError, match="refine=1 needs gradients, .*outside of it"):
        model.encode(make_images(1), refine=1)


@pytest.mark.parametrize("wrong", [{"return_loss": True}, {"sample": True}])
def test_only_deterministic_tokens_are_refined(wrong: dict[str, bool]):
    with pytest.raises(ValueError, match=r"refine=1 .* neither return_loss nor sample"):
        make_model("gaussian").encode(make_images(1), refine=1, **wrong)
    with pytest.raises(ValueError, match=r"refine=1 .* model\.eval\(\)"):
        make_model("gaussian").train().encode(make_images(1), refine=1)


@pytest.mark.parametrize("rounds", [-1, 1.5, "2"])
def test_rounds_are_counted(rounds: object):
    with pytest.raises(ValueError, match=f"refine must be a whole number of rounds, 0 or more, got {rounds}"):
        make_model("gaussian").encode(make_images(1), refine=rounds)
