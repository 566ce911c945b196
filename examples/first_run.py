"""A first run: FedKNOW on handwritten digits, from Python.

Run it with ``python examples/first_run.py``. It takes about half a minute.
"""

import sys

import fedknow


def main(out: str = "runs/first-run") -> fedknow.Run:
    """Simulate eight clients that learn five tasks, and look at the result."""
    run = fedknow.simulate(
        "digits",
        data={"clients": 8},
        learner="fedknow",
        out=out,
        report=True,
    )
    print(run)
    # Rows are tasks, columns are the moments after each task; NaN is "not learned yet".
    print((100 * run.matrix()).round(1))
    print(f"forgetting: {100 * run.measures['forgetting']:.1f} points")
    run.plot("matrix").savefig(run.path / "matrix.png")

    # The global model, ready for other programs: images from 0 to 1 in, logits out.
    model = run.deployed()
    model.export(run.path / "model", to="safetensors")
    print(f"the report is in {run.path / 'report.html'}")
    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
