"""hf_vq: discrete image tokenizers as native Hugging Face models. Importing it registers the Auto classes."""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from hf_vq.bridge import VQBridge
from hf_vq.models.configuration_pixelcnn import PixelCNNPriorConfig
from hf_vq.models.configuration_sqvae import SQVAEConfig
from hf_vq.models.configuration_transformer_prior import TransformerPriorConfig
from hf_vq.models.configuration_vqvae import VQVAEConfig
from hf_vq.models.image_processing_vq import VQImageProcessor
from hf_vq.models.modeling_pixelcnn import PixelCNNPrior
from hf_vq.models.modeling_sqvae import SQVAEModel
from hf_vq.models.modeling_transformer_prior import TransformerPrior
from hf_vq.models.modeling_vqvae import VQVAEModel
from hf_vq.models.pipeline_image_generation import ImageGenerationPipeline
from hf_vq.tokenizer import ImageTokenizer
from hf_vq.version import __version__ as __version__

if TYPE_CHECKING:
    from hf_vq.callbacks import QuantizerCallback

for _config, _model in ((VQVAEConfig, VQVAEModel), (SQVAEConfig, SQVAEModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoImageProcessor.register(_config, image_processor_classes={"pil": VQImageProcessor}, exist_ok=True)

for _prior_config, _prior in ((PixelCNNPriorConfig, PixelCNNPrior), (TransformerPriorConfig, TransformerPrior)):
    AutoConfig.register(_prior_config.model_type, _prior_config, exist_ok=True)
    AutoModelForCausalLM.register(_prior_config, _prior, exist_ok=True)

# AutoProcessor finds a processor by the name of its class; no config belongs to this one.
AutoProcessor.register(VQBridge, VQBridge, exist_ok=True)

PIPELINE_REGISTRY.register_pipeline(
    "unconditional-image-generation", ImageGenerationPipeline, pt_model=AutoModelForCausalLM, type="image"
)


def __getattr__(name: str) -> Any:
    """QuantizerCallback when it is asked for: transformers' Trainer, which it belongs to, takes time to import."""
    if name != "QuantizerCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_vq.callbacks import QuantizerCallback

    return QuantizerCallback


__all__ = [
    "ImageGenerationPipeline",
    "ImageTokenizer",
    "PixelCNNPrior",
    "PixelCNNPriorConfig",
    "QuantizerCallback",
    "SQVAEConfig",
    "SQVAEModel",
    "TransformerPrior",
    "TransformerPriorConfig",
    "VQBridge",
    "VQImageProcessor",
    "VQVAEConfig",
    "VQVAEModel",
]
