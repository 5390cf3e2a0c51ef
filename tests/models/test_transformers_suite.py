"""transformers' own model and config tests, run on every model and quantizer.

Each class of quantizers is here once, with options that can be had together; a second for each takes two seconds.
"""

import copy
import unittest

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

import transformers_suite
from hf_vq import SQVAEConfig, SQVAEModel, VQVAEConfig, VQVAEModel
from hf_vq.models.modeling_autoencoder import AutoencoderModel
from hf_vq.models.quantizers import Quantizer
from hf_vq.models.stochastic_quantizers import StochasticQuantizer

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
        if config.body == "unet":
            # A block and attention at each resolution, one block more in the decoder, and twice a middle of three.
            self.seq_length = self.hidden_size = self.image_size
            levels, blocks = len(config.hidden_channels), config.num_residual_blocks
            self.num_hidden_layers = levels * (2 * blocks + 1) + len(config.attention_levels) * (2 * blocks + 1) + 6
            return
        variance_block = config.has_variance_head and not config.latent_projection
        self.num_hidden_layers = 2 * config.num_residual_blocks + variance_block

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


class VQVAESuite(AutoencoderSuite):
    """The VQ-VAE and its quantizers."""

    model_class, config_class = VQVAEModel, VQVAEConfig


class FrozenCodebookSuite(VQVAESuite):
    """Codebooks that move by averages, or not at all."""

    # Before 5.22 the tests ask a gradient of every parameter, also of those that require none.
    test_all_params_have_gradient = False


class SQVAESuite(AutoencoderSuite):
    """The SQ-VAE and its quantizers."""

    model_class, config_class = SQVAEModel, SQVAEConfig


class GradientVQVAETest(VQVAESuite, unittest.TestCase):
    settings = {"quantizer": "gradient", "gradient_estimator": "rotation", "normalize_codes": True}


class EMAVQVAETest(FrozenCodebookSuite, unittest.TestCase):
    settings = {"quantizer": "ema"}


class CaredForEMAVQVAETest(FrozenCodebookSuite, unittest.TestCase):
    settings = {"quantizer": "ema", "codebook_init": "kmeans", "revive_below": 0.1, "num_codebooks": 2}


class SoftEMVQVAETest(FrozenCodebookSuite, unittest.TestCase):
    settings = {"quantizer": "soft_em"}


class LinearVQVAETest(FrozenCodebookSuite, unittest.TestCase):
    settings = {"quantizer": "gradient", "codebook_transform": "linear"}


class FiniteScalarVQVAETest(FrozenCodebookSuite, unittest.TestCase):
    settings = {"quantizer": "fsq", "levels": [4, 3], "codebook_size": 12, "codebook_dim": 2}


class GaussianSQVAETest(SQVAESuite, unittest.TestCase):
    settings = {"quantizer": "gaussian"}


class DiagonalSQVAETest(SQVAESuite, unittest.TestCase):
    settings = {"quantizer": "gaussian", "covariance": "diagonal", "dequantization_noise": True, "num_codebooks": 2}


class VonMisesFisherSQVAETest(SQVAESuite, unittest.TestCase):
    settings = {"quantizer": "vmf", "initial_variance": 0.1}


class AuthorsSQVAETest(SQVAESuite, unittest.TestCase):
    """BatchNorm, no projections, two heads, a bounded output and a learned variance."""

    settings = {
        "quantizer": "gaussian",
        "covariance": "per_latent",
        "norm": "batch",
        "activation": "relu",
        "latent_projection": False,
        "codebook_dim": 16,
        "output_activation": "sigmoid",
        "variance_form": "sum",
        "variance_update": "learned",
    }

    @unittest.skip("two residual blocks, and a third for the variance")
    def test_num_layers_is_small(self) -> None: ...

    @unittest.skipIf(Version(transformers.__version__) < Version("5.21"), "holds that counters of batches are cast too")
    def test_keep_in_fp32_modules(self) -> None:
        super().test_keep_in_fp32_modules()


class UNetSQVAETest(SQVAESuite, unittest.TestCase):
    """The other body, with attention and two heads."""

    settings = {
        "quantizer": "gaussian",
        "covariance": "per_latent",
        "body": "unet",
        "residual_channels": 64,
        "norm_groups": 4,
        "attention_levels": [1],
        "bottleneck_channels": 6,
    }

    @unittest.skip("blocks at every resolution")
    def test_num_layers_is_small(self) -> None: ...


def quantizer_classes(base: type[Quantizer] = Quantizer) -> set[type[Quantizer]]:
    """Every quantizer of the package that models can have."""
    ours = [child for child in base.__subclasses__() if child.__module__.startswith("hf_vq.")]
    below = {found for child in ours for found in quantizer_classes(child)}
    return below if base in (Quantizer, StochasticQuantizer) else below | {base}


def test_every_model_and_quantizer_is_here():
    suites = [value for value in globals().values() if isinstance(value, type) and issubclass(value, unittest.TestCase)]
    models = [suite.model_class(ModelTester(suite.config_class, suite.settings).get_config()) for suite in suites]
    assert {type(model.quantizer) for model in models} == quantizer_classes()
    families = {child for child in AutoencoderModel.__subclasses__() if child.__module__.startswith("hf_vq.")}
    assert {type(model) for model in models} == families
