"""torch.compile: one graph for each of training and evaluation, compiled once, and the numbers of eager mode."""

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from tiny_models import FAMILIES, make_images, make_model
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_vq import QuantizerCallback, SQVAEConfig
from hf_vq.models.modeling_autoencoder import AutoencoderModel
from hf_vq.models.quantizers import Quantizer

# Forward and backward passes, two to a step, and how many of them are taken in eager mode too.
PASSES, COMPARED = 100, 4

pytestmark = [
    # What is compiled is traced on empty tensors.
    pytest.mark.uninitialised_memory,
    # torch traces an autograd.Function by what it warns of itself.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make(family: str) -> AutoencoderModel:
    """A model in training, whose temperature falls at every step."""
    settings = {"temperature_decay_steps": PASSES} if FAMILIES[family][1] is SQVAEConfig else {}
    return make_model(family, **settings).train()


class Trainer:
    """A model, and how it trains: compiled or not."""

    def __init__(self, model: AutoencoderModel, backend: str | None = None) -> None:
        self.model = model
        self.forward = torch.compile(model, fullgraph=True, backend=backend) if backend else model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step(self, number: int) -> Tensor:
        """A forward and a backward pass, of which every second ends a step; its loss."""
        torch.manual_seed(number)
        loss = self.forward(make_images(4, seed=number)).loss
        loss.backward()
        # A counter of forwards since the last step must not make a new graph of each.
        if number % 2:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.step()
        return loss.detach()


def assert_near(one: nn.Module, other: nn.Module, tolerance: float) -> None:
    for (name, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(
            tensor, twin, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_family
def test_training_is_one_graph_compiled_once_and_equal_to_eager(family: str):
    eager = Trainer(make(family))
    compiled = Trainer(copy.deepcopy(eager.model), "aot_eager")
    start = copy.deepcopy(eager.model.state_dict())
    for number in range(COMPARED):
        torch.testing.assert_close(compiled.step(number), eager.step(number), rtol=1e-5, atol=1e-6)
        assert_near(compiled.model, eager.model, 1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(COMPARED, PASSES):
            loss = compiled.step(number)
    assert loss.isfinite()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    moved = {name for name, tensor in compiled.model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert {"observation_variance"} <= moved
    assert "quantizer.temperature.steps" in moved or not hasattr(compiled.model.quantizer, "temperature")


@every_family
def test_evaluation_is_one_graph_and_equal_to_eager(family: str):
    model, images = make_model(family), make_images(5)

    def every_method(pixel_values: Tensor) -> tuple[Tensor, ...]:
        output, image_tokens = model(pixel_values), model.encode(pixel_values).image_tokens
        return output.loss, image_tokens, output.decoded_pixel_values, model.decode(image_tokens).pixel_values

    with torch.no_grad():
        loss, image_tokens, *pictures = torch.compile(every_method, fullgraph=True, backend="eager")(images)
        expected = model(images)
    assert torch.equal(image_tokens, expected.image_tokens)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    for pixel_values in pictures:
        torch.testing.assert_close(pixel_values, expected.decoded_pixel_values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["ema", "gaussian"])
def test_counting_codes_for_trainer_breaks_no_graph_and_makes_no_new_one(family: str):
    model, callback = make(family), QuantizerCallback()
    control = {"args": TrainingArguments("unused", use_cpu=True), "state": TrainerState(), "control": TrainerControl()}
    callback.on_train_begin(**control, model=model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(make_images(4)).loss.backward()
        model.eval()
        with torch.no_grad():
            tokens = compiled(make_images(5)).image_tokens
        assert callback._counts.sum() == tokens.numel()
        callback.on_evaluate(**control, model=model)
        model.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler uses what torch has deprecated
@pytest.mark.parametrize("family", ["soft_em", "gaussian-diagonal"])
def test_machine_code_of_a_quantizer_equals_eager(family: str):
    """Of the quantizer alone: compiling the convolutions, which are torch's own, takes minutes."""
    eager = make(family).quantizer
    compiled = copy.deepcopy(eager)
    with torch._inductor.config.patch(fallback_random=True):
        results = [quantize(eager, eager), quantize(compiled, torch.compile(compiled, fullgraph=True))]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    eager.step(), compiled.step()
    assert_near(eager, compiled, 1e-5)


def quantize(quantizer: Quantizer, forward: nn.Module) -> tuple[Tensor, ...]:
    """What a training forward returns, and the gradients of its inputs and parameters."""
    channels = quantizer.num_codebooks * quantizer.codebook.embedding_dim
    torch.manual_seed(0)
    inputs = [torch.randn(4, channels, 3, 3).requires_grad_() for _ in range(2)]
    output = forward(*inputs)
    (output.loss + output.quantized.square().sum()).backward()
    learned = [*inputs, *quantizer.parameters()]
    return *output, *(tensor.grad for tensor in learned if tensor.grad is not None)
