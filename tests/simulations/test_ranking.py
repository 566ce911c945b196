"""Ranks over comparisons: common methods, refusals, files."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedknow.cli.app import app
from fedknow.protocols.config import ConfigError
from fedknow.simulations.ranking import rank_comparisons, write_ranks


def compared(folder: Path, **accuracies: float | None) -> Path:
    """Write what a comparison writes of its means."""
    learners = {
        name: {
            "accuracy": {"mean": accuracy},
            "forgetting": {"mean": accuracy},
        }
        for name, accuracy in accuracies.items()
    }
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(json.dumps({"learners": learners}))
    return folder


def test_methods_of_all_streams_are_ranked(tmp_path: Path) -> None:
    first = compared(tmp_path / "a", er=0.5, fedknow=0.7, gem=0.6)
    second = compared(tmp_path / "b", fedknow=0.9, er=0.8, gem=None, mas=1.0)
    ranks = rank_comparisons([first, second], "accuracy")
    assert ranks.names == ("fedknow", "er")
    assert ranks.means == (1, 2)
    # Less forgetting is better.
    assert rank_comparisons([first, second], "forgetting").names[0] == "er"


@pytest.mark.parametrize(
    ("streams", "measure", "message"),
    [
        ([{"a": 1.0, "b": 0.5}] * 2, "speed", "--measure = 'speed'"),
        ([{"a": 1.0, "b": 0.5}], "accuracy", "two streams"),
        ([{"a": 1.0, "b": 0.5}, {"a": 1.0}], "accuracy", "in common: a"),
        ([{"a": 1.0}, {"b": 1.0}], "accuracy", "in common: none"),
    ],
)
def test_too_little_is_refused(tmp_path, streams, measure, message) -> None:
    folders = [
        compared(tmp_path / str(place), **means)
        for place, means in enumerate(streams)
    ]
    with pytest.raises(ConfigError, match=message):
        rank_comparisons(folders, measure)


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no compare\.json"):
        rank_comparisons([tmp_path, tmp_path], "accuracy")
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        rank_comparisons([tmp_path, tmp_path], "accuracy")


def test_the_command_writes_ranks_and_their_plot(tmp_path: Path) -> None:
    folders = [
        str(compared(tmp_path / name, er=0.5, fedknow=0.7)) for name in "abcde"
    ]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["ranks", *folders, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "Mean ranks by accuracy over 5 streams" in result.output
    assert json.loads((out / "ranks.json").read_text())["names"] == [
        "fedknow",
        "er",
    ]
    assert (out / "plots" / "ranks.png").stat().st_size > 1000


def test_ranks_are_written_as_they_are(tmp_path: Path) -> None:
    folders = [compared(tmp_path / name, er=0.5, gem=0.7) for name in "ab"]
    ranks = rank_comparisons(folders, "accuracy")
    write_ranks(ranks, "accuracy", tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "ranks.json").read_text())
    assert numbers["means"] == [1, 2]
    assert numbers["streams"] == 2
