"""`ImageTokenizer`: images in, lists of ids out, and back, with the habits of a text tokenizer.

Letters: B images, C channels, H height, W width; h, w the token grid; M codebooks, K codes.
"""

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, BatchEncoding
from transformers.utils import CONFIG_NAME, TensorType, cached_file
from transformers.utils.hub import extract_commit_hash
from transformers.utils.logging import tqdm

from hf_vq.canonical import canonical
from hf_vq.hub_commit import commit_folder
from hf_vq.reference_tokens import REFERENCE_FILE, Verification, compare
from hf_vq.token_grids import broadcast_grids, depth, on_grid, to_encoding, to_ids

__all__ = ["ImageTokenizer"]

SECONDS_BEFORE_BAR = 2
MAX_BATCHES_WAITING = 4  # images of many sizes must not pile up


class ImageTokenizer:
    """An image tokenizer model and its processor, used as one uses a text tokenizer.

    Tokens are canonical unless a dtype is asked for: float32, autocast off, whatever surrounds the call.

    Example:
        >>> tok = ImageTokenizer.from_pretrained("org/sqvae-cifar10")
        >>> batch = tok(images)                      # batch.input_ids, batch.image_grid_hw
        >>> ids = tok.encode(image)                  # h * w ids in raster order, no start token
        >>> image = tok.decode(ids)

    Attributes:
        model: the model; its `device` and dtype are those of the computation.
        processor: the image processor.
        revision: the commit that it was loaded from, None if not from the Hub.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        """Joins a loaded model and its image processor.

        Raises:
            ValueError: if the model is no image tokenizer.
        """
        if getattr(model, "main_input_name", None) != "pixel_values" or not hasattr(model.config, "codebook_size"):
            raise ValueError(f"{type(model).__name__} is no image tokenizer: it has no codebook to take ids from.")
        self.model: Any = model
        self.processor = processor
        self.revision: str | None = None
        self._origin: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        **kwargs: Any,
    ) -> "ImageTokenizer":
        """Loads model and processor from the Hub or from a folder.

        Args:
            path: name of a Hub repository, or a local folder.
            device: where the model runs.
            dtype: precision of the model; None is float32, whose tokens are the canonical ones.
            kwargs: for both `from_pretrained`: revision, token, cache_dir, subfolder, trust_remote_code, ...

        Raises:
            OSError: if there is no such model.
            ValueError: if the model is no image tokenizer.
        """
        commit = _commit_of(path, **kwargs)
        at_commit = kwargs | ({"revision": commit} if commit else {})
        model = AutoModel.from_pretrained(path, dtype=torch.float32 if dtype is None else dtype, **at_commit)
        tokenizer = cls(model.to(device).eval(), AutoImageProcessor.from_pretrained(path, **at_commit))
        tokenizer._origin = {"path_or_repo_id": path, **at_commit}
        tokenizer.revision = commit
        return tokenizer

    def __repr__(self) -> str:
        config = self.model.config
        grid = "x".join(map(str, config.grid_size))
        codebooks = f", num_codebooks={config.num_codebooks}" if config.num_codebooks > 1 else ""
        return f"ImageTokenizer({type(self.model).__name__}, vocab_size={self.vocab_size}, grid={grid}{codebooks})"

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of codes K of a codebook: every id is in [0, K), whichever of the M codebooks it belongs to."""
        return self.model.config.codebook_size

    def __call__(
        self,
        images: Any,
        return_tensors: str | None = None,
        batch_size: int = 64,
        refine: int = 0,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Tokens of any number of images, of any sizes, in the given order.

        Args:
            images: one image or many (a list, an array (B, H, W, C), any iterable); see `VQImageProcessor`.
            return_tensors: "pt" or "np" for arrays (images of one grid only); None for lists.
            batch_size: images that run through the model at once; the ids do not depend on it.
            refine: rounds in which ids change where that lowers the error of the decoded image; see the model's encode.
            kwargs: for the processor; `do_resize=False, do_center_crop=False` keeps the size of each image.

        Returns:
            input_ids, one list per image: h * w * M ids, raster order, codebook fastest, no start token; and
            image_grid_hw, one [h, w] per image.

        Raises:
            ValueError: an image that cannot be used, grids that differ where arrays are asked for, a negative refine.
        """
        _check_batch_size(batch_size)
        if return_tensors is not None:
            TensorType(return_tensors)  # a typing error shows before the work
        tokens: dict[int, Tensor] = {}
        images = _as_iterable(images)
        total = len(images) if hasattr(images, "__len__") else None
        with canonical(self.model), _bar("encode", total) as bar:
            for indices, pixel_values in self._pixel_batches(images, batch_size, kwargs):
                encoded = self.model.encode(pixel_values.to(self.model.device), refine=refine).image_tokens.cpu()
                tokens.update(zip(indices, encoded, strict=True))
                bar.update(len(indices))
        if not tokens:
            raise ValueError("images is empty: pass at least one picture.")
        return to_encoding([tokens[index] for index in range(len(tokens))], return_tensors)

    def encode(self, image: Any, **kwargs: Any) -> list[int]:
        """The ids of one image; arguments as in the call. For several images call the tokenizer itself."""
        batch = self(image, **kwargs)
        if len(batch["input_ids"]) != 1:
            raise ValueError(f"encode takes one image, got {len(batch['input_ids'])}: call the tokenizer for several.")
        return batch["input_ids"][0]

    def decode(self, token_ids: Any, image_grid_hw: Any = None, batch_size: int = 64) -> Any:
        """The image of one list of ids, or a list of images for a list of lists.

        Args:
            token_ids: h * w * M ids in raster order, codebook fastest: a list, an array or a tensor; or many of them.
            image_grid_hw: (h, w), or one per image; needed where the grid is not square.
            batch_size: images that run through the model at once.

        Raises:
            ValueError: ids outside [0, K), or a number of ids that does not fit the grid or the codebooks.
        """
        if depth(token_ids) == 1:
            return self.batch_decode([token_ids], image_grid_hw, batch_size)[0]
        return self.batch_decode(token_ids, image_grid_hw, batch_size)

    def batch_decode(
        self, sequences: Iterable[Any], image_grid_hw: Any = None, batch_size: int = 64
    ) -> list[Image.Image]:
        """One image per list of ids; arguments and errors as in `decode`."""
        _check_batch_size(batch_size)
        rows = [to_ids(sequence, index) for index, sequence in enumerate(sequences)]
        grids = broadcast_grids(image_grid_hw, len(rows))
        codes, codebooks = self.vocab_size, self.model.config.num_codebooks
        tokens = [
            on_grid(row, grid, codes, codebooks, index)
            for index, (row, grid) in enumerate(zip(rows, grids, strict=True))
        ]
        images: dict[int, Image.Image] = {}
        with canonical(self.model), _bar("decode", len(tokens)) as bar:
            for indices, batch in _batches_by_shape(enumerate(tokens), batch_size):
                decoded = self.model.decode(batch.to(self.model.device)).pixel_values
                images.update(zip(indices, self.processor.postprocess(decoded), strict=True))
                bar.update(len(indices))
        return [images[index] for index in range(len(images))]

    def verify(self) -> Verification:
        """Whether this machine gives the tokens that were published: encodes the few images that lie beside the model.

        Returns:
            How many tokens differ, and by how much; near-ties do between kernels.

        Raises:
            ValueError: the tokenizer was not loaded by `from_pretrained`, or from where there are no such images.
        """
        if self._origin is None:
            raise ValueError("there is nothing to compare with: load the tokenizer by from_pretrained.")
        where = {name: value for name, value in self._origin.items() if name != "trust_remote_code"}
        file = cached_file(filename=REFERENCE_FILE, **where, _raise_exceptions_for_missing_entries=False)
        if file is None:
            raise ValueError(f"{self._origin['path_or_repo_id']} was published without a {REFERENCE_FILE}.")
        return compare(file, self.model, self.processor)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes model and processor into one folder, which `from_pretrained` reads."""
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload image tokenizer",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> CommitInfo:
        """Uploads model and processor in one commit; the repository is made if it does not exist.

        Args:
            repo_id: its name, "org/name".
            commit_message: first line of the commit.
            private: whether a new repository is private; None is the organisation's default.
            token: of the Hub; None is the one that was logged in with.
            revision: the branch, "main" by default; it is made if it does not exist.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return commit_folder(
                HfApi(token=token), folder, repo_id, private=private, revision=revision, commit_message=commit_message
            )

    def _pixel_batches(
        self, images: Iterable[Any], batch_size: int, kwargs: dict[str, Any]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Images -> (their numbers, pixel_values of one size)."""

        def pixels() -> Iterator[tuple[int, Tensor]]:
            iterator, start = iter(images), 0
            while chunk := list(itertools.islice(iterator, batch_size)):
                pixel_values = self._process(chunk, start, kwargs)
                yield from enumerate(map(torch.as_tensor, pixel_values), start)
                start += len(pixel_values)

        return _batches_by_shape(pixels(), batch_size)

    def _process(self, chunk: list[Any], start: int, kwargs: dict[str, Any]) -> list[np.ndarray]:
        try:
            return self.processor(chunk, **kwargs)["pixel_values"]
        except (TypeError, ValueError) as error:
            if start:
                error.add_note(f"Images are counted from number {start} of this call.")
            raise


def _commit_of(path: Any, **kwargs: Any) -> str | None:
    """The commit that a revision on the Hub points to now, so that all files are of one commit; None of a folder."""
    hub = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
    return extract_commit_hash(cached_file(path, CONFIG_NAME, **hub), None)


def _bar(name: str, total: int | None) -> Any:
    """A progress bar that appears only when the work takes longer than two seconds."""
    return tqdm(desc=name, total=total, unit="img", delay=SECONDS_BEFORE_BAR)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")


def _as_iterable(images: Any) -> Iterable[Any]:
    if isinstance(images, (Image.Image, str, os.PathLike)) or getattr(images, "ndim", 4) < 4:
        return [images]
    if not isinstance(images, Iterable):
        raise TypeError(f"images is a {type(images).__name__}: pass PIL images, uint8 arrays or paths.")
    return images


def _batches_by_shape(items: Iterable[tuple[int, Tensor]], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Numbered tensors of mixed shapes -> (numbers, stacked tensors of one shape), batch_size at a time."""
    waiting: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for index, tensor in items:
        bucket = waiting.setdefault(tensor.shape, [])
        bucket.append((index, tensor))
        if len(bucket) == batch_size:
            yield _stacked(waiting.pop(tensor.shape))
        elif sum(map(len, waiting.values())) >= MAX_BATCHES_WAITING * batch_size:
            yield _stacked(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
    for bucket in waiting.values():
        yield _stacked(bucket)


def _stacked(bucket: Sequence[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    indices, tensors = zip(*bucket, strict=True)
    return list(indices), torch.stack(tensors)
