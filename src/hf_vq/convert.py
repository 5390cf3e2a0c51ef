"""Tokenizers of other libraries as ours: the same tokens, the same pixels.

diffusers' `VQModel` (its config.json and safetensors; diffusers need not be installed) becomes a `VQVAEModel` with the
`unet` body.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from hf_vq.models.configuration_vqvae import VQVAEConfig
from hf_vq.models.image_processing_vq import VQImageProcessor
from hf_vq.models.modeling_vqvae import VQVAEModel
from hf_vq.tokenizer import ImageTokenizer

__all__ = ["convert", "from_diffusers", "to_config"]

WEIGHTS = "diffusion_pytorch_model.safetensors"
IF_THERE: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
NEEDED = (
    f"A VQModel is converted from config.json and one {WEIGHTS}; shards, variants and pickles are not read. In a "
    "pipeline it lies in a folder of its own: --subfolder vqvae."
)
PIPELINES_FROM_ZERO_TO_ONE = ("Amused",)
CONVENTION = (
    "The source minimises the commitment term with weight 1 and the codebook term with weight 0.25 (the weight that is "
    "meant for the commitment stands at the other term); commitment_weight is that of its commitment term."
)
DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "sample_size": 32,
    "num_vq_embeddings": 256,
    "norm_num_groups": 32,
    "vq_embed_dim": None,
    "norm_type": "group",
    "mid_block_add_attention": True,
}
IRRELEVANT = {"scaling_factor", "lookup_from_codebook", "force_upcast"}
"""What touches neither tokens nor pixels."""
LISTS = ("down_block_types", "up_block_types", "block_out_channels")
EXPRESSED: dict[str, tuple[Any, ...]] = {"norm_type": ("group",), "act_fn": ("silu", "swish")}
RESNET = {
    "norm1": "layers.0", "conv1": "layers.2", "norm2": "layers.3", "conv2": "layers.5", "conv_shortcut": "shortcut",
}  # fmt: skip
ATTENTION = {
    "group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "output",
    "query": "query", "key": "key", "value": "value", "proj_attn": "output",
}  # fmt: skip
RESAMPLERS = {"downsamplers": "downsample", "upsamplers": "upsample"}
OTHERS = {
    "encoder.conv_in": "encoder.stem",
    "encoder.conv_norm_out": "encoder.to_latents.0",
    "encoder.conv_out": "encoder.to_latents.2",
    "quant_conv": "encoder.to_latents.3",
    "quantize.embedding": "quantizer.codebook",
    "post_quant_conv": "decoder.from_latents.0",
    "decoder.conv_in": "decoder.from_latents.1",
    "decoder.conv_norm_out": "decoder.to_pixels.0",
    "decoder.conv_out": "decoder.to_pixels.2",
}
OF_BLOCK = re.compile(
    r"(?P<half>encoder|decoder)\.(?:mid_block|(?:down|up)_blocks\.(?P<level>\d+))\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<place>\d+)\.(?P<module>.+)"
)


def convert(
    path: str | os.PathLike[str], subfolder: str = "", revision: str | None = None, image_size: int | None = None
) -> ImageTokenizer:
    """A `VQModel` on the Hub or in a folder, as an image tokenizer of ours.

    Args:
        path: name of a Hub repository, or a folder, with config.json and diffusion_pytorch_model.safetensors.
        subfolder: where they are in it, "vqvae" in the repository of a pipeline.
        revision: branch, tag or commit on the Hub.
        image_size: of the images that it was trained on; by default what its config calls sample_size, which diffusers
            never reads and which need not be true.

    Raises:
        OSError: if there are no such files.
        ValueError: what has no counterpart here, by name.
    """
    source = _read(_file(path, "config.json", subfolder, revision))
    check_pipeline(path, subfolder, revision)
    to_config(source, image_size)  # what cannot be expressed is refused before the weights are fetched
    return from_diffusers(source, load_file(_file(path, WEIGHTS, subfolder, revision)), image_size)


def check_pipeline(path: str | os.PathLike[str], subfolder: str, revision: str | None) -> None:
    """Raises a ValueError if the model belongs to a pipeline that gives it pixels in [0, 1]: ours are in [-1, 1]."""
    index = cached_file(path, "model_index.json", revision=revision, **IF_THERE)
    if index is None and (above := Path(path).absolute().parent / "model_index.json").is_file():
        index = str(above)
    pipeline = _read(index).get("_class_name", "") if index else ""
    if pipeline.startswith(PIPELINES_FROM_ZERO_TO_ONE):
        raise ValueError(f"{path} is a {pipeline}, whose VQModel takes pixels in [0, 1]: that has no counterpart here")


def _file(path: str | os.PathLike[str], name: str, subfolder: str, revision: str | None) -> str:
    try:
        found = cached_file(path, name, subfolder=subfolder, revision=revision)
    except (OSError, HFValidationError) as error:
        error.add_note(NEEDED)
        raise
    if found is None:
        raise OSError(f"{Path(path) / subfolder} has no {name}. {NEEDED}")
    return found


def _read(file: str) -> Any:
    """The object that a JSON file holds; raises a ValueError that names the file."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r:.50}, and an object was to come")
    return content


def from_diffusers(
    source: Mapping[str, Any], weights: Mapping[str, Tensor], image_size: int | None = None
) -> ImageTokenizer:
    """An image tokenizer of ours with the weights of a `VQModel`.

    Args:
        source: the model's config.
        weights: its state_dict.
        image_size: as in `convert`.

    Raises: ValueError for what has no counterpart here, by name.
    """
    config = to_config(source, image_size)
    model: Any = VQVAEModel(config)
    renamed = {rename(name, config): tensor for name, tensor in weights.items()}
    prefixes = ("encoder.", "decoder.", "quantizer.codebook.")
    own = {name: tensor.shape for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
    given = {name: tensor.shape for name, tensor in renamed.items()}
    if odd := sorted(name for name in own | given if own.get(name) != given.get(name)):
        sizes = ", ".join(f"{name} {tuple(given.get(name, ()))}, not {tuple(own.get(name, ()))}" for name in odd[:3])
        raise ValueError(f"weights and config of the VQModel do not fit: {sizes}")
    with torch.no_grad():
        model.load_state_dict(renamed, strict=False)
    return ImageTokenizer(model.eval(), VQImageProcessor.for_config(config))


def to_config(source: Mapping[str, Any], image_size: int | None = None) -> VQVAEConfig:
    """The config that expresses a `VQModel`'s; its defaults are diffusers'.

    Raises: ValueError for what has no counterpart here, by name.
    """
    given = DEFAULTS | {name: value for name, value in source.items() if name in DEFAULTS}
    if source.get("_class_name", "VQModel") != "VQModel":
        raise ValueError(f"_class_name is {source['_class_name']}: only VQModel of diffusers can be converted")
    public = {name for name in source if not name.startswith("_")}
    if unknown := sorted(public - DEFAULTS.keys() - IRRELEVANT):
        raise ValueError(f"the VQModel's config has {', '.join(unknown)}, which this converter does not know")
    for name in LISTS:
        if not isinstance(given[name], list | tuple):
            raise ValueError(f"{name} of the VQModel is {given[name]!r:.50}, and must be a list")
    for name, allowed in EXPRESSED.items():
        if given[name] not in allowed:
            raise ValueError(f"{name} {given[name]!r} of the VQModel has no counterpart here; {allowed} have")
    if given["in_channels"] != given["out_channels"]:
        raise ValueError(f"in_channels {given['in_channels']} and out_channels {given['out_channels']} differ")
    config = VQVAEConfig(
        body="unet",
        num_channels=given["in_channels"],
        image_size=_side(given["sample_size"]) if image_size is None else image_size,
        codebook_size=given["num_vq_embeddings"],
        codebook_dim=given["vq_embed_dim"] or given["latent_channels"],
        quantizer="gradient",
        commitment_weight=1.0,
        hidden_channels=list(given["block_out_channels"]),
        num_residual_blocks=given["layers_per_block"],
        attention_levels=_attention_levels(given),
        middle_attention=given["mid_block_add_attention"],
        bottleneck_channels=given["latent_channels"],
        norm_groups=given["norm_num_groups"],
    )
    config.converted_from = {"class": "diffusers.VQModel", "loss": CONVENTION}
    return config


def _side(sample_size: Any) -> int:
    sides = set(sample_size) if isinstance(sample_size, list | tuple) else {sample_size}
    if len(sides) != 1 or None in sides:
        raise ValueError(f"sample_size {sample_size} of the VQModel is no side of a square: say what image_size is")
    return int(sides.pop())


def _attention_levels(given: Mapping[str, Any]) -> list[int]:
    """The levels whose blocks attend, in encoder and decoder alike."""
    kinds = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
    kinds |= {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
    down, up = list(given["down_block_types"]), list(given["up_block_types"])
    for name in (*down, *up):
        if name not in kinds:
            raise ValueError(f"block type {name} of the VQModel has no counterpart here; {', '.join(kinds)} have")
    if not len(down) == len(up) == len(given["block_out_channels"]):
        raise ValueError(
            f"down_block_types {down}, up_block_types {up} and block_out_channels {list(given['block_out_channels'])} "
            "differ in length"
        )
    levels = [level for level, name in enumerate(down) if kinds[name]]
    if levels != [level for level, name in enumerate(reversed(up)) if kinds[name]]:
        raise ValueError(f"attention stands at other levels in down_block_types {down} than in up_block_types {up}")
    return levels


def rename(name: str, config: VQVAEConfig) -> str:
    """The name that a tensor of the `VQModel` has here.

    Raises: ValueError for one that has no counterpart.
    """
    module, _, tensor = name.rpartition(".")
    if module in OTHERS:
        return f"{OTHERS[module]}.{tensor}"
    found = OF_BLOCK.fullmatch(module)
    if found is None:
        raise ValueError(f"{name} of the VQModel has no counterpart here")
    half, level, kind, place = found["half"], found["level"], found["kind"], int(found["place"])
    if kind in RESAMPLERS and found["module"] == "conv":
        return f"{half}.{RESAMPLERS[kind]}.{level}.convolution.{tensor}"
    inner = (RESNET if kind == "resnets" else ATTENTION).get(found["module"])
    if inner is None:
        raise ValueError(f"{name} of the VQModel has no counterpart here")
    if level is None:
        attends = config.middle_attention
        stage, position = f"{half}.middle", 1 if kind == "attentions" else place * (1 + attends)
    else:
        at = int(level) if half == "encoder" else len(config.hidden_channels) - 1 - int(level)
        step = 1 + (at in config.attention_levels)
        stage, position = f"{half}.stages.{level}", place * step + (kind == "attentions")
    return f"{stage}.{position}.{inner}.{tensor}"
