"""The shipped model behind a scheduler, in this process and behind a real socket."""

import base64
import io
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")


@pytest.fixture(scope="session")
def tiny():
    from sca.inference.factory import load_captioner

    return load_captioner("sca-tiny")


@pytest.fixture
def scheduler(tiny):
    from sca.serve.scheduler import RequestScheduler

    scheduler = RequestScheduler(tiny)
    yield scheduler
    scheduler.close()


@pytest.fixture(scope="session")
def png(scene):
    """The scene as a file."""
    file = io.BytesIO()
    scene.image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def asked(png, scene):
    """`asked(field=value, ...)`: a request as JSON, with the boxes of the scene unless others are given."""

    def make(**fields):
        image = base64.b64encode(png).decode()
        if not fields.keys() & {"prompts", "everything"}:
            fields["prompts"] = [{"box": list(region.box)} for region in scene.regions]
        return {"image": image, **fields}

    return make


@pytest.fixture
def client(tiny):
    """`client(limits)` talks to the application in this process."""
    from fastapi.testclient import TestClient

    from sca.serve.app import create_app
    from sca.serve.scheduler import RequestScheduler

    opened = []

    def make(limits=None, root_path="", keys=(), **options):
        app = create_app(RequestScheduler(tiny, **options), "sca-tiny", limits, root_path=root_path, api_keys=keys)
        client = TestClient(app, raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        return client

    yield make
    for each in opened:
        each.__exit__(None, None, None)


@pytest.fixture
def served(tiny):
    """`served(limits)` is the address of a server on loopback; `served.stop()` ends it."""
    from sca.serve.app import create_app
    from sca.serve.limits import ServerLimits
    from sca.serve.scheduler import RequestScheduler
    from sca.serve.server import make_server

    running = []

    def start(limits=None, captioner=tiny, **options):
        door, limits, scheduler = socket.socket(), limits or ServerLimits(), RequestScheduler(captioner, **options)
        door.bind(("127.0.0.1", 0))
        app = create_app(scheduler, "sca-tiny", limits, allowed_hosts=())
        server = make_server(
            app, scheduler, write_timeout=limits.timeout, max_connections=limits.max_connections, log_requests=False
        )
        thread = threading.Thread(target=server.run, args=([door],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        running.append((server, thread))
        return f"http://127.0.0.1:{door.getsockname()[1]}"

    def stop():
        while running:
            server, thread = running.pop()
            server.should_exit = True
            thread.join()

    start.stop = stop
    yield start
    stop()
