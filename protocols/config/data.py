"""The section ``data``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedknow.protocols.config.base import (
    MOST_CLASSES,
    MOST_CLIENTS,
    MOST_SECONDS,
    MOST_TASKS,
    Section,
)
from fedknow.protocols.config.people import HeldOut, check_held_out

__all__ = ["DataConfig"]

MOST_STEPS = 1 << 20
"""Axis of a sample: a minute of sound at 16 kHz is as long."""
MOST_SIDE = 4096
"""Side of an image."""
MOST_TOKENS = 10_000_000
CHANGES = ("rotation", "noise", "permutation", "season")
"""Domains that are made by changing images."""


class DataConfig(Section):
    """Which data, cut into which tasks, shared among which clients."""

    name: str = "digits"
    """``digits`` (embedded), ``cifar100``, ... (``fedknow list datasets``), ``module:callable``,
    or ``local``: each real client's own."""
    input: list[str] = Field(default=[], max_length=100_000)
    """A table's columns of the sample, where ``name`` is ``file:PATH`` or ``hf:OWNER/NAME``:
    several of numbers, or one of numbers, lists, pictures or WAV files."""
    label: str = ""
    """A table's column of the class."""
    split_column: str = ""
    """A table's column that says ``train`` or ``test``. Without it files named so say it, or
    each fifth sample of a class is for testing."""
    task_column: str = ""
    """A table's column that says which classes make a task together."""
    tokenizer: Literal["words", "wordpiece"] = "words"
    """Texts become ids of words, or of pieces of words that the model ``minilm`` knows."""
    dir: str = ""
    """Folder that holds the data set's own, ``<name>/``; empty: ``$FEDKNOW_DATA``."""
    image_size: int = Field(0, ge=0, le=1024)
    """Height and width that images on disk are scaled to; 0: the data set's usual ones."""
    scenario: Literal[
        "task-incremental", "class-incremental", "domain-incremental"
    ] = "task-incremental"
    """Whether a client knows which task a test sample belongs to (the head is sliced) or not.
    In a domain-incremental stream each task has all classes, in another domain."""
    domain: Literal[
        "", "column", "rotation", "noise", "permutation", "season", "labels"
    ] = ""
    """Domain-incremental: where a task's domain is from: a column of the data set, a change of
    its images that grows from task to task, or ``labels``, whose frequencies shift. Domains
    share no sample."""
    domain_column: str = ""
    """``domain = "column"``: which column, such as ``site``; its values are the domains, in
    their order."""
    domain_strength: float = Field(1.0, ge=0, le=1)
    """How far the last domain is from the one in front: 1 turns it by half a turn, adds noise
    of half the scale, shuffles all pixels, or makes a winter of it."""
    domain_alpha: float = Field(0.5, ge=1e-6, le=1e6)
    """``domain = "labels"``: concentration of each class over the tasks; small is a large
    shift."""
    tasks: int = Field(5, ge=1, le=MOST_TASKS)
    classes_per_task: int = Field(0, ge=0, le=MOST_CLASSES)
    """0: the data set's own groups where it has them (Omniglot's alphabets), else classes divided
    by tasks."""
    class_order: Literal["natural", "shuffled"] = "natural"
    task_order: Literal["same", "shuffled"] = "same"
    """``shuffled``: every client meets the same tasks in an order of its own."""
    repeats: int = Field(1, ge=1, le=MOST_TASKS)
    """How often each task comes, each time with other training samples; ``tasks`` counts all
    of them, so it is a multiple."""
    blur: float = Field(0.0, ge=0, lt=1)
    """Share of a task's training samples that come with the task before or after it."""
    boundaries: Literal["told", "hidden"] = "told"
    """Whether clients are told where a task begins. Where they are not, a test of their own losses
    finds it, and learners see tasks as they were found. Scores are by the stream's tasks."""
    false_alarms: float = Field(1e-4, gt=0, le=0.1)
    """``hidden``: most false alarms of the test a sample, on average."""
    labelled: float = Field(1.0, gt=0, le=1)
    """Share of a client's training samples of each class that have a label. The others are
    left out, as all learners need labels."""
    tasks_min: int = Field(0, ge=0, le=MOST_TASKS)
    """Tasks of the client that has fewest: the first one has ``tasks``, the others evenly in
    between. A client's last task goes on until the run ends. 0: all have ``tasks``."""
    arrival: Literal["same", "staggered", "poisson"] = "same"
    """When tasks arrive: at all clients at once, at each some rounds after the one before it
    (``arrival_lag``), or at each by chance, one in ``train.rounds`` rounds on average. A
    client's last task goes on until the run ends."""
    arrival_lag: float = Field(0, ge=0, le=MOST_SECONDS)
    """``staggered``: by how many rounds (with ``arrival_seconds``: virtual seconds) the last
    client is behind the first."""
    arrival_seconds: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """With a fleet: a task arrives every so many virtual seconds, and not every ``train.rounds``
    rounds, which are then the most that it gets: when all clients have had as many, the server
    waits for the next arrival. 0: in rounds."""
    clients: int = Field(20, ge=1, le=MOST_CLIENTS)
    partition: Literal[
        "paper", "iid", "dirichlet", "quantity", "shards", "natural"
    ] = "paper"
    """``paper``: each client draws some of a task's classes and a fraction of their samples.
    ``quantity``: clients differ in their number of samples. ``shards``: each gets a few pieces
    of the samples sorted by class. ``natural``: a column says whose a sample is."""
    client_column: str = ""
    """``natural``: which column, such as ``person``. Where there are fewer clients than people,
    people are grouped at random."""
    held_out: HeldOut = 0.0
    """``natural``: a share of the people, or their names, who are no clients. The global model is
    scored on all their samples after each task."""
    shards: int = Field(2, ge=1, le=MOST_CLASSES)
    """``shards``: pieces of a task that each client gets."""
    classes_min: int = Field(2, ge=1, le=MOST_CLASSES)
    classes_max: int = Field(5, ge=1, le=MOST_CLASSES)
    samples: float = Field(0.1, gt=0, le=1)
    """``paper``: fraction of a class's training samples that one client holds."""
    test_samples: float = Field(0.1, gt=0, le=1)
    """``paper``: fraction of a class's test samples that one client is scored on; the others share
    out all of them."""
    share: Literal["disjoint", "overlapping"] = "overlapping"
    """``paper``: whether two clients may hold the same sample. ``disjoint`` needs enough samples
    for all clients."""
    alpha: float = Field(0.5, ge=1e-6, le=1e6)
    """``dirichlet``, ``quantity``: concentration; small is skewed. With another partition it
    must be left as it is.
    """
    split: str = ""
    """A file that says who holds which samples
    (:func:`~fedknow.client.data.splits.save_split`), in place of all settings that cut."""
    holdout: float = Field(0.0, ge=0, lt=1)
    """Fraction of each class's training samples that takes the place of the test samples, which
    are then not touched: for choosing settings."""

    kind: Literal["image", "series", "waveform", "tokens", "table"] = "image"
    """``local``: what a sample is. An image ``[C, H, W]``, a series of time steps ``[T, C]``, a
    waveform ``[T]``, token ids ``[T]``, or the columns of a table ``[F]``."""
    shape: list[Annotated[int, Field(ge=1, le=MOST_STEPS)]] = Field(
        default=[], max_length=3
    )
    """``local``: shape of a sample; of an image channels, height and width."""
    vocabulary: int = Field(0, ge=0, le=MOST_TOKENS)
    """``local`` with tokens: number of token ids; 0 is that of no token."""
    classes: int = Field(0, ge=0, le=MOST_CLASSES)
    """``local``: classes of all tasks together."""
    class_names: list[str] = Field(default=[], max_length=MOST_CLASSES)
    """``local``: names of the classes in their order, where clients' tables or folders have names
    and not numbers from 0."""

    @model_validator(mode="after")
    def _partition_fits(self) -> DataConfig:
        if self.classes_min > self.classes_max:
            raise ValueError(
                f"data.classes_min = {self.classes_min} is above data.classes_max = "
                f"{self.classes_max}; "
                "lower the first or raise the second"
            )
        self._refuse_idle("alpha", "partition", ("dirichlet", "quantity"))
        self._refuse_idle("shards", "partition", ("shards",))
        self._refuse_idle("client_column", "partition", ("natural",))
        if self.partition == "natural" and not self.client_column:
            raise ValueError(
                "data.partition = 'natural' needs data.client_column: the column that says "
                "whose a sample is, such as 'person'"
            )
        return self

    @model_validator(mode="after")
    def _stream_fits(self) -> DataConfig:
        self._refuse_idle("domain", "scenario", ("domain-incremental",))
        self._refuse_idle("domain_column", "domain", ("column",))
        self._refuse_idle("domain_strength", "domain", CHANGES)
        self._refuse_idle("domain_alpha", "domain", ("labels",))
        self._refuse_idle("false_alarms", "boundaries", ("hidden",))
        check_stream(self)
        return self

    def _refuse_idle(
        self,
        key: str,
        switch: str,
        values: tuple[str, ...],
    ) -> None:
        """Refuse a setting that does nothing."""
        # It would let a sweep over it pass for a result.
        default = DataConfig.model_fields[key].default
        value, chosen = getattr(self, key), getattr(self, switch)
        if chosen in values or value == default:
            return
        shown = f"{value:g}" if isinstance(value, float) else repr(value)
        raise ValueError(
            f"data.{key} = {shown} does nothing with data.{switch} = {chosen!r}; set "
            f"data.{switch} = {' or '.join(map(repr, values))}, or leave data.{key} at "
            f"{default if isinstance(default, int | float) else repr(default)}"
        )

    @model_validator(mode="after")
    def _images_fit(self) -> DataConfig:
        # Neither is scaled: digits are embedded, and clients' own data come as they are.
        if self.image_size and self.name in ("digits", "local"):
            raise ValueError(
                f"data.image_size = {self.image_size}: data.name = {self.name!r} has "
                f"images of a size of its own; "
                "leave data.image_size at 0"
            )
        # The server holds no sample of theirs, so that it can hold none out.
        if self.holdout and self.name == "local":
            raise ValueError(
                f"data.holdout = {self.holdout:g}: with data.name = 'local' clients "
                f"bring test samples of their own; "
                "leave data.holdout at 0"
            )
        return self

    @model_validator(mode="after")
    def _samples_fit(self) -> DataConfig:
        # Other kinds have one long axis, and images have two.
        if self.kind == "image" and max(self.shape, default=1) > MOST_SIDE:
            raise ValueError(
                f"data.shape = {self.shape}: sides of images end at {MOST_SIDE}; scale the "
                "images down"
            )
        # Nothing else tells how many rows an embedding needs.
        if (self.kind == "tokens") != (self.vocabulary > 1):
            raise ValueError(
                f"data.vocabulary = {self.vocabulary} with data.kind = {self.kind!r}: give the "
                "number of token ids, at least 2, with tokens, and 0 with others"
            )
        if self.kind != "image" and self.name != "local":
            raise ValueError(
                f"data.kind = {self.kind!r}: data.name = {self.name!r} says itself what its "
                "samples are; leave data.kind out"
            )
        return self

    @model_validator(mode="after")
    def _arrivals_fit(self) -> DataConfig:
        # Both or neither: one of the two alone would do nothing.
        if (self.arrival == "staggered") != (self.arrival_lag > 0):
            raise ValueError(
                f"data.arrival_lag = {self.arrival_lag:g} with data.arrival = "
                f"{self.arrival!r}: it must be above 0 "
                "where tasks are staggered, and 0 where they are not"
            )
        # Without seconds a lag is a number of rounds.
        if not self.arrival_seconds and self.arrival_lag % 1:
            raise ValueError(
                f"data.arrival_lag = {self.arrival_lag:g}: rounds are counted in whole "
                f"numbers; round it, or set "
                "data.arrival_seconds"
            )
        return self


def check_stream(data: DataConfig) -> None:
    """Refuse a stream whose settings contradict each other.

    Raises
    ------
    ValueError
        Naming a key, its value and the remedy.
    """
    if data.scenario == "domain-incremental":
        _check_domains(data)
    check_held_out(data)
    if data.split:
        _check_cut(data)
    # Otherwise one task would come less often than the others.
    if data.tasks % data.repeats:
        raise ValueError(
            f"data.repeats = {data.repeats} with data.tasks = {data.tasks}: tasks counts the "
            "repeats too; set data.tasks to a multiple of data.repeats"
        )
    if data.tasks_min > data.tasks:
        raise ValueError(
            f"data.tasks_min = {data.tasks_min} is above data.tasks = {data.tasks}; lower the "
            "first or raise the second"
        )
    if data.blur and data.scenario == "task-incremental":
        raise ValueError(
            f"data.blur = {data.blur:g} with data.scenario = 'task-incremental': a client that "
            "is told the task of each sample has no blurred boundaries; set data.scenario = "
            "'class-incremental' or 'domain-incremental'"
        )
    if data.boundaries == "hidden" and data.scenario == "task-incremental":
        raise ValueError(
            "data.boundaries = 'hidden' with data.scenario = 'task-incremental': a client that is "
            "told the task of each sample sees every boundary; set data.scenario = "
            "'domain-incremental' or 'class-incremental'"
        )
    if data.name == "local":
        _check_local(data)
    elif data.class_names:
        raise ValueError(
            f"data.class_names: data.name = {data.name!r} names its classes itself; leave it out"
        )


def _check_domains(data: DataConfig) -> None:
    if not data.domain:
        raise ValueError(
            "data.scenario = 'domain-incremental' needs data.domain: 'column' for domains that "
            f"the data have, or {', '.join(map(repr, CHANGES))} or 'labels' to make them"
        )
    if data.domain == "column" and not data.domain_column:
        raise ValueError(
            "data.domain = 'column' needs data.domain_column: the column that says which domain "
            "a sample is from, such as 'site'"
        )
    if data.classes_per_task:
        raise ValueError(
            f"data.classes_per_task = {data.classes_per_task} with data.scenario = "
            "'domain-incremental', where each task has all classes; leave it at 0"
        )


def _check_cut(data: DataConfig) -> None:
    """Refuse settings that would cut anew what a file has cut."""
    keys = ("partition", "blur", "labelled", "tasks_min", "task_order")
    # They were applied when the file was made.
    for key in (*keys, "class_order", "classes_per_task"):
        default = DataConfig.model_fields[key].default
        value = getattr(data, key)
        if value != default:
            raise ValueError(
                f"data.{key} = {value!r} does nothing with data.split = {data.split!r}, which "
                f"says who holds what; leave data.{key} at {default!r}"
            )


def _check_local(data: DataConfig) -> None:
    """Refuse settings that would cut data which clients bring cut."""
    names = data.class_names
    if names and data.classes not in (0, len(names)):
        raise ValueError(
            f"data.classes = {data.classes}, and data.class_names has {len(names)}; leave "
            "data.classes out, or name each class"
        )
    # Labels are looked up by name, so that a second class of a name would vanish.
    if len(set(names)) < len(names):
        raise ValueError(
            f"data.class_names = {names}: it must name each class once"
        )
    for key in (
        "split",
        "domain",
        "repeats",
        "blur",
        "labelled",
        "tasks_min",
        "partition",
    ):
        default = DataConfig.model_fields[key].default
        value = getattr(data, key)
        if value != default:
            raise ValueError(
                f"data.{key} = {value!r}: with data.name = 'local' clients bring their tasks "
                f"as they are; leave data.{key} at {default!r}"
            )
