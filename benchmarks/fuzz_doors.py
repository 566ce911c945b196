"""Throw hostile words at all that reads them above the wire.

    python benchmarks/fuzz_doors.py --seconds 60

    python benchmarks/fuzz_doors.py --inputs 2000000 --seconds 36000

These are the server's invitation with its configuration, which a client reads; work and the
settings of a round; the messages of secure aggregation, on both sides; answers of clients, which
the server's checks read; credentials and fences; and texts that go into logs. Each may end in
the error that is made for it, and in no other way. Prints what came of the inputs, and
how far the process grew from a tenth of the way on.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from _fuzzing import NUMBERS, WORDS, Fault, setting, value, watched

from fedknow.client.edge.intake import check_names, read_toml
from fedknow.client.permissions import Permissions
from fedknow.client.secure import SecureNode
from fedknow.protocols.config import ConfigError, TrainConfig, read_config
from fedknow.protocols.instructions import read_instructions
from fedknow.protocols.messages import (
    END_TASK,
    EVALUATE,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
)
from fedknow.protocols.secure import rounds
from fedknow.protocols.secure.masks import public_key
from fedknow.protocols.security import CredentialError, Tokens, authenticate
from fedknow.protocols.security.identity import client_of_peer, client_uri
from fedknow.protocols.texts import printable
from fedknow.protocols.wire import (
    Code,
    WireError,
    check_version,
    goodbye,
    pack,
    parse,
    refusal,
    refused,
    unpack,
    welcome,
)
from fedknow.protocols.wire.frames import Assembler
from fedknow.protocols.work import (
    EndTaskWork,
    ScoreWork,
    TrainWork,
    Work,
    merge_settings,
)
from fedknow.server.checks.claims import Claims
from fedknow.server.checks.replies import Inspector
from fedknow.server.grids.fences import Fences
from fedknow.server.run.secure_waves import read_keys, read_texts

CONFIG = read_config({}).to_toml()
KNOWN = Arrays(w=np.zeros((3, 2), np.float32), b=np.zeros(2, np.float32))
CLAIMS = Claims([[5, 7]] * 4, [[2, 3]] * 4)
TOKEN = "3." + "A" * 43
TOKENS = Tokens({})
TOKENS.add(TOKEN)
FENCES = Fences(b"secret")
SECURE_CONFIG = read_config({"privacy": {"secure": True}})
SESSION = bytes(range(32))
OTHERS = [public_key(bytes([number]) * 32) for number in (1, 2)]


def read_invitation(draw: random.Random) -> str:
    """Read a welcome and its configuration, as a client does."""
    lines = CONFIG.splitlines()
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(lines))
        key = lines[at].partition(" = ")[0]
        choice = draw.randrange(4)
        if choice == 0:
            text = json.dumps(value(draw), ensure_ascii=draw.random() < 0.5)
            lines[at] = f"{key} = {text}"
        elif choice == 1:
            lines.insert(at, draw.choice(lines))
        elif choice == 2:
            del lines[at]
        else:
            spot = draw.randrange(len(lines[at]) + 1)
            noise = chr(draw.randrange(1, 0xD800))
            lines[at] = lines[at][:spot] + noise + lines[at][spot:]
    if draw.random() < 0.05:
        # Deeper, and with more digits, than Python's own readers go.
        lines.insert(0, draw.choice(("x = " + "[" * 3000, "x = " + "9" * 5000)))
    run, node, fence = "4fe1", 2, draw.randbytes(32)
    if draw.random() < 0.2:
        run = draw.choice(("a run", "../x", "", "x" * 99))
        node = draw.choice((3, 0, 1, 2**31, 2**63))
        fence = draw.randbytes(draw.choice((0, 65)))
    text = "\n".join(lines)
    invitation = parse(welcome(node, text, run, fence)).welcome
    check_version(invitation)
    check_names(invitation.run, invitation.node, invitation.fence)
    config = read_config(read_toml(invitation.config))
    Permissions().check(config)
    for name in (config.model.name, config.learner.name, config.data.name):
        if ":" in name:
            raise Fault(f"{name} may be imported")
    return "permitted"


def read_settings(draw: random.Random) -> str:
    """Read the settings of a round, as a client does."""
    keys = ("lr", "epochs", "local-epochs", "batch-size", "proximal-mu", "x")
    settings = {key: value(draw) for key in draw.sample(keys, 3)}
    train = TrainConfig()
    Permissions().check_work(settings, train)
    try:
        read = read_instructions(settings, train)
    except ValueError:
        return "refused"
    if not 0 < read.train.epochs <= 1000:
        raise Fault(f"{read.train.epochs} epochs")
    return "read"


def read_work(draw: random.Random) -> str:
    """Read a piece of work, as a client does before it trains."""
    names = ["task", "round", "rounds", "tasks", "server-round", "scoring"]
    names += ["collect", "forward", "lr", "epochs", draw.choice(WORDS)]
    config = Config({name: value(draw) for name in draw.sample(names, 5)})
    if draw.random() < 0.5:
        config |= {"task": 0, "round": 1}
    content = {"arrays": KNOWN, "config": config, "metrics": Metrics(task=1)}
    if draw.random() < 0.3:
        del content[draw.choice(list(content))]
    settings = merge_settings(content)
    Permissions().check_work(settings, TrainConfig())
    kind: type[Work] = draw.choice((TrainWork, EndTaskWork, ScoreWork))
    try:
        kind.from_content(content)
    except ValueError:
        return "refused"
    return "read"


class Echo:
    """A node that sends back what it got."""

    def handle(self, work: Message, state: Any) -> tuple[Message, Any]:
        """Answer work."""
        metrics = Metrics({"num-examples": 1})
        return work.reply({"arrays": work.arrays(), "metrics": metrics}), state


def read_secure(draw: random.Random) -> str:
    """Read the messages of secure aggregation, on a client and on the server."""
    node = SecureNode(Echo(), SECURE_CONFIG)
    answer, state = node.handle(secure_request(rounds.KEYS, {}, draw), {})
    public = answer.content.get(rounds.SECURE, Config())
    assert isinstance(public, Config)
    request: dict[str, Any] = {rounds.NODES: [2, 3, 4]}
    for name, plural in (
        (rounds.SHARE_KEY, rounds.SHARE_KEYS),
        (rounds.MASK_KEY, rounds.MASK_KEYS),
    ):
        request[plural] = [public.get(name, b""), *OTHERS]
    # As far as this goes, an honest server would.
    if draw.random() < 0.5:
        message = secure_request(rounds.SHARES, request, draw)
        _, state = node.handle(message, state)
    request[rounds.SURVIVORS] = [2, 3, 4]
    request[rounds.SEALED] = [draw.randbytes(148) for _ in range(3)]
    for _ in range(draw.randrange(3)):
        request[draw.choice(list(request))] = setting(draw)
    kind = draw.choice((rounds.SHARES, rounds.UNMASK, TRAIN))
    reply, new = node.handle(secure_request(kind, request, draw), state)
    keys = [new_public(draw) for _ in range(2)]
    record = Config(
        {rounds.SHARE_KEY: keys[0], rounds.MASK_KEY: keys[1], **request}
    )
    with suppress(ValueError):
        read_keys(record)
    with suppress(ValueError):
        read_texts(record, rounds.SEALED, 3, 148)
    if reply.failure is None:
        return "answered"
    if "secure" in new:
        raise Fault("the secrets of a round that failed are kept")
    return "refused"


def secure_request(
    kind: str, request: dict[str, Any], draw: random.Random
) -> Message:
    """Make a message of the server's, most often of the right session."""
    session = SESSION if draw.random() < 0.9 else setting(draw)
    config = Config({rounds.SESSION: session, **request})
    content: dict[str, Any] = {"config": config}
    if kind == TRAIN:
        content = {
            "arrays": KNOWN,
            "config": Config(task=0, round=1),
            rounds.SECURE: config,
        }
    return Message(kind, 2, "1", content=content)


def new_public(draw: random.Random) -> bytes:
    """Draw what may pass for a public key."""
    return draw.choice((bytes(32), draw.randbytes(32), draw.randbytes(31)))


def make_answer(draw: random.Random) -> Message:
    """Make an answer of a client, right or not."""
    kind = draw.choice((TRAIN, END_TASK, EVALUATE))
    names = ["num-examples", "loss", "total", "correct", "losses", "accuracy"]
    names += ["knowledge-bytes", "flops", draw.choice(WORDS)]
    numbers: dict[str, Any] = {
        name: number_of(draw) for name in draw.sample(names, 6)
    }
    if draw.random() < 0.5:
        numbers |= {"num-examples": 5, "total": [2, 3], "correct": [1, 1]}
    arrays = Arrays(KNOWN)
    if draw.random() < 0.5:
        shape = [draw.randrange(4) for _ in range(draw.randrange(3))]
        dtype = draw.choice(("float32", "float64", "int64", "float16", "bool"))
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            array = np.full(shape, float(draw.choice(NUMBERS))).astype(dtype)
        arrays[draw.choice(("w", "b", "z"))] = array
    content = {"arrays": arrays, "metrics": Metrics(numbers)}
    return Message(kind, draw.randint(2, 5), "1", "0", "", content)


def number_of(draw: random.Random) -> Any:
    """Draw a value that metrics can have on the wire."""
    if draw.random() < 0.5:
        return draw.choice(NUMBERS)
    kind = draw.choice((int, float))
    numbers = [number for number in NUMBERS if isinstance(number, kind)]
    return [draw.choice(numbers) for _ in range(draw.randrange(4))]


def read_answer(draw: random.Random) -> str:
    """Check an answer of a client, before a strategy sees it."""
    assembler = Assembler()
    for frame in pack(make_answer(draw)).frames():
        parcel = assembler.add(parse(frame))
    assert parcel is not None
    failures: list[Any] = []
    inspector = Inspector(failures.append, 100.0, claims=CLAIMS)
    inspector.begin(0, 1, KNOWN)
    inspector.expect_scores(2, should_collect=False)
    answer = inspector(unpack(parcel))
    if failures:
        if not str(failures[0]).isprintable():
            raise Fault("a failure that a terminal acts on")
        return "refused"
    if answer.kind == TRAIN:
        check_training(answer)
    return "taken"


def check_training(answer: Message) -> None:
    """Raise :class:`Fault` if a strategy must not see an answer."""
    metrics = answer.content["metrics"]
    assert isinstance(metrics, Metrics)
    if not 0 < float(str(metrics["num-examples"])) <= 7:
        raise Fault(f"{metrics['num-examples']} examples")
    if not all(np.isfinite(array).all() for array in answer.arrays().values()):
        raise Fault("numbers that are not finite")


def read_credential(draw: random.Random) -> str:
    """Read a token and a fence, as the server does before it knows who speaks."""
    text = bytearray(TOKEN.encode())
    text[draw.randrange(len(text))] = draw.randrange(256)
    word = text.decode("latin-1")
    headers = [
        ("authorization", f"{draw.choice(('Bearer', 'bearer', ''))} {word}")
    ]
    headers *= draw.randint(0, 2)
    fence = bytearray(FENCES.issue(2))
    fence[draw.randrange(len(fence))] ^= 1 << draw.randrange(8)
    if FENCES.is_known(2, bytes(fence)):
        raise Fault("a fence that was never issued")
    name = bytearray(b"fedknow://client/3")
    name[draw.randrange(len(name))] = draw.randrange(256)
    named = client_of_peer({"x509_subject_alternative_name": [bytes(name)]})
    if named is not None and client_uri(named).encode() != bytes(name):
        raise Fault(f"{bytes(name)!r} names client {named}")
    client = authenticate({}, headers, TOKENS, draw.choice((None, 3, 4)))
    if client != 3 or word != TOKEN:
        raise Fault(f"{word!r} lets client {client} in")
    return "let in"


def read_text(draw: random.Random) -> str:
    """Read the last words of the other side."""
    text = "".join(
        chr(draw.randrange(0xD800)) for _ in range(draw.randrange(100))
    ) * draw.choice((1, 1, 100))
    error = WireError(Code.MALFORMED, text)
    shown = [
        refused(parse(refusal(error)).refusal).reason,
        printable(parse(goodbye(False, text)).goodbye.reason),
    ]
    for line in shown:
        if not line.isprintable() or len(line) > 25_000:
            raise Fault("a text that a terminal acts on")
    return "shown"


WAYS: tuple[Callable[[random.Random], str], ...] = (
    read_invitation,
    read_settings,
    read_work,
    read_secure,
    read_answer,
    read_credential,
    read_text,
    # Once more: these take a twentieth of the time of the others.
    *(read_settings, read_work, read_credential) * 3,
)


def run(
    inputs: int | None, seconds: float, seed: int
) -> collections.Counter[str]:
    """Read inputs until the count or the time is over.

    Returns
    -------
    Counter
        How often each outcome was seen, by the way of reading.

    Raises
    ------
    Exception
        Any but those made for it: a fault of a reader. Its text names the input's seed.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + seconds
    number = 0
    with warnings.catch_warnings(action="error"):
        while (inputs is None or number < inputs) and time.monotonic() < end:
            # Each input has a seed of its own, by which it can be read again.
            draw = random.Random(f"{seed}:{number}")
            reader = WAYS[number % len(WAYS)]
            number += 1
            try:
                outcome = reader(draw)
            except (ConfigError, WireError, CredentialError) as error:
                outcome = type(error).__name__
            except Exception as error:
                error.add_note(f"input {number - 1} of seed {seed}")
                raise
            outcomes[f"{reader.__name__}: {outcome}"] += 1
    return outcomes


def main() -> None:
    """Run the command."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--inputs", type=int, help="stop after so many")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    watched(run, chosen.inputs, chosen.seconds, chosen.seed)


if __name__ == "__main__":
    main()
