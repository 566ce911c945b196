"""The live page's server: whom it answers, and with what."""

import http.client
import json
import time
from urllib.request import Request, urlopen

import pytest

from fedknow.protocols.config import ConfigError
from fedknow.server.watch.http import LivePage


@pytest.fixture
def run(make_run, tmp_path):
    return make_run(tmp_path / "run", {"learner": "fedavg"})


def answer(page, path="/", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in {"Host": f"127.0.0.1:{page.port}", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse()


def stream(page, last_id=""):
    """The messages that there are, and their ids."""
    request = Request(f"{page.url}events", headers={"Last-Event-ID": last_id})
    ids, messages = [], []
    with urlopen(request, timeout=10) as response:
        for line in response:
            text = line.decode().strip()
            if text.startswith("id: "):
                ids.append(text[4:])
            elif text.startswith("data: "):
                messages.append(json.loads(text[6:]))
            elif text == ":":  # a heartbeat: there was nothing new for a while
                break
            if messages and messages[-1]["type"] in ("state", "bye"):
                break
    return ids, messages


def test_the_page_comes_with_a_strict_policy(run):
    with LivePage(run.path) as page:
        assert page.url == f"http://127.0.0.1:{page.port}/"
        for path in ("/", "/page.css", "/page.js", "/charts.js", "/clients.js"):
            response = answer(page, path)
            assert response.status == 200
            assert response.read()
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'")
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:1"],
)
@pytest.mark.parametrize("path", ["/", "/events"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(run, host, path):
    with LivePage(run.path) as page:
        response = answer(page, path, Host=host)
        assert response.status == 421
        assert b"fedavg" not in response.read()


@pytest.mark.parametrize(
    "host", ["localhost:9", "LOCALHOST", "127.0.0.1", "[::1]:8"]
)
def test_this_machine_may_be_called_by_its_names_and_through_a_tunnel(run, host):
    with LivePage(run.path) as page:
        assert answer(page, Host=host).status == 200


@pytest.mark.parametrize(
    "path",
    ["/config.toml", "/../config.toml", "/%2e%2e/config.toml", "//etc/passwd"],
)
def test_no_other_file_can_be_had(run, path):
    with LivePage(run.path) as page:
        assert answer(page, path).status == 404


def test_other_methods_are_refused(run):
    with LivePage(run.path) as page:
        connection = http.client.HTTPConnection(
            "127.0.0.1", page.port, timeout=10
        )
        connection.request("POST", "/", b"x")
        assert connection.getresponse().status == 501


def test_a_stream_tells_all_and_goes_on_where_a_browser_stopped(run):
    with LivePage(run.path) as page:
        ids, messages = stream(page)
        kinds = [message["type"] for message in messages]
        assert kinds[:3] == ["hello", "run", "start"]
        assert kinds.count("round") == 6
        assert kinds[-2:] == ["end", "state"]
        assert messages[-1]["state"] == "complete"
        assert stream(page, ids[-3])[1] == messages[-2:]
        assert stream(page, "0000-3")[1] == messages
        assert stream(page, f"{ids[0].split('-')[0]}-999999")[1] == []


def test_a_run_that_begins_later_and_is_cut_back(make_run, tmp_path):
    folder = tmp_path / "later"
    with LivePage(folder) as page:
        assert kinds_of(page) == ["hello"]
        run = make_run(folder, {"learner": "fedavg"})
        wait_for(page, "end")
        record = run.path / "metrics.jsonl"
        data = record.read_bytes()
        record.write_bytes(data[: data.index(b"\n") + 1])
        kinds = wait_for(page, "reset")
        assert kinds[kinds.index("reset") + 1] == "start"


def test_several_runs_stand_side_by_side(make_run, tmp_path):
    for name in ("fedavg-seed0", "fedknow-seed0"):
        make_run(tmp_path / name, {"learner": name.split("-")[0]})
    with LivePage(tmp_path) as page:
        runs = {message.get("run") for message in messages_of(page)}
    assert runs == {None, "fedavg-seed0", "fedknow-seed0"}


def test_a_damaged_configuration_is_a_message(run):
    (run.path / "config.toml").write_text("nonsense = [")
    with LivePage(run.path) as page:
        (fault,) = [each for each in messages_of(page) if each["type"] == "fault"]
    assert "config.toml cannot be read" in fault["reason"]


def test_a_port_in_use_is_refused_with_words(run):
    with (
        LivePage(run.path) as page,
        pytest.raises(ConfigError, match=f"port {page.port} of 127.0.0.1"),
    ):
        LivePage(run.path, page.port)


def test_the_end_is_told(run):
    page = LivePage(run.path)
    with page:
        response = urlopen(f"{page.url}events", timeout=10)
    assert b'{"type":"bye"}' in response.read()


def messages_of(page):
    lines, _ = page._hub.wait(0, 0)
    return [json.loads(line) for line in lines]


def kinds_of(page):
    return [message["type"] for message in messages_of(page)]


def wait_for(page, kind, seconds=30):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        kinds = kinds_of(page)
        if kind in kinds:
            return kinds
        time.sleep(0.1)
    raise AssertionError(f"no {kind} message came: {kinds}")
