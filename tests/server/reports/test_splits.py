"""The picture of a split: bounded, with the right number in the right cell."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedknow.client.data import make_benchmark
from fedknow.protocols.config import read_config
from fedknow.server.reports.blocks import Figures, Table
from fedknow.server.reports.page import write_report, write_split
from fedknow.server.reports.splits import (
    MOST_CLIENTS,
    MOST_COLUMNS,
    Holdings,
    split_blocks,
)
from fedknow.server.run.folder import RunFolder


def share(**counts: int) -> dict[str, Any]:
    """A share of classes 0 and 1; ``a`` and ``b`` count their samples."""
    held = [label for label, key in enumerate("ab") if counts.get(key)]
    numbers = [counts["ab"[label]] for label in held]
    return {
        "classes": [0, 1],
        "held": held,
        "counts": numbers,
        "train": sum(numbers),
        "test": 2,
    }


SPLIT = {
    "digest": "abc",
    "clients": [[share(a=3, b=1), share(b=40)], [share(a=2)]],
}


def test_each_cell_has_the_samples_of_its_client_task_and_class() -> None:
    holdings = Holdings.from_summary(SPLIT)
    assert holdings.columns == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert holdings.starts == [(0, 0), (1, 2)]
    none = np.nan
    np.testing.assert_array_equal(
        holdings.counts, [[3, 1, none, 40], [2, none, none, none]]
    )


def test_the_table_counts_the_clients_that_have_a_task() -> None:
    figures, table = split_blocks(SPLIT)
    assert isinstance(figures, Figures)
    assert isinstance(table, Table)
    assert table.texts() == [
        ["1", "2", "1 to 2", "2 to 4", "6", "2"],
        ["2", "1", "1", "40", "40", "2"],
    ]
    (plot,) = figures.plots
    assert "Shown are" not in plot.caption


def test_many_clients_and_classes_are_bounded_and_it_is_said() -> None:
    wide = {
        "classes": list(range(300)),
        "held": [0, 299],
        "counts": [5, 5],
        "train": 10,
        "test": 1,
    }
    figures, table = split_blocks({"clients": [[wide]] * 1000})
    (plot,) = figures.plots
    assert (
        f"first {MOST_CLIENTS} of 1000 clients and the first {MOST_COLUMNS} of 300 pairs"
        in plot.caption
    )
    assert table.rows[0][1].value == 1000
    figure = Figure()
    plot.draw(figure)
    (image,) = figure.axes[0].get_images()
    assert image.get_array().shape == (MOST_CLIENTS, MOST_COLUMNS)
    assert plot.shape.height < 10


def test_a_split_of_an_earlier_version_has_no_picture() -> None:
    old = {key: value for key, value in share(a=1).items() if key != "counts"}
    assert split_blocks({"clients": [[old]]}) == []


def test_a_page_of_a_real_split(tmp_path) -> None:
    config = read_config(
        {"data": {"partition": "dirichlet", "clients": 3, "tasks": 2}}
    )
    partition = make_benchmark(config).partition
    held = Holdings.from_summary(partition.summary())
    assert np.nansum(held.counts) == sum(
        len(share.train) for shares in partition.tasks for share in shares
    )
    page = write_split(tmp_path / "p.html", config, partition.summary())
    text = page.read_text("utf-8")
    assert partition.digest in text
    assert 'id="split-title"' in text
    assert (tmp_path / "plots" / "split.png").is_file()


def test_more_clients_than_are_listed_have_the_same_sums() -> None:
    config = read_config(
        {"data": {"partition": "dirichlet", "clients": 5, "tasks": 2}}
    )
    partition = make_benchmark(config).partition
    figures, table = split_blocks(partition.summary(limit=2))
    _, whole = split_blocks(partition.summary())
    assert "the first 2 of 5 clients" in figures.plots[0].caption
    sums = [[row[place] for place in (0, 1, 4)] for row in table.texts()]
    assert sums == [[row[place] for place in (0, 1, 4)] for row in whole.texts()]
    sizes = sorted(len(shares[1].train) for shares in partition.tasks)
    text = f"{sizes[0]} to {sizes[-1]} ({sizes[2]})"
    assert table.texts()[1][3] == text


@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_report_of_a_run_shows_its_split(tmp_path, is_damaged) -> None:
    with RunFolder.create(tmp_path / "run", read_config({})) as run:
        run.write_partition(SPLIT)
        path = run.path / "partition.json"
        if is_damaged:
            path.write_text(path.read_text().replace("40", "41"))
        text = write_report([run], run.path).read_text("utf-8")
    assert "Who holds what" in text
    assert ("is not what the run wrote" in text) == is_damaged
    assert ('id="split-title"' in text) != is_damaged
