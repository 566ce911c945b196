"""The files of a deployment are valid and agree with the command line."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from fedknow.cli import app
from fedknow.protocols.config import read_config
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILES = [
    ROOT / "docker" / "server.Dockerfile",
    ROOT / "docker" / "client.Dockerfile",
]
UNIT = ROOT / "docs" / "how-to" / "fedknow-client.service"
FEDKNOW = Path(sys.executable).with_name("fedknow")
HADOLINT = shutil.which(
    "hadolint", path=f"{FEDKNOW.parent}{os.pathsep}{os.environ['PATH']}"
)

EXPERIMENT = """
name = "tiny"
data = {name = "digits", tasks = 2}
model = {name = "mlp", hidden = 20}
train = {rounds = 2, epochs = 1}
learner = "fedknow"
evaluation = {global_model = true}
"""


@pytest.fixture(scope="module")
def services():
    found = yaml.safe_load(COMPOSE.read_text("utf-8"))["services"]
    assert len(found) == 2 + 4
    return found


def understood(line):
    """Whether the command line takes this line; an unknown command or flag is refused as it would
    be on a terminal."""
    group = typer.main.get_command(app)
    name, *arguments = line
    group.commands[name].make_context(name, list(arguments))


def fill(text, **variables):
    """Compose's ``${NAME:-default}``."""
    return re.sub(
        r"\$\{(\w+):-([^}]*)\}",
        lambda match: variables.get(match[1], match[2]),
        text,
    )


def test_compose_has_the_schema_of_compose():
    command = [
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(COMPOSE),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_are_clean(file):
    done = subprocess.run([HADOLINT, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd is not installed"
)
def test_systemd_understands_the_unit(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(
        UNIT.read_text("utf-8").replace("/opt/fedknow/bin/fedknow", str(FEDKNOW))
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True
    )
    assert str(unit.name) not in done.stderr, done.stderr


def test_every_command_of_the_files_is_one_of_ours(services):
    lines = [
        [fill(word) for word in service["command"]]
        for service in services.values()
    ]
    for service in services.values():
        if "healthcheck" in service:
            cmd, program, *line = service["healthcheck"]["test"]
            assert (cmd, program) == ("CMD", "fedknow")
            lines.append(line)
    unit = UNIT.read_text("utf-8")
    program, *line = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1].split()
    assert program.endswith("/fedknow")
    lines.append(
        [
            {"${SERVER}": "a:1", "${DATA}": "/data"}.get(word, word)
            for word in line
        ]
    )
    for file in DOCKERFILES:
        text = file.read_text("utf-8")
        assert re.search(r'^ENTRYPOINT \["fedknow"\]$', text, re.MULTILINE)
        lines.append(
            yaml.safe_load(re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)[1])
        )
        check = re.search(r"^    CMD (\[.*\])$", text, re.MULTILINE)[1]
        words = (
            " ".join(yaml.safe_load(check))
            .partition("fedknow ")[2]
            .replace('"', "")
            .split()
        )
        lines.append(words)
    for code in re.findall(
        r"^```sh\n(.*?)^```",
        (ROOT / "docs" / "how-to" / "deploy.md").read_text("utf-8"),
        re.M | re.S,
    ):
        for command in re.findall(
            r"^(?:sudo \S+ )?(?:\S*/)?fedknow ([^#&\n]*)",
            code.replace("\\\n", " "),
            re.M,
        ):
            lines.append(shlex.split(command))
    assert len(lines) > 20
    for line in lines:
        understood(line)


def test_a_command_that_is_not_ours_is_noticed():
    with pytest.raises(Exception, match="No such option"):
        understood(["client", "--sever", "a:1"])


def test_images_hold_what_they_are_built_of():
    built_of = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    assert all((ROOT / name).exists() for name in built_of)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    rooms = set(project["tool"]["setuptools"]["package-dir"].values())
    for file in DOCKERFILES:
        text = file.read_text("utf-8")
        copied = {
            word
            for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.M)
            for word in line.split()
        }
        assert copied == built_of
        assert rooms <= copied
        assert "USER 10001:10001" in text


def test_clients_see_their_own_certificates_alone(services):
    for name, service in services.items():
        seen = [
            mount
            for mount in service["volumes"]
            if mount.get("source") == "certs"
        ]
        assert len(seen) == 1
        number = name.partition("-")[2]
        subpath = seen[0].get("volume", {}).get("subpath")
        assert subpath == {"certs": None, "server": "server"}.get(
            name, f"clients/{number:>03}"
        )
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True


# --- the same topology as processes
# -----------------------------------------------------------------------------------


class Topology:
    """The services of ``docker-compose.yml`` as processes on this machine."""

    def __init__(self, services, place):
        self.services = services
        self.place = place
        self.port = ""
        self.started = []
        (place / "tiny.toml").write_text(EXPERIMENT)

    def line(self, words, service):
        """A command with the container's paths and names replaced by this machine's."""
        folders = {}
        for mount in self.services[service]["volumes"]:
            below = mount.get("volume", {}).get("subpath", "")
            folders[mount["target"]] = str(
                self.place / fill(mount["source"], DATA="data") / below
            )
        line = []
        for word in words:
            word = fill(word, EXPERIMENT=str(self.place / "tiny.toml"))
            word = word.replace("0.0.0.0:8700", "127.0.0.1:0")
            word = re.sub(
                r"^(server|localhost):8700$", f"localhost:{self.port}", word
            )
            target = next(
                (t for t in folders if word == t or word.startswith(f"{t}/")),
                None,
            )
            line.append(
                word if target is None else folders[target] + word[len(target) :]
            )
        return line

    def run(self, words, service, **options):
        return subprocess.run(
            [FEDKNOW, *self.line(words, service)],
            capture_output=True,
            text=True,
            timeout=100,
            **options,
        )

    def start(self, service, *more):
        log = (self.place / f"{service}.log").open("ab")
        command = [
            FEDKNOW,
            *self.line(self.services[service]["command"], service),
            *more,
        ]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        log.close()
        self.started.append(process)
        return process

    def log(self, service):
        return (self.place / f"{service}.log").read_text("utf-8")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.mark.timeout(
    600
)  # nine processes that import torch, one after the other on a busy machine
def test_the_topology_runs_as_processes(services, tmp_path, numbers):
    config = read_config(
        tomllib.loads(EXPERIMENT), ["data.clients=4", "engine.backend=inline"]
    )
    expected = numbers(simulate(config, tmp_path / "inline").folder)
    clients = [name for name in services if name.startswith("client-")]
    with Topology(services, tmp_path) as topology:
        done = topology.run(services["certs"]["command"], "certs")
        assert done.returncode == 0, done.stderr
        port_file = tmp_path / "port"
        server = topology.start("server", "--port-file", str(port_file))
        topology.port = _wait_for_port(server, port_file, topology)
        for name in (
            "server",
            clients[0],
        ):  # the server waits for its clients, so that it is there to be asked
            done = topology.run(services[name]["healthcheck"]["test"][2:], name)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["clients"] == 4
        processes = {name: topology.start(name) for name in clients}
        for name, process in {"server": server, **processes}.items():
            assert process.wait(200) == 0, topology.log(name)
    assert numbers(tmp_path / "runs" / "experiment") == expected


def _wait_for_port(server, file, topology):
    while server.poll() is None:
        if file.exists():
            return file.read_text().strip()
        try:
            server.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(topology.log("server"))
