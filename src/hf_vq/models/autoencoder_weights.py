"""Weights at the start of training, and what transformers has to know of every tokenizer."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .body_parts import BodyBlock
from .configuration_autoencoder import AutoencoderConfig
from .quantizers import Quantizer

INITIAL_OBSERVATION_VARIANCE = 0.25


class AutoencoderPreTrainedModel(PreTrainedModel):
    """Weights at the start, and what transformers has to know of both families."""

    config: AutoencoderConfig
    quantizer: Quantizer
    base_model_prefix = "autoencoder"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["ResidualBlock", "UNetBlock", "GridAttention"]
    _can_record_outputs = {"hidden_states": BodyBlock}
    _keep_in_fp32_modules_strict = ["quantizer", "observation_variance"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear maps scaled by fan-in or by initializer_range; the rest as each quantizer says, or at zero."""
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            self._init_weight(module)
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            self._init_norm(module)
        elif isinstance(module, nn.Embedding):
            # Not with the quantizer: transformers passes over a module that owns no tensors itself.
            init.copy_(module.weight, self.quantizer.initial_state()["codebook.weight"])
        else:
            start = module.initial_state() if isinstance(module, Quantizer) else {}
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                init.copy_(tensor, start.get(name, torch.full_like(tensor, INITIAL_SCALARS.get(name, 0.0))))

    def _init_weight(self, module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
        if self.config.initializer_range is None:
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        else:
            init.normal_(module.weight, std=self.config.initializer_range)
        if module.bias is not None:
            init.zeros_(module.bias)

    def _init_norm(self, module: nn.GroupNorm | nn.BatchNorm2d) -> None:
        init.normal_(module.weight, mean=1.0, std=self.config.initializer_range or 0.0)
        init.zeros_(module.bias)
        for name, buffer in module.named_buffers():
            init.constant_(buffer, 1.0 if name == "running_var" else 0.0)


INITIAL_SCALARS = {
    "observation_variance": INITIAL_OBSERVATION_VARIANCE,
    "log_observation_variance": math.log(INITIAL_OBSERVATION_VARIANCE),
}


__all__ = ["INITIAL_OBSERVATION_VARIANCE", "AutoencoderPreTrainedModel"]
