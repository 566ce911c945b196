"""Compare seconds a round of our gRPC server with Flower's deployment.

Clients return what they received.

    python benchmarks/grpc_vs_flower.py    # the table, about half an hour
    python benchmarks/grpc_vs_flower.py --clients 2 --parameters 62000 --rounds 3 --repeats 1

Everything is on this machine, over loopback: ours with TLS both ways, Flower's in the clear
(``flower-superlink --insecure``, a ``flower-supernode`` a client, ``flwr run``). Flower's own
``FedAvg.start`` drives both, and a round ends when it calls ``evaluate_fn``. The first round,
in which ours waits for its clients, is reported apart; medians over the warm rounds of all
repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from _flower_deployment import flowers, logs_of, process_of

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
}

RESULT = "RESULT "


def main() -> None:
    """Run the cases asked for, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 10])
    parser.add_argument(
        "--parameters", type=int, nargs="+", default=[62_000, 1_000_000]
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=["fedknow", "flower"],
        default=["fedknow", "flower"],
    )
    parser.add_argument(
        "--rounds", type=int, default=6, help="warm rounds, after the first"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "grpc_vs_flower.json",
    )
    parser.add_argument("--drive", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--echo", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        clients, parameters, rounds, folder = args.drive
        drive(int(clients), int(parameters), int(rounds), Path(folder))
    elif args.echo:
        server, tls, state = args.echo
        echo(server, Path(tls), Path(state))
    else:
        table(args)


def table(args: argparse.Namespace) -> None:
    """Measure all cases, print a table and write the results."""
    from engine_vs_flower import describe

    cases = []
    print(
        f"{'parameters':>10} {'clients':>7} {'system':8} {'s/round':>9} "
        f"{'of each repeat':24} {'first':>7} {'ratio':>8}"
    )
    for parameters in args.parameters:
        for clients in args.clients:
            for figures in compare(parameters, clients, args):
                case = {"parameters": parameters, "clients": clients, **figures}
                cases.append(case)
                print_case(case)
    args.workers = None
    description = describe(args)
    description["command"] = " ".join(
        ["python", "benchmarks/grpc_vs_flower.py", *sys.argv[1:]]
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"about": description, "cases": cases}, indent=1) + "\n",
        "utf-8",
    )
    print(f"written to {args.out}")


def compare(
    parameters: int, clients: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure one case on each system, and return the figures of each.

    The systems take turns, so that other work of the machine affects both alike.
    """
    runs = {"fedknow": serve_here, "flower": flowers}
    repeats: dict[str, list[list[float]]] = {
        system: [] for system in args.systems
    }
    for _ in range(args.repeats):
        for system in args.systems:
            with tempfile.TemporaryDirectory(
                prefix="fedknow-benchmark-"
            ) as folder:
                times = runs[system](
                    clients, parameters, args.rounds, Path(folder)
                )
            repeats[system].append(times)
    results = [
        {"system": system, **figures_of(each)} for system, each in repeats.items()
    ]
    medians = {result["system"]: result["median"] for result in results}
    for result in results:
        if result["system"] == "fedknow" and "flower" in medians:
            result["times_faster_than_flower"] = (
                medians["flower"] / medians["fedknow"]
            )
    return results


def figures_of(repeats: list[list[float]]) -> dict[str, Any]:
    """Return the figures of a system's rounds; the first of a repeat is apart."""
    warm = chain.from_iterable(times[1:] for times in repeats)
    return {
        "median": statistics.median(warm),
        "medians": [statistics.median(times[1:]) for times in repeats],
        "first": statistics.median(times[0] for times in repeats),
        "rounds": repeats,
    }


def print_case(case: dict[str, Any]) -> None:
    """Print a row of the table."""
    each = " ".join(f"{value:.4f}" for value in case["medians"])
    ratio = ""
    if "times_faster_than_flower" in case:
        ratio = f"{case['times_faster_than_flower']:7.0f}x"
    print(
        f"{case['parameters']:10} {case['clients']:7} {case['system']:8} "
        f"{case['median']:9.4f} {each:24} {case['first']:7.2f} {ratio:>8}",
        flush=True,
    )


def serve_here(
    clients: int, parameters: int, rounds: int, folder: Path
) -> list[float]:
    """Return seconds of each round with our server and clients.

    Each of them is a process of its own.
    """
    from fedknow.server.certs import make_certificates

    make_certificates(folder / "certs", clients)
    command = [
        sys.executable,
        __file__,
        "--drive",
        str(clients),
        str(parameters),
        str(rounds),
        str(folder),
    ]
    with ExitStack() as stack:
        server = stack.enter_context(
            process_of(command, folder / "server.log", stdout=subprocess.PIPE)
        )
        assert server.stdout is not None
        port = server.stdout.readline().decode().strip()
        if not port:
            raise SystemExit((folder / "server.log").read_text())
        for client in range(clients):
            tls = folder / "certs" / "clients" / f"{client:03d}"
            line = [
                sys.executable,
                __file__,
                "--echo",
                f"localhost:{port}",
                str(tls),
                str(folder / f"state-{client}"),
            ]
            stack.enter_context(process_of(line, folder / f"client-{client}.log"))
        result = server.stdout.read().decode()
        if not result.startswith(RESULT):
            raise SystemExit(logs_of(folder))
        times: list[float] = json.loads(result.removeprefix(RESULT))
        return [end - start for start, end in pairwise(times)]


def drive(clients: int, parameters: int, rounds: int, folder: Path) -> None:
    """Run the server's process."""
    from engine_clients import digits, first_arrays
    from flwr.serverapp.strategy import FedAvg

    from fedknow.protocols.flower import to_record
    from fedknow.protocols.security import server_credentials
    from fedknow.server.grids.grpc_grid import GrpcGrid
    from fedknow.server.grids.strategy_grid import StrategyGrid

    credentials = server_credentials(folder / "certs" / "server")
    times: list[float] = []
    with GrpcGrid(
        digits(clients, "finetune"), "127.0.0.1:0", credentials=credentials
    ) as grid:
        print(grid.port, flush=True)
        strategy = FedAvg(
            fraction_evaluate=0.0,
            min_train_nodes=clients,
            min_available_nodes=clients,
        )
        arrays = to_record(first_arrays("echo", clients, parameters))
        strategy.start(
            StrategyGrid(grid),
            arrays,
            num_rounds=rounds + 1,
            evaluate_fn=lambda *_: times.append(time.time()),
        )
        grid.finish()
    print(RESULT + json.dumps(times), flush=True)


def echo(server: str, tls: Path, state: Path) -> None:
    """Run a client's process."""
    from engine_clients import Echo, Nothing

    from fedknow.client.edge.client import EdgeClient, run_client

    run_client(
        EdgeClient(
            server,
            state,
            tls=tls,
            node=lambda config: Echo(config, Nothing(config.data.clients)),
        )
    )


if __name__ == "__main__":
    main()
