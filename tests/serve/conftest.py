"""Fixtures of the server tests: the bundled model behind a scheduler, an application and a server on loopback."""

import base64
import io
import socket
import threading
import time
from contextlib import ExitStack

import pytest

pytest.importorskip("fastapi", reason="requires the extra serve")
pytest.importorskip("prometheus_client", reason="requires the extra serve")


@pytest.fixture(scope="session")
def captioner():
    from sca.inference import factory

    return factory.load_captioner("sca-tiny")


@pytest.fixture
def scheduler(captioner):
    from sca.serve.scheduler import RequestScheduler

    scheduler = RequestScheduler(captioner)
    yield scheduler
    scheduler.close()


@pytest.fixture(scope="session")
def png_bytes(scene):
    """PNG file of the scene."""
    file = io.BytesIO()
    scene.image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def make_body(png_bytes, scene):
    """Function that returns a request body with the given fields; the default prompts are the boxes of the scene."""

    def make(**fields):
        image = base64.b64encode(png_bytes).decode()
        if not fields.keys() & {"prompts", "everything"}:
            fields["prompts"] = [{"box": list(region.box)} for region in scene.regions]
        return {"image": image, **fields}

    return make


@pytest.fixture
def open_client():
    """Function that starts an application in this process and returns its client."""
    from fastapi.testclient import TestClient

    with ExitStack() as stack:
        yield lambda app: stack.enter_context(TestClient(app, raise_server_exceptions=False))


@pytest.fixture
def make_client(captioner, open_client):
    """Function that returns a client of a new application in this process."""
    from sca.serve.app import create_app
    from sca.serve.scheduler import RequestScheduler

    def make(limits=None, root_path="", api_keys=(), zoom="off", **options):
        scheduler = RequestScheduler(captioner, **options)
        return open_client(create_app(scheduler, "sca-tiny", limits, root_path=root_path, api_keys=api_keys, zoom=zoom))

    return make


@pytest.fixture
def start_server(captioner):
    """Function that starts a server on loopback and returns its URL; its attribute `stop` stops all servers."""
    from sca.serve.app import create_app
    from sca.serve.limits import ServerLimits
    from sca.serve.scheduler import RequestScheduler
    from sca.serve.server import make_server

    running = []

    def start(limits=None, captioner=captioner, task_images=None, **options):
        bound_socket, limits = socket.socket(), limits or ServerLimits()
        scheduler = RequestScheduler(captioner, **options)
        bound_socket.bind(("127.0.0.1", 0))
        app = create_app(scheduler, "sca-tiny", limits, allowed_hosts=(), task_images=task_images)
        server = make_server(
            app, scheduler, write_timeout=limits.timeout, max_connections=limits.max_connections, log_requests=False
        )
        thread = threading.Thread(target=server.run, args=([bound_socket],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return f"http://127.0.0.1:{bound_socket.getsockname()[1]}"

    def stop():
        while running:
            server, thread = running.pop()
            server.should_exit = True
            thread.join()

    start.stop = stop
    yield start
    stop()
