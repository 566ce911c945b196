import pytest

from fedknow.client.learners import resolve
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.presets import list_presets, load_preset
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
    "learner": "fedavg",
    "engine": {"backend": "inline"},
}


def test_a_run_leaves_everything_behind(tmp_path):
    seen = []
    result = simulate(
        read_config(SMALL), tmp_path / "run", observers=[seen.append]
    )
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "config.toml",
        "partition.json",
        "metrics.jsonl",
        "accuracy.npz",
        "report.html",
        "plots",
    } <= names
    assert [event.event for event in seen] == [
        "start", *("round", "evaluation", "task_end") * 2, "end"
    ]  # fmt: skip
    assert RunFolder.open(tmp_path / "run").events() == [
        each.line() for each in seen
    ]
    assert result.summary["accuracy"] == seen[-1].accuracy
    # The configuration is complete: it can be given again as it stands.
    assert read_config(tmp_path / "run" / "config.toml") == resolve(
        read_config(SMALL)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learner=fedavgg", "did you mean 'fedavg'"),
        ("strategy=fedadm", "did you mean 'fedadam'"),
        ("strategy.min_train_nodes=50", "50"),
        ("model=cnn9", "cnn9"),
        ("data.name=nothere", "nothere"),
    ],
)
def test_what_cannot_run_leaves_no_folder(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        simulate(read_config(SMALL, [change]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(tmp_path):
    simulate(read_config(SMALL), tmp_path)
    with pytest.raises(ConfigError, match="finished run"):
        simulate(read_config(SMALL), tmp_path)


@pytest.mark.parametrize("name", list(list_presets()))
def test_presets_can_be_read(name):
    config = resolve(load_preset(name))
    assert config.name == name
    closed_form = {"cifar100-ci-pretrained": "afcl"}
    assert config.learner.name == closed_form.get(name, "fedknow")
    assert len(list_presets()[name]) > 20


def test_the_paper_preset_is_the_papers_protocol():
    config = resolve(load_preset("paper-cifar100"))
    data, train = config.data, config.train
    assert (
        data.clients,
        data.tasks,
        data.classes_per_task,
        data.classes_min,
        data.classes_max,
    ) == (20, 10, 10, 2, 5)
    assert (train.rounds, train.epochs, train.batch_size, train.optimizer) == (
        15,
        8,
        40,
        "adam",
    )
    assert (
        train.lr,
        train.weight_decay,
        config.strategy.options["fraction"],
    ) == (
        1e-3,
        1e-4,
        0.4,
    )
    assert (
        config.learner.options["rho"],
        config.learner.options["k"],
        config.model.name,
    ) == (0.1, 10, "cnn6")


def test_a_preset_that_is_not_there():
    with pytest.raises(
        ConfigError, match=r"preset 'digit'.*did you mean 'digits'"
    ):
        load_preset("digit")


def test_a_faulty_change_names_the_preset():
    with pytest.raises(ConfigError, match=r"^preset digits:\n  train\.lr = 0: "):
        load_preset("digits", ["train.lr=0"])
