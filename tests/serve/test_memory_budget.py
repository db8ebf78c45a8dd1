"""A budget of bytes: large requests wait or are refused, and small ones always find room."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
import torch
from sca_registry.contracts import Caption, Prompt

from sca.serve import service as module
from sca.serve.limits import ServerLimits
from sca.serve.memory_budget import BudgetError, ByteBudget, is_out_of_memory
from sca.serve.service import CaptionService
from sca.serve.inference_requests import InferenceRequest, InsufficientMemoryError, RequestDone

MIB = 2**20


def test_byte_budget_keeps_room_for_small_requests():
    budget = ByteBudget(64 * MIB)
    with budget.create_lease() as large, budget.create_lease() as small:
        large.resize(48 * MIB)
        with pytest.raises(BudgetError, match="48 MiB of 64 are in use"), budget.create_lease() as another:
            another.resize(2 * MIB)
        small.resize(1 * MIB)
        assert budget.leased_bytes == 49 * MIB
        with pytest.raises(BudgetError):
            small.resize(2 * MIB)
    assert budget.leased_bytes == 0


def test_byte_budget_refuses_at_once_what_never_fits():
    budget = ByteBudget(64 * MIB)
    with budget.create_lease() as lease, pytest.raises(BudgetError):
        lease.resize(budget.max_request_bytes + 1, timeout=60)


def test_lease_waits_until_another_ends():
    budget = ByteBudget(64 * MIB)
    first, second = budget.create_lease(), budget.create_lease()
    first.resize(40 * MIB)
    waiting = threading.Thread(target=second.resize, args=(40 * MIB, 30))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    first.__exit__()
    waiting.join(10)
    assert (first.leased_bytes, second.leased_bytes, budget.leased_bytes) == (0, 40 * MIB, 40 * MIB)


def test_lease_that_has_ended_takes_nothing():
    """Work goes on for a moment after its request has gone."""
    budget = ByteBudget(64 * MIB)
    with budget.create_lease() as lease:
        lease.resize(5)
    lease.resize(10 * MIB)
    assert (lease.leased_bytes, budget.leased_bytes) == (0, 0)


@pytest.fixture
def request_of():
    """`request_of(budget)`: a request with a lease of a budget."""

    async def stays():
        return False

    def make(budget):
        state = SimpleNamespace(lease=budget.create_lease())
        return SimpleNamespace(state=state, is_disconnected=stays, client=None)

    return make


@pytest.fixture
def service(scheduler):
    service = CaptionService(scheduler, "sca-tiny", ServerLimits())
    yield service
    service.close()


def test_service_decodes_no_image_for_a_request_that_has_ended(service, request_of, png, monkeypatch):
    monkeypatch.setattr(module, "decode_image", lambda *_: pytest.fail("decoded"))
    request = request_of(service.budget)
    request.state.lease.__exit__()
    with pytest.raises(BudgetError, match="the request has ended"):
        asyncio.run(service.decode_request_image(request, png))


@pytest.mark.parametrize("counts", [1000, 100_000])
def test_events_that_nobody_reads_are_part_of_the_memory_of_their_request(service, request_of, monkeypatch, counts):
    mask = {"size": [9, 9], "counts": "x" * counts}
    caption = Caption(
        "a cat", 0.5, mask=mask, box=None, predicted_iou=None, prompt=Prompt(box=(0, 0, 9, 9)), region_id=0
    )
    told = threading.Event()

    def submit(question, on_event):
        for event in (*[caption] * 50, RequestDone(50)):
            on_event(event)
        told.set()
        return SimpleNamespace(cancel=lambda: None)

    monkeypatch.setattr(service.scheduler, "submit", submit)
    budget = ByteBudget(2 * MIB)
    request = request_of(budget)

    async def read():
        events = service.iter_events(request, InferenceRequest(None))
        found = [await anext(events)]
        assert told.wait(10)
        await asyncio.sleep(0.1)
        assert budget.leased_bytes > 40 * 1000
        found += [event async for event in events]
        return found

    if counts == 1000:
        assert len(asyncio.run(read())) == 51
        assert budget.leased_bytes == 0
    else:
        with pytest.raises(InsufficientMemoryError):
            asyncio.run(read())


def test_torch_out_of_memory_on_a_cpu_is_recognized():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
