"""Pictures of every kind in, pixel_values out, and back; each damaged or ambiguous one gets an error that helps."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vq.models.image_processing_vq import VQImageProcessor

GENERATOR = np.random.default_rng(0)


def noise(height: int = 32, width: int = 32, channels: int | None = 3) -> np.ndarray:
    shape = (height, width) if channels is None else (height, width, channels)
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


def gradient(height: int, width: int) -> np.ndarray:
    """A picture on which resizing and cropping show: red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.full_like(red, 100)], axis=-1).round().astype(np.uint8)


@pytest.fixture
def processor() -> VQImageProcessor:
    return VQImageProcessor()


@pytest.fixture
def as_is() -> VQImageProcessor:
    return VQImageProcessor(do_resize=False, do_center_crop=False, downsampling_factor=4)


def slow(processor: VQImageProcessor, monkeypatch: pytest.MonkeyPatch) -> VQImageProcessor:
    """The same processor without its vectorised path."""
    twin = VQImageProcessor(**{name: value for name, value in processor.to_dict().items() if not name.endswith("type")})
    monkeypatch.setattr(twin, "_stack_fitting", lambda *arguments: None)
    return twin


def pixels_of(processor: VQImageProcessor, image: object) -> np.ndarray:
    """What the processor made of one image, as uint8 (H, W, C)."""
    return processor.postprocess(processor(image, return_tensors="pt").pixel_values, output_type="np")[0]


# Values and shapes.


def test_values_are_exactly_minus_one_to_one(processor: VQImageProcessor):
    values = np.arange(256, dtype=np.uint8).repeat(12).reshape(32, 32, 3)
    pixel_values = processor(values, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 32, 32) and pixel_values.dtype == torch.float32
    assert pixel_values.min() == -1 and pixel_values.max() == 1
    expected = torch.from_numpy(values).permute(2, 0, 1).double() / 127.5 - 1
    torch.testing.assert_close(pixel_values[0].double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("channels", [3, 1])
def test_postprocess_returns_the_8_bit_image(channels: int):
    processor = VQImageProcessor(num_channels=channels)
    images = [Image.fromarray(noise(channels=3 if channels == 3 else None)) for _ in range(3)]
    back = processor.postprocess(processor(images, return_tensors="pt").pixel_values)
    assert [image.mode for image in back] == ["RGB" if channels == 3 else "L"] * 3
    assert all(np.array_equal(image, original) for image, original in zip(back, images, strict=True))


def test_postprocess_takes_lists_single_images_and_bfloat16_and_clips(processor: VQImageProcessor):
    wild = torch.full((3, 4, 6), 7.0, dtype=torch.bfloat16, requires_grad=True)
    (image,) = processor.postprocess(wild)
    assert image.size == (6, 4) and image.getextrema() == ((255, 255),) * 3
    assert [image.size for image in processor.postprocess([wild, wild[:, :2]])] == [(6, 4), (6, 2)]


@pytest.mark.parametrize(
    ("pixel_values", "output_type", "message"),
    [
        (torch.zeros(1, 1, 4, 4), "pil", r"\(B, 3, H, W\).*\(1, 4, 4\)"),
        (torch.full((1, 3, 4, 4), torch.nan), "pil", "NaN"),
        (torch.zeros(1, 3, 4, 4), "tiff", "output_type='tiff'"),
    ],
    ids=["channels", "nan", "output_type"],
)
def test_postprocess_refuses(processor: VQImageProcessor, pixel_values: torch.Tensor, output_type: str, message: str):
    with pytest.raises(ValueError, match=message):
        processor.postprocess(pixel_values, output_type=output_type)  # type: ignore[arg-type]  # it is what must be refused


def test_rescaling_and_normalising_can_be_turned_off():
    image = noise()
    raw = VQImageProcessor(do_rescale=False, do_normalize=False)
    assert torch.equal(
        raw(image, return_tensors="pt").pixel_values[0], torch.from_numpy(image).permute(2, 0, 1).float()
    )
    unit = VQImageProcessor(do_normalize=False)
    pixel_values = unit(image, return_tensors="pt").pixel_values
    assert pixel_values.min() >= 0 and pixel_values.max() == pytest.approx(1, abs=0.01)
    assert np.array_equal(unit.postprocess(pixel_values)[0], image)


def test_mean_and_std_may_differ_by_channel():
    processor = VQImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 4.0])
    image = noise()
    expected = (image / 255 - [0.1, 0.2, 0.3]) / [1.0, 2.0, 4.0]
    np.testing.assert_allclose(processor(image).pixel_values[0], expected.transpose(2, 0, 1), atol=1e-6)
    assert np.array_equal(pixels_of(processor, image), image)
    with pytest.raises(ValueError, match=r"image_mean=.* has 3 values for num_channels=1"):
        processor(image, num_channels=1)


# Sizes.


@pytest.mark.parametrize("size", [(48, 80), (80, 48), (20, 31), (1, 9)], ids=str)
def test_the_shortest_edge_is_resized_and_the_centre_cropped(processor: VQImageProcessor, size: tuple[int, int]):
    height, width = size
    short = min(size)
    resized = (int(32 * width / short), 32) if height <= width else (32, int(32 * height / short))
    expected = Image.fromarray(gradient(height, width)).resize(resized, Image.Resampling.BICUBIC)
    left, top = (resized[0] - 32) // 2, (resized[1] - 32) // 2
    assert np.array_equal(
        pixels_of(processor, gradient(height, width)), expected.crop((left, top, left + 32, top + 32))
    )


def test_without_resize_and_crop_the_size_stays_cut_to_the_factor(as_is: VQImageProcessor):
    image = noise(38, 23)
    pixels = pixels_of(as_is, image)
    assert pixels.shape == (36, 20, 3)
    assert np.array_equal(pixels, image[1:37, 1:21])
    assert pixels_of(as_is, noise(8, 12)).shape == (8, 12, 3)
    assert pixels_of(VQImageProcessor(), noise(8, 12)).shape == (32, 32, 3)
    assert VQImageProcessor()(noise(40, 61), do_center_crop=False)["pixel_values"][0].shape == (3, 32, 48)


def test_different_sizes_give_lists(as_is: VQImageProcessor):
    images = [noise(8, 8), noise(12, 8), noise(8, 8)]
    values = as_is(images).pixel_values
    assert isinstance(values, list)
    assert [value.shape for value in values] == [(3, 8, 8), (3, 12, 8), (3, 8, 8)]
    assert all(np.array_equal(as_is(image).pixel_values[0], value) for image, value in zip(images, values, strict=True))
    for tensors in ("pt", "np"):
        with pytest.raises(ValueError, match=r"one size.*\(8, 8\), \(12, 8\).*leave return_tensors out"):
            as_is(images, return_tensors=tensors)


def test_a_list_comes_back_without_return_tensors(processor: VQImageProcessor):
    values = processor([noise(), noise()]).pixel_values
    assert isinstance(values, list) and all(isinstance(value, np.ndarray) for value in values)
    assert processor([noise(), noise()], return_tensors="np").pixel_values.shape == (2, 3, 32, 32)


# Modes.


def modes() -> dict[str, tuple[Callable[[], Image.Image], np.ndarray]]:
    """Name -> (picture, its RGB pixels); pictures of 4x4."""
    grey, rgb, alpha = noise(4, 4, None), noise(4, 4), noise(4, 4, None)
    alpha[0], alpha[1] = 0, 255
    share = alpha[..., None] / 255
    three = np.repeat(grey[..., None], 3, axis=2)

    def white(pixels: np.ndarray) -> np.ndarray:
        return np.rint(pixels * share + 255 * (1 - share))

    def rgba() -> Image.Image:
        return Image.fromarray(np.dstack([rgb, alpha]))

    def palette(transparent: bool) -> Image.Image:
        image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), mode=None).convert("L")
        image = Image.frombytes("P", (4, 4), image.tobytes())
        image.putpalette(rgb.reshape(-1).tolist())
        if transparent:
            image.info["transparency"] = 5
        return image

    def coloured_key() -> Image.Image:
        image = Image.fromarray(rgb)
        image.info["transparency"] = tuple(int(value) for value in rgb[2, 3])
        return image

    holed, keyed = rgb.copy(), rgb.copy()
    holed[1, 1] = keyed[2, 3] = 255
    deep = grey.astype(np.uint16) * 257
    bits = (grey > 127).astype(np.uint8) * 255
    cmyk = np.dstack([255 - rgb, np.zeros((4, 4), np.uint8)])
    return {
        "1": (lambda: Image.fromarray(bits).convert("1"), np.repeat(bits[..., None], 3, axis=2)),
        "L": (lambda: Image.fromarray(grey), three),
        "LA": (lambda: Image.fromarray(np.dstack([grey, alpha])), white(three)),
        "La": (lambda: Image.fromarray(np.dstack([grey, alpha])).convert("La"), white(three)),
        "P": (lambda: palette(False), rgb),
        "P-transparent": (lambda: palette(True), holed),
        "RGB": (lambda: Image.fromarray(rgb), rgb),
        "RGB-key": (coloured_key, keyed),
        "RGBA": (rgba, white(rgb)),
        "RGBa": (lambda: rgba().convert("RGBa"), white(rgb)),
        "CMYK": (lambda: Image.frombytes("CMYK", (4, 4), cmyk.tobytes()), rgb),
        "YCbCr": (lambda: Image.fromarray(rgb).convert("YCbCr"), rgb),
        "HSV": (lambda: Image.fromarray(rgb).convert("HSV"), rgb),
        "LAB": (lambda: Image.new("LAB", (4, 4), (255, 128, 128)), np.full((4, 4, 3), 255)),
        "I;16": (lambda: Image.fromarray(deep), three),
        "I;16B": (lambda: Image.frombytes("I;16B", (4, 4), deep.astype(">u2").tobytes()), three),
        "I": (lambda: Image.fromarray(deep.astype(np.int32)), three),
        "F": (lambda: Image.fromarray(grey.astype(np.float32)), three),
    }


@pytest.mark.parametrize("name", modes())
def test_every_pil_mode(as_is: VQImageProcessor, name: str):
    make, expected = modes()[name]
    # Compositing and colour spaces round; premultiplied alpha keeps few bits of a faint colour.
    tolerance = {"RGBa": 2, "La": 2, "YCbCr": 3, "HSV": 6, "LAB": 1, "LA": 1, "RGBA": 1}.get(name, 0)
    np.testing.assert_allclose(pixels_of(as_is, make()).astype(int), expected, atol=tolerance)


@pytest.mark.parametrize("name", modes())
def test_every_pil_mode_becomes_grey(name: str):
    processor = VQImageProcessor(num_channels=1, do_resize=False, do_center_crop=False)
    make, rgb = modes()[name]
    grey = rgb @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(pixels_of(processor, make())[..., 0], grey, atol=3)


def test_sixteen_bits_are_rounded_not_cut(as_is: VQImageProcessor):
    image = Image.fromarray(np.array([[0, 128, 129, 65535]] * 4, np.uint16))
    assert pixels_of(as_is, image)[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(as_is: VQImageProcessor, orientation: int):
    upright = noise(8, 12)
    inverse = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(inverse(upright))).save(file, "png", exif=exif)
    stored = Image.open(io.BytesIO(file.getvalue()))
    assert np.array_equal(pixels_of(as_is, stored), upright)


# Arrays and other things that are pictures.


@pytest.mark.parametrize(
    "make",
    [
        lambda image: image,
        lambda image: image.transpose(2, 0, 1),
        lambda image: torch.from_numpy(image),
        lambda image: torch.from_numpy(image).permute(2, 0, 1),
        lambda image: image[None],
        lambda image: torch.from_numpy(image)[None],
        lambda image: [[image]],
        lambda image: image / 255,
        lambda image: (image / 255).astype(np.float32),
        lambda image: image.astype(np.int64),
        lambda image: image.astype(np.uint16) * 257,
        lambda image: np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]),
        lambda image: image[::-1][::-1],
    ],
    ids=[
        "hwc",
        "chw",
        "torch",
        "torch-chw",
        "batch",
        "torch-batch",
        "nested",
        "float64",
        "float32",
        "int64",
        "uint16",
        "rgba",
        "strided",
    ],
)
def test_arrays_and_tensors(as_is: VQImageProcessor, make: Callable[[np.ndarray], object]):
    image = noise(8, 12)
    assert np.array_equal(pixels_of(as_is, make(image)), image)


def test_grey_arrays(as_is: VQImageProcessor):
    grey = noise(8, 8, None)
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(pixels_of(as_is, grey), expected)
    assert np.array_equal(pixels_of(as_is, grey[..., None]), expected)
    single = VQImageProcessor(num_channels=1, do_resize=False, do_center_crop=False)
    assert np.array_equal(pixels_of(single, grey)[..., 0], grey)
    assert single([grey, grey], return_tensors="pt").pixel_values.shape == (2, 1, 8, 8)
    assert single(np.stack([grey, grey])[..., None], return_tensors="pt").pixel_values.shape == (2, 1, 8, 8)
    assert np.array_equal(pixels_of(as_is, grey > 127)[..., 0], (grey > 127) * 255)


def test_paths(as_is: VQImageProcessor, tmp_path: Path):
    image = noise(8, 8)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(pixels_of(as_is, tmp_path / "a.png"), image)
    assert np.array_equal(pixels_of(as_is, str(tmp_path / "a.png")), image)


def truncated_file() -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(file, "png")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images is empty"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "images is empty"),
        (Image.new("RGB", (0, 5)), ValueError, r"image 0 is empty.*\(0, 5\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, r"image 0 is empty.*\(0, 8, 3\)"),
        (noise(3, 40), ValueError, "image 0 is 3x40 .*downsampling_factor 4.*do_resize"),
        (np.zeros(8, np.uint8), ValueError, r"image 0 has shape \(8,\)"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], ValueError, r"image 0 has shape \(2, 8, 8, 3\)"),
        (np.zeros((9, 8, 8), np.uint8), ValueError, r"\(9, 8, 8\).*list of \(H, W\)"),
        (np.full((8, 8, 3), 1.5), ValueError, "image 0 .float64. has values from 1.5 to 1.5, outside 0 ... 1"),
        (np.full((8, 8, 3), np.nan), ValueError, "nan"),
        (np.full((8, 8, 3), -1), ValueError, "image 0 .int64. has values from -1 to -1, outside 0 ... 255"),
        (np.zeros((8, 8, 3), complex), TypeError, "image 0 has dtype complex128"),
        (Image.fromarray(np.full((8, 8), 70000, np.int32)), ValueError, "mode I.* 70000, outside 0 ... 65535"),
        (Image.fromarray(np.full((8, 8), -3, np.float32)), ValueError, r"mode F.* -3.0.*outside 0 ... 255"),
        ("nowhere.png", ValueError, r"image 0 \(nowhere.png\) cannot be opened"),
        ([noise(8, 8), None], TypeError, "image 1 is a NoneType"),
        (truncated_file(), ValueError, "image 0 .* cannot be decoded"),
    ],
    ids=[
        "empty-list",
        "empty-batch",
        "empty-pil",
        "empty-array",
        "small",
        "1d",
        "nested-batch",
        "ambiguous",
        "float-range",
        "nan",
        "int-range",
        "complex",
        "mode-I",
        "mode-F",
        "missing",
        "none",
        "truncated",
    ],
)
def test_what_cannot_be_used_is_named(as_is: VQImageProcessor, images: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        as_is(images)


@pytest.mark.parametrize("settings", [{"num_channels": 2}, {"downsampling_factor": 0}], ids=str)
def test_bad_settings_are_named(settings: dict[str, int], processor: VQImageProcessor):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        VQImageProcessor(**settings)
    with pytest.raises(ValueError, match=f"{name}={value}"):
        processor(noise(), **settings)


# The vectorised path.


def fitting(kind: str, count: int = 5) -> object:
    if kind == "grey-pil":
        return [Image.fromarray(noise(channels=None)) for _ in range(count)]
    if kind == "grey-arrays":
        return [noise(channels=None) for _ in range(count)]
    arrays = [noise() for _ in range(count)]
    return {"pil": [Image.fromarray(a) for a in arrays], "arrays": arrays, "batch": np.stack(arrays)}[kind]


@pytest.mark.parametrize("kind", ["pil", "arrays", "batch", "grey-pil", "grey-arrays"])
def test_the_vectorised_path_is_bit_equal(kind: str, monkeypatch: pytest.MonkeyPatch):
    processor = VQImageProcessor(num_channels=1 if kind.startswith("grey") else 3)
    images = fitting(kind)
    stack = processor._stack_fitting(images, vars(processor) | {"input_data_format": None})
    assert stack is not None and stack.dtype == np.uint8
    fast = processor(images, return_tensors="pt").pixel_values
    assert torch.equal(fast, slow(processor, monkeypatch)(images, return_tensors="pt").pixel_values)
    assert fast.is_contiguous()


def test_the_vectorised_path_notices_what_does_not_fit(processor: VQImageProcessor, monkeypatch: pytest.MonkeyPatch):
    good = Image.fromarray(noise())
    turned, keyed = good.copy(), good.copy()
    turned.getexif()[0x0112] = 6
    keyed.info["transparency"] = good.getpixel((0, 0))
    odd = [turned, keyed, good.convert("RGBA"), good.resize((40, 32)), noise(), noise(channels=None), noise() / 255]
    for other in odd:
        for images in ([good, other], [other, good], [noise(), other]):
            fast = processor(images, return_tensors="pt").pixel_values
            assert torch.equal(fast, slow(processor, monkeypatch)(images, return_tensors="pt").pixel_values)


def test_the_vectorised_path_pays(processor: VQImageProcessor, monkeypatch: pytest.MonkeyPatch):
    images = fitting("pil", 128)

    def seconds(run: VQImageProcessor) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run(images, return_tensors="pt")
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(slow(processor, monkeypatch)) > 1.5 * seconds(processor)


# Configs and files.


def test_it_is_made_for_a_config():
    config = SimpleNamespace(image_size=64, num_channels=1, downsampling_factor=8)
    processor = VQImageProcessor.for_config(config)
    assert processor([noise(100, 70)], return_tensors="pt").pixel_values.shape == (1, 1, 64, 64)
    assert processor.downsampling_factor == 8
    assert not VQImageProcessor.for_config(config, do_resize=False).do_resize


@pytest.mark.parametrize("settings", [{}, {"num_channels": 1, "downsampling_factor": 8, "do_resize": False}], ids=str)
def test_it_survives_saving(tmp_path: Path, settings: dict[str, int]):
    processor = VQImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    loaded = VQImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**processor.to_dict(), **{k: loaded.to_dict()[k] for k in ["auto_map"]}}
    assert loaded.downsampling_factor == settings.get("downsampling_factor", 4)
    image = noise(50, 41)
    assert np.array_equal(processor(image).pixel_values, loaded(image).pixel_values)


def test_its_code_travels_with_it(tmp_path: Path):
    VQImageProcessor().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {"image_inputs.py", "image_processing_vq.py"}
    assert "image_processing_vq.VQImageProcessor" in (tmp_path / "preprocessor_config.json").read_text()
