"""Memory budget: large requests wait or are rejected, and small requests always have room."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from sca_registry.contracts import Caption, Prompt

from sca.serve import service as service_module
from sca.serve.inference_requests import InferenceRequest, InsufficientMemoryError, RequestDone
from sca.serve.limits import ServerLimits
from sca.serve.memory_budget import MemoryBudget, MemoryBudgetError, is_out_of_memory
from sca.serve.service import CaptionService

MIB = 2**20


def test_memory_budget_reserves_room_for_small_requests():
    budget = MemoryBudget(64 * MIB)
    with budget.create_lease() as large, budget.create_lease() as small:
        large.resize(48 * MIB)
        with pytest.raises(MemoryBudgetError, match="48 of 64 MiB in use"), budget.create_lease() as another:
            another.resize(2 * MIB)
        small.resize(1 * MIB)
        assert budget.leased_bytes == 49 * MIB
        with pytest.raises(MemoryBudgetError):
            small.resize(2 * MIB)
    assert budget.leased_bytes == 0


def test_memory_budget_rejects_too_large_request_immediately():
    budget = MemoryBudget(64 * MIB)
    with budget.create_lease() as lease, pytest.raises(MemoryBudgetError):
        lease.resize(budget.max_request_bytes + 1, timeout=60)


def test_lease_waits_for_memory_of_another_lease():
    budget = MemoryBudget(64 * MIB)
    first, second = budget.create_lease(), budget.create_lease()
    first.resize(40 * MIB)
    waiting_thread = threading.Thread(target=second.resize, args=(40 * MIB, 30))
    waiting_thread.start()
    waiting_thread.join(0.2)
    assert waiting_thread.is_alive()
    first.__exit__()
    waiting_thread.join(10)
    assert (first.leased_bytes, second.leased_bytes, budget.leased_bytes) == (0, 40 * MIB, 40 * MIB)


def test_ended_lease_allocates_nothing():
    """Work can continue briefly after its request was cancelled."""
    budget = MemoryBudget(64 * MIB)
    with budget.create_lease() as lease:
        lease.resize(5)
    lease.resize(10 * MIB)
    assert (lease.leased_bytes, budget.leased_bytes) == (0, 0)


@pytest.fixture
def make_request():
    """Function that returns an HTTP request with a lease of a memory budget."""

    async def is_disconnected():
        return False

    def make(budget):
        state = SimpleNamespace(lease=budget.create_lease())
        return SimpleNamespace(state=state, is_disconnected=is_disconnected, client=None)

    return make


@pytest.fixture
def service(scheduler):
    service = CaptionService(scheduler, "sca-tiny", ServerLimits())
    yield service
    service.close()


def test_service_decodes_no_image_for_a_cancelled_request(service, make_request, png_bytes, monkeypatch):
    monkeypatch.setattr(service_module, "decode_image", lambda *_: pytest.fail("decoded"))
    request = make_request(service.budget)
    request.state.lease.__exit__()
    with pytest.raises(MemoryBudgetError, match="the request was cancelled"):
        asyncio.run(service.decode_request_image(request, png_bytes))


@pytest.mark.parametrize("mask_bytes", [1000, 100_000])
def test_unread_events_count_toward_request_memory(service, make_request, monkeypatch, mask_bytes):
    mask = {"size": [9, 9], "counts": "x" * mask_bytes}
    caption = Caption(
        "a cat", 0.5, mask=mask, box=None, predicted_iou=None, prompt=Prompt(box=(0, 0, 9, 9)), region_id=0
    )
    all_sent = threading.Event()

    def submit(inference_request, on_event):
        for event in (*[caption] * 50, RequestDone(50)):
            on_event(event)
        all_sent.set()
        return SimpleNamespace(cancel=lambda: None)

    monkeypatch.setattr(service.scheduler, "submit", submit)
    budget = MemoryBudget(2 * MIB)
    request = make_request(budget)

    async def read_events():
        events = service.iter_events(request, InferenceRequest(None))
        received = [await anext(events)]
        assert all_sent.wait(10)
        await asyncio.sleep(0.1)
        assert budget.leased_bytes > 40 * 1000
        received += [event async for event in events]
        return received

    if mask_bytes == 1000:
        assert len(asyncio.run(read_events())) == 51
        assert budget.leased_bytes == 0
    else:
        with pytest.raises(InsufficientMemoryError):
            asyncio.run(read_events())


def test_is_out_of_memory_recognizes_torch_cpu_errors():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
