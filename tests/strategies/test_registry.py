import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp import strategy as flower

from fedknow.protocols.config import ConfigError, StrategyConfig
from fedknow.strategies import build_strategy, list_strategies, quiet_flower

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = {
    "qfedavg": {"client_learning_rate": 0.1},
    "dp-fixed-clipping": {
        "noise_multiplier": 0.5,
        "clipping_norm": 1.0,
        "num_sampled_clients": 4,
    },
    "dp-adaptive-clipping": {
        "noise_multiplier": 0.5,
        "num_sampled_clients": 4,
        "clipped_count_stddev": 2.0,
    },
}


def build(name, **options):
    return build_strategy(StrategyConfig(name=name, **options))


@pytest.mark.parametrize("name", list_strategies())
def test_every_name_makes_a_strategy_that_works_with_one_client(name):
    strategy = build(name, **NEEDED.get(name, {}))
    assert isinstance(strategy, flower.Strategy)
    inner = getattr(strategy, "strategy", strategy)
    assert (
        inner.min_train_nodes,
        inner.min_available_nodes,
        inner.fraction_evaluate,
    ) == (1, 1, 0.0)
    assert list_strategies()[name]


def test_the_names_the_documentation_promises():
    assert {
        "fedavg", "fedprox", "fedavgm", "fedadam", "fedadagrad", "fedyogi", "fedmedian",
        "fedtrimmedavg", "krum",
        "multikrum", "bulyan", "qfedavg",
    } <= list_strategies().keys()  # fmt: skip


def test_options_reach_the_constructor():
    strategy = build("fedadam", eta=0.25, fraction=0.4, min_train_nodes=3)
    assert type(strategy) is flower.FedAdam
    assert (strategy.eta, strategy.fraction_train, strategy.min_train_nodes) == (
        0.25,
        0.4,
        3,
    )


def test_privacy_wraps_fedavg_and_shares_the_options_out():
    strategy = build(
        "dp-fixed-clipping", fraction=0.5, **NEEDED["dp-fixed-clipping"]
    )
    assert isinstance(strategy, flower.DifferentialPrivacyServerSideFixedClipping)
    assert strategy.clipping_norm == 1.0
    assert strategy.strategy.fraction_train == 0.5


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fedagv", {}, ["'fedagv'", "'fedavg'", "fedmedian", "module:Class"]),
        ("fedavg", {"fractoin": 0.5},
            ["strategy.fractoin = 0.5", "'fraction_train'", "min_train_nodes"]),
        ("fedavg", {"fraction": 0}, ["strategy.fraction_train = 0", "above 0"]),
        ("fedavg", {"fraction": 1.5}, ["strategy.fraction_train = 1.5", "at most 1"]),
        ("fedadam", {"eta": "fast"}, ["strategy.eta = 'fast'", "a number"]),
        ("fedadam", {"eta": True}, ["strategy.eta = True", "a number"]),
        ("fedavg", {"weighted_by_key": 3}, ["strategy.weighted_by_key = 3", "text"]),
        ("fedavg", {"train_metrics_aggr_fn": "f"},
            ["strategy.train_metrics_aggr_fn", "no such option"]),
        ("qfedavg", {}, ["needs strategy.client_learning_rate"]),
        ("dp-fixed-clipping", {"noise_multiplier": 1},
            ["strategy.clipping_norm", "strategy.num_sampled_clients"]),
        ("fedtrimmedavg", {"beta": 0.7}, ["strategy.beta = 0.7", "[0, 0.5)"]),
        ("no_such_module:X", {}, ["no_such_module", "ModuleNotFoundError"]),
        ("json:NoSuch", {}, ["'NoSuch'"]),
        ("collections:OrderedDict", {}, ["flwr.serverapp.strategy.Strategy"]),
        ("fedadam", {"eta": float("nan")}, ["strategy.eta = nan", "finite"]),
        ("fedadam", {"eta": 0}, ["strategy.eta = 0", "above 0"]),
        ("fedadam", {"tau": 0.0}, ["strategy.tau = 0.0", "above 0"]),
        ("fedadam", {"beta_1": 1}, ["strategy.beta_1 = 1", "at least 0 and below 1"]),
        ("fedavg", {"min_train_nodes": 2.5},
            ["strategy.min_train_nodes = 2.5", "a whole number, at least 1"]),
        ("fedprox", {"proximal_mu": float("inf")}, ["strategy.proximal_mu = inf", "finite"]),
        ("krum", {"num_malicious_nodes": -1},
            ["num_malicious_nodes = -1", "a whole number, at least 0"]),
        ("krum", {"num_malicious_nodes": 2.5},
            ["num_malicious_nodes = 2.5", "a whole number, at least 0"]),
        ("fedprox", {"proximal_mu": 1e308}, ["strategy.proximal_mu = 1e+308", "at most 1e+06"]),
        ("flwr.serverapp.strategy:Krum", {"num_malicious_nodes": -1},
            ["num_malicious_nodes = -1", "at least 0"]),
        ("flwr.serverapp.strategy:FedAvg", {"fraction_train": -1},
            ["strategy.fraction_train = -1", "above 0"]),
        ("flwr.serverapp.strategy:FedAdam", {"eta": "x"},
            ["strategy.eta = 'x'", "a number, above 0"]),
        ("semisync", {"deadline": float("inf")}, ["strategy.deadline = inf", "finite"]),
        ("sys:exit", {},
            ["strategy.name = 'sys:exit'", "not written in Python", "function of yours"]),
        ("os:abort", {}, ["strategy.name = 'os:abort'", "not written in Python"]),
        ("code:interact", {}, ["standard library"]),
        ("builtins:quit", {}, ["standard library"]),
        ("functools:partial", {}, ["flwr.serverapp.strategy.Strategy"]),
        ("json:__doc__", {}, ["'json:__doc__'", "flwr.serverapp.strategy.Strategy"]),
        ("json:loads", {"s": "1"}, ["standard library", "function of yours"]),
    ],
)  # fmt: skip
def test_what_cannot_be_built_says_why(name, options, words):
    with pytest.raises(ConfigError) as error:
        build(name, **options)
    for word in words:
        assert word in str(error.value)


def test_a_strategy_that_would_wait_for_ever_is_refused():
    config = StrategyConfig(name="fedavg", min_train_nodes=30)
    with pytest.raises(
        ConfigError, match=r"min_train_nodes = 30, .*data\.clients = 20"
    ):
        build_strategy(config, clients=20)
    assert build_strategy(config, clients=30)
    private = StrategyConfig(
        name="dp-fixed-clipping",
        min_available_nodes=30,
        **NEEDED["dp-fixed-clipping"],
    )
    with pytest.raises(ConfigError, match="min_available_nodes = 30"):
        build_strategy(private, clients=20)


@pytest.mark.parametrize(
    ("name", "options", "clients", "words"),
    [
        (
            "bulyan",
            {"num_malicious_nodes": 1},
            6,
            r"needs 4 x 1 \+ 3 = 7 clients in a round, and a round asks 6; low",
        ),
        (
            "bulyan",
            {"num_malicious_nodes": 1, "fraction": 0.5},
            13,
            "a round asks 6",
        ),
        (
            "bulyan",
            {},
            2,
            r"needs 4 x 0 \+ 3 = 3 clients in a round, and a round asks 2; raise",
        ),
        (
            "krum",
            {"num_malicious_nodes": 1},
            4,
            r"needs 2 x 1 \+ 3 = 5 clients .* asks 4; .*nodes to 0, or raise",
        ),
        (
            "krum",
            {"num_malicious_nodes": 10**9},
            2,
            "= 2000000003 clients in a round, and a round asks 2; raise",
        ),
        (
            "multikrum",
            {"num_malicious_nodes": 1, "num_nodes_to_select": 6},
            6,
            "select = 6: .* set it to 5 or less",
        ),
        (
            "dp-fixed-clipping",
            NEEDED["dp-fixed-clipping"],
            3,
            "num_sampled_clients = 4,",
        ),
        (
            "fedtrimmedavg",
            {},
            4,
            r"beta = 0.2 trims nothing of 4 answers .*beta to 0.25, or have 5 clients",
        ),
        ("fedtrimmedavg", {"beta": 1 / 49}, 48, "have 50 clients"),
        (
            "fedtrimmedavg",
            {"beta": 0.4},
            2,
            "below 1; have 3 clients .* strategy.beta = 0 for a plain mean",
        ),
    ],
)
def test_a_strategy_that_could_never_aggregate_is_refused(
    name, options, clients, words
):
    with pytest.raises(ConfigError, match=words):
        build_strategy(StrategyConfig(name=name, **options), clients)


@pytest.mark.parametrize(
    ("name", "options", "clients"),
    [
        ("bulyan", {"num_malicious_nodes": 1}, 7),
        ("bulyan", {"num_malicious_nodes": 1, "fraction": 0.5}, 14),
        (
            "bulyan",
            {"num_malicious_nodes": 1, "fraction": 0.1, "min_train_nodes": 7},
            10,
        ),
        ("krum", {"num_malicious_nodes": 1}, 5),
        ("multikrum", {"num_malicious_nodes": 1, "num_nodes_to_select": 5}, 6),
        ("fedtrimmedavg", {}, 5),
        ("fedtrimmedavg", {"beta": 0.25}, 4),
        ("fedtrimmedavg", {"beta": 1 / 49}, 50),
        ("fedtrimmedavg", {"beta": 0}, 2),
    ],
)
def test_and_with_enough_clients_it_is_made(name, options, clients):
    assert build_strategy(StrategyConfig(name=name, **options), clients)


@pytest.mark.parametrize(
    "fault",
    ["raise SystemExit", "raise GeneratorExit2", "import sys; sys.exit(0)"],
)
def test_a_users_strategy_cannot_end_the_process(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"leaves_{abs(hash(fault))}"
    text = (
        "class GeneratorExit2(BaseException):\n    pass\ndef make():\n    "
        + fault
        + "\n"
    )
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(
        ConfigError, match=f"strategy {name}:make refused its defaults: .*Exit"
    ):
        build(f"{name}:make")


def test_a_users_own_argument_may_be_infinite_where_its_default_is(
    tmp_path, monkeypatch
):
    (tmp_path / "limitless_for_test.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n"
        "class Limitless(FedAvg):\n"
        "    def __init__(self, most=float('inf'), least=0.0):\n"
        "        super().__init__()\n"
        "        self.most, self.least = most, least\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert build(
        "limitless_for_test:Limitless", most=float("-inf")
    ).most == float("-inf")
    with pytest.raises(
        ConfigError, match=r"strategy\.least = inf: must be a finite number"
    ):
        build("limitless_for_test:Limitless", least=float("inf"))


def test_a_users_file_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "theirs_by_file.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n"
        "class Theirs(FedAvg):\n"
        "    def __init__(self, strength, fraction=1.0, **rest):\n"
        "        super().__init__(fraction_train=fraction, **rest)\n"
        "        self.strength = strength\n"
        "def make():\n    return Theirs(7)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    strategy = build(
        "theirs_by_file:Theirs", strength=2, fraction=0.5, fraction_evaluate=0.3
    )
    assert (
        strategy.strength,
        strategy.fraction_train,
        strategy.fraction_evaluate,
    ) == (
        2,
        0.5,
        0.3,
    )
    assert (
        strategy.min_train_nodes == 2
    )  # untouched: the user's class has Flower's defaults
    assert build("theirs_by_file:make").strength == 7
    with pytest.raises(ConfigError, match=r"needs strategy\.strength"):
        build("theirs_by_file:Theirs")


def test_installed_packages_offer_strategies(monkeypatch, tmp_path):
    package = tmp_path / "afar-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: afar\nVersion: 1.0\n"
    )
    entries = [
        "[fedknow.strategies]",
        "from-afar = flwr.serverapp.strategy:FedMedian",
        "fedavg = flwr.serverapp.strategy:FedMedian",
    ]
    (package / "entry_points.txt").write_text("\n".join(entries))
    monkeypatch.syspath_prepend(tmp_path)
    lines = list_strategies()
    assert (
        lines["from-afar"] == "from afar 1.0 (flwr.serverapp.strategy:FedMedian)"
    )
    assert type(build("from-afar")) is flower.FedMedian
    # A built-in name stays ours, and the list says so.
    assert type(build("fedavg")) is flower.FedAvg
    assert "not used, because 'fedavg' is built in" in lines["fedavg (installed)"]


def test_building_is_quiet_and_leaves_flowers_log_alone(caplog):
    logger = logging.getLogger("flwr")
    before = logger.level
    with caplog.at_level(logging.INFO, "flwr"):
        build("fedavg")
        assert logger.level == logging.INFO
    assert caplog.records == []
    with quiet_flower():
        assert logger.level == logging.ERROR
    assert logger.level == before


def test_the_example_shortens_long_updates(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Message,
        MetricRecord,
        RecordDict,
    )

    from fedknow.protocols.flower import set_id
    from fedknow.server.grids.inline import InlineGrid
    from fedknow.server.grids.strategy_grid import StrategyGrid

    grid = StrategyGrid(InlineGrid(3, host=None))
    strategy = build("own_strategy:ShortUpdates")
    start = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    sent = list(strategy.configure_train(1, start, ConfigRecord(), grid))
    for place, message in enumerate(sent):
        set_id(message, str(place))

    def reply(message, vector):
        arrays = ArrayRecord({"w": Array(np.array(vector, np.float32))})
        content = RecordDict(
            {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        )
        return Message(content, reply_to=message)

    replies = [
        reply(m, v) for m, v in zip(sent, [(1, 0), (0, 2), (30, 40)], strict=True)
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    # the median norm is 2: (30, 40) of norm 50 becomes (1.2, 1.6)
    np.testing.assert_allclose(
        arrays["w"].numpy(), [(1 + 1.2) / 3, (2 + 1.6) / 3], rtol=1e-6
    )
    assert arrays["w"].numpy().dtype == np.float32


def test_options_that_a_users_class_hands_on_to_flower_are_checked(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "hands_on.py").write_text(
        "from flwr.serverapp.strategy import Krum\n"
        "class Mine(Krum):\n"
        "    def __init__(self, tau=0, **options):\n"
        "        super().__init__(**options)\n"
    )
    with pytest.raises(
        ConfigError,
        match=r"strategy\.num_malicious_nodes = 2\.5: must be a whole number",
    ):
        build("hands_on:Mine", num_malicious_nodes=2.5)
    # tau is Flower's of another class: here it is the user's own.
    assert (
        build("hands_on:Mine", num_malicious_nodes=2, tau=-1).num_malicious_nodes
        == 2
    )
