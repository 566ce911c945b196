"""The configuration: one typed source for files, the command line and checkpoints; errors that
tell what to do."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    differences,
    parse_override,
    read_config,
)


def test_defaults_are_a_complete_experiment():
    config = read_config({})
    assert (
        config.name,
        config.data.name,
        config.learner.name,
        config.strategy.name,
    ) == (
        "digits",
        "digits",
        "fedknow",
        "fedavg",
    )


def test_file_and_overrides(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\nlearner = "fedper"\n[train]\nlr = 0.1\nrounds = 7\n'
    )
    config = read_config(
        path,
        [
            "train.lr=0.2",
            "data.clients=3",
            "strategy=krum",
            "strategy.num_malicious_nodes=1",
        ],
    )
    assert (config.train.lr, config.train.rounds, config.data.clients) == (
        0.2,
        7,
        3,
    )
    assert (config.learner.name, config.strategy.name) == ("fedper", "krum")
    assert config.strategy.options == {"num_malicious_nodes": 1}


def test_toml_holds_everything_and_reads_back_the_same():
    config = read_config(
        {}, ["learner.rho=0.05", "strategy.fraction=0.4", "train.clip_norm=1.5"]
    )
    again = read_config(tomllib.loads(config.to_toml()))
    assert again == config
    assert differences(config, again) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lrr=0.1",
            r"train\.lrr: unknown key \(did you mean 'lr'\?\); train has: rounds, epochs",
        ),
        ("trian.lr=0.1", r"trian: unknown key \(did you mean 'train'\?\)"),
        (
            "data.clinets=3",
            r"data\.clinets: unknown key \(did you mean 'clients'\?\)",
        ),
        ("train.lr=0", r"train\.lr = 0: .*greater than 0"),
        (
            "train.weight_decay=1.0",
            r"train\.weight_decay = 1\.0: .*less than or equal to 0\.1",
        ),
        ("train.rounds=two", r"train\.rounds = 'two': .*integer"),
        (
            "data.partition=fair",
            r"data\.partition = 'fair': .*'paper', 'iid', 'dirichlet', .* or 'natural'",
        ),
        (
            "data.classes_min=9",
            r"data\.classes_min = 9 is above data\.classes_max = 5; lower",
        ),
        (
            "data.alpha=0.1",
            r"data\.alpha = 0\.1 does nothing with data\.partition = 'paper'; set "
            r".*'dirichlet' or 'quantity', or .* 0\.5",
        ),
        (
            "train.momentum=0.9",
            r"train\.momentum = 0\.9 does nothing with train\.optimizer = 'adam'; set .* 'sgd', or",
        ),
        ("name=a/b", r"name = 'a/b': .*pattern"),
        ("seed=-1", r"seed = -1"),
        ("train.lr", r"--set 'train\.lr': write key=value"),
        ("train.lr.x=1", r"train\.lr"),
        (
            "train.rounds=1" + "0" * 30,
            r"train\.rounds = 10{30}: .*less than or equal to 1000000",
        ),
        (
            "train.rounds=" + "9" * 5000,
            r"--set train\.rounds: its value is no TOML: .*4300",
        ),
        (
            "train.rounds=" + "[" * 5000 + "]" * 5000,
            r"--set train\.rounds: its value is nested too deeply",
        ),
        (
            "train.rounds=0x" + "f" * 5000,
            r"train\.rounds = an integer of 20000 bits: .*1000000",
        ),
        (
            "strategy.eta=1" + "0" * 30,
            r"strategy\.eta = 10{30}: must fit into 64 bits",
        ),
        (
            "learner.since=2024-02-29",
            r"learner\.since = .*write a date in quotes",
        ),
        (".".join("a" * 5000) + "=1", r"nested more than 8 levels deep"),
        ("data.dir=" + "x" * 5000, r"data\.dir = .*at most 4096 characters"),
        ("train.lr=inf", r"train\.lr = inf: .*"),
        ("train.clip_norm=nan", r"train\.clip_norm = nan: .*finite"),
        ("data.alpha=inf", r"data\.alpha = inf: .*finite"),
        ("fleet.down=inf", r"fleet\.down = inf: .*finite"),
        ("data.clients=1000000000", r"data\.clients = 1000000000: .*100000"),
        (
            "name=2024",
            r"name = 2024: must be text; write name=\"2024\" \(in a shell: --set 'name=\"2024\"'\)",
        ),
        ("model=5", r"model = 5: must be a name or a table of settings"),
        ("train=5", r"train = 5: must be a table of settings"),
    ],
)
def test_what_cannot_be_is_refused_with_key_value_and_remedy(override, message):
    with pytest.raises(ConfigError, match=message):
        read_config({"train": {"lr": 0.1}}, [override])


def test_a_table_of_scores_that_fits_no_memory_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"data\.tasks = 1000 with data\.clients = 1000: .*at most 2e\+08",
    ):
        read_config({}, ["data.tasks=1000", "data.clients=1000"])
    assert read_config({}, ["data.tasks=1000", "data.clients=200"])


def test_files_with_what_toml_readers_choke_on(tmp_path):
    path = tmp_path / "hostile.toml"
    for text, words in (
        ("seed = " + "9" * 5000, "not valid TOML: .*4300"),
        ("seed = " + "[" * 100_000, "not valid TOML"),
        ("seed = " + "[" * 20 + "]" * 20, "nested more than 8 levels"),
        (".".join("a" * 2_000) + " = 1", "nested"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_config(path)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_config(path)


def test_mappings_are_checked_as_files_are():
    with pytest.raises(
        ConfigError, match="must be a number, a text, true or false"
    ):
        read_config({"learner": {"name": "ewc", "odd": object()}})
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match="nested more than 8 levels"):
        read_config({"learner": deep})


def test_settings_that_do_something_where_they_stand():
    config = read_config(
        {},
        [
            "data.alpha=0.1",
            "data.partition=dirichlet",
            "train.momentum=0.9",
            "train.optimizer=sgd",
        ],
    )
    assert (config.data.alpha, config.train.momentum) == (0.1, 0.9)
    assert read_config(tomllib.loads(config.to_toml())) == config


def test_a_mapping_is_called_by_the_name_it_is_given():
    with pytest.raises(
        ConfigError, match=r"^the configuration:\n  train\.lr = 0"
    ):
        read_config({}, ["train.lr=0"])
    with pytest.raises(ConfigError, match=r"^preset mine:\n  train\.lr = 0"):
        read_config({}, ["train.lr=0"], called="preset mine")


def test_every_problem_is_listed_at_once():
    with pytest.raises(ConfigError) as error:
        read_config({}, ["train.lr=0", "data.clients=0"])
    assert "train.lr" in str(error.value)
    assert "data.clients" in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file.*fedknow list presets"):
        read_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        read_config(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(tmp_path)


def test_another_learner_leaves_the_old_ones_settings_behind():
    config = read_config(
        {"learner": {"name": "fedknow", "rho": 0.2}}, ["learner=local"]
    )
    assert config.learner.options == {}
    config = read_config(
        {"learner": {"name": "fedknow", "rho": 0.2}}, ["learner=fedknow"]
    )
    assert config.learner.options == {"rho": 0.2}
    config = read_config({"learner": "fedknow"}, ["learner.rho=0.2"])
    assert (config.learner.name, config.learner.options) == (
        "fedknow",
        {"rho": 0.2},
    )


def test_another_data_set_keeps_the_partition():
    config = read_config(
        {"data": {"name": "digits", "clients": 7}}, ["data=omniglot"]
    )
    assert (config.data.name, config.data.clients) == ("omniglot", 7)


def test_differences_name_the_settings_and_leave_the_engine_out():
    old = read_config({}, ["learner.rho=0.1"])
    new = read_config(
        {},
        [
            "learner.rho=0.2",
            "train.lr=0.5",
            "engine.workers=4",
            "data.dir=/elsewhere",
        ],
    )
    assert differences(old, new) == [
        "learner.rho: was 0.1, now 0.2",
        "train.lr: was 0.001, now 0.5",
    ]


def test_a_configuration_never_changes():
    with pytest.raises(ValidationError):
        ExperimentConfig().train.lr = 0.1  # type: ignore[misc]


@given(
    st.one_of(
        st.integers(-9, 9),
        st.floats(-5, 5),
        st.booleans(),
        st.sampled_from(["abc", "a-b", "mod:Class"]),
    )
)
def test_override_values_keep_their_type(value):
    text = str(value).lower() if isinstance(value, bool) else str(value)
    path, read = parse_override(f"a.b={text}")
    assert path == ["a", "b"]
    assert read == value
    assert type(read) is type(value)
