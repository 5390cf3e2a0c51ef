"""From a run directory to a repository on the Hub: one commit of weights, config, code, card and measured numbers."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, HfApi
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM

from hf_vq import models
from hf_vq.evaluation import weights_hash
from hf_vq.hub_commit import commit_folder, full_name
from hf_vq.model_card import METHODS, write_card
from hf_vq.models.prior_tokenizer import check_tokenizer, is_prior, tokenizer_location
from hf_vq.reference_tokens import REFERENCE_FILE
from hf_vq.run_files import EVALUATION, LOG, REFINED, RUN, STARTED_FROM, copy_run

__all__ = ["TokenizerPlace", "choose_tokenizer", "publish", "write_repository"]

PathLike = str | os.PathLike[str]
PICTURES = ("reconstructions", "codes", "samples", "code-history", "curves")
CODE = tuple(path.name for path in Path(models.__file__).parent.glob("*.py"))
REPLACED = (
    EVALUATION, REFINED, RUN, LOG, REFERENCE_FILE, "preprocessor_config.json", "generation_config.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    f"{STARTED_FROM}/*", *(f"pictures/{kind}.png" for kind in PICTURES), *CODE,
)  # fmt: skip
"""Files of an earlier version that go where the new one has none of that name."""


class TokenizerPlace(NamedTuple):
    """Where a published prior finds its tokenizer: a name on the Hub, or a path seen from the prior's folder."""

    name: str
    revision: str | None = None


def publish(
    run_dir: PathLike,
    repo_id: str,
    *,
    tokenizer_repo_id: str | None = None,
    with_tokenizer: bool = False,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Makes a repository of a trained model, in one commit: whoever pulls gets the version before, or all of this one.

    After an error nothing of the new version is visible, and the same call finishes the work.

    Args:
        run_dir: what training left, or any folder with a tokenizer or a prior.
        repo_id: the repository, "org/name", or "name" for one of yours; it is made if it does not exist.
        tokenizer_repo_id: of a prior, where its tokenizer is published; by default where its config says.
        with_tokenizer: publish a prior's tokenizer first, by default beside the prior under the name of its folder.
        license: identifier of the weights' licence for the card.
        private: whether a new repository is private; None is the organisation's default.
        revision: the branch, "main" by default; it is made if it does not exist.
        token: of the Hub; None is the one that was logged in with.

    Raises:
        ValueError: no such model; numbers that were measured on another; or a prior whose tokenizer nobody would find.
        HfHubHTTPError, OSError: what the Hub or the network refused.
    """
    api, tokenizer = HfApi(token=token), None
    repo_id = full_name(api, repo_id)
    config = read_config(run_dir)
    if is_prior(config):
        name = choose_tokenizer(config.tokenizer_name_or_path, repo_id, tokenizer_repo_id, with_tokenizer)
        name, commit = full_name(api, name), None
        if with_tokenizer:
            shared: dict[str, Any] = {"license": license, "private": private, "revision": revision, "token": token}
            commit = publish(tokenizer_location(config), name, **shared).oid
        tokenizer = find_on_hub(config, name, api, commit)
    with tempfile.TemporaryDirectory() as folder:
        write_repository(run_dir, folder, repo_id, license=license, tokenizer=tokenizer)
        return commit_folder(api, folder, repo_id, private=private, revision=revision, replaced=REPLACED)


def choose_tokenizer(name: str | None, repo_id: str, tokenizer_repo_id: str | None, with_tokenizer: bool) -> str:
    """The repository in which a published prior finds its tokenizer.

    Args:
        name: the prior's tokenizer_name_or_path.
        repo_id, tokenizer_repo_id, with_tokenizer: as in `publish`.

    Raises: ValueError if others would not find the tokenizer.
    """
    if name is None:
        raise ValueError("the prior's config names no tokenizer: set its tokenizer_name_or_path and fingerprint")
    is_local = name.startswith((".", "/", "~")) or os.path.isdir(name)
    if with_tokenizer and not is_local:
        raise ValueError(f"the prior's tokenizer is published already, as {name}: drop with_tokenizer")
    if tokenizer_repo_id is not None:
        return tokenizer_repo_id
    if not is_local:
        return name
    beside = "/".join([*repo_id.split("/")[:-1], Path(name).resolve().name])
    if with_tokenizer:
        return beside
    raise ValueError(
        f"the prior's tokenizer is in the folder {name}, where nobody else finds it: name its repository by "
        f"tokenizer_repo_id, or publish it, too, by with_tokenizer (as {beside})"
    )


def find_on_hub(config: Any, name: str, api: HfApi, revision: str | None = None) -> TokenizerPlace:
    """The commit of a prior's tokenizer on the Hub, which is checked to be the prior's.

    Args:
        config: the prior's.
        name: the tokenizer's repository.
        revision: by default that which the prior names, if it names this repository, or else main.

    Raises: ValueError if it is another tokenizer.
    """
    if revision is None and config.tokenizer_name_or_path == name:
        revision = config.tokenizer_revision
    commit = api.model_info(name, revision=revision).sha
    check_tokenizer(config, AutoModel.from_pretrained(name, revision=commit, token=api.token))
    return TokenizerPlace(name, commit)


def write_repository(
    run_dir: PathLike,
    folder: PathLike,
    repo_id: str,
    *,
    license: str | None = None,
    tokenizer: TokenizerPlace | None = None,
) -> None:
    """Writes a repository's folder: what `from_pretrained` reads, its code, the run's numbers and pictures, the card.

    Args:
        run_dir, repo_id, license: as in `publish`.
        folder: is made if need be; of an earlier version there, nothing stays.
        tokenizer: what a prior is to call its tokenizer.

    Raises: ValueError if there is no such model, or its numbers were measured on another one.
    """
    run_dir, folder = Path(run_dir), Path(folder)
    if run_dir.resolve() != folder.resolve():
        remove_replaced(folder)
    if is_prior(read_config(run_dir)):
        model: Any = AutoModelForCausalLM.from_pretrained(run_dir)
        check_measured(run_dir, model, model.config.tokenizer_fingerprint)
        if tokenizer is not None:
            model.config.tokenizer_name_or_path, model.config.tokenizer_revision = tokenizer
            model.config.name_or_path = str(folder)
    else:
        model = AutoModel.from_pretrained(run_dir)
        check_measured(run_dir, model, model.fingerprint())
        AutoImageProcessor.from_pretrained(run_dir).save_pretrained(folder)
    model.save_pretrained(folder)
    copy_measured(run_dir, folder)
    write_card(folder, model, repo_id, license)


def read_config(run_dir: PathLike) -> Any:
    """The config of a tokenizer or a prior.

    Raises: ValueError if it is that of something else.
    """
    config = AutoConfig.from_pretrained(run_dir)
    if config.model_type not in METHODS:
        raise ValueError(f"{run_dir} holds a {config.model_type}: name a tokenizer or a prior of hf_vq")
    return config


def check_measured(run_dir: Path, model: Any, fingerprint: str) -> None:
    """Raises a ValueError if numbers tell of other weights, or of another tokenizer."""
    here, what_was_measured = weights_hash(model), []
    for file in (run_dir / REFINED, run_dir / EVALUATION):
        if file.is_file():
            measured = json.loads(file.read_text(encoding="utf-8"))
            _check_measured(file, measured, here, fingerprint)
            what_was_measured.append([measured.get(name) for name in ("dataset_name", "split", "num_images")])
    if (run_dir / REFINED).is_file() and what_was_measured[1:] != what_was_measured[:1]:
        raise ValueError(
            f"{run_dir / REFINED} is of other images than {EVALUATION} beside it: measure both on the same"
        )


def _check_measured(file: Path, measured: dict[str, Any], here: str, fingerprint: str) -> None:
    if "dataset_name" not in measured or "split" not in measured:
        raise ValueError(f"{file} does not say what was measured: make it by hf-vq evaluate, or remove it")
    if (file.name == REFINED) != bool(measured.get("refine")):
        raise ValueError(f"numbers of hf-vq evaluate --refine belong in {REFINED}, and no others do: {file} is wrong")
    flags = f"--refine {measured['refine']} " if measured.get("refine") else ""
    of_tokenizer = measured.get("tokenizer_fingerprint", measured.get("fingerprint", fingerprint))
    of_weights = measured.get("weights_sha256", here)
    if (of_tokenizer, of_weights) != (fingerprint, here):
        what = "with another tokenizer" if of_tokenizer != fingerprint else "with other weights"
        raise ValueError(
            f"{file} was measured {what} than those in {file.parent}: measure again, "
            f"hf-vq evaluate {file.parent} {flags}--output {file}, or remove it"
        )


def remove_replaced(folder: Path) -> None:
    """Removes what an earlier version may have left."""
    shutil.rmtree(folder / STARTED_FROM, ignore_errors=True)
    for pattern in REPLACED:
        for path in folder.glob(pattern):
            path.unlink()


def copy_measured(run_dir: Path, folder: Path) -> None:
    """The run's settings, log, numbers and reference tokens, and the last picture of each kind."""
    copy_run(run_dir, folder)
    for name in (EVALUATION, REFINED, REFERENCE_FILE):
        if (run_dir / name).is_file():
            copy(run_dir / name, folder / name)
    (folder / "pictures").mkdir(exist_ok=True)
    for kind in PICTURES:
        # step-000500-codes.png comes before step-001000-codes.png, and both before codes.png
        found = [*sorted(run_dir.glob(f"pictures/step-*-{kind}.png")), *run_dir.glob(f"pictures/{kind}.png")]
        if found:
            copy(found[-1], folder / "pictures" / f"{kind}.png")


def copy(source: Path, target: Path) -> None:
    """A file to another place, or to its own."""
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
