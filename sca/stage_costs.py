"""FLOPs and peak memory per stage of code that runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, sdpa_backward_flop_count, sdpa_flop_count
from transformers import DynamicCache

ALLOCATION_BLOCK_BYTES = 512  # allocators round sizes up to multiples of this
CONSTANT_TYPES = (bool, int, float, str, tuple, torch.dtype, torch.device, type(None))
aten: Any = torch.ops.aten
INDEXING_OPERATORS = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


def _has_own_storage(result: Tensor, inputs: list[Tensor]) -> bool:
    """Return whether a tensor fills its storage and shares it with no input."""
    storage = result.untyped_storage()
    return storage.nbytes() == result.nbytes and all(storage._cdata != each.untyped_storage()._cdata for each in inputs)


class MemoryTracker(TorchDispatchMode):
    """Dispatch mode that tracks the memory of every tensor created while it is active.

    Attributes:
        current_bytes: Bytes of the tensors that are alive.
        peak_bytes: Maximum of `current_bytes`.
        tracked_storages: Storages that are alive.
    """

    current_bytes: int
    peak_bytes: int

    def __init__(self) -> None:
        super().__init__()
        self.current_bytes = self.peak_bytes = 0
        self.tracked_storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():  # real tensors, such as the image index, and what is computed from them
                return func(*args, **(kwargs or {}))
        if func in INDEXING_OPERATORS:
            args = (args[0], [indices for index in args[1] for indices in _mask_to_indices(index)], *args[2:])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._track_storage(tensor.untyped_storage())
        return result

    def _track_storage(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.tracked_storages:
            size = -(-storage.nbytes() // ALLOCATION_BLOCK_BYTES) * ALLOCATION_BLOCK_BYTES
            self.tracked_storages.add(key)
            self.current_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.current_bytes)
            weakref.finalize(storage, self._release_storage, key, size)

    def _release_storage(self, key: int, size: int) -> None:
        self.tracked_storages.discard(key)
        self.current_bytes -= size


def _mask_to_indices(index: Tensor | None) -> list[Tensor | None]:
    """Convert a boolean index to integer indices, one per dimension, so that the shape of the result is known."""
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    with unset_fake_temporarily():
        return list(index.nonzero(as_tuple=True))


TensorMetadata = tuple[torch.Size, tuple[int, ...], torch.dtype]
CacheUpdates = list[list[tuple[torch.Size, torch.dtype]]]  # (keys, values) of each update


def _get_metadata(tensor: Tensor) -> TensorMetadata:
    return tensor.shape, tensor.stride(), tensor.dtype


def _create_empty_tensor(metadata: TensorMetadata) -> Tensor:
    shape, stride, dtype = metadata
    return torch.empty_strided(shape, stride, dtype=dtype)


@contextmanager
def _record_cache_updates(caches: list[DynamicCache]) -> Iterator[CacheUpdates]:
    """Record the shapes and dtypes of the keys and values that are added to caches."""
    updates: CacheUpdates = []

    def record_and_update(original: Callable[..., Any], keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        updates.append([(each.shape, each.dtype) for each in (keys, values)])  # no strides: they may be views
        return original(keys, values, *args, **kwargs)

    patched_caches: list[Any] = [*caches]
    for cache in patched_caches:
        cache.update = partial(record_and_update, cache.update)
    try:
        yield updates
    finally:
        for cache in patched_caches:
            del cache.update


def make_flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter, which also counts operations that torch 2.13 omits: see `UNCOUNTED_FLOPS`."""
    return FlopCounterMode(display=False, custom_mapping=UNCOUNTED_FLOPS)


def _count_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of attention between tensors of these shapes."""
    return sdpa_flop_count(query, key, value)


def _count_attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of the gradients of attention between tensors of these shapes."""
    return sdpa_backward_flop_count(gradient, query, key, value)


def _count_product_flops(_: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of a batched matrix product between tensors of these shapes that is added to another tensor."""
    return bmm_flop(left, right)


def _count_int8_linear_flops(inputs: Any, scale: float, zero_point: int, weight: Any, *args: Any, **kwargs: Any) -> int:
    """Count the operations of an int8 product of these shapes, (N, I) x (I, O)."""
    return 2 * inputs[0] * inputs[1] * weight[1]


UNCOUNTED_FLOPS = {  # attention on a CPU, int8 products, and in-place products
    torch.ops.aten.baddbmm_: _count_product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward_flops,
}
if hasattr(torch.ops.onednn, "qlinear_pointwise"):  # of builds with oneDNN, see `sca.nn.int8_linear`
    UNCOUNTED_FLOPS[torch.ops.onednn.qlinear_pointwise] = _count_int8_linear_flops


@dataclass(frozen=True)
class CallCost:
    """Measured cost of a call.

    Attributes:
        flops: Floating-point operations.
        extra_bytes: Peak bytes during the call beyond those before it.
        result_structure: Tree structure of the result.
        result_metadata: Shape, stride and dtype of each tensor of the result.
        cache_updates: Keys and values added to the KV cache.
    """

    flops: int
    extra_bytes: int
    result_structure: Any
    result_metadata: list[TensorMetadata]
    cache_updates: CacheUpdates


class StageMeter:
    """FLOPs and peak memory per stage. The FLOPs of a repeated stage add up.

    Use as a context manager: `with meter("encode"): ...`.

    Args:
        tracker: Active memory tracker.
        cached_costs: Cost of calls by everything that it depends on; meters may share it.

    Attributes:
        flops: Floating-point operations by stage.
        memory: Peak bytes by stage.
    """

    def __init__(self, tracker: MemoryTracker, cached_costs: dict[Any, CallCost]):
        self.tracker = tracker
        self.cached_costs = cached_costs
        self.flops: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.flop_counter: FlopCounterMode = make_flop_counter()
        self.repeated_flops: int = 0  # FLOPs of calls that were counted without running

    @contextmanager
    def __call__(self, stage: str, times: int = 1) -> Iterator[None]:
        """Measure a stage, and count its FLOPs `times` times."""
        self.tracker.peak_bytes = self.tracker.current_bytes
        with self.count_flops() as flops:
            yield
        self.flops[stage] = self.flops.get(stage, 0) + times * flops[0]
        self.memory[stage] = max(self.memory.get(stage, 0), self.tracker.peak_bytes)

    def count_once(
        self, function: Callable[..., Any], cost_key: Any, layer_index: int | None = None
    ) -> Callable[..., Any]:
        """Wrap a function so that only the first of several calls with the same cost runs.

        Args:
            function: Function of fake tensors whose cost depends on their shapes only.
            cost_key: Key that is equal for functions with the same cost.
            layer_index: Layer of the KV cache that the function updates, if it takes a cache.

        Returns:
            A function that adds the same FLOPs and peak memory at every call, and returns tensors of the same shapes.
        """

        def run_or_repeat(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            caches = [leaf for leaf in leaves if isinstance(leaf, DynamicCache)]
            constants = [leaf for leaf in leaves if isinstance(leaf, CONSTANT_TYPES)]
            if len(tensors) + len(constants) + len(caches) < len(leaves) or len(caches) > (layer_index is not None):
                return function(*args, **kwargs)
            shapes = tuple(map(_get_metadata, tensors))
            key = (
                cost_key,
                str(structure),
                shapes,
                tuple(constants),
                *(cache.get_seq_length(cast("int", layer_index)) for cache in caches),
            )
            if key in self.cached_costs:
                return self._repeat_cost(self.cached_costs[key], caches, layer_index)
            flops_before, bytes_before, previous_peak = (
                self.flop_counter.get_total_flops() + self.repeated_flops,
                self.tracker.current_bytes,
                self.tracker.peak_bytes,
            )
            self.tracker.peak_bytes = bytes_before
            with _record_cache_updates(caches) as cache_updates:
                result = function(*args, **kwargs)
            flops, extra_bytes = (
                self.flop_counter.get_total_flops() + self.repeated_flops - flops_before,
                self.tracker.peak_bytes - bytes_before,
            )
            self.tracker.peak_bytes = max(previous_peak, self.tracker.peak_bytes)
            results, result_structure = tree_flatten(result)
            if all(isinstance(each, Tensor) and _has_own_storage(each, tensors) for each in results):
                self.cached_costs[key] = CallCost(
                    flops, extra_bytes, result_structure, [*map(_get_metadata, results)], cache_updates
                )
            return result

        return run_or_repeat

    def _repeat_cost(self, cost: CallCost, caches: list[DynamicCache], layer_index: int | None) -> Any:
        self.repeated_flops += cost.flops
        self.tracker.peak_bytes = peak = max(self.tracker.peak_bytes, self.tracker.current_bytes + cost.extra_bytes)
        for cache in caches:
            for pair in cost.cache_updates:
                keys, values = (torch.empty(shape, dtype=dtype) for shape, dtype in pair)
                cache.update(keys, values, cast("int", layer_index))
        results = tree_unflatten([_create_empty_tensor(each) for each in cost.result_metadata], cost.result_structure)
        assert self.tracker.peak_bytes == peak, "the results of a call are part of its peak"
        return results

    @contextmanager
    def count_flops(self) -> Iterator[list[int]]:
        """Count FLOPs outside of a stage; the list contains them after the context."""
        flops: list[int] = []
        self.repeated_flops = 0
        with make_flop_counter() as self.flop_counter:
            yield flops
        flops.append(self.flop_counter.get_total_flops() + self.repeated_flops)
