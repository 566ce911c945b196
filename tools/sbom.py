"""The bill of materials of an installation, and the licences in it.

    python tools/sbom.py build/sbom.cdx.json build/licences.md

The first file is CycloneDX 1.5 as JSON: each package that fedknow needs here, with its version,
its licence and what it needs itself. The second is a table for people. Both are read from the
installed packages, so that they say what is run and not what was asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import uuid
from collections.abc import Iterable, Mapping
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
)
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = "fedknow"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sbom", type=Path)
    parser.add_argument("licences", type=Path)
    args = parser.parse_args()
    packages = collect(ROOT)
    args.sbom.parent.mkdir(parents=True, exist_ok=True)
    args.sbom.write_text(json.dumps(bill(packages), indent=1) + "\n", "utf-8")
    args.licences.write_text(table(packages), "utf-8")
    print(f"{len(packages)} packages: {args.sbom}, {args.licences}")


def collect(root: str) -> dict[str, Distribution]:
    """Find a package and all that it needs here, with all extras.

    Returns
    -------
    dict
        Distributions by normalised name; what is not installed is left out.
    """
    packages: dict[str, Distribution] = {}
    waiting = [root]
    while waiting:
        name = normalise(waiting.pop())
        if name in packages:
            continue
        try:
            packages[name] = distribution(name)
        except PackageNotFoundError:
            continue
        waiting += needs(packages[name])
    return dict(sorted(packages.items()))


def needs(package: Distribution) -> list[str]:
    """Name what a package needs on this machine, with all of its extras."""
    extras = ["", *(package.metadata.get_all("Provides-Extra") or [])]
    environment = default_environment()
    names = set()
    for text in package.requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(
            marker.evaluate({**environment, "extra": extra}) for extra in extras
        ):
            names.add(normalise(requirement.name))
    # An extra of a package may name the package itself.
    return sorted(names - {normalise(package.name)})


def licence(package: Distribution) -> str:
    """Give a package's licence as it states it, in one line."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = metadata.get_all("Classifier") or []
    stated = [
        text.rpartition(" :: ")[2]
        for text in classifiers
        if text.startswith("License ::")
    ]
    # Some packages put the whole text of the licence into the field.
    line = str(metadata.get("License") or "").strip().partition("\n")[0]
    return "; ".join(stated) or line[:80] or "not stated"


def bill(packages: Mapping[str, Distribution]) -> dict[str, Any]:
    """Describe packages in CycloneDX 1.5."""
    main_component = component(packages[ROOT]) | {"type": "application"}
    libraries = [
        component(package) for name, package in packages.items() if name != ROOT
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{serial(packages.values())}",
        "version": 1,
        "metadata": {"component": main_component},
        "components": libraries,
        "dependencies": [
            {"ref": reference(package), "dependsOn": links(package, packages)}
            for package in packages.values()
        ],
    }


def links(
    package: Distribution, packages: Mapping[str, Distribution]
) -> list[str]:
    """Refer to the packages that one needs, as far as they are installed."""
    names = [name for name in needs(package) if name in packages]
    return [reference(packages[name]) for name in names]


def component(package: Distribution) -> dict[str, Any]:
    """Describe one package."""
    return {
        "type": "library",
        "bom-ref": reference(package),
        "name": package.name,
        "version": package.version,
        "purl": reference(package),
        "licenses": [{"license": {"name": licence(package)}}],
    }


def reference(package: Distribution) -> str:
    """Give a package's URL, which identifies it."""
    # A local build such as 2.6.0+cpu has a plus sign, which stands for a blank in URLs.
    version = package.version.replace("+", "%2B")
    return f"pkg:pypi/{normalise(package.name)}@{version}"


def serial(packages: Iterable[Distribution]) -> uuid.UUID:
    """Make a serial number of the contents: the same bill has the same number."""
    text = "\n".join(sorted(map(reference, packages)))
    return uuid.uuid5(uuid.NAMESPACE_URL, text)


def table(packages: Mapping[str, Distribution]) -> str:
    """List the licences for people."""
    rows = ["| package | version | licence |", "|---|---|---|"]
    rows += [
        f"| {package.name} | {package.version} | {licence(package)} |"
        for package in packages.values()
    ]
    return "\n".join(rows) + "\n"


def normalise(name: str) -> str:
    """Spell a package's name as indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
