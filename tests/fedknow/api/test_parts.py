"""Objects that no section of a configuration can hold as they are."""

from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import TensorDataset

from fedknow.api.parts import named
from fedknow.protocols.config import ConfigError

ROWS = torch.arange(6.0).view(3, 2)


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        (
            datasets.Dataset.from_dict({"x": [1.0], "y": [0]}),
            "from_huggingface",
        ),
        (TensorDataset(ROWS, torch.arange(3)), "from_torch"),
    ],
)
def test_data_of_other_libraries_names_what_converts_it(
    part: Any, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=remedy) as refused:
        named("data", part)
    assert "\n" not in str(refused.value)


def test_other_objects_have_no_remedy() -> None:
    with pytest.raises(ConfigError, match=r"fedknow\.Dataset$"):
        named("data", 3)
    with pytest.raises(ConfigError, match=r"body and head$"):
        named("model", [1, 2])
