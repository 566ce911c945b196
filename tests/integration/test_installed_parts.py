"""Parts of a package that is really installed, by name."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedknow
from fedknow.cli import app

PACKAGE = Path(__file__).parent / "installed"
SMALL = {
    "data": {"name": "kindly-noise", "clients": 3, "tasks": 2, "samples": 0.5},
    "train": {"rounds": 1, "epochs": 1},
    "engine": {"backend": "inline"},
}


def install(source, target):
    """Install a package into a folder, without a network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(source)], check=True, timeout=240)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    # A build leaves files beside the sources.
    source = shutil.copytree(
        PACKAGE, tmp_path_factory.mktemp("source") / "package"
    )
    target = tmp_path_factory.mktemp("target")
    install(source, target)
    return target


@pytest.fixture
def installed(target, monkeypatch):
    monkeypatch.syspath_prepend(str(target))


def run(*words):
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "300"})
    return done.exit_code, " ".join(done.output.split())


def test_a_command_uses_all_its_parts(target, tmp_path):
    words = ["simulate", "digits", "--quiet", "--out", str(tmp_path / "run")]
    changes = ["learner=kindly", "strategy=kindly-mean", "model=kindly-net"]
    changes += [
        "data=kindly-noise",
        "data.clients=3",
        "data.tasks=2",
        "model.width=4",
    ]
    changes += ["train.rounds=1", "train.epochs=1", "engine.backend=inline"]
    changes += ["data.samples=0.5", "data.classes_max=2", "tracking.wait=120"]
    for change in changes:
        words += ["--set", change]
    done = subprocess.run(
        [sys.executable, "-m", "fedknow", *words, "--track", "kindly-file"],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "run" / "kindly.txt").read_text()
    assert written == "complete after 2 rounds"


@pytest.mark.parametrize(
    ("kind", "name", "origin"),
    [
        ("learners", "kindly", "parts:Kindly"),
        ("strategies", "kindly-mean", "parts:KindlyMean"),
        ("models", "kindly-net", "parts:kindly_net"),
        ("datasets", "kindly-noise", "parts:kindly_noise"),
        ("trackers", "kindly-file", "parts:KindlyFile"),
    ],
)
def test_each_is_listed_and_described(installed, kind, name, origin):
    code, text = run("list", kind)
    assert code == 0
    assert f"{name} from kindly-shared 0.3 (kindly_shared.{origin})" in text
    code, text = run("list", kind, name)
    assert code == 0, text
    assert text.startswith(f"{name}: ")


def test_a_built_in_name_is_not_taken_over(installed):
    from fedknow.client.learners import learner_class

    assert learner_class("gem").__module__.startswith("fedknow.")
    text = run("list", "learners")[1]
    assert (
        "gem (installed) not used, because 'gem' is built in: kindly-shared 0.3 "
        "(kindly_shared.parts:Kindly); name it kindly_shared.parts:Kindly"
    ) in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"learner": "broken"},
            ["kindly-shared 0.3", "its library is not there"],
        ),
        ({"learner": "number"}, ["not a subclass of"]),
        ({"learner": "kindli"}, ["did you mean 'kindly'?"]),
        ({"model": "kindly-nett"}, ["did you mean 'kindly-net'?"]),
        ({"model": {"name": "kindly-net", "depth": 3}}, ["depth"]),
        ({"strategy": "kindly-men"}, ["did you mean 'kindly-mean'?"]),
    ],
)
def test_what_is_wrong_is_refused_with_a_sentence(
    installed, tmp_path, settings, words
):
    with pytest.raises(fedknow.ConfigError) as error:
        fedknow.simulate("digits", out=tmp_path / "run", **(SMALL | settings))
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()


def test_two_packages_with_one_name_are_refused(installed, tmp_path, monkeypatch):
    other = tmp_path / "other-2.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other\nVersion: 2.0\n"
    )
    (other / "entry_points.txt").write_text(
        "[fedknow.learners]\nkindly = other:Kind\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "several packages offer it" in run("list", "learners")[1]
    with pytest.raises(
        fedknow.ConfigError, match="write 'other:Kind' or"
    ) as error:
        fedknow.simulate(
            "digits", learner="kindly", out=tmp_path / "run", **SMALL
        )
    assert "'kindly_shared.parts:Kindly'" in str(error.value)
