"""A budget of bytes: large requests wait or are refused, and small ones always find room."""

import threading

import pytest
import torch

from sca.serve.memory import BudgetError, ByteBudget, is_out_of_memory

MIB = 2**20


def test_byte_budget_keeps_room_for_small_requests():
    budget = ByteBudget(64 * MIB)
    with budget.lease() as large, budget.lease() as small:
        large.set(48 * MIB)
        with pytest.raises(BudgetError, match="48 MiB of 64 are in use"), budget.lease() as another:
            another.set(2 * MIB)
        small.set(1 * MIB)
        assert budget.held == 49 * MIB
        with pytest.raises(BudgetError):
            small.set(2 * MIB)
    assert budget.held == 0


def test_byte_budget_refuses_at_once_what_never_fits():
    budget = ByteBudget(64 * MIB)
    with budget.lease() as lease, pytest.raises(BudgetError):
        lease.set(budget.largest + 1, seconds=60)


def test_lease_waits_until_another_ends():
    budget = ByteBudget(64 * MIB)
    first, second = budget.lease(), budget.lease()
    first.set(40 * MIB)
    waiting = threading.Thread(target=second.set, args=(40 * MIB, 30))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    first.__exit__()
    waiting.join(10)
    assert (first.held, second.held, budget.held) == (0, 40 * MIB, 40 * MIB)


def test_lease_that_has_ended_takes_nothing():
    """Work goes on for a moment after its request has gone."""
    budget = ByteBudget(64 * MIB)
    with budget.lease() as lease:
        lease.set(5)
    lease.set(10 * MIB)
    assert (lease.held, budget.held) == (0, 0)


def test_torch_out_of_memory_on_a_cpu_is_recognized():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
