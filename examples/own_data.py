"""Data of your own: four arrays become a task stream for many clients.

Run it with ``python examples/own_data.py``. Here the arrays are drawn by a random generator;
yours come from files.
"""

import sys

import numpy as np

import fedknow

CLASSES = 6


def draw(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw pictures of a bright stripe, whose row tells the class.

    Returns
    -------
    uint8 [n, 1, 12, 12] and int64 [n]
    """
    random = np.random.default_rng(seed)
    y = np.repeat(np.arange(CLASSES), per_class)
    x = random.integers(0, 120, (len(y), 1, 12, 12), dtype=np.uint8)
    rows = 2 * y
    x[np.arange(len(y)), 0, rows] += 100
    return x, y


def main(out: str = "runs/own-data") -> fedknow.Run:
    """Share the samples of six classes among five clients, two classes a task."""
    train_x, train_y = draw(per_class=60, seed=1)
    test_x, test_y = draw(per_class=20, seed=2)
    stripes = fedknow.Dataset.from_arrays(
        "stripes", train_x, train_y, test_x, test_y
    )
    run = fedknow.simulate(
        "digits",  # a preset: every setting that is not given here
        name="stripes",
        data={
            "name": stripes,
            "clients": 5,
            "tasks": 3,
            "partition": "dirichlet",
        },
        learner="fedrep",
        engine={"backend": "inline"},
        out=out,
    )
    print(run)
    print((100 * run.matrix()).round(1))
    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
