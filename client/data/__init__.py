"""Data sets, their partition among clients, and each client's tasks.

The way of a sample:

1. a *data set* (``datasets``, ``arrays``) holds all samples and what is known of them;
2. a *partition* (``partition``, ``shares``) says, from labels alone, which rows of it make a
   client's tasks;
3. a *stream* (``benchmark``, ``local``) turns these rows into a task's tensors (``stream``).

Only the first and the last know what a sample is. Between them there are row numbers.
"""

from fedknow.client.data.benchmark import Benchmark, make_benchmark
from fedknow.client.data.columns import Column
from fedknow.client.data.datasets import Dataset, list_datasets, load_dataset
from fedknow.client.data.objects import from_huggingface, from_torch
from fedknow.client.data.partition import Partition, Share, make_partition
from fedknow.client.data.ragged import Ragged
from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.splits import save_split
from fedknow.client.data.stream import Split, TaskData, TaskStream
from fedknow.client.data.tables import Roles

__all__ = [
    "Benchmark",
    "Column",
    "Dataset",
    "Partition",
    "Ragged",
    "Roles",
    "SampleSpec",
    "Share",
    "Split",
    "TaskData",
    "TaskStream",
    "from_huggingface",
    "from_torch",
    "list_datasets",
    "load_dataset",
    "make_benchmark",
    "make_partition",
    "save_split",
]
