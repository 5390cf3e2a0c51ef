"""Bulk tokenization: data sets of images, of any size, become data sets of their tokens.

    units of the data set (units.py) -> decoded and processed in loader workers (loading.py, transform.py)
    -> tokens, where the model is -> Parquet files (writing.py, token_file.py), one for each unit, which appear whole

What is done is skipped when the same job (job.py) runs again. Many machines share the units by Ray (on_ray.py).
"""

from hf_vq.corpus.corpus import Corpus
from hf_vq.corpus.job import TokenizationJob
from hf_vq.corpus.transform import ProcessImages, TokenizeImages

__all__ = ["Corpus", "ProcessImages", "TokenizationJob", "TokenizeImages"]
