"""Trackers that behave badly."""

import threading
from typing import ClassVar


class Keeping:
    """Keeps all that it is told in a list of the class."""

    told: ClassVar[list] = []

    def start(self, run):
        self.told.append(("start", run))
        return "its-id"

    def log(self, step, numbers, time):
        self.told.append((step, dict(numbers)))

    def finish(self, status):
        self.told.append(("finish", status))


class Raising(Keeping):
    def log(self, step, numbers, time):
        raise SystemExit("the tracker's machine is down")


class Blocking(Keeping):
    forever = threading.Event()

    def start(self, run):
        self.forever.wait()


class Slow(Blocking):
    def start(self, run):
        return None

    def log(self, step, numbers, time):
        self.forever.wait(20)


class Unmade(Keeping):
    def __init__(self):
        raise OSError("no such store")
