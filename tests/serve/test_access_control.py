"""Access control: Host headers, API keys and loopback addresses."""

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
def app():
    async def get_client_name(request):
        return PlainTextResponse(getattr(request.state, "client", "anybody"))

    return Starlette(routes=[Route("/", get_client_name), Route("/health", get_client_name)])


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
def test_host_check_allows_addresses_and_named_hosts(app, host, status):
    client = TestClient(HostCheckMiddleware(app, ["captions.example"]))
    response = client.get("/", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert "--allow-host" in response.json()["error"]["message"]


def test_host_check_allows_every_host_with_a_star(app):
    assert TestClient(HostCheckMiddleware(app, ["*"])).get("/", headers={"Host": "evil.example"}).status_code == 200


def test_key_check_requires_an_api_key_except_for_health(app):
    client = TestClient(KeyCheckMiddleware(app, ["first", "second"]))
    assert client.get("/health").status_code == 200
    for authorization in (None, "Bearer", "Bearer third", "Basic first", "Bearer fir", "Bearer ü"):
        response = client.get("/", headers={"Authorization": authorization.encode()} if authorization else {})
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert client.get("/", headers={"Authorization": "Bearer second"}).text == "key 1"
    assert client.get("/", headers={"Authorization": "bearer first"}).text == "key 0"


def test_find_key_index_compares_every_key():
    assert find_key_index("b", ["a", "b", "c"]) == 1
    assert find_key_index("", ["a"]) is None


def test_read_keys_skips_comments_and_rejects_invalid_files(tmp_path):
    key_file = tmp_path / "keys"
    key_file.write_text("# of the team\n\n one \ntwo\n")
    assert read_keys(key_file) == ("one", "two")
    key_file.write_text("# none\n")
    with pytest.raises(ValueError, match="contains no API key; write one key per line"):
        read_keys(key_file)
    key_file.write_text("one\nschlüssel\n", "utf-8")
    with pytest.raises(ValueError, match="contains an API key that is not printable ASCII"):
        read_keys(key_file)
    with pytest.raises(ValueError, match=r"cannot read API keys from .*nothing"):
        read_keys(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_is_loopback_recognizes_local_addresses(host, is_local):
    assert is_loopback(host) is is_local


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_command_reports_a_missing_key_file_in_one_line(command, capfd, tmp_path):
    assert run_command([command, "--api-key-file", str(tmp_path / "nothing")]) == 2
    assert "cannot read API keys from" in capfd.readouterr().err


def test_demo_command_rejects_any_model_on_a_network_address(capfd):
    pytest.importorskip("gradio", reason="requires the extra demo")
    assert run_command(["demo", "--host", "0.0.0.0", "--any-model"]) == 2
    assert "load any folder of this machine; list the models with --model" in capfd.readouterr().err
