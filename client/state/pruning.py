"""Deleting the files of client states that no checkpoint needs any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fedknow.client.state.errors import StateError
from fedknow.client.state.files import Files
from fedknow.client.state.layout import client_in, version_path
from fedknow.client.state.parts import NamedParts, is_part

__all__ = ["Pruning"]


class Pruning:
    """Deletes what is in a folder of states and does not count any more.

    Only clients that were *touched* since the last time may have files of older versions. To look
    at all files of a hundred thousand clients takes longer than many a round. At first all count
    as touched.

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
        self._named_parts = NamedParts(folder, files)
        self._touched: set[int] | None = None
        # One a store: a process that forks keeps no thread, so a shared one would wait for ever
        # in the child.
        self._background = ThreadPoolExecutor(1, "fedknow-prune")
        self._deleting: Future[None] | None = None

    def touch(self, clients: Iterable[int] | None) -> None:
        """Note clients that may have a new version; ``None``: any may."""
        if clients is None:
            self._touched = None
        elif self._touched is not None:
            self._touched.update(clients)

    def prune(self, versions: Mapping[int, int]) -> None:
        """Delete the files of all present versions but those given, by client.

        A disk may take milliseconds for each, so it is done in the background; :meth:`settle`
        waits for it.

        Raises
        ------
        StateError
            If a file could not be deleted the last time.
        """
        # The last deletion must be through, or this one would list files that are about to go.
        self.settle()
        touched, self._touched = self._touched, set()
        names = {
            version_path(self._folder, client, versions[client]).name
            for client in (versions if touched is None else touched)
            if versions.get(client)
        }
        # Listed now: files that come later are no business of this call's.
        present = self._files.list(self._folder, touched)
        self._deleting = self._background.submit(
            self.delete_except, names, present
        )

    def settle(self) -> None:
        """Wait until :meth:`prune` is through.

        Raises
        ------
        StateError
            If a file could not be deleted.
        """
        if self._deleting is not None:
            deleting = self._deleting
            # It raises once: whoever waits next is told nothing of it.
            self._deleting = None
            deleting.result()

    def delete_except(
        self, names: Collection[str], present: Sequence[Path]
    ) -> None:
        """Delete what is present, except some versions and their parts.

        A version that stays need not be among what is present: on a disk of many machines a
        listing may be late.
        """
        unclear = self._named_parts.read(names, present)
        required = self._named_parts.names.union(names)
        try:
            for path in present:
                # Which parts a damaged state names is not known, so all of its client's stay.
                is_unclear = is_part(path) and client_in(path.name) in unclear
                if path.name not in required and not is_unclear:
                    self._files.delete(path)
        except OSError as error:
            raise StateError(
                f"{self._folder}: old client states cannot be deleted: {error}"
            ) from error
