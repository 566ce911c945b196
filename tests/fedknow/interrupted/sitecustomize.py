"""Put this folder on PYTHONPATH, and a process sends itself SIGTERM where a test wants it.

``SIGNAL_AT`` is ``import NAME``, when that module is first imported, or ``start NAME``, when a
program whose path ends in that name is started.
"""

import os
import signal
import sys

kind, _, name = os.environ.pop("SIGNAL_AT", "").partition(
    " "
)  # popped: not for processes it starts
waiting = [name] if name else []


def watch(event, arguments):
    if not waiting:
        return
    is_import = kind == "import" and event == "import" and arguments[0] == name
    is_start = (
        kind == "start"
        and event == "subprocess.Popen"
        and str(arguments[0]).endswith(name)
    )
    if is_import or is_start:
        waiting.clear()
        os.kill(os.getpid(), signal.SIGTERM)


sys.addaudithook(watch)
