"""Operations and memory of code that runs on tensors without content, by stage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

BLOCK = 512  # bytes: what allocators round to
CONSTANTS = (bool, int, float, str, tuple, torch.dtype, torch.device, type(None))
aten = torch.ops.aten
CHOOSING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


def _is_new(result: Tensor, inputs: list[Tensor]) -> bool:
    """Whether a tensor is all of its storage, and shares it with no input."""
    storage = result.untyped_storage()
    return storage.nbytes() == result.nbytes and all(storage._cdata != each.untyped_storage()._cdata for each in inputs)


class Live(TorchDispatchMode):
    """Follows every tensor that is made while this mode is on: the bytes there are now, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():  # whose region is which has content, and so has all that follows from it
                return func(*args, **(kwargs or {}))
        if func in CHOOSING:
            args = (args[0], [number for index in args[1] for number in _as_numbers(index)], *args[2:])
        given = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return given

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _as_numbers(index: Tensor | None) -> list[Tensor | None]:
    """Places chosen by truth values as places chosen by number, one for each dimension, so that it is known how many
    there are.
    """
    if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
        return [index]
    with unset_fake_temporarily():
        return list(index.nonzero(as_tuple=True))


TensorMetadata = tuple[torch.Size, tuple[int, ...], torch.dtype]
Added = list[list[tuple[torch.Size, torch.dtype]]]  # keys and values


def _metadata(tensor: Tensor) -> TensorMetadata:
    return tensor.shape, tensor.stride(), tensor.dtype


def _empty(metadata: TensorMetadata) -> Tensor:
    shape, stride, dtype = metadata
    return torch.empty_strided(shape, stride, dtype=dtype)


@contextmanager
def _recorded(caches: list[DynamicCache]) -> Iterator[Added]:
    """Record the shapes and types of the keys and values that are added to caches."""
    added: Added = []

    def record_and_update(original: Callable[..., Any], keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        added.append([(each.shape, each.dtype) for each in (keys, values)])  # which may be parts of a larger tensor
        return original(keys, values, *args, **kwargs)

    for cache in caches:
        cache.update = partial(record_and_update, cache.update)
    try:
        yield added
    finally:
        for cache in caches:
            del cache.update


@dataclass(frozen=True)
class Known:
    """The cost of a call that was run. extra: the most bytes at once, beyond those before. added: to a cache."""

    flops: int
    extra: int
    structure: Any
    results: list[TensorMetadata]
    added: Added


class Stages:
    """Operations and the most memory by stage; a stage that comes again, or several times, adds to the former.

    known: the cost of calls, by all that it depends on; several of these may share it.
    """

    def __init__(self, live: Live, known: dict[Any, Known]):
        self.live = live
        self.known = known
        self.flops: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.counter = FlopCounterMode(display=False)
        self.repeated = 0  # operations of calls that were counted without being run

    @contextmanager
    def __call__(self, stage: str, times: int = 1) -> Iterator[None]:
        self.live.peak = self.live.now
        with self.aside() as counted:
            yield
        self.flops[stage] = self.flops.get(stage, 0) + times * counted[0]
        self.memory[stage] = max(self.memory.get(stage, 0), self.live.peak)

    def count_once(self, run: Callable[..., Any], alike: Any, place: int | None = None) -> Callable[..., Any]:
        """Wrap a function so that of all alike calls with the same shapes only the first runs.

        Args:
            run: takes and returns tensors without content. Its cost must depend on shapes only.
            alike: equal for functions with the same cost.
            place: which layer of a cache of keys and values the function adds to, if it takes one.

        Returns:
            A function with the same cost at every call: operations, the most memory meanwhile, and its result.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            caches = [leaf for leaf in leaves if isinstance(leaf, DynamicCache)]
            constants = [leaf for leaf in leaves if isinstance(leaf, CONSTANTS)]
            if len(tensors) + len(constants) + len(caches) < len(leaves) or len(caches) > (place is not None):
                return run(*args, **kwargs)
            shapes = tuple(map(_metadata, tensors))
            key = (alike, str(structure), shapes, tuple(constants), *(cache.get_seq_length(place) for cache in caches))
            if key in self.known:
                return self._repeat(self.known[key], caches, place)
            before, start, peak = self.counter.get_total_flops() + self.repeated, self.live.now, self.live.peak
            self.live.peak = start
            with _recorded(caches) as added:
                given = run(*args, **kwargs)
            flops, extra = self.counter.get_total_flops() + self.repeated - before, self.live.peak - start
            self.live.peak = max(peak, self.live.peak)
            results, found = tree_flatten(given)
            if all(isinstance(each, Tensor) and _is_new(each, tensors) for each in results):
                self.known[key] = Known(flops, extra, found, [*map(_metadata, results)], added)
            return given

        return call

    def _repeat(self, known: Known, caches: list[DynamicCache], place: int | None) -> Any:
        self.repeated += known.flops
        self.live.peak = peak = max(self.live.peak, self.live.now + known.extra)
        for cache in caches:
            for pair in known.added:
                cache.update(*(torch.empty(shape, dtype=dtype) for shape, dtype in pair), place)
        results = tree_unflatten([_empty(each) for each in known.results], known.structure)
        assert self.live.peak == peak, "what a call leaves is part of what it needs"
        return results

    @contextmanager
    def aside(self) -> Iterator[list[int]]:
        """Operations that are no stage of their own."""
        counted: list[int] = []
        self.repeated = 0
        with FlopCounterMode(display=False) as self.counter:
            yield counted
        counted.append(self.counter.get_total_flops() + self.repeated)
