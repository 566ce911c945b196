"""The Helm chart, by its schema and in a rendered form.

Helm is not at hand. ``render`` knows the few actions that the templates use, and no others.
"""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

CHART = Path(__file__).parents[1] / "recipes" / "helm"
ACTION = re.compile(r"\{\{-? ?(.*?) ?-?\}\}")
LOOP = re.compile(
    r"\n?\{\{- range (\$\w+) := ([^}]*?) \}\}(.*?)\n\{\{- end \}\}", re.S
)


def value(text, names):
    """The value of an action: a path, with or without ``quote``, or a number of three digits."""
    text, _, function = text.partition(" | ")
    if text.startswith('printf "%03d" '):
        return f"{names[text.split()[-1]]:03d}"
    if text in names:
        found = names[text]
    else:
        found = names["."]
        for part in text.removeprefix("$").strip(".").split("."):
            found = found[part]
    assert function in ("", "quote"), function
    return json.dumps(str(found)) if function else str(found)


def render(template, names):
    def repeat(match):
        name, items, body = match.groups()
        if items.startswith("until (int "):
            items = range(int(value(items[len("until (int ") : -1], names)))
        else:
            assert items == ".Values.options"
            items = names["."]["Values"]["options"]
        return "".join(render(body, names | {name: item}) for item in items)

    text = LOOP.sub(repeat, template)
    return ACTION.sub(lambda match: value(match[1], names), text)


def documents(**changes):
    values = yaml.safe_load((CHART / "values.yaml").read_text()) | changes
    names = {".": {"Values": values, "Release": {"Name": "lab"}}}
    found = []
    for path in sorted((CHART / "templates").iterdir()):
        text = render(path.read_text(), names)
        found += [each for each in yaml.safe_load_all(text) if each]
    return found


def schema():
    return json.loads((CHART / "values.schema.json").read_text())


def test_the_values_fit_the_schema_and_mistakes_do_not():
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.Draft7Validator.check_schema(schema())
    jsonschema.validate(values, schema())
    for change in (
        {"clients": 0},
        {"clients": "4"},
        {"client": 4},
        {"storage": {"runs": "10", "state": "1Gi"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values | change, schema())


def test_each_client_has_a_certificate_and_a_state_of_its_own():
    kinds = documents(clients=3, options=["--set", "train.rounds=5"])
    clients = [each for each in kinds if each["kind"] == "StatefulSet"]
    assert len(clients) == 3
    secrets = []
    for client in clients:
        pod = client["spec"]["template"]
        assert (
            pod["metadata"]["labels"] == client["spec"]["selector"]["matchLabels"]
        )
        (volume,) = pod["spec"]["volumes"]
        secrets.append(volume["secret"]["secretName"])
        (container,) = pod["spec"]["containers"]
        assert container["args"][:3] == ["client", "--server", "lab-server:8700"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {"certs", "state"}
        assert client["spec"]["volumeClaimTemplates"][0]["metadata"] == {
            "name": "state"
        }
    assert secrets == ["lab-certs-000", "lab-certs-001", "lab-certs-002"]


def test_the_server_has_a_service_a_volume_and_the_commands_words():
    kinds = {
        each["kind"]: each
        for each in documents(clients=3, options=["--set", "train.rounds=5"])
    }
    pod = kinds["Job"]["spec"]["template"]
    assert kinds["Service"]["metadata"]["name"] == "lab-server"
    assert kinds["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    assert container["args"] == [
        *("server", "digits", "--set", "data.clients=3"),
        *("--listen", "0.0.0.0:8700", "--tls", "/certs"),
        *("--out", "/runs/lab", "--resume", "--set", "train.rounds=5"),
    ]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == [kinds["PersistentVolumeClaim"]["metadata"]["name"]]
