"""What all families share: tokens and back, the likelihood of an image, precision, fingerprint, torch.compile."""

import math
import warnings
from collections.abc import Callable

import naive_quantizers as naive
import pytest
import torch
from tiny_models import FAMILIES, make_images, make_model
from torch import Tensor

from hf_vq.models import quantizers
from hf_vq.models.modeling_autoencoder import AutoencoderModel

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize(("height", "width", "count"), [(8, 8, 3), (12, 20, 2), (4, 8, 1)])
def test_decoding_the_tokens_gives_what_forward_decodes(family: str, height: int, width: int, count: int):
    model, images = make_model(family), make_images(count, height, width)
    output, encoded = model(images), model.encode(images)
    assert torch.equal(encoded.image_tokens, output.image_tokens)
    assert encoded.image_tokens.dtype == torch.int64
    assert encoded.image_tokens.shape == (count, height // 4, width // 4)
    assert encoded.last_hidden_state.shape == (count, 3, height // 4, width // 4)
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


@every_family
def test_tokens_across_batch_sizes_differ_only_at_near_ties(family: str):
    model, images = make_model(family, codebook_size=64, codebook_dim=4), make_images(640, 16, 16)
    with torch.no_grad():
        joint = model.encode(images)
        latents = joint.last_hidden_state.movedim(1, -1).flatten(0, 2)
        nearest = torch.cdist(latents.double(), model.quantizer.codebook.weight.double()).topk(2, largest=False).values
        for size in (5, 256):
            tokens = torch.cat([model.encode(part).image_tokens for part in images.split(size)])
            differ = (tokens != joint.image_tokens).flatten()
            assert differ.sum() <= len(differ) / 10_000
            margin = (nearest[:, 1] - nearest[:, 0]) / nearest[:, 0]
            assert (margin[differ] < 1e-4).all()
    assert len(differ) >= 10_000 and len(joint.image_tokens.unique()) > 8


def test_sampled_tokens_come_from_the_posterior():
    model, images = make_model("gaussian"), make_images(64)
    deterministic = model.encode(images).image_tokens
    draw = [model.encode(images, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0].image_tokens, draw[1].image_tokens)
    assert not torch.equal(draw[0].image_tokens, draw[2].image_tokens)
    assert not torch.equal(draw[0].image_tokens, deterministic)
    assert torch.equal(model.quantizer.lookup(draw[0].image_tokens), draw[0].quantized_last_hidden_state)
    model = make_model("ema")
    assert torch.equal(model.encode(images, sample=True).image_tokens, model.encode(images).image_tokens)


def test_sampling_draws_in_one_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantizers, "draw_codes", lambda probabilities, generator: probabilities.argmin(1))
    model, images = make_model("gaussian"), make_images(1)
    latents = model.encode(images).last_hidden_state[0].flatten(1).T
    farthest = [max(range(12), key=lambda k: (row - model.quantizer.codebook.weight[k]).norm()) for row in latents]
    assert model.encode(images, sample=True).image_tokens.flatten().tolist() == farthest


def bin_probability(value: int, mean: float, scale: float) -> float:
    """P(8-bit value) of a Gaussian on [-1, 1] with open ends, by math.erfc on the side of the smaller tail."""

    def tail(x: float) -> float:
        return math.erfc(x / scale / math.sqrt(2)) / 2

    center = value / 127.5 - 1 - mean
    lower, upper = (-math.inf if value == 0 else center - 1 / 255), (math.inf if value == 255 else center + 1 / 255)
    return tail(lower) - tail(upper) if lower > 0 else tail(-upper) - tail(-lower)


@pytest.mark.parametrize("variance", [1e-6, 1e-3, 0.25, 40.0])
def test_log_prob_equals_the_error_function(variance: float):
    model = make_model("ema")
    images = make_images(3)
    tokens = model.encode(images).image_tokens
    with torch.no_grad():
        means = model.decode(tokens).pixel_values.double()
        # Near the means, where the tails of a narrow Gaussian still have digits.
        nearby = (means + math.sqrt(variance) * torch.randn(means.shape).clamp(-3, 3)).clamp(-1, 1)
    values = ((nearby + 1) * 127.5).round().long()
    model.observation_variance.fill_(variance)
    actual = model.log_prob(values.float() / 127.5 - 1, tokens)
    scale = math.sqrt(model.observation_variance.item())
    assert actual.shape == (3,) and actual.dtype == torch.float64
    for i in range(3):
        pairs = zip(values[i].flatten().tolist(), means[i].flatten().tolist(), strict=True)
        expected = sum(math.log(bin_probability(value, mean, scale)) for value, mean in pairs)
        assert actual[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variance", [1e-4, 0.02, 0.25, 10.0])
def test_the_probabilities_of_the_256_values_sum_to_one(variance: float):
    # Float64: a float32 reconstruction depends on its batch in the last digits.
    model = make_model("gaussian").double()
    model.observation_variance.fill_(variance)
    images = make_images(1, dtype=torch.float64)
    tokens = model.encode(images).image_tokens
    base = model.log_prob(images, tokens)
    # One element takes every value; the others stay, and cancel.
    rest = base - model_element(model, images, tokens)
    every = images.repeat(256, 1, 1, 1)
    every[:, 1, 3, 5] = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_probabilities = model.log_prob(every, tokens.repeat(256, 1, 1)) - rest
    assert log_probabilities.exp().sum().item() == pytest.approx(1, abs=1e-9)


def model_element(model: AutoencoderModel, images: Tensor, tokens: Tensor) -> Tensor:
    """log P of element (1, 3, 5) of the only image."""
    mean = model.decode(tokens).pixel_values[0, 1, 3, 5].item()
    value = round((images[0, 1, 3, 5].item() + 1) * 127.5)
    probability = bin_probability(value, mean, math.sqrt(model.observation_variance.item()))
    return torch.tensor(math.log(probability), dtype=torch.float64)


@pytest.mark.parametrize("variance", [1e-30, 1e-12, 1e-4, 1e8])
def test_log_prob_is_finite_far_in_the_tails(variance: float):
    model, images = make_model("gradient"), make_images(2)
    model.observation_variance.fill_(variance)
    tokens = model.encode(images).image_tokens
    for pictures in (images, torch.ones_like(images), -torch.ones_like(images)):
        assert torch.isfinite(model.log_prob(pictures, tokens)).all()


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
    rows = model.encode(images).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.quantizer.search(rows), model.quantizer.train(False)(rows).image_tokens)
        searched = model.quantizer.search(rows).flatten().tolist()
    places = naive.positions(rows)
    assert searched == [naive.nearest(rows[b, :, i, j].double(), model.quantizer.codebook.weight) for b, i, j in places]


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


@pytest.mark.uninitialised_memory
@every_family
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_training_forward_compiles_into_one_graph(family: str, autocast: bool):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = make_model(family).train(), make_model(family).train()
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        losses = []
        for model, run in ((eager, eager), (compiled, forward)):
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = run(make_images(4)).loss
            loss.backward()
            # Not after every forward: a counter of forwards must not make a new graph of each.
            if seed == 1:
                model.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-2 if autocast else 1e-5, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    for one, other in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-6)


@pytest.mark.uninitialised_memory
@every_family
def test_plain_torch_compile_breaks_no_graph(family: str):
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(make_model(family).train())(make_images(4))
    torch._dynamo.reset()
    assert explanation.graph_break_count == 0, explanation.break_reasons
