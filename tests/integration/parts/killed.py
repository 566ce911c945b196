"""Run the command again and again, in processes that die while writing a file.

``python killed.py ARGUMENTS KILLS``: both JSON lists, the second of pairs of a run folder and a
number n. For each pair a process begins the run, or goes on with it, and kills itself half way
through the n-th file it writes (0: never). One line is printed for each: its exit code.
"""

import json
import os
import signal
import sys

from fedknow import cli
from fedknow.protocols import files
from fedknow.simulations import simulate


class Fatal:
    """A file in the middle of whose writing the process dies."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def command(arguments, kill):
    written = 0

    def opened(path, mode):
        nonlocal written
        written += 1
        file = open(path, mode)  # noqa: SIM115 (whoever asked closes it)
        return Fatal(file) if written == kill else file

    files.open = opened
    try:
        cli.app(arguments)
    except SystemExit as done:
        os._exit(
            done.code or 0
        )  # taking apart all that was imported takes longer than the run


arguments = json.loads(sys.argv[1])
simulate.write_report = lambda *_: None
# A run in this process first: all that is imported on the way is imported once.
cli.app([*arguments, "--out", "warm"], standalone_mode=False)
for out, kill in json.loads(sys.argv[2]):
    pid = os.fork()
    if pid == 0:
        command(
            [
                *arguments,
                "--out",
                out,
                *["--resume"] * os.path.exists(f"{out}/config.toml"),
            ],
            kill,
        )
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
