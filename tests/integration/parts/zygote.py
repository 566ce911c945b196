"""Starts fedknow commands as processes of their own, in no time: everything is imported already,
and then forked.

Lines of JSON come in: ``{"arguments": [...], "log": path, "cwd": path}``; ``{"pid": n}`` goes
out for each, and ``{"pid": n, "code": n}`` when it ends (below 0: by a signal).
"""

import json
import os
import select
import sys

import sklearn.datasets  # noqa: F401 (what the digits come with)
import torch
import torch._dynamo

import fedknow.client.edge.client
import fedknow.client.node
import fedknow.server.reports.summary
import fedknow.server.serve
from fedknow.cli import app
from fedknow.protocols.interruption import heed_signals

torch.set_num_threads(1)


def become(arguments, log, cwd):
    """Be the command, and end."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    sys.path.append(os.getcwd())
    fedknow.server.serve.write_report = lambda *_: (
        None
    )  # takes longer than these runs
    code = 1
    heed_signals()
    try:
        app(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    """Serve until stdin ends; then kill what is left."""
    running = {}
    while True:
        ready, _, _ = select.select([0, *running], [], [])
        for end in ready:
            if end == 0:
                line = sys.stdin.buffer.readline()
                if not line:
                    for pid in running.values():
                        os.kill(pid, 9)
                    os._exit(
                        0
                    )  # taking all that was imported down again takes longer
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    become(**order)
                running[os.pidfd_open(pid)] = pid
                print(json.dumps({"pid": pid}), flush=True)
            else:
                pid = running.pop(end)
                os.close(end)
                _, status = os.waitpid(pid, 0)
                print(
                    json.dumps(
                        {"pid": pid, "code": os.waitstatus_to_exitcode(status)}
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
