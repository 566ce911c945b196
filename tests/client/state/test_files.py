"""Files that are sealed with a key."""

import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedknow.client.state import StateLost, StateStore, files
from fedknow.client.state.files import Files, SealedFiles, read_key
from fedknow.protocols.config import ConfigError

KEY = bytes(range(32))


@given(
    st.binary(max_size=100), st.integers(0, 10_000), st.sampled_from([7, 2**26])
)
def test_a_changed_byte_is_found(tmp_path_factory, data, place, chunk):
    path = tmp_path_factory.mktemp("sealed") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK_BYTES", chunk)
        SealedFiles(KEY).write(path, data, durable=False)
        assert SealedFiles(KEY).read(path) == data
        sealed = bytearray(path.read_bytes())
        sealed[place % len(sealed)] ^= 1
        path.write_bytes(sealed)
        with pytest.raises(ValueError, match="damaged"):
            SealedFiles(KEY).read(path)


@pytest.mark.parametrize("kept", [0, 3, 36, 52, 36 + 23, 36 + 46])
def test_a_file_cut_short_is_found_even_between_chunks(
    tmp_path, monkeypatch, kept
):
    monkeypatch.setattr(files, "_CHUNK_BYTES", 7)
    path = tmp_path / "file"
    SealedFiles(KEY).write(path, b"x" * 21)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged"):
        SealedFiles(KEY).read(path)


def test_a_file_has_its_name_and_its_key(tmp_path):
    SealedFiles(KEY).write(tmp_path / "one", b"text")
    (tmp_path / "two").write_bytes((tmp_path / "one").read_bytes())
    with pytest.raises(ValueError, match="damaged"):
        SealedFiles(KEY).read(tmp_path / "two")
    with pytest.raises(ValueError, match="damaged"):
        SealedFiles(bytes(32)).read(tmp_path / "one")


@pytest.mark.parametrize("writer", [Files(0o600), SealedFiles(KEY)])
def test_files_are_the_owners_whatever_the_umask(tmp_path, writer):
    writer.write(tmp_path / "file", b"text")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_a_store_keeps_states_and_parts_sealed(tmp_path):
    kept = torch.arange(40_000.0)
    store = StateStore(tmp_path, 2**24, files=SealedFiles(KEY))
    store.save(0, 1, {"kept": kept})
    store.save(0, 2, {**store.load(0, 1), "n": 1})
    store.save(0, 3, {**store.load(0, 2), "n": 2})
    assert list(tmp_path.glob("*.part.*"))
    store.prune({0: 3})
    store.settle()
    again = StateStore(tmp_path, 0, files=SealedFiles(KEY)).load(0, 3)
    assert again["n"] == 2
    assert torch.equal(again["kept"], kept)
    some = kept.numpy().tobytes()[4000:4064]
    assert not any(some in path.read_bytes() for path in tmp_path.iterdir())
    for path in tmp_path.glob("*.part.*"):
        sealed = bytearray(path.read_bytes())
        sealed[5000] ^= 1
        path.write_bytes(sealed)
    with pytest.raises(StateLost, match="damaged: its seal is broken"):
        StateStore(tmp_path, 0, files=SealedFiles(KEY)).load(0, 3)


def test_a_key_has_32_bytes_and_is_its_owners(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        read_key(path)
    path.write_bytes(KEY[:31])
    with pytest.raises(ConfigError, match="has 31; make one"):
        read_key(path)
    path.write_bytes(KEY)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(path)
    path.chmod(0o600)
    assert read_key(path) == KEY


def test_the_missing_package_is_named(monkeypatch):
    module = "cryptography.hazmat.primitives.hashes"
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=r"--state-key.*cryptography"):
        SealedFiles(KEY)
