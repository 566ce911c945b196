"""Which files of parts the versions of states name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from fedknow.client.state.codec import part_names
from fedknow.client.state.errors import StateLost
from fedknow.client.state.files import Files
from fedknow.client.state.layout import PART_SUFFIX, client_in, find

__all__ = ["NamedParts", "is_part"]


class NamedParts:
    """The parts that the versions in a folder name.

    Parameters
    ----------
    folder : Path
        Where the files lie.
    files : Files
        How they are read.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder = folder
        self._files = files
        self._noted: dict[str, tuple[int, frozenset[str]]] = {}

    @property
    def names(self) -> set[str]:
        """File names of all parts that were named when :meth:`read` looked."""
        return set().union(*(parts for _, parts in self._noted.values()))

    def read(self, names: Collection[str], present: Sequence[Path]) -> set[str]:
        """Note the parts that some versions name.

        Parameters
        ----------
        names : collection of str
            File names of the versions.
        present : sequence of Path
            The files of the folder.

        Returns
        -------
        set of str
            The clients whose parts could not be found out.
        """
        divided = {client_in(path.name) for path in present if is_part(path)}
        unclear: set[str] = set()
        noted: dict[str, tuple[int, frozenset[str]]] = {}
        for name in names:
            if client_in(name) not in divided:
                continue
            try:
                noted[name] = self._parts_in(name)
            except (OSError, StateLost):
                # Whoever asks for this state is told what is wrong with it.
                unclear.add(client_in(name))
        # Only of these versions: those that are gone would fill memory over a long run.
        self._noted = noted
        return unclear

    def _parts_in(self, name: str) -> tuple[int, frozenset[str]]:
        """Give when a version was written, and the parts that it names."""
        path = find(self._folder, name)
        written = self._files.stamp(path)
        noted = self._noted.get(name)
        # Headers are read once: a folder may hold thousands of files.
        if noted and noted[0] == written:
            return noted
        return written, part_names(path, self._files)


def is_part(path: Path) -> bool:
    """Tell whether a file is a part, and no version."""
    return path.name.endswith(PART_SUFFIX)
