"""How the real clients are led to a HubServer: in a process of their own by its environment, in this one by patches."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.file_download
import huggingface_hub.hf_api
import pytest
import transformers.utils.hub
from datasets.utils import file_utils
from huggingface_hub import HfApi, HfFileSystem, close_session, constants
from huggingface_hub.utils import _http as http
from huggingface_hub.utils.tqdm import progress_bar_states

from hub_server import HubServer

SOURCES = Path(__file__).resolve().parent.parent / "src"
WITHOUT_PROXY = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


# What the client raises when the server hangs up; its HTTP library goes by a name of its own in every major release.
CONNECTION_LOST: tuple[type[Exception], ...] = http._DEFAULT_RETRY_ON_EXCEPTIONS


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """The variables of a process whose Hub is `server`, with the owner's token and caches in `home`."""
    theirs = [name for name in os.environ if name.startswith("HF_") and not name.startswith("HF_VQ_")]
    ours = {name: value for name, value in os.environ.items() if name not in theirs}
    return ours | {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": server.token,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        # With Xet large files would go to another store by another protocol, and upload_folder makes many commits.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # datasets counts downloads at an address that is not the Hub's.
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SOURCES),
        **WITHOUT_PROXY,
    }


class ImpatientTime:
    """The module time to those who sleep between their tries: they do not."""

    @staticmethod
    def sleep(seconds: float) -> None:
        """Returns at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def forget_connections() -> None:
    """Open connections, and what file systems remember of listings: the next server may have the same port."""
    close_session()
    HfFileSystem.clear_instance_cache()


@contextmanager
def in_process(server: HubServer, home: Path) -> Iterator[HfApi]:
    """huggingface_hub, transformers and datasets speak to `server`, with caches in `home`, and retry without waiting.

    They read most constants when they need them; what they bound when they were imported is rebound here.
    """
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # huggingface_hub uploads large files by an argument that its HTTP library discourages.
        warnings.filterwarnings("ignore", "Use 'content=<...>'", DeprecationWarning)
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(home / "hub"),
        }.items():
            patch.setattr(constants, name, value)
        for name, value in {
            "HF_ENDPOINT": server.url,
            "HUB_DATASETS_URL": server.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
            "HF_HUB_OFFLINE": False,
            "HF_DATASETS_OFFLINE": False,
            "HF_UPDATE_DOWNLOAD_COUNTS": False,
            "HF_DATASETS_CACHE": home / "datasets",
            "DOWNLOADED_DATASETS_PATH": home / "datasets" / "downloads",
        }.items():
            patch.setattr(datasets.config, name, value)
        # Functions such as huggingface_hub.create_repo are methods of this one.
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        # transformers keeps a client of its own.
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        for name, value in {"HF_TOKEN": server.token, **WITHOUT_PROXY}.items():
            patch.setenv(name, value)
        for module in (http, huggingface_hub.file_download, file_utils):
            patch.setattr(module, "time", ImpatientTime())
        patch.setitem(progress_bar_states, "_global", False)
        forget_connections()
        try:
            yield HfApi(endpoint=server.url, token=server.token)
        finally:
            forget_connections()
