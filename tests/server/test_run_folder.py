import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.checks import RunError
from fedknow.server.run_folder import RunFolder, running_out_of_disk

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
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == expected
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
        arrays = {"personal": np.arange(4.0).reshape(1, 2, 2), "weights": np.ones((1, 2))}
        folder.write_accuracy(arrays)
        for name, value in folder.accuracy().items():
            np.testing.assert_array_equal(value, arrays[name])


def test_partition_round_trip(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.write_partition({"digest": "abc", "clients": [[1, 2], [3]]})
    assert RunFolder.open(tmp_path / "run").partition == {"digest": "abc", "clients": [[1, 2], [3]]}


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
    elsewhere = read_config(CONFIG.model_dump(), ["engine.workers=7", "engine.on_client_error=skip"])
    with RunFolder.resume(tmp_path / "half", elsewhere) as folder:
        assert folder.config.engine.workers == 7


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path):
    with RunFolder.create(tmp_path / "run", CONFIG):
        with pytest.raises(ConfigError, match="in use"):
            RunFolder.resume(tmp_path / "run", CONFIG)
        assert RunFolder.open(tmp_path / "run").events() == []  # reading is always possible
    RunFolder.resume(tmp_path / "run", CONFIG).close()
    code = (
        "import os, sys; from fedknow.server.run_folder import RunFolder\n"
        "folder = RunFolder.resume(sys.argv[1], RunFolder.open(sys.argv[1]).config); os._exit(9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False)
    assert died.returncode == 9
    RunFolder.resume(tmp_path / "run", CONFIG).close()


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch):
    with RunFolder.create(tmp_path / "run", CONFIG) as folder:
        folder.write_accuracy({"personal": np.ones(3)})

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with (
            pytest.raises(RunError, match=r"disk that holds .*run is full.*--resume"),
            running_out_of_disk(folder.path),
        ):
            folder.write_accuracy({"personal": np.zeros(3)})
        np.testing.assert_array_equal(folder.accuracy()["personal"], np.ones(3))
        assert not [path for path in folder.path.iterdir() if path.suffix == ".tmp"]


def test_other_faults_of_the_disk_are_not_called_a_full_one(tmp_path):
    with pytest.raises(OSError, match="read-only"), running_out_of_disk(tmp_path):
        raise OSError(errno.EROFS, "read-only file system")
