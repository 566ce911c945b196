"""Real clients over real sockets, in threads of this process."""

import asyncio
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fedknow.client.data import make_benchmark
from fedknow.client.edge.client import EdgeClient
from fedknow.client.node import Node
from fedknow.server.serve import serve

WAIT = 120
AT_WORK = threading.Lock()
"""Held by the thread that builds or uses a node, as all share PyTorch's generators."""


def plain_node(config, client):
    """A node over the experiment's own data."""
    return Node(config, make_benchmark(config))


class OneAtATime:
    """The node of one client, which waits while another one's is at work."""

    def __init__(self, make_node, client, config):
        with AT_WORK:
            self.node = make_node(config, client)

    def handle(self, message, state):
        with AT_WORK:
            return self.node.handle(message, state)


def edge_client(port, state, client, make_node=plain_node, **options):
    """A client that has not begun; ``make_node`` takes the experiment and the client's number."""
    return EdgeClient(
        f"127.0.0.1:{port}",
        state,
        client=client,
        node=partial(OneAtATime, make_node, client),
        **options,
    )


def run_real_clients(config, folder, make_node=plain_node, **options):
    """Run an experiment to its end. States lie beside its folder."""
    count = config.data.clients
    with ThreadPoolExecutor(count) as threads:
        running = []

        def start(port):
            for client in range(count):
                edge = edge_client(
                    port,
                    folder.with_name(f"{folder.name}-state{client}"),
                    client,
                    make_node,
                    # Else a server that fails is waited for until the test is out of time.
                    give_up=WAIT,
                    **options,
                )
                running.append(threads.submit(asyncio.run, edge.run()))

        serve(config, folder, "127.0.0.1:0", ready=start)
        for client in running:
            client.result(WAIT)


class Clients:
    """Clients that can be stopped, and that wait for a server."""

    def __init__(self, port, folder, count, make_node=plain_node):
        self.ends, self.tasks, self.work_threads = queue.SimpleQueue(), [], []
        for number in range(count):
            before = _work_threads()
            client = edge_client(port, folder / str(number), number, make_node)
            self.work_threads += _work_threads() - before
            started = queue.SimpleQueue()
            threading.Thread(
                target=self._run, args=[client, started], daemon=True
            ).start()
            self.tasks.append(started.get(timeout=WAIT))

    def _run(self, client, started):
        async def main():
            started.put((asyncio.get_running_loop(), asyncio.current_task()))
            await client.run()

        try:
            asyncio.run(main())
        except BaseException as error:  # what it came to
            self.ends.put(error)
        else:
            self.ends.put(None)

    def ended(self):
        """Wait for all of them; give what each came to."""
        ends = [self.ends.get(timeout=WAIT) for _ in self.tasks]
        # A client that ends does not wait for what it is busy with, which still writes states.
        for thread in self.work_threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        return ends

    def stop(self):
        for loop, task in self.tasks:
            loop.call_soon_threadsafe(task.cancel)
        self.ended()


def _work_threads():
    return {
        thread
        for thread in threading.enumerate()
        if thread.name == "fedknow-work"
    }
