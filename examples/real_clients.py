"""Real clients: a gRPC server and three clients, all processes.

Run it with ``python examples/real_clients.py``. All run on this machine here, in the clear on
loopback; on other machines give ``--tls`` (see docs/how-to/deploy.md).
"""

import re
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import fedknow

CLIENTS = 3
COMMAND = [sys.executable, "-m", "fedknow"]


def start_server(out: str) -> tuple[Popen[str], str]:
    """Start a server on a free port.

    Returns
    -------
    The process, and the address that clients connect to.
    """
    settings = [f"data.clients={CLIENTS}", "data.tasks=2", "train.rounds=2"]
    changes = [f"--set={setting}" for setting in settings]
    places = ["--listen", "127.0.0.1:0", "--out", out]
    command = [*COMMAND, "server", "digits", *places, *changes]
    server = Popen(command, stdout=PIPE, stderr=STDOUT, text=True)
    assert server.stdout is not None
    # Port 0 is any free one; a line of the server's log says which it is.
    for line in server.stdout:
        print(line, end="")
        if address := re.search(r"127\.0\.0\.1:\d+", line):
            return server, address[0]
    raise SystemExit("the server did not start")


def main(out: str = "runs/real-clients") -> fedknow.Run:
    """Start the server and the clients; wait until the run is over."""
    server, address = start_server(out)
    states = Path(tempfile.mkdtemp())
    command = [*COMMAND, "client", "--server", address, "--quiet", "--state"]
    clients = [Popen([*command, str(states / str(n))]) for n in range(CLIENTS)]
    print(server.communicate()[0], end="")
    codes = [process.wait() for process in (server, *clients)]
    assert codes == [0] * (CLIENTS + 1), codes
    return fedknow.load_run(out)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
