"""CLINC150: sentences that tell an assistant what to do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.ragged import Ragged
from fedknow.client.data.recorded import Records, Rows
from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.wordpiece import WordPiece, find_wordpiece

__all__ = [
    "CLINC_COLUMNS",
    "UNKNOWN",
    "Vocabulary",
    "make_tokenizer",
    "read_clinc150",
    "words",
]

CLINC_COLUMNS = ("text", "intent", "domain")

UNKNOWN = 1
"""Token id of words that are not in the vocabulary."""

_LENGTH = 24
"""Words of a sentence that a model sees; longer ones are rare."""
_PIECES = 36
"""The same for pieces of words."""
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]")


def words(text: str) -> list[str]:
    """Split a sentence into lower-case words and digits.

    Examples
    --------
    >>> words("What's 20 euros in yen?")
    ["what's", '2', '0', 'euros', 'in', 'yen']
    """
    return _WORD.findall(text.lower())


class Vocabulary:
    """Words that occur at least twice, by how often they do.

    Id 0 is no word, and 1 any other word.

    Parameters
    ----------
    texts : iterable of str
        Training sentences.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        counts = Counter(chain.from_iterable(map(words, texts)))
        # By the alphabet among equals, so that the order of sentences does not matter.
        order = sorted(counts, key=lambda word: (-counts[word], word))
        # A word met once counts as unknown, so that training meets unknown words too.
        frequent = [word for word in order if counts[word] > 1]
        # 0 is padding, and 1 stands for an unknown word.
        self.ids = {word: 2 + place for place, word in enumerate(frequent)}

    def __len__(self) -> int:
        """Count the ids."""
        return 2 + len(self.ids)

    def encode(self, texts: Sequence[str]) -> Ragged:
        """Turn sentences into ids, int32, at their own lengths."""
        return Ragged.join([self._ids(text) for text in texts])

    def _ids(self, text: str) -> NDArray[np.int32]:
        ids = [self.ids.get(word, UNKNOWN) for word in words(text)]
        return np.array(ids, np.int32)


def make_tokenizer(
    tokenizer: str, texts: Iterable[str]
) -> Vocabulary | WordPiece:
    """Make what turns texts into ids, as ``data.tokenizer`` says.

    Parameters
    ----------
    tokenizer : str
        ``words``: those of the training texts; ``wordpiece``: pieces that a pretrained network
        knows.
    texts : iterable of str
        Training texts.

    Raises
    ------
    ConfigError
        If the vocabulary of a pretrained network is not installed.
    """
    return find_wordpiece() if tokenizer == "wordpiece" else Vocabulary(texts)


def read_clinc150(tables: Mapping[str, Any], tokenizer: str = "words") -> Records:
    """Read the sentences of CLINC150 as token ids.

    A row has ``text``, its ``intent`` and the ``domain`` that 15 intents belong to. The
    classes of a domain are a group. The vocabulary is that of the training sentences.

    Parameters
    ----------
    tables : mapping
        Parquet tables ``train`` and ``test``.
    tokenizer : str
        See :func:`make_tokenizer`.

    References
    ----------
    Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope
    Prediction", EMNLP 2019.
    """
    vocabulary = make_tokenizer(tokenizer, tables["train"]["text"].to_pylist())
    parts = []
    for part in ("train", "test"):
        table = tables[part]
        domains = np.array(table["domain"].to_pylist())
        rows = Rows(
            vocabulary.encode(table["text"].to_pylist()),
            np.array(table["intent"].to_pylist()),
            {"domain": domains},
        )
        parts.append(rows)
    sample = SampleSpec(
        "tokens",
        # Words fall into pieces, and marks stand around them.
        (_LENGTH if tokenizer == "words" else _PIECES,),
        "int32",
        is_ragged=True,
        vocabulary=len(vocabulary),
    )
    train, test = parts
    return Records(sample, train, test, groups="domain")
