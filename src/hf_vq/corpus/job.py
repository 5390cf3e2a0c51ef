"""What a bulk tokenization was asked for, and how it is opened: here, or in a process of a cluster."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_vq.corpus.corpus import Corpus, read_job
from hf_vq.corpus.transform import TokenizeImages
from hf_vq.corpus.units import ImageUnits
from hf_vq.datasets_io import open_splits
from hf_vq.tokenizer import ImageTokenizer

__all__ = ["TokenizationJob"]


@dataclass(frozen=True)
class TokenizationJob:
    """A tokenizer, a data set and what stays of it, in plain values.

    Attributes:
        model: the tokenizer's name on the Hub, or folder.
        revision: its branch, tag or commit.
        dataset_name, dataset_config_name, dataset_revision, data_files, image_column, splits: as in `open_splits`.
        keep_columns: that stay beside the tokens; by default all but those of pictures, sounds and the like.
        keep_size: neither resize nor crop.
        refine: rounds of refinement of the tokens.
        rows_per_file: rows from which on a file of the data set becomes several.
    """

    model: str
    dataset_name: str
    revision: str | None = None
    trust_remote_code: bool = False
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    data_files: tuple[str, ...] | None = None
    image_column: str | None = None
    splits: tuple[str, ...] | None = None
    keep_columns: tuple[str, ...] | None = None
    keep_size: bool = False
    refine: int = 0
    rows_per_file: int = 100_000

    def open(
        self,
        folder: Path,
        device: Any = "cpu",
        batch_size: int = 64,
        max_bad_examples: int = 100,
        token: str | None = None,
    ) -> Corpus:
        """The data set and the tokenizer, ready to fill `folder`; of what was begun there, the same commits of both.

        Args:
            device: where the model runs.
            batch_size, max_bad_examples: as in `Corpus`.
            token: of the Hub; None is the one that was logged in with.

        Raises:
            OSError: there is no such tokenizer or data set.
            ValueError: what does not fit together.
        """
        begun = read_job(folder)
        pinned = begun if self.settings.items() <= begun.items() else {}
        tokenizer = ImageTokenizer.from_pretrained(
            self.model,
            device=device,
            revision=pinned.get("tokenizer_commit") or self.revision or "main",
            trust_remote_code=self.trust_remote_code,
            token=token,
        )
        source = open_splits(
            self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            data_files=list(self.data_files) if self.data_files else None,
            revision=pinned.get("dataset_commit") or self.dataset_revision,
            image_column=self.image_column,
            splits=self.splits,
            token=token,
        )
        sizes: dict[str, Any] = {"do_resize": False, "do_center_crop": False} if self.keep_size else {}
        units, tokenize = ImageUnits(source, self.rows_per_file), TokenizeImages(tokenizer, refine=self.refine, **sizes)
        opened = {
            "tokenizer_commit": tokenizer.revision,
            "tokenizer_fingerprint": tokenize.description.tokenizer_fingerprint,
            "processor_hash": tokenize.description.processor_hash,
            "dataset_commit": source.revision,
            "images_hash": units.hash(),
        }
        return Corpus(folder, units, tokenize, self.settings | opened, self.keep_columns, batch_size, max_bad_examples)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides on the rows, as JSON holds it."""
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        del given["trust_remote_code"]
        return given
