"""Data sets, their partition among clients, and the stream of tasks that each client meets."""

from fedknow.client.data.benchmark import Benchmark, make_benchmark
from fedknow.client.data.datasets import Dataset, list_datasets, load_dataset
from fedknow.client.data.partition import Partition, Share, make_partition
from fedknow.client.data.stream import Split, TaskData, TaskStream

__all__ = [
    "Benchmark",
    "Dataset",
    "Partition",
    "Share",
    "Split",
    "TaskData",
    "TaskStream",
    "list_datasets",
    "load_dataset",
    "make_benchmark",
    "make_partition",
]
