"""transformers' own image processing tests, run on ours."""

import unittest

import pytest

import transformers_suite
from hf_vq.models.image_processing_vq import VQImageProcessor

common = transformers_suite.load("test_image_processing_common")

pytestmark = [
    # The tests are not ours, and some provoke the warnings that they look for.
    pytest.mark.filterwarnings("ignore"),
]


class ImageProcessingTester(common.ImageProcessingTester):
    """The settings and the pictures that the tests take."""

    def __init__(self, parent: unittest.TestCase) -> None:
        self.size = {"shortest_edge": 20}
        self.crop_size = {"height": 18, "width": 18}
        self.do_resize = self.do_center_crop = self.do_normalize = True
        super().__init__(parent)

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": VQImageProcessor}


class VQImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessingTester

    @unittest.skip("a picture has one channel or three; the model's config says which")
    def test_call_numpy_4_channels(self) -> None: ...

    @unittest.skip("torchvision is no dependency")
    def test_new_models_require_torchvision_backend(self) -> None: ...

    # Stands in versions before 5.22.
    @unittest.skip("looks for the processor inside transformers")
    def test_pil_can_load_without_torchvision(self) -> None: ...
