"""What all families share: tokens and back, samples, precision, fingerprint, a forgotten step."""

import itertools
import warnings
from collections.abc import Callable

import naive_quantizers as naive
import naive_stochastic_quantizers as loops
import naive_vector_quantizers as vector_loops
import pytest
import torch
from tiny_models import FAMILIES, STOCHASTIC_QUANTIZERS, VECTOR_QUANTIZERS, make_images, make_model
from torch import Tensor

from hf_vq.models import stochastic_quantizers
from hf_vq.models.finite_scalar_quantizer import FiniteScalarQuantizer
from hf_vq.models.modeling_autoencoder import AutoencoderModel
from hf_vq.models.stochastic_quantizers import DiagonalGaussianQuantizer

every_family = pytest.mark.parametrize("family", FAMILIES)


def tokens_shape(model: AutoencoderModel, count: int, height: int, width: int) -> tuple[int, ...]:
    shape = (count, height // 4, width // 4)
    return shape if model.config.num_codebooks == 1 else (*shape, model.config.num_codebooks)


@every_family
@pytest.mark.parametrize(("height", "width", "count"), [(8, 8, 3), (12, 20, 2), (4, 8, 1)])
def test_decoding_the_tokens_gives_what_forward_decodes(family: str, height: int, width: int, count: int):
    model, images = make_model(family), make_images(count, height, width)
    output, encoded = model(images), model.encode(images)
    assert torch.equal(encoded.image_tokens, output.image_tokens)
    assert encoded.image_tokens.dtype == torch.int64
    assert encoded.image_tokens.shape == tokens_shape(model, count, height, width)
    channels = model.config.num_codebooks * model.config.codebook_dim
    assert encoded.last_hidden_state.shape == (count, channels, height // 4, width // 4)
    assert output.decoded_pixel_values.shape == images.shape
    assert torch.equal(model.decode(encoded.image_tokens).pixel_values, output.decoded_pixel_values)
    again = model.decode(quantized_last_hidden_state=encoded.quantized_last_hidden_state)
    assert torch.equal(again.pixel_values, output.decoded_pixel_values)


@every_family
def test_training_gives_the_deterministic_tokens_too(family: str):
    model, images = make_model(family), make_images(4)
    tokens = model.encode(images).image_tokens
    assert torch.equal(model.train()(images).image_tokens, tokens)
    assert torch.equal(model.encode(images).image_tokens, tokens)


@every_family
def test_flat_tokens_and_every_integer_type(family: str):
    model = make_model(family)
    tokens = model.encode(make_images(2)).image_tokens
    expected = model.decode(tokens).pixel_values
    strided = tokens.flatten(1).T.contiguous().T
    for same in (tokens.flatten(1), strided, *(tokens.to(kind) for kind in (torch.int32, torch.int16, torch.uint8))):
        assert torch.equal(model.decode(same).pixel_values, expected)


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint32, torch.uint64])
def test_tokens_in_the_types_in_which_data_sets_store_them(kind: torch.dtype):
    model = make_model("ema")
    tokens = model.encode(make_images(2)).image_tokens
    assert torch.equal(model.decode(tokens.to(kind)).pixel_values, model.decode(tokens).pixel_values)


def distances(model: AutoencoderModel, latents: Tensor, log_variance: Tensor | None) -> Tensor:
    """What the search minimises, (M, N, K), in float64."""
    quantizer = model.quantizer.double()
    rows, vectors = quantizer.rows(latents.double()), quantizer.vectors()
    if isinstance(quantizer, FiniteScalarQuantizer):
        rows = quantizer.bound(rows) / quantizer.half_widths(rows)
    weights = 1.0
    if isinstance(quantizer, DiagonalGaussianQuantizer):
        weights = 1 / quantizer.row_variance(log_variance.double()).unsqueeze(2)
    return ((rows.unsqueeze(2) - vectors.unsqueeze(1)).square() * weights).sum(-1).sqrt()


@every_family
def test_tokens_across_batch_sizes_differ_only_at_near_ties(family: str):
    wider = {"codebook_size": 64, "codebook_dim": 4}
    if family == "fsq":
        wider |= {"codebook_dim": 3, "levels": [4, 4, 4]}
    model, images = make_model(family, **wider), make_images(640, 16, 16)
    with torch.no_grad():
        joint = model.encode(images).image_tokens
        split = {size: torch.cat([model.encode(part).image_tokens for part in images.split(size)]) for size in (5, 256)}
        best, second = distances(model, *model.encoder(images)).topk(2, largest=False).values.unbind(-1)
    for tokens in split.values():
        differ = (tokens != joint).reshape(-1, len(best)).T
        assert differ.sum() <= differ.numel() / 10_000
        assert ((second - best)[differ] < 1e-4 * best[differ]).all()
    assert differ.numel() >= 10_000 and len(joint.unique()) > 8


@pytest.mark.parametrize("family", STOCHASTIC_QUANTIZERS)
def test_sampled_tokens_come_from_the_posterior(family: str):
    model, images = make_model(family), make_images(64)
    deterministic = model.encode(images).image_tokens
    draw = [model.encode(images, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0].image_tokens, draw[1].image_tokens)
    assert not torch.equal(draw[0].image_tokens, draw[2].image_tokens)
    assert not torch.equal(draw[0].image_tokens, deterministic)
    assert torch.equal(model.quantizer.lookup(draw[0].image_tokens), draw[0].quantized_last_hidden_state)
    statistics = model.quantizer.statistics(*model.encoder(images))
    agreement = torch.stack([drawn.image_tokens == deterministic for drawn in draw]).double().mean().item()
    assert statistics["argmax_probability"].item() == pytest.approx(agreement, abs=0.06)


@pytest.mark.parametrize("family", VECTOR_QUANTIZERS)
def test_without_a_posterior_a_sample_is_deterministic(family: str):
    model, images = make_model(family), make_images(4)
    assert torch.equal(model.encode(images, sample=True).image_tokens, model.encode(images).image_tokens)
    assert model.quantizer.statistics(*model.encoder(images)) == {}


def test_sampling_draws_in_one_place(monkeypatch: pytest.MonkeyPatch):
    uniforms = [0.02, 0.4, 0.75, 0.999]
    given = torch.tensor(uniforms).view(1, 4, 1)
    monkeypatch.setattr(stochastic_quantizers, "uniform_noise", lambda like, samples, generator: given)
    model, images = make_model("gaussian", initial_variance=0.5), make_images(1)
    expected = []
    for site, uniform in zip(naive.sites(model.encode(images).last_hidden_state), uniforms, strict=True):
        posterior = loops.posterior(site.latent, model.quantizer.codebook.weight, torch.tensor(0.5))
        passed = list(itertools.accumulate(p.item() for p in posterior))
        expected.append(next(k for k, share in enumerate(passed) if uniform < share))
    assert model.encode(images, sample=True).image_tokens.flatten().tolist() == expected
    assert len(set(expected)) > 2


CASTS: dict[str, tuple[Callable[[AutoencoderModel], AutoencoderModel], torch.dtype]] = {
    "to-bfloat16": (lambda model: model.to(torch.bfloat16), torch.float32),
    "bfloat16": (lambda model: model.bfloat16(), torch.float32),
    "half": (lambda model: model.half(), torch.float32),
    "half-and-back": (lambda model: model.half().float(), torch.float32),
    "in-a-module": (lambda model: torch.nn.ModuleList([model]).to(torch.bfloat16)[0], torch.float32),
    "double": (lambda model: model.double(), torch.float64),
}


def kept(model: AutoencoderModel) -> dict[str, Tensor]:
    """What must not fall below float32."""
    own = {**dict(model.named_parameters(recurse=False)), **dict(model.named_buffers(recurse=False))}
    inner = {**dict(model.quantizer.named_parameters()), **dict(model.quantizer.named_buffers())}
    return own | inner


@every_family
@pytest.mark.parametrize(("cast", "expected"), CASTS.values(), ids=CASTS)
def test_the_state_of_the_quantizer_keeps_its_precision(
    family: str, cast: Callable[[AutoencoderModel], AutoencoderModel], expected: torch.dtype
):
    model, reference = cast(make_model(family).train()), make_model(family)
    for name, tensor in kept(model).items():
        assert tensor.dtype == expected, name
        assert torch.equal(tensor.float(), kept(reference)[name]), name
    output = model(make_images(2))
    output.loss.backward()
    model.step()
    assert output.loss.dtype == expected and output.loss.isfinite()
    assert all(tensor.dtype == expected for tensor in kept(model).values())


def test_half_after_double_runs():
    model = make_model("gaussian").double().half().train()
    model(make_images(2)).loss.backward()


@every_family
def test_autocast_leaves_the_quantizer_in_float32(family: str):
    model, images = make_model(family).train(), make_images(4)
    seen = []
    model.quantizer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output)))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images)
        tokens = model.encode(images).image_tokens
    output.loss.backward()
    (latents, quantized), *_ = seen
    assert latents == torch.bfloat16 and quantized.quantized.dtype == quantized.loss.dtype == torch.float32
    assert output.loss.dtype == torch.float32 and torch.equal(tokens, output.image_tokens)
    assert all(tensor.dtype == torch.float32 for tensor in kept(model).values())
    latents, log_variance = model.encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        searched = model.quantizer.search(latents, log_variance)
        assert torch.equal(searched, model.quantizer.eval()(latents, log_variance).image_tokens)
    assert torch.equal(searched, naive_tokens(model, latents, log_variance))


@every_family
def test_looking_up_is_exact_under_autocast_too(family: str):
    quantizer = make_model(family).quantizer
    shape = (2, 3, 4, quantizer.num_codebooks)[: 4 if quantizer.num_codebooks > 1 else 3]
    image_tokens = torch.randint(quantizer.codebook_size, shape)
    expected = quantizer.lookup(image_tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.lookup(image_tokens), expected)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gradient", {"normalize_codes": True}),
        ("gradient", {"activation": "relu"}),
        ("gaussian-diagonal", {"variance_form": "sum"}),
        ("gaussian-diagonal", {"initial_variance": 0.5}),
    ],
)
def test_options_that_change_the_tokens_change_the_fingerprint(family: str, fields: dict[str, object]):
    plain, changed = make_model(family), make_model(family, **fields)
    changed.load_state_dict(plain.state_dict())
    assert changed.fingerprint() != plain.fingerprint()


def naive_tokens(model: AutoencoderModel, latents: Tensor, log_variance: Tensor | None) -> Tensor:
    """The tokens of latents by the loops, in float64."""
    config, quantizer = model.config, model.quantizer
    latents, vectors = latents.double(), quantizer.vectors().double()
    if config.quantizer == "fsq":
        return vector_loops.finite_scalar(latents, config.levels, config.num_codebooks).image_tokens
    tokens = []
    for site in naive.sites(latents, config.num_codebooks):
        latent = naive.unit(site.latent) if quantizer.normalize_codes else site.latent
        variance = torch.ones_like(latent)
        if isinstance(quantizer, DiagonalGaussianQuantizer):
            variance = torch.stack(loops.head_at("diagonal", log_variance.double(), site)).exp()
        tokens.append(loops.likeliest(latent, vectors[site.m], variance))
    return torch.tensor(tokens).reshape(tokens_shape(model, len(latents), *(4 * side for side in latents.shape[2:])))


@every_family
def test_the_fingerprint_is_of_what_determines_the_tokens(family: str):
    def fingerprint(change: Callable[[AutoencoderModel], object] = lambda model: None) -> str:
        model = make_model(family, norm="batch").train()
        change(model)
        return model.fingerprint()

    def move(model: AutoencoderModel, part: str) -> None:
        torch.nn.init.constant_(model.get_parameter(part), 0.3)

    original = fingerprint()
    same: list[Callable[[AutoencoderModel], object]] = [
        lambda model: model.eval(),
        lambda model: move(model, "decoder.from_latents.0.weight"),
        lambda model: model.step(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.double(),
        lambda model: model.observation_variance.fill_(0.1),
    ]
    other: list[Callable[[AutoencoderModel], object]] = [
        lambda model: move(model, "encoder.downsample.0.weight"),
        lambda model: move(model, "encoder.blocks.0.layers.1.bias"),
        lambda model: move(model, "quantizer.codebook.weight"),
        lambda model: model.encoder.downsample[1].running_mean.add_(1),
        lambda model: model.encoder(make_images(2)),
    ]
    assert len(original) == 64
    assert {fingerprint(change) for change in same} == {original}
    assert len({fingerprint(change) for change in other} | {original}) == 1 + len(other)


@pytest.mark.parametrize("family", ["ema", "gaussian"])
def test_a_loop_that_forgets_step_is_warned_once_after_100_training_forwards(family: str):
    model, images = make_model(family, hidden_channels=(4,), image_size=4).train(), make_images(1, 4, 4)

    def warnings_of(forwards: int) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(forwards):
                model(images)
        return [str(warning.message) for warning in caught]

    assert warnings_of(99) == []
    model.step()
    assert warnings_of(99) == []
    model.eval()
    assert warnings_of(5) == []
    model.train()
    (message,) = warnings_of(120)
    assert "model.step()" in message and "100" in message
