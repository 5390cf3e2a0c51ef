"""Saved and loaded: every tensor as it was, in the precision it needs, with the package and without it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_images, make_model
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from hf_vq import SQVAEConfig, VQImageProcessor
from hf_vq.models.modeling_autoencoder import AutoencoderModel
from without_package import run_without_package

every_family = pytest.mark.parametrize("family", FAMILIES)


def trained(family: str, **settings: object) -> AutoencoderModel:
    """A model whose every state has moved, with nothing pending."""
    anneals = {"temperature_decay_steps": 10} if FAMILIES[family][1] is SQVAEConfig else {}
    model = make_model(family, **anneals, **settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for seed in range(3):
        optimizer.zero_grad()
        model(make_images(4, seed=seed)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.step()
    return model.eval()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are not saved too; but not rows that are kept no longer (kept_count is 0)."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in own.items() if not name.endswith("kept_rows")}


@every_family
def test_every_tensor_survives(family: str, tmp_path: Path):
    saved = trained(family)
    saved.save_pretrained(tmp_path)
    loaded, information = type(saved).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(information.values()), information
    assert not loaded.training
    assert tensors(loaded).keys() == tensors(saved).keys()
    for name, tensor in tensors(saved).items():
        assert torch.equal(tensors(loaded)[name], tensor), name
        assert tensors(loaded)[name].dtype == tensor.dtype, name
    images = make_images(3)
    assert torch.equal(loaded(images).loss, saved(images).loss)
    assert loaded.fingerprint() == saved.fingerprint()


@every_family
def test_a_new_model_has_no_uninitialised_memory(family: str):
    model_class, config_class, settings = FAMILIES[family]
    with torch.device("meta"):
        model = model_class(config_class(**settings))
    model = model.to_empty(device="cpu")
    assert model.observation_variance.isnan().all()
    # What from_pretrained does for each tensor that a checkpoint lacks.
    for module in model.modules():
        model._init_weights(module)
    for name, tensor in tensors(model).items():
        assert tensor.isfinite().all(), name
    assert (model.observation_variance == 0.25).all()


@every_family
def test_a_quantizer_that_a_checkpoint_lacks_starts_as_in_a_new_model(family: str, tmp_path: Path):
    saved = trained(family)
    saved.save_pretrained(tmp_path)
    kept = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if "quantizer" not in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, new = type(saved).from_pretrained(tmp_path).quantizer, type(saved)(saved.config).quantizer
    for name, tensor in tensors(new).items():
        if name != "codebook.weight" or saved.config.quantizer == "fsq":
            assert torch.equal(tensors(loaded)[name], tensor), name
    assert 0.6 < loaded.codebook.weight.std() / new.codebook.weight.std() < 1.6


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_leaves_the_quantizer(family: str, dtype: torch.dtype, tmp_path: Path):
    saved = trained(family)
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in tensors(saved).items():
        body = name.startswith(("encoder.", "decoder."))
        assert tensors(loaded)[name].dtype == (dtype if body else torch.float32), name
        if not body:
            assert torch.equal(tensors(loaded)[name], tensor), name
    output = loaded(make_images(2))
    assert output.decoded_pixel_values.dtype == dtype and output.loss.dtype == torch.float32
    decoded = loaded.decode(loaded.encode(make_images(2)).image_tokens).pixel_values
    assert torch.equal(decoded, output.decoded_pixel_values)


def test_the_temperature_goes_on_where_it_was(tmp_path: Path):
    saved = trained("gaussian", temperature_start=1.0, temperature_end=0.1)
    saved.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert saved.quantizer.temperature().item() == pytest.approx(0.1**0.3)
    for _ in range(2):
        assert torch.equal(loaded.quantizer.temperature(), saved.quantizer.temperature())
        loaded.step()
        saved.step()


def save_all(folder: Path) -> dict[str, Path]:
    """One repository per family."""
    paths = {}
    for family in FAMILIES:
        paths[family] = folder / family
        model = trained(family)
        model.save_pretrained(paths[family])
        VQImageProcessor.for_config(model.config).save_pretrained(paths[family])
    return paths


def picture() -> torch.Tensor:
    """A uint8 picture (H, W, C) that the processor has to resize and crop."""
    return torch.randint(0, 256, (30, 41, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


TOKENS_AND_PIXELS = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

folder, source = map(pathlib.Path, sys.argv[1:])
picture = load_file(folder / "picture.safetensors")["picture"].numpy()
paths = sorted(path for path in folder.iterdir() if path.is_dir())
models = {path.name: AutoModel.from_pretrained(path, trust_remote_code=True) for path in paths}
results = {}

def run():
    for path in paths:
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
        pixel_values = processor(picture, return_tensors="pt").pixel_values
        encoded = models[path.name].encode(pixel_values)
        decoded = models[path.name].decode(encoded.image_tokens)
        results[f"{path.name}.tokens"] = encoded.image_tokens.contiguous()
        results[f"{path.name}.pixels"] = decoded.pixel_values.contiguous()
        assert type(processor).__module__.startswith("transformers_modules."), type(processor)
        assert type(models[path.name]).__module__.startswith("transformers_modules."), type(models[path.name])

with torch.no_grad():
    run()
    assert "hf_vq" not in sys.modules
    sys.meta_path.remove(blocker)
    sys.path.insert(0, str(source))
    import hf_vq
    local = AutoModel.from_pretrained(paths[0])
    assert type(local).__module__.startswith("hf_vq.")
for model in (local, *models.values()):
    model.train()(torch.rand(2, 3, 8, 8)).loss.backward()
    model.step()
save_file(results, folder / "results.safetensors")
"""


def test_remote_code_gives_the_same_tokens_where_the_package_cannot_be_imported(tmp_path: Path, repository: Path):
    paths = save_all(tmp_path)
    save_file({"picture": picture()}, tmp_path / "picture.safetensors")
    run_without_package(TOKENS_AND_PIXELS, tmp_path, repository / "src")
    results = load_file(tmp_path / "results.safetensors")
    for family, path in paths.items():
        model, processor = AutoModel.from_pretrained(path), AutoImageProcessor.from_pretrained(path)
        assert type(model) is FAMILIES[family][0] and type(processor) is VQImageProcessor
        encoded = model.encode(processor(picture().numpy(), return_tensors="pt").pixel_values)
        assert torch.equal(results[f"{family}.tokens"], encoded.image_tokens)
        torch.testing.assert_close(
            results[f"{family}.pixels"], model.decode(encoded.image_tokens).pixel_values.detach()
        )


TWO_COPIES = """
import importlib, pathlib, sys, types
from torch._library.custom_ops import CustomOpDef

folder = pathlib.Path(sys.argv[1])
files = [path.stem for path in folder.glob("*.py") if "library.custom_op(" in path.read_text()]
assert "code_search" in files

def operators(copy):
    package = sys.modules[copy] = types.ModuleType(copy)
    package.__path__ = [str(folder)]
    modules = [importlib.import_module(f"{copy}.{name}") for name in files]
    return {id(value): value for module in modules for value in vars(module).values() if isinstance(value, CustomOpDef)}

first, second = operators("first_copy"), operators("second_copy")
assert len(first) >= 3 and not first.keys() & second.keys()
names = [str(operator._opoverload) for operator in (*first.values(), *second.values())]
# A name that is registered again frees the operator that the first copy still calls.
assert len(set(names)) == len(names), names
"""


def test_copies_of_the_code_do_not_take_each_others_operators(repository: Path):
    folder = repository / "src" / "hf_vq" / "models"
    ran = subprocess.run([sys.executable, "-c", TWO_COPIES, str(folder)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
