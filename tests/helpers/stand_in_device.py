"""A device that computes on the CPU, and refuses what a GPU refuses: above all, tensors of the host among its own.

Tensors there hold a plain one, which nothing outside of this file sees; PyTorch's key for devices of others
("PrivateUse1") makes them known to it.

    with stand_in_device() as device:
        qexport.export(model, out_dir=out, device=device)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
_aten = torch.ops.aten
# What copies from one device to another, and indices, which a GPU takes from the host too.
_MIXING = {_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default,
           _aten.index_put.default, _aten._index_put_impl_.default}  # fmt: skip
# Where a GPU takes a tensor of the host that has no dimension, as a number.
_NUMBERS = ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "pow", "where", "eq", "ne", "lt", "le", "gt",
            "ge", "maximum", "minimum", "clamp", "clamp_", "clamp_min", "clamp_max", "bitwise_and", "logical_and",
            "addcmul", "fill_", "remainder", "rsub")  # fmt: skip
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.addmv.default,
             _aten.mv.default, _aten.dot.default, _aten.addmm_.default}  # fmt: skip

# As soon as this is imported: autograd counts devices once, when it is first used.
_setup_privateuseone_for_python_backend(NAME)
# Autocast asks every known backend, also for models on the CPU.
getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]


class MixedDevices(RuntimeError):
    """A tensor of the host among those of the device, or what the device has no kernel for."""


class StandInTensor(torch.Tensor):
    """A tensor on the device.

    Attributes:
        held: its values, on the CPU.
    """

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "StandInTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise MixedDevices("can't convert a tensor of the stand-in device to numpy")

    def __array__(self, *args, **kwargs):
        raise MixedDevices("can't convert a tensor of the stand-in device to numpy")

    def __repr__(self) -> str:
        return f"StandInTensor({self.held!r})"


class _StandInMode(TorchDispatchMode):
    """Sees what makes tensors of nothing, and what brings them to the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self)


class _TensorsOfNumbers(TorchFunctionMode):
    """`torch.tensor` copies numbers to a device where no mode of dispatch looks."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def stand_in_device() -> Iterator[str]:
    """The name of the device, which is there inside the `with`."""
    with _StandInMode(), _TensorsOfNumbers():
        yield f"{NAME}:0"


def _run(func, args, kwargs, mode: TorchDispatchMode | None = None):
    everything, _ = tree_flatten((args, kwargs))
    tensors = [a for a in everything if isinstance(a, torch.Tensor)]
    there = any(isinstance(t, StandInTensor) for t in tensors)
    asked = next((a for a in everything if isinstance(a, torch.device)), None)  # `to` has it by position too
    if not there and (asked is None or asked.type != NAME):
        return func(*args, **kwargs)
    _check(func, tensors, there, everything)
    own = {} if func.namespace != "qexport" else _bodies()
    if there and str(func.name()) in own and mode is not None:
        with mode, _TensorsOfNumbers():  # what it calls is looked at too
            return own[str(func.name())](*args, **kwargs)
    wrappers = {id(t.held): t for t in tensors if isinstance(t, StandInTensor)}
    args, kwargs = tree_map(_plain, (args, kwargs))
    result = func(*args, **kwargs)
    if asked is not None and asked.type != NAME:  # brought to the host
        return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) and id(t) in wrappers else t, result)

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        return wrappers[id(value)] if id(value) in wrappers else StandInTensor(value)

    return tree_map(wrapped, result)


def _check(func, tensors: list[torch.Tensor], there: bool, everything: list[Any]) -> None:
    if any(isinstance(a, torch.Generator) for a in everything):
        raise MixedDevices(f"{func}: a generator of the CPU draws nothing on the device")
    if there and func not in _MIXING:
        numbers = func.namespace == "qexport" or func.overloadpacket.__name__ in _NUMBERS
        for tensor in tensors:
            strange = not isinstance(tensor, StandInTensor) and tensor.device.type != "meta"
            if strange and (tensor.dim() > 0 or not numbers):
                raise MixedDevices(f"{func}: a tensor {list(tensor.shape)} of the CPU among those of the device")
    if func in _PRODUCTS and not tensors[0].is_floating_point():
        raise MixedDevices(f"{func}: the device multiplies no matrices of {tensors[0].dtype}")


def _plain(value: Any) -> Any:
    if isinstance(value, StandInTensor):
        return value.held
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


@cache
def _bodies() -> dict[str, Any]:
    """By its name, the function behind each operator of the project."""
    known = torch._library.custom_ops.OPDEFS
    return {name: found._init_fn for name, found in known.items() if name.startswith("qexport::")}
