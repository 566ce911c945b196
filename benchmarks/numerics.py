"""Measure a training step by memory format, precision and optimizer.

    python benchmarks/numerics.py
    python benchmarks/numerics.py --models mlp cnn --repeats 5

Milliseconds of one step with one thread, the ways in turn: forward and backward pass with
images and filters in either memory format and in either precision; and the optimizer's step as
PyTorch's loop, foreach and fused versions take it. `train.channels_last = true`, fused
optimizers and `train.precision = "fp32"` are the defaults.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import RESULTS, write
from torch.nn import functional as F

from fedknow.client.models import build_model
from fedknow.protocols.config import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MODELS: dict[str, tuple[ModelConfig, tuple[int, int, int], int]] = {
    "mlp": (ModelConfig(name="mlp"), (1, 8, 8), 8),
    "cnn": (ModelConfig(name="cnn"), (1, 8, 8), 8),
    "cnn, 28x28": (ModelConfig(name="cnn"), (1, 28, 28), 10),
    "cnn6": (ModelConfig(name="cnn6"), (3, 32, 32), 40),
    "resnet18, half width": (
        ModelConfig.model_validate({"name": "resnet18", "width": 0.5}),
        (3, 32, 32),
        40,
    ),
}
"""Model, image, batch."""
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, loop": lambda p: torch.optim.SGD(p, 1e-3, foreach=False),
    "SGD, foreach": lambda p: torch.optim.SGD(p, 1e-3, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 1e-3, fused=True),
    "Adam, loop": lambda p: torch.optim.Adam(p, 1e-3, foreach=False),
    "Adam, foreach": lambda p: torch.optim.Adam(p, 1e-3, foreach=True),
    "Adam, fused": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS)
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "numerics.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in args.models:
        results[name] = in_turn(passes(name) | steps(name), args.repeats)
        print(
            name,
            {step: round(ms, 3) for step, ms in results[name].items()},
            flush=True,
        )
    write(args.out, results, repeats=args.repeats)


def in_turn(
    candidates: Mapping[str, Callable[[], None]], repeats: int
) -> dict[str, float]:
    """Median milliseconds of each way; the first turn is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            seconds[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: statistics.median(values[1:]) for name, values in seconds.items()
    }


def passes(name: str) -> dict[str, Callable[[], None]]:
    """Forward and backward pass in each memory format and precision."""
    config, shape, batch = MODELS[name]

    def step_of(
        memory_format: torch.memory_format, bf16: bool
    ) -> Callable[[], None]:
        model = build_model(config, shape, 100, 0).to(memory_format=memory_format)  # type: ignore[call-overload]
        x = torch.randn(batch, *shape).contiguous(memory_format=memory_format)
        y = torch.randint(0, 100, (batch,))

        def run() -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                z = model(x)
            F.cross_entropy(z.float(), y).backward()  # type: ignore[no-untyped-call]

        return run

    passes = {}
    for name, memory_format in FORMATS.items():
        for precision in ("fp32", "bf16"):
            step = step_of(memory_format, precision == "bf16")
            passes[f"{name}, {precision}"] = step
    return passes


def steps(name: str) -> dict[str, Callable[[], None]]:
    """Each optimizer's step on the model's parameters."""
    config, shape, _ = MODELS[name]
    candidates: dict[str, Callable[[], None]] = {}
    for optimizer, make in OPTIMIZERS.items():
        model = build_model(config, shape, 100, 0).to(
            memory_format=torch.channels_last
        )  # type: ignore[call-overload]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        candidates[optimizer] = make(list(model.parameters())).step
    return candidates


if __name__ == "__main__":
    main()
