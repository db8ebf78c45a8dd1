"""Who may use a server."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sca.cli import run_command
from sca.serve.access_control import HostCheckMiddleware, KeyCheckMiddleware
from sca.serve.api_keys import find_key_index, read_keys
from sca.serve.sockets import is_loopback


@pytest.fixture
def plain():
    async def seen(request):
        return PlainTextResponse(getattr(request.state, "client", "anybody"))

    return Starlette(routes=[Route("/", seen), Route("/health", seen)])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7:8000", 200),
        ("captions.example:443", 200),
        ("Captions.Example.", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("evil.example@127.0.0.1", 200),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_host_check_allows_addresses_and_named_hosts(plain, host, status):
    client = TestClient(HostCheckMiddleware(plain, ["captions.example"]))
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == status
    if status == 403:
        assert "--allow-host" in answer.json()["error"]["message"]


def test_host_check_allows_all_where_told(plain):
    assert TestClient(HostCheckMiddleware(plain, ["*"])).get("/", headers={"Host": "evil.example"}).status_code == 200


def test_key_check_requires_a_key_except_for_health(plain):
    client = TestClient(KeyCheckMiddleware(plain, ["first", "second"]))
    assert client.get("/health").status_code == 200
    for given in (None, "Bearer", "Bearer third", "Basic first", "Bearer fir", "Bearer ü"):
        answer = client.get("/", headers={"Authorization": given.encode()} if given else {})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert client.get("/", headers={"Authorization": "Bearer second"}).text == "key 1"
    assert client.get("/", headers={"Authorization": "bearer first"}).text == "key 0"


def test_find_key_compares_with_every_key():
    assert find_key_index("b", ["a", "b", "c"]) == 1
    assert find_key_index("", ["a"]) is None


def test_read_keys_skips_comments_and_refuses_empty_files(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\n\n one \ntwo\n")
    assert read_keys(file) == ("one", "two")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="has no API key; write one key per line"):
        read_keys(file)
    file.write_text("one\nschlüssel\n", "utf-8")
    with pytest.raises(ValueError, match="has an API key that is not printable ASCII"):
        read_keys(file)
    with pytest.raises(ValueError, match=r"cannot read the API keys in .*nothing"):
        read_keys(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_is_loopback(host, local):
    assert is_loopback(host) is local


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_key_file_that_is_missing_is_one_line(command, capfd, tmp_path):
    assert run_command([command, "--api-key-file", str(tmp_path / "nothing")]) == 2
    assert "cannot read the API keys" in capfd.readouterr().err


def test_the_demo_serves_no_folders_to_a_network(capfd):
    pytest.importorskip("gradio", reason="needs the extra demo")
    assert run_command(["demo", "--host", "0.0.0.0", "--any-model"]) == 2
    assert "load any folder of this machine; give models with --model" in capfd.readouterr().err
