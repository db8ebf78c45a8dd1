"""A simulated CUDA device: its tensors are computed on the CPU and refuse what a GPU refuses.

Within `simulated_cuda()` tensors can be made on `cuda` or moved there. They hold real values, so that code which
decides by values (greedy search, suppression, boolean masks) runs to its end. What is checked beyond that:

- An operation on tensors of two devices raises, except where CUDA takes a number (0 dimensions) from the CPU.
- An operation whose CUDA kernel takes one floating type raises if it gets two, also where the CPU's kernel takes both.
- Random numbers on the device come from a generator of its own, as on a GPU, and a CPU generator is refused there.
- Autocast follows CUDA's lists of operations, as far as they are called from Python.
- Operations for which the host waits for the device are counted in `synchronizations`, with the line of this
  repository that caused them.

It is built like torch's FakeTensorMode (tensors on `meta` with the dispatch keys of CUDA, below a dispatch mode), which
has no values. Kernels are the CPU's: their speed, memory and last bits are not a GPU's.
"""

import os
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
REPOSITORY = Path(__file__).parent.parent
PACKAGE_PREFIX = str(REPOSITORY / "sca") + os.sep
UNREPORTED_PREFIXES = (__file__, os.path.dirname(torch.__file__))  # frames that are not the cause of an operation

COPY_OPERATIONS = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
INDEXING_OPERATIONS = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
OPERATIONS_ACCEPTING_CPU_SCALARS = {
    aten.fill_.Tensor,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    *INDEXING_OPERATIONS,
}  # take one from the CPU
SYNCHRONIZING_OPERATIONS = {  # operations whose result, or its shape, the host needs before it continues
    *(aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default),
    *(aten.repeat_interleave.Tensor, aten.bincount.default),
}
MATRIX_PRODUCT_OPERATIONS = {  # need one type, and CUDA supports no integers
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.addmv.default, aten.mv.default),
    *(aten.dot.default, aten.linear.default, aten.convolution.default, aten.convolution_backward.default),
}
SINGLE_DTYPE_OPERATIONS = {aten.native_layer_norm.default, aten.native_group_norm.default, *MATRIX_PRODUCT_OPERATIONS}
AUTOCAST_CATEGORIES = {  # by name, as called from Python: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference
    "lower": {
        *("__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "conv1d", "conv2d"),
        *("conv_transpose2d", "einsum", "linear", "matmul", "mm", "mv", "scaled_dot_product_attention"),
        "multi_head_attention_forward",  # composed of those
    },
    "float32": {
        *("__pow__", "binary_cross_entropy_with_logits", "cosine_similarity", "cross_entropy", "cumprod", "cumsum"),
        *("exp", "group_norm", "layer_norm", "log", "log_softmax", "mse_loss", "nll_loss", "norm", "normalize"),
        *("pow", "prod", "rsqrt", "softmax", "softplus", "sum"),
    },
    "widest": {"addcdiv", "addcmul", "cat", "index_put", "scatter_add", "stack", "tensordot"},
}


class SimulatedTensor(Tensor):
    """A tensor that reports the device `cuda:0`; its values are in `cpu_values`."""

    @staticmethod
    def __new__(cls, cpu_values):
        with torch.inference_mode(cpu_values.is_inference()):
            shape = torch.empty_strided(cpu_values.shape, cpu_values.stride(), dtype=cpu_values.dtype, device=META)
            return Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=CUDA)

    def __init__(self, cpu_values):
        self.cpu_values = cpu_values

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # called from C++, which has no device guard for a GPU here
            return META
        raise RuntimeError(f"{func} on a simulated tensor outside of simulated_cuda()")

    @property
    def device(self):
        return CUDA

    @property
    def is_cuda(self):
        return True

    @property
    def is_meta(self):
        return False

    def get_device(self):
        return 0

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self):
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype})"


@contextmanager
def simulated_cuda():
    """Simulate a CUDA device, see above. Yields the active `Simulation`."""
    simulation = Simulation()
    rng_generator = simulation.generator
    patches = {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "is_bf16_supported": lambda *_, **__: True,
        "device": lambda *_: nullcontext(),
        "get_rng_state": lambda *_: rng_generator.get_state(),
        "set_rng_state": lambda state, *_: rng_generator.set_state(state),
        "amp.common.amp_definitely_not_available": lambda: False,
    }
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(patch(f"torch.cuda.{name}", value))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its tensor on the CPU and moves it
        original_swap_setting = torch.__future__.get_swap_module_params_on_conversion()
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, original_swap_setting)
        torch.__future__.set_swap_module_params_on_conversion(True)  # keeps the class and tied weights
        stack.enter_context(_TorchCallInterceptor())
        stack.enter_context(simulation)
        yield simulation


class Simulation(TorchDispatchMode):
    """Dispatch mode of the simulated device.

    synchronizations: a Counter of (operation, file:line). random_tensor_sums: sums of the random tensors created on the
    device.
    """

    def __init__(self):
        super().__init__()
        self.synchronizations = Counter()
        self.random_tensor_sums = []
        self.generator = torch.Generator()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return META
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:  # in inference mode it is not decomposed yet
                return func.decompose(*args, **kwargs)
        tensors = _collect_tensors((args, kwargs))
        has_simulated_tensor = any(isinstance(tensor, SimulatedTensor) for tensor in tensors)
        requested_device = kwargs.get("device")
        is_cuda_requested = (
            requested_device is not None and torch.device(requested_device).type != "cpu"
        )  # C++ writes meta where it means this device
        if has_simulated_tensor:
            _check_gpu_constraints(func, tensors)
            self._count_synchronization(func, tensors, requested_device, args)
        elif is_cuda_requested and tensors:
            self._record_synchronization(func)  # from unpinned CPU memory
        cpu_args, cpu_kwargs = _map_tensors((args, kwargs), lambda tensor: getattr(tensor, "cpu_values", tensor))
        if is_cuda_requested:
            cpu_kwargs["device"] = CPU
        result_on_cuda = is_cuda_requested if requested_device is not None else has_simulated_tensor
        if result_on_cuda and torch.Tag.nondeterministic_seeded in func.tags:
            result = self._run_with_device_rng(func, cpu_args, cpu_kwargs)
        else:
            result = func(*cpu_args, **cpu_kwargs)
        if not result_on_cuda:
            return result
        if torch.Tag.inplace_view in func.tags and func is not aten.detach_.default:
            raise NotImplementedError(f"{func} changes the shape of a simulated tensor")
        result = _map_tensors(result, SimulatedTensor)
        return return_and_correct_aliasing(func, args, kwargs, result)

    @contextmanager
    def count_synchronizations(self):
        """Yield a Counter of the synchronizations within."""
        outer_counter, inner_counter = self.synchronizations, Counter()
        self.synchronizations = inner_counter
        try:
            yield inner_counter
        finally:
            self.synchronizations = outer_counter + inner_counter

    def _run_with_device_rng(self, func, args, kwargs):
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
        cpu_rng_state = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            result = func(*args, **kwargs)
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(cpu_rng_state)
        self.random_tensor_sums += [float(leaf.double().sum()) for leaf in _collect_tensors(result)]
        return result

    def _count_synchronization(self, func, tensors, requested_device, args):
        crosses_devices = func in COPY_OPERATIONS and (
            any(not isinstance(tensor, SimulatedTensor) for tensor in tensors)
            or (requested_device is not None and torch.device(requested_device).type == "cpu")
        )
        index_tensors = func in INDEXING_OPERATIONS and [index for index in args[1] if index is not None]
        has_hidden_synchronization = index_tensors and any(
            index.dtype == torch.bool or not isinstance(index, SimulatedTensor) for index in index_tensors
        )
        if crosses_devices or has_hidden_synchronization or func in SYNCHRONIZING_OPERATIONS:
            self._record_synchronization(func)

    def _record_synchronization(self, func):
        frame, external_location = sys._getframe(1), None
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE_PREFIX):
            frame_file = frame.f_code.co_filename
            if external_location is None and not frame_file.startswith(UNREPORTED_PREFIXES):
                external_location = f"{Path(frame_file).name}:{frame.f_lineno}"
            frame = frame.f_back
        package_location = frame and f"{Path(frame.f_code.co_filename).relative_to(REPOSITORY)}:{frame.f_lineno}"
        self.synchronizations[str(func), " by ".join(filter(None, (package_location, external_location)))] += 1


class _TorchCallInterceptor(TorchFunctionMode):
    """Intercepts calls of torch before they reach C++.

    `cuda` becomes `cuda:0`, since torch would query the driver for the current device. Autocast is applied here, since
    torch's own follows the device that C++ sees.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = tuple(map(_add_cuda_index, args))
        kwargs = {key: _add_cuda_index(value) for key, value in (kwargs or {}).items()}
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = _cast_arguments(getattr(func, "__name__", ""), (args, kwargs))
        if func is Tensor.backward:
            (loss,) = args
            with self:  # recomputed operations are calls of torch, too
                backward_options = {"allow_unreachable": True, "accumulate_grad": True}
                return _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **backward_options)
        return func(*args, **kwargs)


def _add_cuda_index(value):
    return CUDA if isinstance(value, str | torch.device) and str(value) == "cuda" else value


def _cast_arguments(name, arguments):
    """Return the arguments of an operation in the type to which CUDA's autocast casts them."""
    category = next((category for category, names in AUTOCAST_CATEGORIES.items() if name in names), None)
    if category is None:
        return arguments
    if category == "widest":
        category = (
            "float32" if any(tensor.dtype == torch.float32 for tensor in _collect_tensors(arguments)) else "lower"
        )
    dtype = torch.get_autocast_dtype("cuda") if category == "lower" else torch.float32

    def cast_tensor(tensor):
        is_castable = (
            isinstance(tensor, SimulatedTensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        )
        return tensor.to(dtype) if is_castable else tensor

    return _map_tensors(arguments, cast_tensor)


def _map_tensors(value, function):
    """Apply a function to the tensors in nested containers; torch's `tree_map` would take most of a test's time."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_map_tensors(each, function) for each in value])
    if isinstance(value, dict):
        return {key: _map_tensors(each, function) for key, each in value.items()}
    return value


def _collect_tensors(value):
    tensors = []
    _map_tensors(value, tensors.append)
    return tensors


@cache
def _is_composite(func):
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _check_gpu_constraints(func, tensors):
    """Raise RuntimeError for operations that a GPU refuses."""
    if func not in COPY_OPERATIONS:
        for tensor in tensors:
            is_scalar = tensor.dim() == 0 and (
                torch.Tag.pointwise in func.tags or func in OPERATIONS_ACCEPTING_CPU_SCALARS
            )
            is_index = func in INDEXING_OPERATIONS and tensor is not tensors[0] and not tensor.is_floating_point()
            if not isinstance(tensor, SimulatedTensor) and not is_scalar and not is_index:
                shapes = ", ".join(f"{tuple(each.shape)} on {each.device}" for each in tensors)
                raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
    if func in SINGLE_DTYPE_OPERATIONS:
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise RuntimeError(f"expected one scalar type: {func} of {', '.join(sorted(map(str, dtypes)))}")
        if func in MATRIX_PRODUCT_OPERATIONS and not tensors[0].is_floating_point():
            raise RuntimeError(f"{func} is not implemented for {tensors[0].dtype} on cuda")
