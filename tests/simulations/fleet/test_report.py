"""What a person sees of a fleet: the report, the list of devices, a profile of this machine."""

import json
import math

import psutil
from typer.testing import CliRunner

from fedknow.cli import app
from fedknow.protocols.config import read_config
from fedknow.server.reports.page import write_report
from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.fleet.calibrate import calibrate
from fedknow.simulations.fleet.devices import FLEETS, read_profiles
from fedknow.simulations.simulate import simulate

SMALL = {
    "data": {
        "tasks": 2,
        "clients": 3,
        "classes_min": 2,
        "classes_max": 2,
        "share": "overlapping",
    },
    "model": {"name": "mlp", "hidden": 16},
    "train": {"rounds": 1, "epochs": 1},
    "learner": "finetune",
    "engine": {"backend": "inline"},
    "fleet": {
        "devices": ["jetson-nano", "raspberry-pi-3"],
        "down": 1e4,
        "up": 1e4,
    },
}


def test_the_report_says_where_the_time_went(tmp_path):
    simulate(read_config(SMALL), tmp_path / "one")
    page = (tmp_path / "one" / "report.html").read_text()
    for text in (
        "Virtual time on the fleet",
        "jetson-nano (2)",
        "raspberry-pi-3 (1)",
        "The slowest clients",
        '<th scope="col">away</th>',
        "are rough",
    ):
        assert text in page
    assert {"hours.png", "devices.png"} <= {
        path.name for path in (tmp_path / "one" / "plots").iterdir()
    }
    run = RunFolder.open(tmp_path / "one")
    end = next(event for event in run.events() if event["event"] == "end")
    measures = summarise(run).measures()
    for key in ("virtual_seconds", "communication_seconds", "energy_joules"):
        assert measures[key] == end[key] > 0
    assert (
        json.loads((tmp_path / "one" / "fleet.json").read_text())[
            "virtual_seconds"
        ]
        == end["virtual_seconds"]
    )

    simulate(
        read_config(SMALL, ["fleet.down=1e5"]), tmp_path / "two", report=False
    )
    page = write_report(
        [run, RunFolder.open(tmp_path / "two")], tmp_path
    ).read_text()
    assert "Accuracy over virtual time" in page
    assert "fleet.down=10000.0" in page


def test_a_run_without_a_fleet_does_not_speak_of_one(tmp_path):
    config = read_config(
        {key: value for key, value in SMALL.items() if key != "fleet"}
    )
    simulate(config, tmp_path)
    assert (
        "irtual"
        not in (tmp_path / "report.html").read_text().split("config.toml")[0]
    )
    assert not (tmp_path / "fleet.json").exists()


def test_devices_are_listed():
    text = (
        CliRunner()
        .invoke(app, ["list", "devices"], env={"COLUMNS": "200"})
        .output
    )
    assert "jetson-nano" in text
    assert "82.6 GFLOP/s, room for 2.5 GB, 10 W" in text
    assert "testbed-b" in text


def test_each_number_of_a_device_has_its_source():
    def shown(*names):
        return CliRunner().invoke(app, ["list", *names], env={"COLUMNS": "250"})

    nano = shown("devices", "jetson-nano").output.splitlines()
    assert nano[0] == "jetson-nano: Jetson Nano 4 GB, 128-core Maxwell"
    lines = {line.split()[0]: line for line in nano[1:]}
    assert list(lines) == [
        "peak",
        "efficiency",
        "speed",
        "memory",
        "reserved",
        "room",
        "busy",
        "idle",
    ]
    assert "236 GFLOP/s" in lines["peak"]
    assert "NVIDIA Jetson Nano module data sheet" in lines["peak"]
    assert "0.35" in lines["efficiency"]
    assert "assumed: about a third" in lines["efficiency"]
    assert "2.5 GB" in lines["room"]
    assert "memory less reserved" in lines["room"]
    assert "10 W" in lines["busy"]
    assert "2 W" in lines["idle"]
    titles = [
        line
        for line in shown("devices", "testbed-b").output.splitlines()
        if line[0] != " "
    ]
    assert [title.split(":")[0] for title in titles] == list(FLEETS["testbed-b"])
    assert (
        len(
            [
                line
                for line in shown("devices", "phone-*").output.splitlines()
                if line[0] != " "
            ]
        )
        == 3
    )
    for arguments, message in (
        (
            ("devices", "jetson-nan"),
            "no device 'jetson-nan' (did you mean 'jetson-nano'?)",
        ),
        (("learners", "gme"), "no such learner (did you mean 'gem'?)"),
    ):
        result = shown(*arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())


def test_this_machine_becomes_a_device(tmp_path):
    path = tmp_path / "devices.toml"
    small = [
        "--set",
        "model=mlp",
        "--set",
        "data.clients=3",
        "--seconds",
        "0",
        "--out",
        str(path),
    ]
    for name, watts in (
        ("here", ["--busy-watts", "20", "--idle-watts", "3"]),
        ("there", ["--busy-watts", "20"]),
    ):
        result = CliRunner().invoke(
            app, ["calibrate", "digits", "--name", name, *watts, *small]
        )
        assert result.exit_code == 0, result.output
        assert ("Its energy is unknown" in result.output) == (name == "there")
    found = read_profiles(path)
    assert list(found) == ["here", "there"]
    profile = found["here"]
    assert 1e5 < profile.speed < 1e13
    assert profile.memory == psutil.virtual_memory().total
    assert 0 < profile.memory_limit < profile.memory
    assert (profile.busy, profile.idle) == (20, 3)
    assert (found["there"].busy, found["there"].idle) == (20, None)
    assert (
        "measured: median of 3 rounds on the CPU (fedknow, mlp on digits"
        in profile.source["peak"]
    )
    simulate(
        read_config(SMALL, ["fleet.devices=here", f"fleet.profiles={path}"]),
        tmp_path / "run",
        report=False,
    )
    assert [
        client["device"]
        for client in RunFolder.open(tmp_path / "run").fleet["clients"]
    ] == ["here"] * 3


def test_caches_are_room(tmp_path, monkeypatch):
    memory = psutil.virtual_memory()._replace(
        total=8_000_000_000, available=6_000_000_000, free=1_000_000_000
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    profile = calibrate(read_config(SMALL), seconds=0.0)
    assert (profile.memory, profile.memory_limit) == (8e9, 6e9)


def test_energy_of_a_device_without_watts_is_unknown(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text(
        '[box]\npeak = 1e9\nmemory = 4e9\nsource = { peak = "made up", memory = "made up" }\n'
    )
    simulate(
        read_config(SMALL, [f"fleet.profiles={own}", "fleet.devices=box"]),
        tmp_path / "run",
    )
    run = RunFolder.open(tmp_path / "run")
    assert {client["joules"] for client in run.fleet["clients"]} == {None}
    assert math.isnan(summarise(run).measures()["energy_joules"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>unknown</td>" in page
    assert "Energy, all devices" not in page
