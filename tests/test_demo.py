"""The page: every endpoint by a client, and a person's way through it in a browser, where there is one."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from test_token_desk import make_desk, picture

pytest.importorskip("gradio")
client_module = pytest.importorskip("gradio_client")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def desk() -> Any:
    return make_desk(with_prior=True)


@pytest.fixture(scope="module")
def address(desk: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page that `hf-vq demo` serves, in a process of its own, while the tests run."""
    folder = tmp_path_factory.mktemp("demo")
    desk.tokenizer.save_pretrained(folder / "tokenizer")
    desk.prior.model.config.tokenizer_name_or_path = "../tokenizer"
    desk.prior.model.save_pretrained(folder / "prior")
    command = ["-m", "hf_vq.cli", "demo", str(folder / "tokenizer"), "--prior", str(folder / "prior")]
    environment = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout is not None
    lines = iter(server.stdout.readline, "")
    yield next(found.group() for line in lines if (found := re.search(r"http://\S+", line)))
    server.terminate()
    server.communicate()


@pytest.fixture
def client(address: str) -> Any:
    return client_module.Client(address, verbose=False)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    picture().save(tmp_path / "picture.png")
    return client_module.handle_file(tmp_path / "picture.png")


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_picture_is_encoded_looked_up_changed_and_decoded(client: Any, desk: Any, file: Any):
    seen = desk.see(picture())
    grid, reconstruction, words, _, text = client.predict(file, 0, api_name="/encode")
    assert json.loads(text) == seen.tokens and f"{seen.psnr:.1f} dB" in words
    assert np.array_equal(pixels(grid), np.asarray(desk.draw_grid(seen.tokens)))
    assert np.array_equal(pixels(reconstruction), np.asarray(seen.reconstruction))

    _, code, swatches = client.predict(1, 2, 0, api_name="/neighbours")
    assert code == seen.tokens[1][2] and swatches.count("swatch") >= 8

    new = (code + 1) % 16
    _, reconstruction, words, _, text = client.predict(1, 2, 0, new, api_name="/change")
    assert "dB" not in words
    changed = desk.change(seen.tokens, 1, 2, new)
    assert json.loads(text) == changed
    assert np.array_equal(pixels(reconstruction), np.asarray(desk.decode(changed)))

    _, reconstruction, _ = client.predict(json.dumps(seen.tokens), 0, api_name="/decode")
    assert np.array_equal(pixels(reconstruction), np.asarray(seen.reconstruction))


def test_two_pictures_are_mixed(client: Any, desk: Any, file: Any, tmp_path: Path):
    picture(3).save(tmp_path / "other.png")
    other = client_module.handle_file(tmp_path / "other.png")
    _, result = client.predict(file, other, "checkerboard", 0.5, api_name="/mix")
    tokens = desk.mix(desk.see(picture()).tokens, desk.see(picture(3)).tokens, "checkerboard", 0.5)
    assert np.array_equal(pixels(result), np.asarray(desk.decode(tokens)))


def test_new_ones_are_drawn(client: Any, desk: Any):
    gallery = client.predict(1, 2.0, 0.9, 7, api_name="/sample")
    expected = desk.sample(1, 2.0, 0.9, seed=7)
    assert len(gallery) == 8
    assert np.array_equal(pixels(gallery[3]["image"]), np.asarray(expected[3]))


@pytest.mark.parametrize(
    ("arguments", "name", "message"),
    [
        ((0, 0, 0), "/neighbours", "Put in a picture"),
        (("[[99]]", 0), "/decode", "codes lie in 0 to 15, and one is 99"),
        (("no", 0), "/decode", "the tokens are not JSON"),
        (("[" * 100_000, 0), "/decode", "the tokens are not JSON"),
        ((0, None, 0), "/neighbours", "Put in a picture"),
        (("[[0]]", None), "/decode", "Fill in every field"),
        ((1, 1.0, 1.0, None), "/sample", "Fill in every field"),
        ((1, 1.0, 1.0, 10**30), "/sample", "4294967295"),
    ],
)
def test_people_are_told_what_is_wrong(client: Any, arguments: Any, name: str, message: str):
    with pytest.raises(Exception, match=message):
        client.predict(*arguments, api_name=name)


def test_a_picture_without_a_codebook_is_refused(client: Any, file: Any):
    with pytest.raises(Exception, match="Fill in every field"):
        client.predict(file, None, api_name="/encode")


def test_a_broken_picture_is_named(client: Any, tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(Exception, match="cannot identify image file"):
        client.predict(client_module.handle_file(tmp_path / "broken.png"), 0, api_name="/encode")


def test_a_person_goes_through_the_page(address: str, tmp_path: Path):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no browser")
    playwright = pytest.importorskip("playwright.sync_api")
    picture().save(tmp_path / "picture.png")
    with playwright.sync_playwright() as started:
        window = started.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = window.new_page(viewport={"width": 1280, "height": 900})
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.set_input_files("#picture input[type=file]", tmp_path / "picture.png")
        before = page.wait_for_selector("#reconstruction img").get_attribute("src")
        page.wait_for_function("document.querySelector('#facts').innerText.includes('dB')")
        large = [page.locator(f"#{name} img").bounding_box() for name in ("picture", "tokens", "reconstruction")]
        assert all(abs(box["width"] - box["height"]) < 2 and box["width"] > 300 for box in large if box)
        page.click("#tokens img", position={"x": 60, "y": 60})
        page.wait_for_selector("#neighbours .swatch >> nth=7")
        row, column, code = (page.locator(f"input[type=number] >> nth={place}") for place in range(3))
        assert (row.input_value(), column.input_value()) == ("0", "0")
        page.click("#tokens img", position={"x": 200, "y": 110})
        page.wait_for_function("() => document.querySelectorAll('input[type=number]')[1].value === '2'")
        assert row.input_value() == "1"
        code.fill(str((int(code.input_value()) + 5) % 16))
        page.click("#change")
        page.wait_for_function("(old) => document.querySelector('#reconstruction img').src !== old", arg=before)
        page.get_by_role("tab", name="Draw", exact=True).click()
        page.click("#draw")
        page.wait_for_selector("#drawn img >> nth=7")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert not complaints
        window.close()
