"""Heterogeneous devices: virtual hours on Jetsons and Raspberry Pis.

Run it with ``python examples/fleet.py``. Devices and links are counted in virtual time: the
machine that simulates has no influence on the hours.
"""

import sys

import fedknow


def main(out: str = "runs/fleet") -> fedknow.ComparedRuns:
    """Compare two methods on three kinds of devices behind slow links."""
    compared = fedknow.compare(
        "digits",
        ["fedavg", "fedknow"],
        seeds=1,
        data={"clients": 6, "tasks": 3},
        train={"rounds": 2},
        fleet={
            # Repeated as often as there are clients; `fedknow list devices` has more.
            "devices": ["jetson-nano", "jetson-agx-xavier", "raspberry-pi-4-2gb"],
            "up": 1e6,  # bytes per second
            "down": 1e6,
        },
        out=out,
    )
    for group in compared.groups:
        seconds = group.estimate("virtual_seconds").mean
        energy = group.estimate("energy_joules").mean
        accuracy = group.estimate("accuracy").mean
        print(
            f"{group.label}: {100 * accuracy:.1f} % after {seconds:.1f} virtual seconds, "
            f"{energy:.0f} J"
        )
    return compared


if __name__ == "__main__":
    main(*sys.argv[1:])
