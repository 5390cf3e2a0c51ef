"""transformers' own model and config tests, run on every model and quantizer."""

import copy
import unittest

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

import transformers_suite
from hf_vq import SQVAEConfig, SQVAEModel, VQVAEConfig, VQVAEModel

ModelTesterMixin = transformers_suite.load("test_modeling_common").ModelTesterMixin
ConfigTester = transformers_suite.load("test_configuration_common").ConfigTester

pytestmark = [
    # The tests are not ours, and some provoke the warnings that they look for.
    pytest.mark.filterwarnings("ignore"),
]


TINY_BODY = {"hidden_channels": [8, 16], "num_residual_blocks": 1, "residual_channels": 8}


class ModelTester:
    """A tiny model and its inputs, in the form in which transformers' tests ask for them."""

    batch_size = 3
    image_size = 16
    is_training = True

    def __init__(self, config_class: type[PreTrainedConfig], settings: dict[str, object]) -> None:
        self.config_class = config_class
        self.settings = {"image_size": self.image_size, "codebook_size": 12, **TINY_BODY, **settings}
        config = self.get_config()
        # Of a convolutional net the tests take these for height and width of the feature maps.
        self.seq_length, self.hidden_size = config.grid_size
        self.num_hidden_layers = 2 * config.num_residual_blocks

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        pixel_values = torch.rand(self.batch_size, 3, self.image_size, self.image_size) * 2 - 1
        return self.get_config(), {"pixel_values": pixel_values}


class AutoencoderSuite(ModelTesterMixin):
    """What the classes below share; each names a model, its config and its settings."""

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    settings: dict[str, object]

    has_attentions = False
    # The codebook is as large as the config says; there is nothing like a vocabulary that grows.
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.config_class, self.settings)
        self.config_tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=["codebook_size", "grid_size", "downsampling_factor"],
            **self.model_tester.settings,
        )

    @property
    def all_model_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return (self.model_class,)

    def _prepare_for_class(
        self, inputs_dict: dict[str, torch.Tensor], model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> dict[str, torch.Tensor]:
        # An image is its own label.
        return copy.deepcopy(inputs_dict)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class GradientVQVAETest(AutoencoderSuite, unittest.TestCase):
    model_class, config_class = VQVAEModel, VQVAEConfig
    settings = {"quantizer": "gradient"}


class EMAVQVAETest(AutoencoderSuite, unittest.TestCase):
    model_class, config_class = VQVAEModel, VQVAEConfig
    settings = {"quantizer": "ema"}
    # Before 5.22 the tests ask a gradient of every parameter, and the codebook moves by averages.
    test_all_params_have_gradient = False


class GaussianSQVAETest(AutoencoderSuite, unittest.TestCase):
    model_class, config_class = SQVAEModel, SQVAEConfig
    settings = {"quantizer": "gaussian"}


class AuthorsSQVAETest(AutoencoderSuite, unittest.TestCase):
    """BatchNorm, no projections, a bounded output and a learned variance."""

    model_class, config_class = SQVAEModel, SQVAEConfig
    settings = {
        "quantizer": "gaussian",
        "norm": "batch",
        "activation": "relu",
        "latent_projection": False,
        "codebook_dim": 16,
        "output_activation": "sigmoid",
        "variance_form": "sum",
        "variance_update": "learned",
    }

    @unittest.skipIf(Version(transformers.__version__) < Version("5.21"), "holds that counters of batches are cast too")
    def test_keep_in_fp32_modules(self) -> None:
        super().test_keep_in_fp32_modules()
