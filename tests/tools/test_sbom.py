"""The bill of materials names what is installed, and each dependency has its reason."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import hashes  # noqa: E402
import sbom  # noqa: E402


def test_the_bill_names_what_is_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools/sbom.py", tmp_path / "a.json", tmp_path / "a.md"],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    bill = json.loads((tmp_path / "a.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["component"]["name"] == "fedknow"
    components = {each["name"].lower(): each for each in bill["components"]}
    for name in ("torch", "numpy", "grpcio", "cryptography"):
        assert components[name]["version"] == version(name)
    assert "BSD" in components["numpy"]["licenses"][0]["license"]["name"]
    references = [each["bom-ref"] for each in bill["components"]]
    assert len(set(references)) == len(references)
    assert all(
        re.fullmatch(r"pkg:pypi/[a-z0-9-]+@[\w.%]+", each) for each in references
    )
    # All links lead to a part of the bill.
    known = {*references, bill["metadata"]["component"]["bom-ref"]}
    for entry in bill["dependencies"]:
        assert {entry["ref"], *entry["dependsOn"]} <= known
    rows = (tmp_path / "a.md").read_text().splitlines()
    assert len(rows) == len(references) + 3


def test_names_are_spelled_as_indexes_do():
    assert sbom.normalise("Ruamel_yaml.Clib") == "ruamel-yaml-clib"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (
            {"url": "https://host/a.whl", "archive_info": {"hashes": {"sha256": "ab"}}},
            "a==1.0 \\\n    --hash=sha256:ab",
        ),
        (
            {"url": "file:///wheels/a.whl", "archive_info": {"hashes": {"sha256": "ab"}}},
            "# a==1.0: no hash, as it comes from file",
        ),
        ({"url": "https://host/a"}, "# a==1.0: no hash, as it comes from https"),
    ],
)  # fmt: skip
def test_hashes_of_a_report(origin, expected):
    entry = {"metadata": {"name": "a", "version": "1.0"}, "download_info": origin}
    assert hashes.merged([{"install": [entry]}]) == [expected]


def test_hashes_of_several_kinds_of_machines_stand_together():
    reports = []
    for digest in ("cd", "ab"):
        origin = {
            "url": "https://host",
            "archive_info": {"hashes": {"sha256": digest}},
        }
        entry = {
            "metadata": {"name": "a", "version": "1"},
            "download_info": origin,
        }
        reports.append({"install": [entry]})
    assert hashes.merged([*reports, reports[0]]) == [
        "a==1 \\\n    --hash=sha256:ab \\\n    --hash=sha256:cd"
    ]


@pytest.mark.parametrize(
    ("name", "extras"), [("client", ["secure"]), ("server", ["secure", "sim"])]
)
def test_what_is_installed_has_hashes_of_the_pinned_versions(name, extras):
    """``bash .ci/hashes --write`` makes the files."""
    text = (ROOT / f"hashes-{name}.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+) ", text, re.M))
    versions = {sbom.normalise(name): number for name, number in pinned.items()}
    constraints = re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M
    )
    known = {sbom.normalise(name): number for name, number in constraints}
    assert {name: known[name] for name in versions} == versions
    needed = {
        sbom.normalise(Requirement(each).name)
        for each in hashes.requirements(extras)
    }
    assert "torch" not in versions
    assert needed <= versions.keys()
    assert "no hash, as it comes" not in text
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", text)) >= len(versions)


def dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        texts += extra
    names = {sbom.normalise(Requirement(text).name) for text in texts}
    return sorted(names - {"fedknow"})


def test_each_dependency_has_a_reason():
    page = (ROOT / "docs/explanation/dependencies.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)` \| [^|]+ \| ([^|]+) \|$", page, re.M)
    reasons = {sbom.normalise(name): reason for name, reason in rows}
    assert sorted(reasons) == dependencies()
    assert all(len(reason.split()) >= 3 for reason in reasons.values())
