"""hf_vq: discrete image tokenizers as native Hugging Face models. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel

from hf_vq.callbacks import QuantizerCallback
from hf_vq.models.configuration_sqvae import SQVAEConfig
from hf_vq.models.configuration_vqvae import VQVAEConfig
from hf_vq.models.image_processing_vq import VQImageProcessor
from hf_vq.models.modeling_sqvae import SQVAEModel
from hf_vq.models.modeling_vqvae import VQVAEModel
from hf_vq.tokenizer import ImageTokenizer
from hf_vq.version import __version__ as __version__

for _config, _model in ((VQVAEConfig, VQVAEModel), (SQVAEConfig, SQVAEModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoImageProcessor.register(_config, image_processor_classes={"pil": VQImageProcessor}, exist_ok=True)

__all__ = [
    "ImageTokenizer",
    "QuantizerCallback",
    "SQVAEConfig",
    "SQVAEModel",
    "VQImageProcessor",
    "VQVAEConfig",
    "VQVAEModel",
]
