"""torch.export of encode and decode: any batch from 1 to 64, plain aten operators, and the tokens of the model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_images, make_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hf_vq.models.modeling_autoencoder import AutoencoderModel

MOST = 64

# What is exported is traced on empty tensors.
pytestmark = pytest.mark.uninitialised_memory
every_family = pytest.mark.parametrize("family", FAMILIES)


class Encode(nn.Module):
    """pixel_values (B, C, H, W) to image_tokens."""

    def __init__(self, model: AutoencoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode(pixel_values).image_tokens


class Decode(nn.Module):
    """image_tokens to pixel_values (B, C, H, W)."""

    def __init__(self, model: AutoencoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_tokens: Tensor) -> Tensor:
        return self.model.decode(image_tokens).pixel_values


def export(module: nn.Module, example: Tensor) -> ExportedProgram:
    """The module as a program for 1 to MOST examples."""
    return torch.export.export(module.eval(), (example,), dynamic_shapes=({0: Dim("batch", min=1, max=MOST)},))


def foreign_operators(program: ExportedProgram) -> set[str]:
    """What a program calls beside aten operators and arithmetic on sizes."""
    called = [
        node.target
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    ]
    assert called
    return {
        str(target)
        for target in called
        if getattr(target, "namespace", None) != "aten" and getattr(target, "__module__", "") != "_operator"
    }


@every_family
def test_programs_give_the_tokens_and_pixels_of_the_model(family: str):
    model = make_model(family)
    with torch.no_grad():
        example = make_images(3)
        encode, decode = export(Encode(model), example), export(Decode(model), model.encode(example).image_tokens)
        for program in (encode, decode):
            assert not foreign_operators(program)
        for count in (1, 7, MOST):
            images = make_images(count, seed=count)
            image_tokens = model.encode(images).image_tokens
            assert torch.equal(encode.module()(images), image_tokens)
            pixel_values = model.decode(image_tokens).pixel_values
            torch.testing.assert_close(decode.module()(image_tokens), pixel_values, rtol=1e-5, atol=1e-5)


WITHOUT_PACKAGE = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hf_vq", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import hf_vq
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("hf_vq can be imported")
import torch
from safetensors.torch import load_file, save_file

folder = sys.argv[1]
images = load_file(f"{folder}/images.safetensors")["images"]
encode, decode = (torch.export.load(f"{folder}/{name}.pt2").module() for name in ("encode", "decode"))
image_tokens = encode(images)
pixel_values = decode(image_tokens).detach().contiguous()
save_file({"image_tokens": image_tokens, "pixel_values": pixel_values}, f"{folder}/results.safetensors")
"""


def test_saved_programs_run_where_the_package_cannot_be_imported(tmp_path: Path):
    model, images = make_model("ema"), make_images(7)
    with torch.no_grad():
        image_tokens = model.encode(images).image_tokens
        pixel_values = model.decode(image_tokens).pixel_values
        torch.export.save(export(Encode(model), images), tmp_path / "encode.pt2")
        torch.export.save(export(Decode(model), image_tokens), tmp_path / "decode.pt2")
    save_file({"images": images}, tmp_path / "images.safetensors")
    command = [sys.executable, "-I", "-c", WITHOUT_PACKAGE, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, ran.stderr
    results = load_file(tmp_path / "results.safetensors")
    assert torch.equal(results["image_tokens"], image_tokens)
    torch.testing.assert_close(results["pixel_values"], pixel_values, rtol=1e-5, atol=1e-5)
