import math
import os
from pathlib import Path

import pytest

from fedknow.protocols.config import ConfigError, FleetConfig, read_config
from fedknow.simulations.fleet.devices import (
    FLEETS,
    NUMBERS,
    assign,
    load_profiles,
    phones,
    shipped_profiles,
)
from fedknow.simulations.fleet.links import make_links


def test_each_number_has_a_source():
    for name, profile in shipped_profiles().items():
        assert set(profile.source) == set(NUMBERS), name
        assert all(len(text) > 10 for text in profile.source.values()), name
        assert profile.memory_limit > 0
        assert profile.about


def test_data_sheets():
    known = shipped_profiles()
    for name, cores, ghz in (
        ("jetson-nano", 128, 0.9216),
        ("jetson-tx2", 256, 1.3),
        ("jetson-agx-orin", 2048, 1.3),
    ):
        assert known[name].peak == pytest.approx(cores * 2 * ghz * 1e9, rel=0.01)
    assert (
        known["raspberry-pi-4-8gb"].speed
        == known["raspberry-pi-4-2gb"].speed
        == pytest.approx(1.584e10)
    )
    assert known["raspberry-pi-4-8gb"].memory == 8e9
    assert math.isinf(known["infinite"].speed)


def test_flash_measured_the_phones():
    # LEAF's FEMNIST CNN, multiply-adds forward: two 5x5 convolutions (32, 64 channels, same
    # padding) and two layers.
    first = 28 * 28 * 32 * 25
    forward = first + 14 * 14 * 64 * 32 * 25 + 7 * 7 * 64 * 2048 + 2048 * 62
    batch = 10 * 2 * (3 * forward - first)
    for name, milliseconds in (("low", 1642), ("middle", 588), ("high", 179)):
        assert shipped_profiles()[f"phone-{name}"].speed == pytest.approx(
            batch / milliseconds * 1e3, rel=0.01
        )


def test_the_papers_testbeds():
    assert sum(FLEETS["testbed-a"].values()) == 20
    assert sum(FLEETS["testbed-b"].values()) == 30
    names = assign(FleetConfig(devices="testbed-a"), 20, 0)
    assert (
        names
        == ["jetson-nano"] * 8
        + ["jetson-tx2"] * 2
        + ["jetson-xavier-nx"] * 8
        + ["jetson-agx-xavier"] * 2
    )


def test_lists_are_repeated_and_patterns_are_drawn():
    assert assign(FleetConfig(devices=["infinite", "jetson-nano"]), 3, 0) == [
        "infinite",
        "jetson-nano",
        "infinite",
    ]
    assert assign(FleetConfig(devices="jetson-tx2"), 2, 0) == ["jetson-tx2"] * 2
    drawn = assign(FleetConfig(devices=["phone-*"]), 6, 0)
    assert sorted(drawn[:3]) == ["phone-high", "phone-low", "phone-middle"]
    assert (
        drawn[:3] == drawn[3:] == assign(FleetConfig(devices=["phone-*"]), 3, 0)
    )


@pytest.mark.parametrize(
    ("fleet", "message"),
    [
        ({"devices": {"jetson-nano": 8}}, r"8 devices for data.clients = 20"),
        (
            {"devices": ["jetson-nan"]},
            r"no device 'jetson-nan' \(did you mean 'jetson-nano'\?\)",
        ),
        ({"devices": "testbed-c"}, r"did you mean 'testbed-"),
        (
            {"devices": ["infinite"], "profiles": "/nowhere.toml"},
            r"fleet.profiles = '/nowhere.toml': cannot be read",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fleet, message):
    with pytest.raises(ConfigError, match=message):
        assign(FleetConfig(**fleet), 20, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "fleet.deadline=5",
            r"fleet.deadline = 5.0 does nothing without devices",
        ),
        ("fleet.devices.jetson-nano=0", r"fleet.devices"),
        ("fleet.over_commit=0.5", r"fleet.over_commit = 0.5"),
        ("fleet.speed=1", r"fleet.speed: unknown key"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config({}, [change])


def test_a_fleet_is_part_of_what_a_result_depends_on():
    config = read_config({}, ["fleet=testbed-a", "fleet.down=1e6"])
    assert config.fleet.devices == "testbed-a"
    assert config.digest_fields()["fleet"]["down"] == 1e6
    assert read_config(
        {"fleet": {"devices": {"jetson-nano": 8}}}, ["data.clients=8"]
    ).to_toml()


def test_own_profiles(tmp_path):
    path = tmp_path / "own.toml"
    text = "[box]\npeak = 1e9\nmemory = 1e9\nbusy = 5\nidle = 1\n"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"box.*source"):
        load_profiles(str(path))
    path.write_text(text + 'source = { peak = "measured" }\n')
    with pytest.raises(ConfigError, match=r"box.source lacks memory, busy, idle"):
        load_profiles(str(path))
    path.write_text(
        text
        + 'source = { peak = "measured", memory = "bought", busy = "meter", idle = "meter" }\n'
    )
    assert load_profiles(str(path))["box"].speed == 1e9
    assert "jetson-nano" in load_profiles(str(path))


def test_a_list_of_phones(tmp_path):
    path = tmp_path / "phones.csv"
    path.write_text(
        "model,soc,ram_gb,cpu_float_score\n"
        "One 5G+,A,8,2324\nTwo,B,4,1481\nTiny,C,1,100\nMid,D,3,698.1\n"
    )
    found = phones(path)
    known = shipped_profiles()
    assert list(found) == ["ai-one-5g", "ai-two", "ai-tiny", "ai-mid"]
    for name, like in (("one-5g", "high"), ("two", "middle"), ("tiny", "low")):
        assert found[f"ai-{name}"].speed == pytest.approx(
            known[f"phone-{like}"].speed
        )
    # Halfway between low and middle in the logarithm of the score: the geometric mean of their
    # speeds.
    half = math.sqrt(known["phone-low"].speed * known["phone-middle"].speed)
    assert found["ai-mid"].speed == pytest.approx(half, rel=1e-3)
    assert found["ai-one-5g"].memory_limit == 4e9
    path.write_text("model,ram_gb\nx,8\n")
    with pytest.raises(
        ConfigError, match=r"line 2: needs model, ram_gb and cpu_float_score"
    ):
        phones(path)


@pytest.mark.data
@pytest.mark.skipif(
    not os.environ.get("FEDKNOW_DATA"), reason="needs FEDKNOW_DATA"
)
def test_the_ai_benchmark_list():
    path = (
        Path(os.environ["FEDKNOW_DATA"]) / "devices" / "ai_benchmark_phones.csv"
    )
    found = phones(path)
    assert len(found) > 300
    assert {shipped_profiles()["phone-low"].speed} < {
        round(profile.speed, -3) for profile in found.values()
    }


def test_links_differ_as_told():
    links = make_links(
        FleetConfig(devices=["infinite"], down=100.0, link_sigma=0.5), 2000, 3
    )
    logs = [math.log(rate / 100) for rate in links.down]
    assert sum(logs) / 2000 == pytest.approx(0, abs=0.04)
    assert math.sqrt(sum(x * x for x in logs) / 2000) == pytest.approx(
        0.5, abs=0.03
    )
    assert set(links.up) == {math.inf}
