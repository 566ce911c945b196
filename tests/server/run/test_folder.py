import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.checks.faults import RunError
from fedknow.server.run.disk import running_out_of_disk
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.integrity import FolderDamaged

CONFIG = read_config({"data": {"clients": 2, "tasks": 3}, "train": {"rounds": 2}})


def finished(path):
    with RunFolder.create(path, CONFIG) as folder:
        folder.append({"event": "end"})


def test_a_new_folder_holds_the_whole_configuration(tmp_path):
    with RunFolder.create(tmp_path / "deep" / "run", CONFIG) as folder:
        assert RunFolder.open(folder.path).config == CONFIG
        assert folder.events() == []
        assert folder.partition is None
        assert not folder.complete
    assert "rounds = 2" in (tmp_path / "deep" / "run" / "config.toml").read_text()


def test_events_are_lines_of_strict_json(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        written = folder.append(
            {
                "event": "round",
                "loss": float("nan"),
                "n": np.int64(3),
                "list": np.array([0.5, np.inf]),
                "nested": {"x": np.float32(0.25)},
                "name": "ümlaut",
            }
        )
    expected = {
        "event": "round",
        "loss": None,
        "n": 3,
        "list": [0.5, None],
        "nested": {"x": 0.25},
        "name": "ümlaut",
    }
    assert written == expected
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert len(line.pop("crc32")) == 8
    assert line == expected
    assert RunFolder.open(tmp_path / "run").events() == [expected]


def test_half_a_line_is_not_an_event(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.append({"event": "start"})
        with (folder.path / "metrics.jsonl").open("a") as file:
            file.write('{"event": "rou')
        assert [event["event"] for event in folder.events()] == ["start"]


def test_events_are_cut_back_to_a_position(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.append({"event": "start"})
        position = folder.position()
        folder.append({"event": "round"})
        folder.cut_back(position)
        folder.append({"event": "again"})
        assert [event["event"] for event in folder.events()] == ["start", "again"]


def test_accuracy_round_trip_and_before_anything_was_scored(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        empty = folder.accuracy()
        assert empty["personal"].shape == (2, 3, 3)
        assert np.isnan(empty["personal"]).all()
        assert np.isnan(empty["global"]).all()
        assert (empty["weights"] == 0).all()
        assert empty["round_personal"].shape == (0, 2, 3)
        arrays = {
            "personal": np.arange(4.0).reshape(1, 2, 2),
            "weights": np.ones((1, 2)),
        }
        folder.write_accuracy(arrays)
        for name, value in folder.accuracy().items():
            np.testing.assert_array_equal(value, arrays[name])


def test_partition_round_trip(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.write_partition({"digest": "abc", "clients": [[1, 2], [3]]})
    assert RunFolder.open(tmp_path / "run").partition == {
        "digest": "abc",
        "clients": [[1, 2], [3]],
    }


def test_what_is_there_is_never_overwritten(tmp_path):
    finished(tmp_path / "done")
    with pytest.raises(ConfigError, match=r"finished run.*--out"):
        RunFolder.create(tmp_path / "done", CONFIG)
    RunFolder.create(tmp_path / "half", CONFIG).close()
    with pytest.raises(ConfigError, match=r"unfinished run.*--resume.*--out"):
        RunFolder.create(tmp_path / "half", CONFIG)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"no empty folder.*--out"):
        RunFolder.create(tmp_path / "other", CONFIG)
    with pytest.raises(ConfigError, match="no empty folder"):
        RunFolder.create(tmp_path / "other" / "thesis.tex", CONFIG)


def test_only_an_unfinished_run_of_the_same_experiment_is_resumed(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder.resume(tmp_path / "nothing", CONFIG)
    finished(tmp_path / "done")
    with pytest.raises(ConfigError, match="nothing to resume"):
        RunFolder.resume(tmp_path / "done", CONFIG)
    RunFolder.create(tmp_path / "half", CONFIG).close()
    other = read_config(CONFIG.model_dump(), ["train.lr=0.5", "data.tasks=4"])
    with pytest.raises(ConfigError) as error:
        RunFolder.resume(tmp_path / "half", other)
    assert "train.lr: was 0.001, now 0.5" in str(error.value)
    assert "data.tasks: was 3, now 4" in str(error.value)
    assert "--out" in str(error.value)
    elsewhere = read_config(
        CONFIG.model_dump(), ["engine.workers=7", "engine.on_client_error=skip"]
    )
    with RunFolder.resume(tmp_path / "half", elsewhere) as folder:
        assert folder.config.engine.workers == 7


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG):
        with pytest.raises(ConfigError, match="in use"):
            RunFolder.resume(tmp_path / "run", CONFIG)
        assert (
            RunFolder.open(tmp_path / "run").events() == []
        )  # reading is always possible
    RunFolder.resume(tmp_path / "run", CONFIG).close()
    code = (
        "import os, sys; from fedknow.server.run.folder import RunFolder\n"
        "folder = RunFolder.resume(sys.argv[1], RunFolder.open(sys.argv[1]).config); os._exit(9)"
    )
    died = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], check=False
    )
    assert died.returncode == 9
    RunFolder.resume(tmp_path / "run", CONFIG).close()


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(
    tmp_path, monkeypatch
):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.write_accuracy({"personal": np.ones(3)})

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with (
            pytest.raises(
                RunError, match=r"disk that holds .*run is full.*--resume"
            ),
            running_out_of_disk(folder.path),
        ):
            folder.write_accuracy({"personal": np.zeros(3)})
        np.testing.assert_array_equal(folder.accuracy()["personal"], np.ones(3))
        assert not [
            path for path in folder.path.iterdir() if path.suffix == ".tmp"
        ]


def test_other_faults_of_the_disk_are_not_called_a_full_one(tmp_path):
    with pytest.raises(OSError, match="read-only"), running_out_of_disk(tmp_path):
        raise OSError(errno.EROFS, "read-only file system")


def test_a_run_that_is_refused_before_it_began_leaves_nothing(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    assert len(folder.run_id) == 16
    folder.clients.mkdir()
    with pytest.raises(ConfigError, match="no port"), folder:
        raise ConfigError("no port")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with (
        pytest.raises(ConnectionError),
        RunFolder.create(tmp_path / "run", CONFIG),
    ):
        raise ConnectionError
    RunFolder.create(tmp_path / "run", CONFIG).close()
    with pytest.raises(ConfigError), RunFolder.resume(tmp_path / "run", CONFIG):
        raise ConfigError  # it was there before
    assert (tmp_path / "run" / "config.toml").is_file()


def test_a_run_that_began_is_kept_whatever_ends_it(tmp_path):
    folder = RunFolder.create(tmp_path / "run", CONFIG)
    folder.append({"event": "start"})
    with pytest.raises(ConfigError), folder:
        raise ConfigError
    assert [
        event["event"] for event in RunFolder.open(tmp_path / "run").events()
    ] == ["start"]


def test_paths_mean_the_same_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fleet = {
        "devices": "infinite",
        "profiles": "mine.toml",
        "availability": "there.csv",
    }
    config = read_config({"data": {"dir": "data"}, "fleet": fleet}).absolute()
    assert config.data.dir == str(tmp_path / "data")
    assert config.fleet.profiles == str(tmp_path / "mine.toml")
    assert config.fleet.availability == str(tmp_path / "there.csv")
    assert read_config({}).absolute() == read_config({})
    markov = read_config(
        {"fleet": {"devices": "infinite", "availability": "markov"}}
    )
    assert markov.absolute() == markov


def test_a_run_of_an_earlier_version_is_resumed_where_its_paths_are_relative(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = read_config(
        {"fleet": {"devices": "infinite", "profiles": "mine.toml"}}
    )
    RunFolder.create("run", config).close()
    RunFolder.resume("run", config.absolute()).close()
    other = read_config(config.model_dump(), ["fleet.profiles=/other"])
    with pytest.raises(ConfigError, match=r"fleet\.profiles: was "):
        RunFolder.resume(tmp_path / "run", other)


def damage(path, place=None):
    data = path.read_bytes()
    place = len(data) // 2 if place is None else place
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def test_damage_is_a_sentence_that_names_the_file(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        for number in range(3):
            folder.append({"event": "round", "loss": number / 8})
        folder.append({"event": "end"})
        folder.write_partition({"digest": "abc"})
        folder.write_fleet({"virtual_seconds": 1.5, "clients": []})
        folder.write_accuracy({"personal": np.arange(4.0)})
        assert len(folder.run_id) == 16
    folder = RunFolder.open(tmp_path / "run")
    for name in (
        "metrics.jsonl",
        "partition.json",
        "fleet.json",
        "accuracy.npz",
        "run-id",
    ):
        before = (folder.path / name).read_bytes()
        damage(folder.path / name)
        with pytest.raises(
            FolderDamaged,
            match=rf"{name} is not what the run wrote: .*; put it back",
        ):
            assert not (
                folder.events(),
                folder.partition,
                folder.fleet,
                folder.accuracy(),
                folder.run_id,
            )
        (folder.path / name).write_bytes(before)
    assert folder.complete
    assert [event.get("loss") for event in folder.events()] == [
        0.0,
        0.125,
        0.25,
        None,
    ]
    (folder.path / "config.toml").write_text(
        (folder.path / "config.toml")
        .read_text()
        .replace("rounds = 2", "rounds = 3")
    )
    with pytest.raises(
        ConfigError,
        match=r"config\.toml was changed since the run was made: .*--set",
    ):
        RunFolder.open(folder.path)


def test_a_line_that_is_gone_is_noticed(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        for number in range(4):
            folder.append({"event": "round", "loss": number})
        lines = (
            (folder.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        )
        for others in (
            lines[1:],
            lines[:1] + lines[2:],
            [lines[1], lines[0], *lines[2:]],
        ):
            (folder.path / "metrics.jsonl").write_bytes(b"".join(others))
            with pytest.raises(
                FolderDamaged, match=r"line \d: a checksum is wrong"
            ):
                folder.events()
            with pytest.raises(
                FolderDamaged,
                match=r"it has \d+ bytes and had \d+|checksum is wrong",
            ):
                folder.cut_back(len(b"".join(lines)))


def test_an_array_that_is_gone_from_the_directory_is_noticed(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.write_accuracy(
            {"personal": np.arange(4.0), "global": np.arange(4.0)}
        )
        path = folder.path / "accuracy.npz"
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(
                whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :]
            )
            try:
                assert folder.accuracy().keys() == {"personal", "global"}
                assert (
                    len(whole) - 19 <= place < len(whole) - 17
                )  # the comment's length
            except FolderDamaged:
                pass


def test_another_runs_files_are_noticed(tmp_path):
    other = read_config(CONFIG.model_dump(), ["seed=1"])
    for name, config in (("a", CONFIG), ("b", other)):
        with RunFolder.create(tmp_path / name, config) as folder:
            folder.append({"event": "end"})
            folder.write_fleet({"virtual_seconds": 1.5, "clients": []})
            folder.write_accuracy({"personal": np.arange(4.0)})
    folder = RunFolder.open(tmp_path / "a")
    for name, read in (
        ("metrics.jsonl", folder.events),
        ("fleet.json", lambda: folder.fleet),
        ("accuracy.npz", folder.accuracy),
    ):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(FolderDamaged, match=name):
            read()


def test_folders_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.toml").write_text(CONFIG.to_toml())
    (path / "metrics.jsonl").write_text('{"event": "start"}\n')
    (path / "partition.json").write_text('{"digest": "abc"}')
    (path / "run-id").write_text("0123456789abcdef")
    np.savez_compressed(path / "accuracy.npz", personal=np.arange(4.0))
    with RunFolder.resume(path, CONFIG) as folder:
        assert folder.run_id == "0123456789abcdef"
        assert folder.partition == {"digest": "abc"}
        np.testing.assert_array_equal(
            folder.accuracy()["personal"], np.arange(4.0)
        )
        folder.cut_back(folder.position())
        folder.append({"event": "end"})
        assert folder.complete
        assert [event["event"] for event in folder.events()] == ["start", "end"]
        damage(path / "metrics.jsonl", 12)
        with pytest.raises(
            FolderDamaged,
            match="line 2: a checksum is wrong here or in the lines before",
        ):
            folder.events()
    (path / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="was changed since the run was made"):
        RunFolder.open(path)


def test_a_run_that_clients_know_does_not_get_another_name(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.checkpoints.mkdir()
        with pytest.raises(
            FolderDamaged,
            match=r"run-id is missing, so clients would not know the run again",
        ):
            assert not folder.run_id
