"""Checks of a strategy's instructions to clients, before they are sent.

A wrong learning rate is the strategy's fault, not that of the first client to read it. A setting
that nobody reads changes nothing, so that a run's user must hear of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import ConfigRecord
from flwr.app import Message as FlowerMessage

from fedknow.client.learners.frames.learner import Learner
from fedknow.protocols.config import ExperimentConfig, closest
from fedknow.protocols.instructions import READ, read_instructions
from fedknow.protocols.messages import ARRAYS, EXTRA, TRAIN, client_of
from fedknow.protocols.secure.rounds import NODES, SESSION
from fedknow.protocols.work import POSITION, ROUND, TASK
from fedknow.server.checks.faults import RunError

__all__ = ["StrategyCheck", "position"]

SETTINGS = "fedknow"
"""Name of the config record that is added where a strategy leaves out ours."""


def position(message: FlowerMessage) -> ConfigRecord:
    """Find the config record of a message that names its task and round."""
    records = message.content.config_records.values()
    return next(
        (record for record in records if TASK in record and ROUND in record),
        ConfigRecord(),
    )


class StrategyCheck:
    """Looks at every training message of a strategy before it is sent.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    learner : object
        The server's :class:`~fedknow.client.learners.Learner`.
    warn : callable
        Told once a run, in a sentence, which settings nobody reads.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        learner: Any,
        warn: Callable[[str], object],
    ) -> None:
        self._config = config
        self._learner = learner
        self._warn = warn
        reads = getattr(learner, "reads", ())
        # The keys of secure aggregation are for the node, before the learner.
        self._known = {*POSITION, *READ, *reads, SESSION, NODES}
        self._takes_extra = (
            getattr(type(learner), "receive_extra", Learner.receive_extra)
            is not Learner.receive_extra
        )
        self._warned = False

    def __call__(
        self,
        messages: Sequence[FlowerMessage],
        make_settings: Callable[[], ConfigRecord],
    ) -> None:
        """Check messages, and add our settings where a strategy leaves them out.

        Parameters
        ----------
        messages : sequence of flwr.app.Message
            Messages about to be sent.
        make_settings : callable
            Makes our settings.

        Raises
        ------
        RunError
            Naming the strategy, the key, the value and what would be right.
        """
        work = [
            message
            for message in messages
            if message.metadata.message_type == TRAIN
        ]
        # Clients share records, and often a message's whole content.
        checked: set[int] = set()
        unread: dict[str, None] = {}
        for message in work:
            if not position(message):
                message.content[SETTINGS] = make_settings()
            if id(message.content) in checked:
                continue
            # The messages hold the contents, so that no id is given twice.
            checked.add(id(message.content))
            self._check(message)
            unread |= dict.fromkeys(self._unread(message))
        # Once a run: a strategy sends the same settings in every round.
        if unread and not self._warned:
            self._warned = True
            self._warn(self._sentence(list(unread)))

    def _check(self, message: FlowerMessage) -> None:
        settings: dict[str, Any] = {}
        for record in message.content.config_records.values():
            # The first record that has a key decides, as on the client.
            settings = {**record, **settings}
        client = client_of(message.metadata.dst_node_id)
        try:
            train = read_instructions(settings, self._config.train).train
        except ValueError as error:
            raise self._fault(client, str(error)) from None
        # Known once the server has looked at the samples; other servers' learners may not say.
        smallest = getattr(self._learner, "batch_minimum", None) or 1
        if train.batch_size < smallest:
            model = f"model.name = {self._config.model.name!r}"
            reason = (
                f"batch-size = {train.batch_size}: {model} has BatchNorm, "
                f"which needs {smallest} or more"
            )
            raise self._fault(client, reason)
        # The client would fail for it, and each client again in each round.
        if EXTRA in message.content and not self._takes_extra:
            name = self._config.learner.name
            reason = (
                f"a record {EXTRA!r}, which learner.name = {name!r} does not take; "
                "choose its own strategy"
            )
            raise self._fault(client, reason)

    def _fault(self, client: int, reason: str) -> RunError:
        return RunError(
            f"strategy {self._config.strategy.name} sends client {client} {reason}"
        )

    def _unread(self, message: FlowerMessage) -> list[str]:
        arrays = list(message.content.array_records)
        # A strategy may give its parameters another name.
        parameters = ARRAYS if ARRAYS in arrays else next(iter(arrays), ARRAYS)
        names: list[str] = []
        for record in message.content.config_records.values():
            names += record
        names += [name for name in arrays if name not in (parameters, EXTRA)]
        names += list(message.content.metric_records)
        return [name for name in names if name not in self._known]

    def _sentence(self, unread: list[str]) -> str:
        hint = closest(unread[0], READ)
        read = ", ".join((*READ, *getattr(self._learner, "reads", ())))
        return (
            f"strategy {self._config.strategy.name} sends clients {', '.join(unread)}, "
            f"which learner "
            f"{self._config.learner.name} does not read{hint}: this changes nothing; it "
            f"reads {read}"
        )
