"""The command: tokens to a file and back to pictures, numbers of a data set, and errors for humans."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoImageProcessor

from hf_vq import VQVAEConfig, VQVAEModel
from hf_vq.cli import main
from hf_vq.code_counts import save_code_counts
from hf_vq.commands.tokens import find_images
from hf_vq.models.image_processing_vq import VQImageProcessor
from hf_vq.token_files import output_names, read_records
from hf_vq.tokenizer import ImageTokenizer

CODES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and, beside it, images of two sizes."""
    AutoImageProcessor.register(VQVAEConfig, image_processor_classes={"pil": VQImageProcessor}, exist_ok=True)
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = VQVAEConfig(
        image_size=16, codebook_size=CODES, hidden_channels=[8, 16], residual_channels=8, num_residual_blocks=1
    )
    ImageTokenizer(VQVAEModel(config), VQImageProcessor.for_config(config)).save_pretrained(root / "model")
    (root / "images" / "below").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in {"a.png": (16, 16), "b.jpg": (16, 24), "below/c.png": (16, 16)}.items():
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / name)
    (root / "images" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `hf-vq COMMAND MODEL ...` -> exit code, stdout, stderr."""

    def run_command(command: str, *arguments: object, model: object = None) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([command, str(model or folder / "model"), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run_command


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_there_and_back(folder: Path, tmp_path: Path, run: Any, suffix: str):
    tokens = tmp_path / "new" / f"tokens.{suffix}"
    code, out, _ = run("encode", folder / "images", "--output", tokens, "--keep_size", "--batch_size", 2)
    assert code == 0 and "3 images" in out
    records = read_records(tokens)
    assert [Path(record["image"]).name for record in records] == ["a.png", "b.jpg", "c.png"]
    assert [record["image_grid_hw"] for record in records] == [[4, 4], [4, 6], [4, 4]]
    tok = ImageTokenizer.from_pretrained(folder / "model")
    assert records[0]["input_ids"] == tok.encode(folder / "images" / "a.png")
    assert [path.name for path in tokens.parent.iterdir()] == [tokens.name]

    code, out, _ = run("decode", tokens, "--output", tmp_path / "out")
    assert code == 0 and "3 images" in out
    images = {path.name: pixels(path) for path in (tmp_path / "out").iterdir()}
    shapes = {name: image.shape[:2] for name, image in images.items()}
    assert shapes == {"a.png": (16, 16), "b.png": (16, 24), "c.png": (16, 16)}
    assert np.array_equal(images["b.png"], tok.decode(records[1]["input_ids"], (4, 6)))


def test_sizes_are_made_uniform_by_default(folder: Path, tmp_path: Path, run: Any):
    image = folder / "images" / "b.jpg"
    assert run("encode", image, image, "--output", tmp_path / "t.json")[0] == 0
    assert [record["image_grid_hw"] for record in read_records(tmp_path / "t.json")] == [[4, 4]] * 2
    assert run("decode", tmp_path / "t.json", "--output", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b_000000.png", "b_000001.png"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("one.json", [0] * 16),
        ("lists.json", [[0] * 16, [1] * 16]),
        ("lists.jsonl", [[0] * 16, [1] * 16]),
        ("object.json", {"input_ids": [0] * 16}),
    ],
)
def test_plain_lists_of_ids_decode(tmp_path: Path, run: Any, name: str, content: Any):
    lines = map(json.dumps, content) if name.endswith("jsonl") else [json.dumps(content)]
    (tmp_path / name).write_text("\n".join(lines))
    code, _, err = run("decode", tmp_path / name, "--output", tmp_path / "out")
    assert code == 0, err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["image_000000.png", "image_000001.png"][: 1 if name[0] == "o" else 2]


def test_output_names_never_clash():
    assert output_names([{"image": "x/a.png"}, {"image": "b.jpg"}]) == ["a.png", "b.png"]
    records = [{"image": name} for name in ("x/a.png", "y/A.jpg", "a_000000.png")] + [{}]
    assert output_names(records) == ["a_000000.png", "A_000001.png", "a_000000_000002.png", "image_000003.png"]


def test_folders_are_searched_in_name_order(folder: Path):
    found = find_images([str(folder / "images" / "below" / "c.png"), str(folder / "images")])
    assert [path.name for path in found] == ["c.png", "a.png", "b.jpg", "c.png"]


@pytest.fixture
def parquet(folder: Path, tmp_path: Path) -> Path:
    rows = {"picture": [str(path) for path in find_images([str(folder / "images")])] * 2, "label": list(range(6))}
    dataset = Dataset.from_dict(rows).cast_column("picture", ImageFeature())
    assert isinstance(dataset.features, Features)
    dataset.to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["table", "stream"])
def test_evaluate_writes_and_prints_every_number(parquet: Path, tmp_path: Path, run: Any, streaming: list[str]):
    output = tmp_path / "evaluation.json"
    flags = ["--dataset_name", "parquet", "--data_files", parquet, "--cache_dir", tmp_path / "cache", *streaming]
    code, out, err = run("evaluate", *flags, "--output", output, "--batch_size", 4)
    assert code == 0, err
    written = json.loads(output.read_text())
    assert written["num_images"] == 6 and written["bad_examples"] == 0
    assert written["dataset_name"] == "parquet" and written["split"] == "test"
    numbers = {"loss", "mse", "psnr", "psnr_of_mse", "ssim", "perplexity", "usage", "images_per_second"}
    assert numbers <= written.keys() and all(f"\n{name} " in f"\n{out}" for name in numbers)


def test_evaluate_measures_refined_tokens_and_says_so(parquet: Path, tmp_path: Path, run: Any):
    flags = ["--dataset_name", "parquet", "--data_files", parquet, "--cache_dir", tmp_path / "cache"]
    for name, more in {"plain": [], "refined": ["--refine", 2]}.items():
        code, _, err = run("evaluate", *flags, *more, "--output", tmp_path / f"{name}.json")
        assert code == 0, err
    plain, refined = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "refined"))
    assert refined["refine"] == 2 and "refine" not in plain
    assert refined["protocol"] == f"{plain['protocol']}; tokens refined in 2 rounds"
    assert refined["mse"] < plain["mse"] and "loss" not in refined


def test_encode_refines_on_request(folder: Path, tmp_path: Path, run: Any):
    image = folder / "images" / "a.png"
    assert run("encode", image, "--output", tmp_path / "t.json", "--refine", 1)[0] == 0
    tok = ImageTokenizer.from_pretrained(folder / "model")
    (record,) = read_records(tmp_path / "t.json")
    assert record["input_ids"] == tok.encode(image, refine=1) != tok.encode(image) and record["refine"] == 1


def test_refined_numbers_go_to_a_file_of_their_own(
    parquet: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_name", "parquet", "--data_files", parquet, "--cache_dir", tmp_path / "cache"]
    assert run("evaluate", *flags)[0] == 0 and run("evaluate", *flags, "--refine", 1)[0] == 0
    assert "refine" not in json.loads(Path("evaluation.json").read_text())
    assert json.loads(Path("evaluation-refined.json").read_text())["refine"] == 1


def test_evaluate_counts_damaged_images(folder: Path, tmp_path: Path, run: Any):
    good = (folder / "images" / "a.png").read_bytes()
    rows = {"image": [{"bytes": data, "path": None} for data in (good, good[:300], good)]}
    Dataset.from_dict(rows, features=Features({"image": ImageFeature()})).to_parquet(tmp_path / "rows.parquet")
    flags = ["--dataset_name", "parquet", "--data_files", tmp_path / "rows.parquet", "--cache_dir", tmp_path / "cache"]
    flags += ["--output", tmp_path / "e.json"]
    assert run("evaluate", *flags)[0] == 0
    written = json.loads((tmp_path / "e.json").read_text())
    assert (written["num_images"], written["bad_examples"]) == (2, 1)
    code, _, err = run("evaluate", *flags, "--max_bad_examples", 0)
    assert code == 2 and "max_bad_examples" in err


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a training leaves to draw: code counts of two evaluations, and a log."""
    folder = tmp_path / "run"
    for step, counts in ((5, [[4, 4, 4, 4]]), (10, [[9, 7, 0, 0]])):
        save_code_counts(folder / "codes.safetensors", step, torch.tensor(counts))
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n{"step": 10, "loss": 1.0, "eval_usage": 0.5}\n')
    return folder


@pytest.mark.parametrize("flags", [[], ["--output", "{tmp}/new/folder"]], ids=["default", "output"])
def test_plot_draws_the_pictures_of_a_run(run_dir: Path, tmp_path: Path, run: Any, flags: list[str]):
    code, out, err = run("plot", *[flag.format(tmp=tmp_path) for flag in flags], model=run_dir)
    assert code == 0, err
    folder = tmp_path / "new" / "folder" if flags else run_dir / "pictures"
    assert {path.name for path in folder.iterdir()} == {"code-history.png", "step-000010-codes.png", "curves.png"}
    for path in folder.iterdir():
        assert str(path) in out and pixels(path).shape[0] > 100
    shades = pixels(folder / "code-history.png").reshape(-1, pixels(folder / "code-history.png").shape[-1])
    assert len(np.unique(shades, axis=0)) > 10


@pytest.mark.parametrize(
    ("missing", "drawn"),
    [("codes.safetensors", {"curves.png"}), ("metrics.jsonl", {"code-history.png", "step-000010-codes.png"})],
    ids=["codes", "log"],
)
def test_plot_draws_what_there_is(run_dir: Path, run: Any, missing: str, drawn: set[str]):
    (run_dir / missing).unlink()
    code, out, err = run("plot", model=run_dir)
    assert code == 0, err
    assert {path.name for path in (run_dir / "pictures").iterdir()} == drawn
    assert ("no codes.safetensors" in out) == (missing == "codes.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: [path.unlink() for path in folder.iterdir()], "has no metrics.jsonl and no codes.safetensors"),
        (lambda folder: (folder / "codes.safetensors").write_bytes(b"0" * 20), "codes.safetensors is damaged"),
        (lambda folder: (folder / "metrics.jsonl").write_text("{}"), "metrics.jsonl has none of loss"),
        (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe"), "metrics.jsonl is not the"),
        (lambda folder: (folder / "pictures").write_text(""), "pictures is a file: name a folder"),
    ],
    ids=["no-run", "damaged", "no-numbers", "no-text", "output-file"],
)
def test_plot_refuses_what_is_no_run(run_dir: Path, run: Any, spoil: Any, message: str):
    spoil(run_dir)
    code, _, err = run("plot", model=run_dir)
    assert code == 2 and message in err.split("hf-vq plot: error: ")[1] and "Traceback" not in err


def test_plot_of_a_missing_folder_names_it(tmp_path: Path, run: Any):
    code, _, err = run("plot", model=tmp_path / "nowhere")
    assert code == 2 and f"{tmp_path / 'nowhere'} has no metrics.jsonl" in err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("encode", ["{images}/a.png", "--output", "{tmp}/tokens.txt"], "must end in .json or .jsonl"),
        ("encode", ["{images}/a.png", "--output", "{images}/x.json", "--batch_size", "0"], "batch_size=0"),
        ("encode", ["nowhere.png", "{images}/a.png", "--output", "{tmp}/t.json"], "there is no nowhere.png"),
        ("encode", ["{tmp}", "--output", "{tmp}/t.json"], "has no image files"),
        ("encode", ["{images}/notes.txt", "--output", "{tmp}/t.json"], "notes.txt) cannot be opened"),
        ("decode", ["{tmp}/bad.json", "--output", "{tmp}/out"], "bad.json is not valid JSON"),
        ("decode", ["{tmp}/empty.jsonl", "--output", "{tmp}/out"], "at least one"),
        ("decode", ["{tmp}/nowhere.json", "--output", "{tmp}/out"], "there is no file"),
        ("decode", ["{tmp}/foreign.jsonl", "--output", "{tmp}/out"], "record 0 of {tmp}/foreign.jsonl has tokens of"),
        ("decode", ["{tmp}/wild.json", "--output", "{tmp}/out"], "outside [0, 16)"),
        ("decode", ["{tmp}/halves.json", "--output", "{tmp}/out"], "1 of 2 records have an image_grid_hw"),
        ("decode", ["{tmp}/wild.json", "--output", "{tmp}/bad.json"], "is a file: name a folder"),
        ("evaluate", ["--dataset_name", "{tmp}/nowhere"], "nowhere"),
        ("evaluate", ["--dataset_name", "{images}", "--split", "tset", "--output", "{tmp}/e.json"], "tset"),
        ("evaluate", ["--dataset_name", "{images}", "--output", "{tmp}"], "is a folder: name a file"),
    ],
    ids=[
        "suffix",
        "batch_size",
        "missing-image",
        "no-images",
        "no-image",
        "json",
        "empty",
        "missing",
        "foreign",
        "range",
        "grids",
        "output-file",
        "dataset",
        "split",
        "output-folder",
    ],
)
def test_errors_are_for_humans(
    folder: Path, tmp_path: Path, run: Any, command: str, arguments: list[str], message: str
):
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "foreign.jsonl").write_text(json.dumps({"input_ids": [0] * 16, "fingerprint": "other"}))
    (tmp_path / "wild.json").write_text(json.dumps([99] * 16))
    (tmp_path / "halves.json").write_text(json.dumps([{"input_ids": [0], "image_grid_hw": [1, 1]}, {"input_ids": [0]}]))
    places = {"images": folder / "images", "tmp": tmp_path}
    code, out, err = run(command, *[argument.format(**places) for argument in arguments])
    assert code == 2 and out == ""
    # The progress of loading the weights may stand before it.
    assert message.format(**places) in err.split(f"hf-vq {command}: error: ")[1]
    assert "Traceback" not in err


def test_a_missing_or_damaged_model_is_named(tmp_path: Path, folder: Path, run: Any):
    image = folder / "images" / "a.png"
    code, _, err = run("encode", image, "--output", tmp_path / "t.json", model=tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err
    for path in (folder / "model").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    code, _, err = run("encode", image, "--output", tmp_path / "t.json", model=tmp_path)
    assert code == 2 and "hf-vq encode: error: " in err
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "codebook_size": "many"}))
    code, _, err = run("encode", image, "--output", tmp_path / "t.json", model=tmp_path)
    assert code == 2 and "codebook_size" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["encode", "model"],
        ["encode", "model", "a.png", "--out", "t.json"],
        ["encode", "model", "a.png", "--output", "t.json", "--device", "nonsense"],
        ["encode", "model", "a.png", "--output", "t.json", "--refine", "-1"],
        ["evaluate", "model", "--dataset", "x"],
    ],
    ids=["nothing", "no-images", "abbreviated", "device", "rounds", "abbreviated-dataset"],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: hf-vq" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["hf-vq", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("encode", "decode", "evaluate", "plot"))
