"""transformers' own model and config tests, run on both priors."""

import copy
import unittest

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

import transformers_suite
from hf_vq import PixelCNNPrior, PixelCNNPriorConfig, TransformerPrior, TransformerPriorConfig

ModelTesterMixin = transformers_suite.load("test_modeling_common").ModelTesterMixin
ConfigTester = transformers_suite.load("test_configuration_common").ConfigTester

pytestmark = [
    # The tests are not ours, and some provoke the warnings that they look for.
    pytest.mark.filterwarnings("ignore"),
]

CODES, SIDE, WIDTH = 12, 3, 32
LENGTH = 1 + SIDE * SIDE


class ModelTester:
    """A tiny prior and its inputs, in the form in which transformers' tests ask for them."""

    batch_size = 3
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, config_class: type[PreTrainedConfig], hidden_shape: tuple[int, int]) -> None:
        self.config_class = config_class
        # What the tests expect the hidden states to end in.
        self.seq_length, self.hidden_size = hidden_shape
        self.settings = {
            "codebook_size": CODES,
            "grid_size": [SIDE, SIDE],
            "num_classes": 2,
            "hidden_size": WIDTH,
            "num_hidden_layers": self.num_hidden_layers,
            # A label dropped at random would make two passes of the same model differ.
            "label_dropout": 0.0,
        }

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        input_ids = torch.randint(CODES, (self.batch_size, LENGTH))
        input_ids[:, 0] = CODES
        return self.get_config(), {"input_ids": input_ids, "class_labels": torch.randint(2, (self.batch_size,))}


class PriorSuite(ModelTesterMixin):
    """What the classes below share; each names a model and its config."""

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    hidden_shape: tuple[int, int]

    # The vocabulary is the tokenizer's codebook.
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.config_class, self.hidden_shape)
        self.config_tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=["codebook_size", "hidden_size", "num_hidden_layers", "num_classes"],
            **self.model_tester.settings,
        )

    @property
    def all_model_classes(self) -> tuple[type[PreTrainedModel], ...]:
        return (self.model_class,)

    @property
    def all_generative_model_classes(self) -> tuple[type[PreTrainedModel], ...]:
        # The sdist lacks the tests of `generate`: test_priors.py has ours.
        return ()

    def _prepare_for_class(
        self, inputs_dict: dict[str, torch.Tensor], model_class: type[PreTrainedModel], return_labels: bool = False
    ) -> dict[str, torch.Tensor]:
        inputs = copy.deepcopy(inputs_dict)
        return inputs | {"labels": inputs["input_ids"]} if return_labels else inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class TransformerPriorTest(PriorSuite, unittest.TestCase):
    model_class, config_class = TransformerPrior, TransformerPriorConfig
    hidden_shape = (LENGTH, WIDTH)


for name in dir(TransformerPriorTest):
    if name.startswith("test_eager_matches_sdpa_inference"):
        reason = "it pads, and images have no padding: test_priors.py compares the two"
        setattr(TransformerPriorTest, name, unittest.skip(reason)(getattr(TransformerPriorTest, name)))


class PixelCNNPriorTest(PriorSuite, unittest.TestCase):
    model_class, config_class = PixelCNNPrior, PixelCNNPriorConfig
    hidden_shape = (SIDE, SIDE)

    has_attentions = False
