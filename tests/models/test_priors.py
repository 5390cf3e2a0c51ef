"""Both priors: causal, the same with a cache and without, and a likelihood that is that of their samples."""

import math

import pytest
import torch
from tiny_priors import CLASSES, CODES, FAMILIES, GRID, make_prior, make_tokens
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from hf_vq import PixelCNNPrior
from hf_vq.models.fourier_features import fourier_features
from hf_vq.models.modeling_prior import PriorPreTrainedModel

LABELS = torch.tensor([1, 3])

every_family = pytest.mark.parametrize("family", FAMILIES)
every_depth = pytest.mark.parametrize("num_codebooks", [1, 2, 3], ids="M={}".format)
cached = pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])


def sample(prior: PriorPreTrainedModel, seed: int = 0, labels: Tensor | None = LABELS, **options: object) -> Tensor:
    torch.manual_seed(seed)
    return prior.generate(class_labels=labels, **options)


# The order of an image's tokens.


@every_depth
def test_sequences_are_the_start_token_and_the_grid_row_by_row_codebook_fastest(num_codebooks):
    prior = make_prior("transformer", num_codebooks)
    tokens = make_tokens(prior)
    sequences = prior.sequences(tokens)
    grid = tokens.view(2, *GRID, num_codebooks)
    expected = [int(grid[1, y, x, m]) for y in range(3) for x in range(4) for m in range(num_codebooks)]
    assert sequences[1].tolist() == [CODES, *expected]
    assert torch.equal(prior.sequences(tokens.flatten(1)), sequences)
    assert torch.equal(prior.image_tokens(sequences), tokens)


@every_family
@every_depth
def test_no_logit_depends_on_its_own_token_or_a_later_one(family, num_codebooks):
    prior = make_prior(family, num_codebooks)
    sequences = prior.sequences(make_tokens(prior))
    logits = prior(sequences, class_labels=LABELS, use_cache=False).logits
    for place in range(1, sequences.shape[1]):
        changed = sequences.clone()
        changed[:, place] = (changed[:, place] + 1) % CODES
        moved = (prior(changed, class_labels=LABELS, use_cache=False).logits != logits).any(dim=2).any(dim=0)
        # logits[:, place] is of the token after `place`, and the last of all is of none.
        assert not moved[:place].any(), place
        assert place == sequences.shape[1] - 1 or moved[place], place


@every_family
@every_depth
def test_no_gradient_reaches_a_logit_from_its_own_token_or_a_later_one(family, num_codebooks):
    prior = make_prior(family, num_codebooks)
    sequences = prior.sequences(make_tokens(prior, 1))
    embedded: list[Tensor] = []
    prior.codes.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    logits = prior(sequences, use_cache=False).logits[..., :CODES]
    codes = embedded[0].unsqueeze(2) if num_codebooks == 1 else embedded[0]
    # With one codebook the start token passes through the table as well, and its row is left out.
    first = 1 if num_codebooks == 1 else 0
    for place in range(logits.shape[1] - 1):
        (gradient,) = torch.autograd.grad(
            logits[0, place].logsumexp(0), embedded[0], retain_graph=True, allow_unused=True
        )
        reached = torch.zeros(codes.shape[1]) if gradient is None else gradient.view(codes.shape).abs().sum((0, 2, 3))
        before = place // num_codebooks
        assert not reached[first + before :].any(), place
        assert before == 0 or reached[first : first + before].any(), place


def test_every_position_before_is_seen(family="pixelcnn"):
    """No blind spot: the last logits depend on every code once the layers reach that far."""
    prior = make_prior(family, num_hidden_layers=6)
    sequences = prior.sequences(make_tokens(prior, 1))
    logits = prior(sequences, use_cache=False).logits[:, -2]
    for place in range(1, sequences.shape[1] - 1):
        changed = sequences.clone()
        changed[:, place] = (changed[:, place] + 1) % CODES
        assert not torch.equal(prior(changed, use_cache=False).logits[:, -2], logits), place


# Classes.


@every_family
def test_the_class_is_the_start_tokens_embedding_and_none_is_the_null_class(family):
    prior = make_prior(family)
    sequences = prior.sequences(make_tokens(prior))
    logits = {label: prior(sequences, class_labels=torch.tensor([label] * 2)).logits for label in (-1, 0, 1)}
    assert torch.equal(prior(sequences).logits, logits[-1])
    assert not torch.equal(logits[0], logits[1])
    with torch.no_grad():
        prior.classes.weight[1] = prior.classes.weight[-1]
    assert torch.equal(prior(sequences, class_labels=torch.tensor([1, 1])).logits, logits[-1])


@every_family
def test_dropped_labels_teach_the_null_class(family):
    prior = make_prior(family, label_dropout=0.5).train()
    sequences = prior.sequences(make_tokens(prior, 32))
    torch.manual_seed(0)
    prior(sequences, class_labels=torch.ones(32, dtype=torch.int64), labels=sequences).loss.backward()
    reached = prior.classes.weight.grad.abs().sum(1) > 0
    assert reached.tolist() == [False, True, False, False, True]


# Likelihood.


@every_family
@every_depth
def test_log_prob_is_the_sum_over_the_steps_of_a_generation(family, num_codebooks):
    prior = make_prior(family, num_codebooks)
    drawn = sample(prior, output_logits=True, return_dict_in_generate=True)
    # `generate` keeps logits in float32.
    steps = torch.stack(drawn.logits, dim=1).double().log_softmax(dim=-1)
    expected = steps.gather(2, drawn.sequences[:, 1:, None]).sum(dim=(1, 2))
    tokens = prior.image_tokens(drawn.sequences)
    torch.testing.assert_close(prior.log_prob(tokens, LABELS), expected, rtol=1e-6, atol=0)
    loss = prior(drawn.sequences, class_labels=LABELS, labels=drawn.sequences).loss
    torch.testing.assert_close(loss, -expected.sum() / drawn.sequences[:, 1:].numel(), rtol=1e-6, atol=0)


@every_family
def test_probabilities_of_all_images_sum_to_one(family):
    prior = make_prior(family, num_codebooks=2, codebook_size=3, grid_size=(1, 2))
    everything = torch.cartesian_prod(*[torch.arange(3)] * 4).view(-1, 1, 2, 2)
    labels = torch.full((81,), 2)
    torch.testing.assert_close(prior.log_prob(everything, labels).exp().sum(), torch.tensor(1.0, dtype=torch.float64))


# Generation.


@every_family
@every_depth
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": False},
        {"guidance_scale": 3.0},
        {"do_sample": False, "num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_return_sequences": 3, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"repetition_penalty": 1.3},
    ],
    ids=lambda options: "-".join(options) or "sampled",
)
def test_a_cache_changes_no_token(family, num_codebooks, options):
    prior = make_prior(family, num_codebooks)
    with_cache, without = (sample(prior, use_cache=use_cache, **options) for use_cache in (True, False))
    assert with_cache.shape == (2 * options.get("num_return_sequences", 1), 1 + 12 * num_codebooks)
    assert torch.equal(with_cache, without)
    assert (with_cache[:, 1:] < CODES).all()


@every_family
@every_depth
def test_images_can_be_completed(family, num_codebooks):
    prior = make_prior(family, num_codebooks)
    begun = prior.sequences(make_tokens(prior))[:, :6]
    with_cache, without = (sample(prior, inputs=begun, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(with_cache, without)
    assert torch.equal(with_cache[:, :6], begun)


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_a_static_cache_changes_no_token(num_codebooks):
    prior = make_prior("transformer", num_codebooks)
    static = {"cache_implementation": "static", "disable_compile": True}
    for seed in range(2):
        assert torch.equal(sample(prior, seed, **static), sample(prior, seed))


@every_family
@every_depth
@pytest.mark.parametrize("begin", [1, 2, 5, 8])
def test_logits_are_the_same_however_the_sequence_is_cut(family, num_codebooks, begin):
    prior = make_prior(family, num_codebooks)
    sequences = prior.sequences(make_tokens(prior))
    whole = prior(sequences, class_labels=LABELS, use_cache=False).logits
    output = prior(sequences[:, :begin], class_labels=LABELS, use_cache=True)
    parts = [output.logits]
    rest = sequences[:, begin:]
    for part in (rest[:, :1], rest[:, 1:4], *rest[:, 4:].split(1, dim=1)):
        parts.append(prior(part, class_labels=LABELS, past_key_values=output.past_key_values).logits)
    # What follows a whole image is asked by nobody.
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, :-1], whole[:, :-1])


@every_family
@every_depth
def test_only_the_last_logits_on_request(family, num_codebooks):
    prior = make_prior(family, num_codebooks)
    sequences = prior.sequences(make_tokens(prior))
    whole = prior(sequences, use_cache=False).logits
    last = prior(sequences, use_cache=False, logits_to_keep=3).logits
    # A matrix product of fewer rows takes another kernel on some CPUs, whose float64 differs in its last bits.
    torch.testing.assert_close(last, whole[:, -3:], rtol=1e-12, atol=1e-12)


@every_family
@cached
def test_guidance_moves_the_logits(family, use_cache):
    prior = make_prior(family)
    wanted = {"use_cache": use_cache, "max_new_tokens": 2, "output_scores": True, "return_dict_in_generate": True}
    plain, guided = (sample(prior, **wanted, **more).scores for more in ({}, {"guidance_scale": 3.0}))
    null = prior(torch.full((2, 1), CODES), use_cache=False).logits[:, -1].log_softmax(-1)
    own = plain[0].log_softmax(-1)
    torch.testing.assert_close(guided[0][:, :CODES], (null + 3 * (own - null))[:, :CODES].to(guided[0]))


@every_family
@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_one_step_can_draw_every_code_and_never_the_start_token(family, temperature):
    prior = make_prior(family, codebook_size=64)
    step = sample(
        prior, max_new_tokens=1, temperature=temperature, output_scores=True, return_dict_in_generate=True
    ).scores[0]
    probabilities = step.softmax(dim=-1)
    assert ((probabilities > 0).sum(dim=-1) == 64).all()
    assert (probabilities[:, 64] == 0).all()
    assert (sample(prior, num_return_sequences=50, temperature=temperature)[:, 1:] < 64).all()


@every_family
def test_generation_needs_nothing_but_the_prior(family):
    prior = make_prior(family)
    assert prior.generate().shape == (1, 13)
    assert prior.generate(class_labels=[0, 1, -1]).shape == (3, 13)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_gives_the_same(implementation):
    prior = make_prior("transformer")
    sequences = prior.sequences(make_tokens(prior))
    expected = prior(sequences).logits
    prior.set_attn_implementation(implementation)
    output = prior(sequences, output_attentions=True)
    torch.testing.assert_close(output.logits, expected)
    if implementation == "eager":
        assert all((weights.triu(1) == 0).all() for weights in output.attentions)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"input_ids": s[:, 1:]}, "begin with the start token, 11"),
        (lambda s: {"input_ids": torch.cat([s, s[:, 1:]], 1)}, "25 tokens are longer than .* 3 x 4, 13"),
        (lambda s: {"input_ids": s + 1}, "start token, 11, got"),
        (lambda s: {"input_ids": torch.cat([s[:, :1], s[:, :1]], 1)}, r"lie in \[0, 11\), where the start token"),
        (lambda s: {"input_ids": s.float()}, "integers"),
        (lambda s: {"input_ids": s, "class_labels": torch.tensor([0, CLASSES])}, r"class_labels must lie in \[0, 4\)"),
        (lambda s: {"input_ids": s, "class_labels": torch.tensor([-2, 0])}, r"class_labels must lie in \[0, 4\)"),
        (lambda s: {"input_ids": s, "class_labels": torch.tensor([0])}, r"class_labels must be integers \(2,\)"),
        (lambda s: {"input_ids": s, "attention_mask": (s > 3).long()}, "attention_mask hides"),
    ],
)
def test_bad_sequences_are_refused(change, message):
    prior = make_prior("transformer")
    with pytest.raises(ValueError, match=message):
        prior(**change(prior.sequences(make_tokens(prior))))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 4, 3, dtype=torch.int64), r"grid of 3 x 4, or 12 tokens in a row, got shape \(2, 4, 3\)"),
        (torch.zeros(2, 11, dtype=torch.int64), "grid of 3 x 4"),
        (torch.full((1, 3, 4), CODES), r"lie in \[0, 11\)"),
        (torch.full((1, 3, 4), -1), r"lie in \[0, 11\)"),
    ],
)
def test_tokens_of_another_grid_are_refused(tokens, message):
    prior = make_prior("pixelcnn")
    with pytest.raises(ValueError, match=message):
        prior.log_prob(tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 0}, "codebook_size must be positive, got 0"),
        ({"grid_size": (8, 8, 2)}, r"grid_size must be two positive numbers"),
        ({"grid_size": 0}, "grid_size"),
        ({"num_classes": -1}, "num_classes"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
    ],
)
def test_a_wrong_config_is_refused(settings, message):
    with pytest.raises(Exception, match=message):
        make_prior("pixelcnn", **settings)


def test_heads_that_do_not_share_the_width_are_refused():
    with pytest.raises(Exception, match=r"hidden_size \(16\) must be divisible by num_attention_heads \(3\)"):
        make_prior("transformer", num_attention_heads=3)


# The PixelCNN against its naive twin.


def naive_pixelcnn(prior: PixelCNNPrior, embedded: Tensor, start: Tensor) -> Tensor:
    """Both stacks position by position, each a sum over the offsets that it may see (van den Oord et al. 2016)."""
    height, width = GRID
    above = left = {(y, x): embedded[y, x] for y in range(height) for x in range(width)}

    def gated(features: Tensor) -> Tensor:
        value, weight = features.chunk(2)
        return torch.tanh(value) * torch.sigmoid(weight)

    def summed(weight: Tensor, bias: Tensor, grid: dict[tuple[int, int], Tensor], seen: list) -> Tensor:
        return bias + sum((weight[:, :, i, j] @ grid[place] for i, j, place in seen if place in grid), torch.zeros(()))

    for index, layer in enumerate(prior.trunk.layers):
        reach, first = prior.config.kernel_size // 2, index == 0
        up, side = {}, {}
        for y, x in above:
            rows = range(-reach, 0 if first else 1)
            seen = [
                (i, j, (y + dy, x + dx)) for i, dy in enumerate(rows) for j, dx in enumerate(range(-reach, reach + 1))
            ]
            from_above = summed(layer.vertical.weight, layer.vertical.bias, above, seen)
            seen = [(0, j, (y, x + dx)) for j, dx in enumerate(rows)]
            from_left = summed(layer.horizontal.weight, layer.horizontal.bias, left, seen)
            for_above, for_left = layer.condition(start).chunk(2)
            linked = layer.link.weight[:, :, 0, 0] @ from_above + layer.link.bias
            up[y, x] = gated(from_above + for_above)
            output = layer.output.weight[:, :, 0, 0] @ gated(from_left + linked + for_left) + layer.output.bias
            side[y, x] = output
            if not first:
                up[y, x], side[y, x] = up[y, x] + above[y, x], side[y, x] + left[y, x]
        above, left = up, side
    return torch.stack([left[y, x] for y in range(height) for x in range(width)])


@pytest.mark.parametrize("family", ["pixelcnn", "pixelcnn-wide"])
def test_the_pixelcnn_equals_the_loops_in_value_and_gradient(family):
    prior = make_prior(family)
    tokens, label = make_tokens(prior, 1), torch.tensor([2])
    trunk = prior.trunk(torch.cat([prior.classes(label)[:, None], prior.codes(tokens.flatten(1))], dim=1))[0, :-1]
    expected = naive_pixelcnn(prior, prior.codes(tokens)[0], prior.classes(label)[0])
    torch.testing.assert_close(trunk, expected)
    parameters = [p for name, p in prior.named_parameters() if not name.startswith("head")]
    upstream = torch.randn(trunk.shape, dtype=trunk.dtype, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((out * upstream).sum(), parameters) for out in (trunk, expected))
    for name, one, other in zip([n for n, _ in prior.named_parameters()], ours, theirs, strict=False):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


# Where training starts.


@pytest.mark.parametrize("codebooks", [1, 3])
@every_family
def test_close_codes_start_alike(family: str, codebooks: int):
    prior = make_prior(family, codebooks)
    vectors = torch.randn(codebooks, CODES, 4)
    vectors[:, 1] = vectors[:, 0]
    prior.start_from_codebook(vectors)
    tokens = make_tokens(prior)
    swapped = torch.where(tokens == 0, 1, torch.where(tokens == 1, 0, tokens))
    logits, others = (prior(prior.sequences(seen), use_cache=False).logits for seen in (tokens, swapped))
    # Codes 0 and 1 are one vector: neither what follows them nor how likely they are tells them apart.
    torch.testing.assert_close(logits, others)
    torch.testing.assert_close(logits[..., 0], logits[..., 1])
    assert not torch.isclose(logits[:, :-1, 0], logits[:, :-1, 2]).any()


def test_a_codebook_of_another_size_is_no_start():
    with pytest.raises(ValueError, match=r"vectors must be \(1, 11, D\) for this prior, got shape \(1, 12, 4\)"):
        make_prior("transformer").start_from_codebook(torch.randn(1, 12, 4))


def test_fourier_features_are_a_kernel():
    vectors = torch.randn(50, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5, 3.0]) + 7
    features = fourier_features(vectors, 40_000)
    squared = torch.cdist(vectors, vectors).square()
    # The exponent of two codes drawn at random, themselves included, is 4 on average.
    expected = torch.exp(-4 * squared / squared.mean())
    torch.testing.assert_close(features @ features.mT / 40_000, expected, rtol=0, atol=0.03)
    assert fourier_features(torch.zeros(3, 2), 5).isfinite().all()


# Guidance, beyond the first step.


class ReadAgain(LogitsProcessor):
    """Guidance without a cache: the null class reads the whole sequence at each step."""

    def __init__(self, prior: PriorPreTrainedModel, scale: float) -> None:
        self.prior, self.scale = prior, scale

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        null = self.prior(input_ids, use_cache=False).logits[:, -1].log_softmax(-1)[:, :CODES]
        guided = null + self.scale * (scores.log_softmax(-1)[:, :CODES] - null)
        return nn.functional.pad(guided, (0, 1), value=-math.inf).to(scores)


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {},
    "returned": {"num_return_sequences": 2},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 3},
    "uncached": {"use_cache": False},
}


@pytest.mark.parametrize("begun", [0, 5])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_codebooks", [1, 2])
@every_family
def test_guidance_reads_what_the_class_reads(family: str, num_codebooks: int, way: str, begun: int):
    prior = make_prior(family, num_codebooks)
    prompt = prior.sequences(make_tokens(prior, 4))[:, : 1 + begun]
    labels, settings = torch.tensor([0, 1, 2, -1]), WAYS[way]
    pages = []
    for guidance in ({"guidance_scale": 3.0}, {"logits_processor": LogitsProcessorList([ReadAgain(prior, 3.0)])}):
        torch.manual_seed(0)
        pages.append(prior.generate(prompt, class_labels=labels, **guidance, **settings))
    assert torch.equal(*pages)
    torch.manual_seed(0)
    assert not torch.equal(pages[0], prior.generate(prompt, class_labels=labels, **settings))


def test_a_scale_in_the_generation_config_guides_too():
    prior = make_prior("transformer")
    labels = torch.tensor([0, 1, 2])
    expected = prior.generate(class_labels=labels, do_sample=False, guidance_scale=3.0)
    prior.generation_config.guidance_scale = 3.0
    assert torch.equal(prior.generate(class_labels=labels, do_sample=False), expected)
    assert not torch.equal(prior.generate(class_labels=labels, do_sample=False, guidance_scale=1.0), expected)


# What users bring.


@every_family
def test_labels_come_as_they_are_at_hand(family: str):
    prior = make_prior(family)
    tokens = make_tokens(prior)
    expected = prior.log_prob(tokens, torch.tensor([1, 2]))
    assert torch.equal(prior.log_prob(tokens, [1, 2]), expected)
    assert prior.generate(class_labels=2).shape == (1, 13)


def test_a_start_token_of_ones_own_is_not_taken():
    config = make_prior("transformer").config
    again = type(config).from_dict(config.to_dict() | {"codebook_size": 20, "bos_token_id": 3})
    assert again.bos_token_id == 20 and again.vocab_size == 21


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [True, False])
@every_family
def test_checkpointing_without_labels_gives_the_same_gradients(family: str, implementation: str, reentrant: bool):
    gradients = []
    for checkpointing in (False, True):
        prior = make_prior(family).train()
        if "transformer" in family:
            prior.set_attn_implementation(implementation)
        if checkpointing:
            enable = getattr(prior, "activation_checkpointing_enable", prior.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
        prior(prior.sequences(make_tokens(prior)), class_labels=torch.tensor([0, 1])).logits[..., :-1].sum().backward()
        gradients.append([p.grad for p in prior.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("family", "num_codebooks"), [("pixelcnn", 1), ("pixelcnn", 2), ("transformer", 2)])
def test_a_cache_that_cannot_serve_is_refused(family: str, num_codebooks: int):
    prior = make_prior(family, num_codebooks)
    with pytest.raises(ValueError, match=r"past_key_values .*must be of `new_cache\(\)`"):
        prior(prior.sequences(make_tokens(prior)), past_key_values=DynamicCache())
