"""Hostile clients: who they are, what they send, and that nobody else is touched."""

import json

import numpy as np
import pytest

from fedknow.client.data import make_benchmark
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.hostile import check_honest, hostile_clients
from fedknow.protocols.messages import (
    ARRAYS,
    METRICS,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    node_of,
)
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.attacks import build_attack, little_factor
from fedknow.simulations.simulate import prepare, simulate

SMALL = {
    "data": {
        "clients": 5,
        "tasks": 1,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 0.5,
    },
    "model": "mlp",
    "train": {"rounds": 2, "epochs": 1},
    "learner": "fedavg",
    "engine": {"backend": "inline"},
}


def configured(*overrides, **sections):
    return read_config(SMALL | sections, overrides)


def answers(model, honest):
    """A wave: the work of each client, and what it honestly answers."""
    work, replies = [], []
    for client, values in enumerate(honest):
        content = {
            ARRAYS: Arrays(w=np.asarray(model, np.float32)),
            "config": Config(task=0),
        }
        message = Message(TRAIN, node_of(client), str(client), content=content)
        arrays = Arrays(w=np.asarray(values, np.float32), n=np.array([7]))
        reply = {ARRAYS: arrays, METRICS: Metrics({"num-examples": 3})}
        work.append(message)
        replies.append((message.reply(reply), client))
    return work, replies


def falsified(config, model, honest):
    work, replies = answers(model, honest)
    given = list(build_attack(config).falsify(work, replies))
    by_client = {version: reply for reply, version in given}
    assert len(by_client) == len(honest)
    return [by_client[client].content[ARRAYS] for client in range(len(honest))]


def test_the_seed_chooses_the_hostile_clients():
    config = configured("attack=signflip", "attack.clients=0.4")
    chosen = hostile_clients(config)
    assert len(chosen) == 2
    assert chosen == hostile_clients(config)
    others = {
        hostile_clients(configured("attack=signflip", "attack.clients=0.4", f"seed={seed}"))
        for seed in range(10)
    }  # fmt: skip
    assert len(others) > 1
    assert hostile_clients(configured()) == ()
    # The same ones whatever they do, so that attacks compare.
    assert (
        hostile_clients(configured("attack=scaling", "attack.clients=0.4"))
        == chosen
    )


@pytest.mark.parametrize(
    ("overrides", "sent"),
    [
        (["attack=signflip"], [10 - 4, 10 + 8]),
        (["attack=signflip", "attack.scale=1"], [10 - 1, 10 + 2]),
        (["attack=scaling"], [10 + 10, 10 - 20]),
        (["attack=backdoor"], [10 + 5, 10 - 10]),
        (["attack=labelflip"], [11, 8]),
    ],
)
def test_updates_by_hand(overrides, sent):
    config = configured(*overrides)
    (hostile,) = hostile_clients(config)
    honest = [[11, 8]] * 5
    for client, arrays in enumerate(falsified(config, [10, 10], honest)):
        expected = sent if client == hostile else [11, 8]
        assert arrays["w"].tolist() == expected
        assert arrays["w"].dtype == np.float32
        assert arrays["n"].tolist() == [7]


def test_conspirators_send_one_update_by_hand():
    config = configured("attack=little", "attack.clients=0.4", "attack.scale=0.5")
    one, other = hostile_clients(config)
    honest = [[0.0, 0.0]] * 5
    honest[one], honest[other] = [1.0, 10.0], [5.0, 10.0]
    sent = falsified(config, [0, 0], honest)
    # Mean 3 and 10, standard deviations 2 and 0.
    assert sent[one]["w"].tolist() == sent[other]["w"].tolist() == [2.0, 10.0]


def test_the_paper_s_factor():
    # n = 50, m = 24: s = 2, and the quantile at 24 / 26 (section 3.3).
    assert little_factor(50, 24) == pytest.approx(1.426, abs=1e-3)
    assert little_factor(10, 8) > 3


def prepared(*overrides):
    config = configured(*overrides)
    return prepare(config, make_benchmark(config))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attack=signfilp"], "attack.name = 'signfilp'"),
        (["attack.clients=0.5"], "attack.clients = 0.5 does nothing without an attack"),
        (["attack=labelflip", "attack.scale=2"], "attack.scale = 2 does nothing"),
        (["attack=signflip", "attack.clients=0.95"], "attack.clients = 0.95: that is all of 5"),
        (["attack=little"], "attack.clients = 0.2: clients conspire"),
        (["attack=little", "attack.clients=0.4", "strategy=fedbuff", "strategy.buffer=2"],
            "clients conspire within a round"),
        (["attack=signflip", "engine.running_mean=true"], "set it to false"),
        (["attack=signflip", "learner=local"], "sends nothing that could be attacked"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(overrides, words):
    with pytest.raises(ConfigError) as error:
        prepared(*overrides)
    assert words in str(error.value)


def test_real_clients_refuse_an_attack():
    with pytest.raises(ConfigError, match=r"attack.name = 'scaling'.*simulate"):
        check_honest(configured("attack=scaling"))
    check_honest(configured())


def run(tmp_path, name, *overrides):
    config = configured(*overrides)
    result = simulate(config, tmp_path / name, report=False)
    start = RunFolder.open(tmp_path / name).events()[0]
    return result.arrays, start


def test_a_run_is_attacked_and_says_by_whom(tmp_path):
    honest, start = run(tmp_path, "honest")
    assert "attack" not in start
    assert "[attack]" not in (tmp_path / "honest/config.toml").read_text()
    attacked, start = run(tmp_path, "attacked", "attack=signflip")
    assert start["attack"] == "signflip"
    assert start["hostile"] == list(
        hostile_clients(configured("attack=signflip"))
    )
    assert any(not np.array_equal(honest[key], attacked[key]) for key in honest)


@pytest.mark.parametrize("attack", ["labelflip", "little"])
def test_numbers_are_the_same_with_a_fleet_and_without(tmp_path, attack):
    overrides = [f"attack={attack}", "attack.clients=0.4"]
    plain, _ = run(tmp_path, "plain", *overrides)
    fleet, _ = run(tmp_path, "fleet", *overrides, "fleet.devices=infinite")
    assert all(np.array_equal(plain[key], fleet[key]) for key in plain)


def test_the_report_names_the_attack(tmp_path):
    simulate(configured("attack=scaling"), tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    assert "attack scaling by 1 client" in page
    line = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["attack"] == "scaling"
