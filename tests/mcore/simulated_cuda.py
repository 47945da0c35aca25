"""A pretended CUDA device: on a machine without one it finds tensors on the wrong side.

Tensors of the pretended device are CPU tensors of a class of their own, :class:`Far`, which say
``cuda:0`` when asked for their device. Under :class:`SimulatedCUDA` what is computed of far tensors
is far, what is made with ``device="cuda"`` is far, and a call that mixes the two sides fails as it
does on a GPU. Kernels, streams and rounding of a GPU are not pretended, nor are the rules inside a
backward pass, whose gradients autograd makes out of sight.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn
from torch.distributed import ProcessGroup, distributed_c10d
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from megatron_occ.mcore import layout
from megatron_occ.mcore.cpu.backend import apply_cpu_backend
from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.vocabulary import fused, logprobs

CUDA = torch.device("cuda", 0)
PROPERTIES = {
    Tensor.device.__get__: lambda is_far: CUDA if is_far else torch.device("cpu"),
    Tensor.is_cuda.__get__: lambda is_far: is_far,
    Tensor.is_cpu.__get__: lambda is_far: not is_far,
}
MOVING = {"to", "cpu", "cuda", "type_as"}
# calls that take tensors of both sides on a GPU too
CROSSING = MOVING | {"copy_", "__set__"}
# where an index may lie on the host, and values may not
INDEXING = {"__getitem__", "__setitem__", "index_put_", "index_put"}
# calls in which the host waits for the device
WAITING = {"cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"}
COLLECTIVES = (
    "allreduce",
    "broadcast",
    "reduce",
    "allgather",
    "_allgather_base",
    "gather",
    "scatter",
    "reduce_scatter",
    "_reduce_scatter_base",
    "alltoall",
    "alltoall_base",
    "send",
    "recv",
)


class Far(Tensor):
    """A tensor of the pretended device."""


def _side(device: Any) -> type:
    return Far if torch.device(device).type == "cuda" else Tensor


def _placed(tensor: Tensor, side: type, name: str, given: list[Tensor]) -> Tensor:
    """A result of a call, on its side; what a call moves there is a copy."""
    if isinstance(tensor, Far) == (side is Far):
        return tensor
    if any(tensor is each for each in given):
        return tensor.clone().as_subclass(side) if name in MOVING else tensor
    # no new node of the graph: Megatron looks for the one that accumulates a parameter's gradient
    tensor.__class__ = side
    return tensor


class SimulatedCUDA(TorchFunctionMode):
    """CUDA's rules for which tensors a call may take.

    Attributes:
        waits: how often the host waited for the device, by the name of the call; "sent": for memory
            that is not pinned to arrive there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", str(func)), dict(kwargs or {})
        tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        is_far = any(isinstance(each, Far) for each in tensors)
        if func in PROPERTIES:
            return PROPERTIES[func](is_far)
        if is_far:
            _check(name, args, tensors)
        if is_far and name in WAITING:
            self.waits[name] += 1
        side, args, kwargs = _named_side(name, args, kwargs)
        if side is Far and not is_far and (tensors or name == "tensor"):
            self.waits["sent"] += 1
        kwargs.pop("pin_memory", None)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            if func == Tensor.data.__set__:
                _settle(*args)
            if isinstance(found, torch.Size):
                return found
            if name == "type" and isinstance(found, str) and is_far:
                return found.replace("torch.", "torch.cuda.")
            side = side or (Far if is_far else Tensor)
            return pytree.tree_map_only(Tensor, lambda t: _placed(t, side, name, tensors), found)


def _settle(tensor: Tensor, data: Tensor) -> None:
    """A tensor that was given other data lies where they lie."""
    if isinstance(data, Far) and not isinstance(tensor, Far):
        tensor._is_param = isinstance(tensor, nn.Parameter)
        tensor.__class__ = Far


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _check(name: str, args: tuple, tensors: list[Tensor]) -> None:
    """Refuse a call that mixes the sides."""
    if name == "numpy":
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if name in CROSSING or _in_backward():
        return
    if name in INDEXING and isinstance(args[0], Far):
        tensors = [each for each in (args[0], *args[2:]) if isinstance(each, Tensor)]
    sides = ["cuda:0" if isinstance(each, Far) else "cpu" for each in tensors]
    # a single number may come from the host
    wrong = [s == "cpu" and each.dim() > 0 for s, each in zip(sides, tensors, strict=True)]
    if any(wrong):
        found = [(side, tuple(each.shape)) for side, each in zip(sides, tensors, strict=True)]
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {found}")


def _named_side(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict]:
    """Where the call itself says that its result is to be, if it does; then its arguments."""
    if name in ("cpu", "cuda"):
        return (Tensor if name == "cpu" else Far), args[:1], {}
    if name == "type_as":
        return (Far if isinstance(args[1], Far) else Tensor), args, kwargs
    if name == "to" and len(args) > 1 and isinstance(args[1], Tensor):
        return (Far if isinstance(args[1], Far) else Tensor), args, kwargs
    if name == "to" and len(args) > 1 and isinstance(args[1], (str, torch.device)):
        return _side(args[1]), (args[0], "cpu", *args[2:]), kwargs
    if kwargs.get("device") is not None:
        return _side(kwargs["device"]), args, kwargs | {"device": "cpu"}
    return None, args, kwargs


def to_cuda(module: nn.Module) -> nn.Module:
    """Move parameters, with their marks, and buffers to the pretended device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, Far):
                moved = nn.Parameter(parameter.detach().as_subclass(Far), parameter.requires_grad)
                moved.__dict__.update(parameter.__dict__)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.as_subclass(Far)
    return module


def _to(own: Any) -> Any:
    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        is_cuda = args and isinstance(args[0], torch.device) and args[0].type == "cuda"
        return to_cuda(module) if is_cuda else own(module, *args, **kwargs)

    return to


def _only_far(method: Any, over_gloo: set[str]) -> Any:
    """A collective that refuses tensors of the host, but in groups that were asked to be gloo's."""

    own = method.__name__

    @functools.wraps(method)
    def call(group: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        misplaced = group.group_name not in over_gloo and not _in_backward()
        if misplaced and not all(isinstance(each, Far) for each in tensors):
            raise RuntimeError(f"No backend type associated with device type cpu: {own}")
        return method(group, *args, **kwargs)

    return call


def _collectives(stack: contextlib.ExitStack) -> None:
    """NCCL's rule: what is sent lies on the device."""
    over_gloo: set[str] = set()
    new_group = torch.distributed.new_group

    def remembered(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        if kwargs.get("backend") == "gloo" and hasattr(group, "group_name"):
            over_gloo.add(group.group_name)
        return group

    def device(group: Any = None) -> str:
        name = (group or torch.distributed.group.WORLD).group_name
        return "cpu" if name in over_gloo else "cuda"

    def backend(group: Any = None) -> str:
        return "gloo" if device(group) == "cpu" else "nccl"

    stack.enter_context(mock.patch.object(torch.distributed, "new_group", remembered))
    # torch asks too, and would take what it gets for a real device
    stack.enter_context(mock.patch.object(layout, "get_backend", backend))
    stack.enter_context(mock.patch.object(distributed_c10d, "_get_object_coll_device", device))
    for name in COLLECTIVES:
        own = getattr(ProcessGroup, name)
        stack.enter_context(mock.patch.object(ProcessGroup, name, _only_far(own, over_gloo)))


@contextlib.contextmanager
def simulated_cuda() -> Iterator[SimulatedCUDA]:
    """CUDA's rules, without the CPU back end's answers in their place; NCCL's for collectives.

    Runs that start in it have the pretended device.
    """
    apply_cpu_backend()
    with contextlib.ExitStack() as stack:
        _collectives(stack)
        for name in ("zeros", "ones", "empty", "full", "tensor"):
            made_here = getattr(torch, name).__wrapped__
            stack.enter_context(mock.patch.object(torch, name, made_here))
        for kind in (DistributedOptimizer, Float16OptimizerWithFloat16Params):
            stack.enter_context(mock.patch.object(kind, "__init__", kind.__init__.__wrapped__))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=CUDA))
        stack.enter_context(mock.patch.object(Tensor, "cuda", lambda tensor, **_: tensor.to(CUDA)))
        stack.enter_context(mock.patch.object(nn.Module, "to", _to(nn.Module.to)))
        # there is nothing to compile for
        stack.enter_context(mock.patch.object(fused, "kernel", lambda function: function))
        stack.enter_context(mock.patch.object(logprobs, "compiles", return_value=True))
        on_cuda = functools.partial(Layout.of_this_rank, CUDA)
        there = mock.patch.object(Layout, "of_this_rank", side_effect=lambda _: on_cuda())
        stack.enter_context(there)
        mode = stack.enter_context(SimulatedCUDA())
        run_backward = torch.autograd._engine_run_backward

        def watched(*args: Any, **kwargs: Any) -> Any:
            # the call to backward() is the mode's own by now: what it calls must come to it again
            with mode:
                return run_backward(*args, **kwargs)

        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", watched))
        yield mode
