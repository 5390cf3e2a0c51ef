"""From a cell to a picture: what a server refuses for a moment is no bad picture."""

import io
from collections.abc import Iterator

import pytest

from corpora import picture, png
from hf_vq import decoding
from hf_vq.decoding import BadImageError, decode_image

CELL = {"bytes": None, "path": "https://pictures.example/1.png"}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception | bytes]]:
    """What the server answers, one after the other; nobody waits between."""
    given: list[Exception | bytes] = []

    def answer(path: str) -> io.BytesIO:
        assert path == CELL["path"]
        if isinstance(found := given.pop(0), Exception):
            raise found
        return io.BytesIO(found)

    monkeypatch.setattr(decoding, "open_file", answer)
    monkeypatch.setattr(decoding._fetched.retry, "sleep", lambda seconds: None)
    yield given
    assert not given


def test_a_busy_server_is_asked_again(answers: list[Exception | bytes]):
    answers += [TimeoutError("busy"), ConnectionError("503"), png(1)]
    assert decode_image(CELL).tobytes() == picture(1).tobytes()


def test_one_that_stays_away_is_named_with_its_reason(answers: list[Exception | bytes]):
    answers += [ConnectionError("503, Service Unavailable")] * decoding.ATTEMPTS
    with pytest.raises(BadImageError, match="503, Service Unavailable"):
        decode_image(CELL)


def test_what_is_not_there_is_asked_for_once(answers: list[Exception | bytes]):
    answers += [FileNotFoundError("404")]
    with pytest.raises(BadImageError, match="404"):
        decode_image(CELL)
