"""Configurations with impossible and odd values: a sentence, the right exit code, and an end.

Each setting of the experiment, of each learner, strategy and model meets each hostile value, in
this process. What is accepted is run, tiny, to its end.
"""

import random
import re
import shutil

import pytest

from fedknow.client.learners import LEARNERS
from fedknow.client.models import list_models, setting_names
from fedknow.protocols.config import ExperimentConfig
from fedknow.server.run.folder import RunFolder
from fedknow.strategies.build import option_names
from fedknow.strategies.registry import BUILTIN

pytestmark = pytest.mark.usefixtures("no_report")

TINY = (
    "data.clients=3", "data.tasks=2", "data.classes_max=2", "data.samples=0.1",
    "train.rounds=1", "train.epochs=1",
    "model=linear", "engine.backend=inline", "learner=finetune", "strategy.fraction=1.0",
)  # fmt: skip
NEEDED = {
    "fedtrimmedavg": ["strategy.beta=0.4"],
    "qfedavg": ["strategy.client_learning_rate=0.1"],
    "dp-fixed-clipping": [
        "strategy.noise_multiplier=0.5", "strategy.clipping_norm=1.0",
        "strategy.num_sampled_clients=3",
    ],
    "dp-adaptive-clipping": ["strategy.noise_multiplier=0.5", "strategy.num_sampled_clients=3"],
}  # fmt: skip
"""What strategies cannot do without."""

NEVER = {
    "nan": "nan",
    "inf": "inf",
    "-inf": "-inf",
    "10**30": str(10**30),
    "-10**30": str(-(10**30)),
    "hex": f"0x{'f' * 5000}",
    "digits": "9" * 5000,
    "date": "2024-02-29",
    "deep": "[" * 12 + "]" * 12,
    "very deep": "[" * 5000 + "]" * 5000,
    "table": "{a = {b = 1}}",
    "nul": '"\\u0000"',
    "long": f'"{"x" * 5000}"',
}
"""What no setting can be: always refused."""

SOMETIMES = {
    "-1": "-1",
    "0": "0",
    "1": "1",
    "2.5": "2.5",
    "1e300": "1e300",
    "1e-300": "1e-300",
    "10**9": str(10**9),
    "2**63-1": str(2**63 - 1),
    "text": '"x"',
    "empty": '""',
    "reference": '"sys:exit"',
    "unicode": '"é\\u2028\\u202e"',
    "true": "true",
    "list": "[1, 2]",
    "empty list": "[]",
    "empty table": "{}",
}
"""What some settings can be: refused, or run to the end, or the run says why it cannot go on."""


QUICK_MODELS = ("cnn6", "cnn", "mlp", "linear")
"""Others take seconds to be built: they meet only what is refused before."""


def cases():
    """Each setting with each value: what is set before, the key, what the value is called."""
    for base, key in settings():
        is_quick = (
            not key.startswith("model.")
            or key == "model.name"
            or not base
            or base[0].endswith(QUICK_MODELS)
        )
        for name in NEVER | (SOMETIMES if is_quick else {}):
            yield base, key, name


def settings():
    """All settings there are, each with what must be set so that there is such a one."""
    for section, field in ExperimentConfig.model_fields.items():
        nested = getattr(field.annotation, "model_fields", {})
        names = [f"{section}.{name}" for name in nested] if nested else [section]
        fleet = ["fleet=infinite"] if section == "fleet" else []
        yield from ((fleet, name) for name in names)
    for learner, kind in LEARNERS.items():
        yield from (
            ([f"learner={learner}"], f"learner.{name}")
            for name in kind.Settings.model_fields
        )
    for strategy in BUILTIN:
        base = [
            f"strategy={strategy}",
            *halves(strategy),
            *NEEDED.get(strategy, []),
        ]
        yield from ((base, f"strategy.{name}") for name in option_names(strategy))
    for model in list_models():
        image = ["data.image_size=0"]
        yield from (
            ([f"model={model}", *image], f"model.{name}")
            for name in setting_names(model)
        )


def halves(strategy):
    """The learner that a paired strategy needs, and a model that it can train."""
    found = [
        name for name, kind in LEARNERS.items() if kind.strategy == strategy
    ][:1]
    if not found:
        return []
    train = LEARNERS[found[0]].model_train
    return [f"learner={found[0]}", "model=mlp", f"model.train={train}"]


@pytest.fixture
def attempt(folder, fedknow):
    """Run a case; complain of anything but a sentence and the right exit code."""

    def run(base, key, name):
        out = folder / "run"
        value = (NEVER | SOMETIMES)[name]
        done = fedknow(
            "simulate",
            "digits",
            "-q",
            "--out",
            out,
            changes=[*TINY, *base, f"{key}={value}"],
        )
        case = f"{' '.join(base)} {key} = {name}: "
        if done.exception is not None and not isinstance(
            done.exception, SystemExit
        ):
            return (
                case
                + f"{type(done.exception).__name__}: {str(done.exception)[:300]}"
            )
        problem = wrong_end(done, key, name, out)
        shutil.rmtree(out, ignore_errors=True)
        return case + problem if problem else ""

    return run


def wrong_end(done, key, name, out):
    """What is wrong with the way a run ended; nothing if nothing is."""
    text = f"{done.exit_code}, {done.stderr[:300]!r}"
    if done.exit_code != 2 and name in NEVER:
        return f"not refused: {text}"
    if done.exit_code == 0:
        complete = RunFolder.open(out).complete
        return (
            ""
            if complete and not done.stderr
            else f"ended, but is not complete or complains: {text}"
        )
    if not done.stderr.startswith("Error: ") or len(done.stderr) > 3000:
        return f"no sentence: {text}"
    if done.exit_code == 1:
        return (
            ""
            if (out / "error.log").exists()
            else f"failed without a log: {text}"
        )
    if out.exists():
        return f"refused, but left a folder: {text}"
    leaf = key.rpartition(".")[2]
    names_it = (
        re.search(rf"\b{leaf}\b", done.stderr)
        or key.partition(".")[0] in done.stderr
    )
    return (
        ""
        if done.exit_code == 2 and names_it
        else f"does not name the setting: {text}"
    )


SHORT = 600
"""Cases that CI runs, drawn from all."""


def run_all(attempt, chosen):
    problems = [problem for case in chosen if (problem := attempt(*case))]
    assert not problems, f"{len(problems)} of {len(chosen)}:\n" + "\n".join(
        problems
    )


@pytest.mark.timeout(240)
def test_mutated_configurations(attempt):
    chosen = random.Random(14).sample(list(cases()), SHORT)
    run_all(attempt, chosen)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_mutated_configurations(attempt):
    everything = list(cases())
    assert len(everything) > 5 * SHORT
    run_all(attempt, everything)
