import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedknow.client.permissions import Limits, Permissions
from fedknow.protocols.config import ConfigError, TrainConfig, read_config


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("model", "torch.hub:load"),
        ("model", "setup:x"),
        ("learner", "setup:x"),
        ("learner", "os:system"),
        ("data", "subprocess:run"),
    ],
)
def test_code_that_the_owner_did_not_allow_is_refused(section, name):
    config = read_config({section: {"name": name}})
    with pytest.raises(ConfigError) as error:
        Permissions().check(config)
    assert f"{section}.name = {name!r}" in str(error.value)
    assert f"--allow {name}" in str(error.value)
    Permissions(frozenset({name})).check(config)


def test_parts_of_installed_packages_are_not_fedknows(tmp_path, monkeypatch):
    package = tmp_path / "afar-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: afar\nVersion: 1.0\n"
    )
    entries = [
        "[fedknow.learners]",
        "from-afar = nowhere:Afar",
        "gem = nowhere:Afar",
    ]
    (package / "entry_points.txt").write_text("\n".join(entries))
    monkeypatch.syspath_prepend(tmp_path)
    config = read_config({"learner": "from-afar"})
    with pytest.raises(ConfigError, match="--allow from-afar"):
        Permissions().check(config)
    Permissions(frozenset({"from-afar"})).check(config)
    Permissions().check(
        read_config({"learner": "gem"})
    )  # which stays the built-in one


def test_one_allowed_part_allows_no_other():
    config = read_config(
        {"model": "my_models:build", "learner": "my_models:Other"}
    )
    with pytest.raises(ConfigError, match=r"learner\.name"):
        Permissions(frozenset({"my_models:build"})).check(config)


def test_shipped_parts_are_permitted():
    Permissions().check(read_config({"model": "resnet18", "learner": "gem"}))


@pytest.mark.parametrize(
    ("tree", "limit", "key"),
    [
        ({"train": {"batch_size": 64}}, {"batch_size": 63}, "train.batch_size = 64"),
        ({"evaluation": {"batch_size": 300}}, {"batch_size": 299}, "evaluation.batch_size = 300"),
        ({"train": {"epochs": 3}}, {"epochs": 2}, "train.epochs = 3"),
        ({"data": {"name": "local", "classes": 50, "shape": [1, 8, 8]}}, {"classes": 49},
         "data.classes = 50"),
        ({"data": {"name": "local", "classes": 5, "shape": [3, 100, 100]}},
         {"image_values": 29_999}, "data.shape = 30000"),
        ({"data": {"clients": 30}}, {"clients": 29}, "data.clients = 30"),
        ({"data": {"tasks": 4}}, {"tasks": 3}, "data.tasks = 4"),
        ({"learner": {"name": "fedrep", "head_epochs": 9}}, {"epochs": 8},
         "learner.head_epochs = 9"),
        ({"data": {"name": "cifar100", "image_size": 64}}, {"image_values": 12_000},
         "data.image_size = 12288"),
    ],
)  # fmt: skip
def test_an_experiment_over_a_limit_is_refused(tree, limit, key):
    config = read_config(tree)
    with pytest.raises(ConfigError) as error:
        Permissions(limits=Limits(**limit)).check(config)
    assert key in str(error.value)
    assert f"--limit {next(iter(limit))}=" in str(error.value)
    Permissions().check(config)


def test_a_server_chooses_no_arguments_of_foreign_code():
    name = "my_models:build"
    config = read_config({"model": {"name": name, "width": 3, "path": "/etc"}})
    for allowed in (name, f"{name}()", f"{name}(width, depth)"):
        with pytest.raises(ConfigError, match=r"model\.path") as error:
            Permissions(frozenset({allowed})).check(config)
        if "width" in allowed:
            assert f"--allow '{name}(depth,path,width)'" in str(error.value)
    Permissions(frozenset({f"{name}(path,width)"})).check(config)
    # With what it says itself, foreign code needs no more than its name.
    Permissions(frozenset({name})).check(read_config({"model": name}))
    # A shipped model checks its own settings.
    Permissions().check(read_config({"model": {"name": "mlp", "hidden": 9}}))


@pytest.mark.parametrize(
    ("section", "key"), [("data", "split"), ("model", "weights")]
)
def test_a_server_names_no_file_of_the_owners(section, key):
    prefix = "file:" * (key == "weights")
    tree = {"data": {"classes_per_task": 0}, "model": {"name": "mlp"}}
    tree[section][key] = f"{prefix}/etc/passwd"
    config = read_config(tree)
    with pytest.raises(ConfigError, match="--allow file:/etc/passwd"):
        Permissions().check(config)
    Permissions(frozenset({"file:/etc/passwd"})).check(config)


def test_nothing_is_fetched_at_a_servers_word(monkeypatch):
    monkeypatch.delenv("FEDKNOW_DATA", raising=False)
    data = read_config({"data": {"name": "cifar100"}}).data
    with pytest.raises(ConfigError, match="--allow download"):
        Permissions().check_download(data)
    Permissions(frozenset({"download"})).check_download(data)
    Permissions().check_download(data.model_copy(update={"dir": "/data"}))
    Permissions().check_download(read_config({}).data)


def test_a_model_over_the_limit_takes_no_memory():
    small = Permissions(limits=Limits(parameters=1000))
    huge = read_config({"model": {"name": "mlp", "hidden": 20_000}}).model
    with pytest.raises(ConfigError, match="limit of 1000"):
        small.check_model(huge, (1, 8, 8), 10)
    wide = read_config({"model": {"name": "linear", "neck": 500}}).model
    with pytest.raises(ConfigError, match=r"parameters = 37000"):
        small.check_model(wide, (1, 8, 8), 10)
    linear = read_config({"model": "linear"}).model
    small.check_model(linear, (1, 8, 8), 10)


def test_an_owner_lets_no_head_go():
    owner = Permissions(keeps_own=True)
    with pytest.raises(ConfigError, match=r"evaluation\.global_model = true"):
        owner.check(read_config({"learner": "fedrep"}))
    owner.check(read_config({"learner": "fedavg"}))
    stays = {"learner": "fedrep", "evaluation": {"global_model": False}}
    owner.check(read_config(stays))
    Permissions().check(read_config({"learner": "fedrep"}))


@pytest.mark.parametrize("key", ["epochs", "local-epochs"])
def test_a_round_over_a_limit_is_refused(key):
    permissions = Permissions(limits=Limits(epochs=5))
    permissions.check_work({key: 5, "lr": 0.1}, TrainConfig())
    with pytest.raises(ConfigError, match=f"{key} = 6"):
        permissions.check_work({key: 6}, TrainConfig())


@pytest.mark.parametrize("value", [float("inf"), 1e308, 2**62])
def test_a_round_without_end_is_refused_in_a_sentence(value):
    with pytest.raises(ConfigError, match="limit of 1000"):
        Permissions().check_work({"epochs": value}, TrainConfig())


def test_limits_are_read_from_texts():
    limits = Limits.parse(["epochs=7", "batch_size=32"])
    assert (limits.epochs, limits.batch_size) == (7, 32)
    assert limits.classes == Limits().classes


@pytest.mark.parametrize(
    "text", ["epochs", "epochs=", "epochs=-1", "epochs=0", "epoch=3", "=3"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match="--limit"):
        Limits.parse([text])


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_no_reference_slips_through(module, name):
    with pytest.raises(
        ConfigError
    ):  # of the reader, or of the owner's permissions
        Permissions().check(read_config({"model": {"name": f"{module}:{name}"}}))
