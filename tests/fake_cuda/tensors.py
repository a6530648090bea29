"""Tensors that claim to be on "cuda" and compute on the CPU when the simulated device gets to them.

Every operation of torch that has such a tensor among its arguments, or makes one, comes to `Dispatcher`.  It decides
what the host gets at once (shapes, views), what is queued, what makes the host wait, and what a GPU would refuse.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda.device import Command, FakeDevice, Memory, poison

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
HOST = torch.device("cpu")
META = torch.device("meta")
"""What the tensors are to torch's C++ code, which would look for CUDA's runtime otherwise."""

_VIEWS = {aten._unsafe_view.default, aten._reshape_alias.default}
_MOVES = {aten._to_copy.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other}
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
# These move index tensors from the host themselves, and wait for the number of elements of a mask.
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class CudaTensor(torch.Tensor):
    """On the device; `host` is where its numbers are when the device has done what was queued."""

    host: torch.Tensor
    memory: Memory
    dispatcher: "ClassVar[Dispatcher | None]" = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: torch.Tensor, memory: Memory) -> "CudaTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=META,
        )
        made.host, made.memory = host, memory
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if cls.dispatcher is None:
            raise RuntimeError("a tensor of the simulated GPU is used outside of fake_cuda()")
        return cls.dispatcher.dispatch(func, args, kwargs or {})

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *args: Any) -> Any:
        return self.numpy()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"


class CudaMode(TorchDispatchMode):
    """Brings all operations of a thread to the dispatcher, those that make tensors included.

    Args:
        dispatcher: gets them.
    """

    def __init__(self, dispatcher: "Dispatcher") -> None:
        super().__init__()
        self._dispatcher = dispatcher

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._dispatcher.dispatch(func, args, kwargs or {})


class Dispatcher:
    """Decides how an operation is carried out.

    Args:
        device: that does it.
    """

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self._pinned: dict[int, StorageWeakRef] = {}
        self._special: dict[Any, Callable[..., Any]] = {
            aten.copy_.default: self._copy_,
            aten._to_copy.default: self._to_copy,
            aten._local_scalar_dense.default: self._item,
            aten.equal.default: self._equal,
            aten.mm.dtype: self._mm,
            aten.mm.dtype_out: self._mm,
        }

    def dispatch(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Does, or queues, one operation."""
        flat = pytree.tree_leaves((args, kwargs))
        if not any(map(_is_on_device, flat)):
            pinned = kwargs.get("pin_memory")
            made = func(*args, **({**kwargs, "pin_memory": False} if pinned else kwargs))
            return self.pin(made) if pinned else made
        if func in _MOVES and func is not aten._to_copy.default:
            return self._to(func, args, kwargs)
        if func in self._special:
            return self._special[func](*args, **kwargs)
        if func._can_decompose():
            with CudaMode(self):
                done = func.decompose(*args, **kwargs)
            if done is not NotImplemented:
                return done
        if kwargs.get("device") == HOST:  # a new tensor like one of the device's
            return func(*pytree.tree_map_only(CudaTensor, lambda own: own.host, args), **kwargs)
        if torch.Tag.inplace_view in func.tags or func in (aten.set_.source_Storage, aten.resize_.default):
            raise TypeError(f"fake_cuda: {func} changes the shape of a tensor in place")
        if func in _VIEWS or _is_view(func):
            return self._view(func, args, kwargs)
        return self._compute(func, args, kwargs)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Marks the memory of a host tensor as pinned."""
        if len(self._pinned) > 4096:
            self._pinned = {key: own for key, own in self._pinned.items() if not own.expired()}
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether it is."""
        return tensor.untyped_storage()._cdata in self._pinned

    def empty(self, like: torch.Tensor) -> CudaTensor:
        """A new tensor with the shape, strides and type of another."""
        host = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return CudaTensor(host, self.device.allocate(host))

    def enqueue(self, name: str, run: Callable[[], object], tensors: Sequence[Any]) -> None:
        """Queues what reads and writes these tensors."""
        self.device.enqueue(Command(name, run, [own.memory for own in tensors if isinstance(own, CudaTensor)]))

    def _view(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        base = next(own for own in pytree.tree_leaves((args, kwargs)) if isinstance(own, CudaTensor))
        host_args, host_kwargs = pytree.tree_map_only(CudaTensor, lambda own: own.host, (args, kwargs))
        views = func(*host_args, **host_kwargs)
        # A view of a normal tensor is one itself, in inference mode too.
        with torch.inference_mode(base.is_inference()):
            return pytree.tree_map_only(torch.Tensor, lambda host: CudaTensor(host, base.memory), views)

    def _compute(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        written = [value for argument, value in _bound(func, args, kwargs) if _is_written(argument)]
        if any(isinstance(own, torch.Tensor) and not isinstance(own, CudaTensor) for own in written):
            raise _two_devices(func)
        flat = pytree.tree_leaves((args, kwargs))
        if self._depends_on_data(func, flat):
            self.device.wait(str(func))
        host_args, host_kwargs = self._on_host(func, args, kwargs)
        shapes = self._shapes(func, args, kwargs)

        def run() -> Any:
            return func(*host_args, **host_kwargs)

        if written:
            self.enqueue(str(func), run, flat)
            returned = len(func._schema.returns)
            return None if not returned else written[0] if returned == 1 else tuple(written)
        if shapes is None:
            self.device.wait(f"{func}, whose shape depends on data")
            return pytree.tree_map_only(torch.Tensor, self._filled, run())
        made = pytree.tree_map_only(torch.Tensor, self.empty, shapes)
        if func in _EMPTY:
            return made
        targets = [own.host for own in pytree.tree_leaves(made) if isinstance(own, CudaTensor)]

        def fill() -> None:
            results = [own for own in pytree.tree_leaves(run()) if isinstance(own, torch.Tensor)]
            for target, result in zip(targets, results, strict=True):
                target.copy_(result)

        self.enqueue(str(func), fill, [*flat, *pytree.tree_leaves(made)])
        return made

    def _filled(self, host: torch.Tensor) -> CudaTensor:
        made = self.empty(host)
        made.host.copy_(host)
        return made

    def _on_host(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The arguments as the CPU takes them; numbers that lie on the host are read now."""

        def convert(own: Any) -> Any:
            if isinstance(own, CudaTensor):
                return own.host
            if isinstance(own, torch.device):
                return HOST
            if not isinstance(own, torch.Tensor):
                return own
            if own.dim() and func not in _INDEXING:
                raise _two_devices(func)
            if own.dim():
                self.device.wait("index on the host")
            return own.clone()

        converted, named = pytree.tree_map(convert, (tuple(args), dict(kwargs)))
        named.pop("pin_memory", None)
        return converted, named

    def _shapes(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The results as meta tensors; raises what is wrong with the arguments.  None where it depends on data."""

        def convert(own: Any) -> Any:
            if isinstance(own, torch.Tensor) and (isinstance(own, CudaTensor) or own.dim()):
                return torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=META)
            if isinstance(own, torch.Generator):
                return None
            return META if isinstance(own, torch.device) else own

        if self._depends_on_data(func, pytree.tree_leaves((args, kwargs))):
            return None
        converted, named = pytree.tree_map(convert, (tuple(args), dict(kwargs)))
        named.pop("pin_memory", None)
        try:
            return func(*converted, **named)
        except NotImplementedError:  # torch has no meta kernel for it
            return None

    def _depends_on_data(self, func: Any, flat: Sequence[Any]) -> bool:
        if func in _INDEXING:
            return any(isinstance(own, torch.Tensor) and own.dtype in (torch.bool, torch.uint8) for own in flat[1:])
        return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags

    # What moves numbers.

    def _to(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = {argument.name: value for argument, value in _bound(func, args, kwargs)}
        own = given.pop("self")
        other = given.pop("other", None)
        if other is not None:
            given |= {"device": other.device, "dtype": other.dtype}
        copy, device, dtype = given.pop("copy", False), given.pop("device", None), given.get("dtype")
        now = own.device
        device = now if device is None else CUDA if device.type in ("cuda", "meta") else device
        if not copy and device == now and dtype in (None, own.dtype) and given.get("memory_format") is None:
            return own
        return self._to_copy(own, device=device, **given)

    def _to_copy(
        self,
        own: torch.Tensor,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        **layout: Any,
    ) -> torch.Tensor:
        dtype, target = dtype or own.dtype, HOST if device == HOST else CUDA
        if target == HOST:
            if not non_blocking:
                self.device.wait("copy to the host")
                return _host(own).to(dtype, copy=True)
            made = self.pin(torch.empty_like(_host(own), dtype=dtype))
            return self._copy_(made, own, non_blocking=True)
        if isinstance(own, CudaTensor):
            layout.pop("pin_memory", None)
            return self._compute(aten._to_copy.default, (own,), {"dtype": dtype, **layout})
        return self._copy_(self.empty(torch.empty_like(own, dtype=dtype)), own, non_blocking=non_blocking)

    def _copy_(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(target, CudaTensor) and isinstance(source, CudaTensor):
            return self._compute(aten.copy_.default, (target, source), {})
        if isinstance(target, CudaTensor):
            self._upload(target, source, asynchronous=non_blocking and self.is_pinned(source))
        elif non_blocking and self.is_pinned(target):
            poison_values(target)
            host = _host(source)
            self.enqueue("copy to pinned memory", lambda: target.copy_(host), [source])
        else:
            self.device.wait("copy to the host")
            target.copy_(_host(source))
        return target

    def _upload(self, target: CudaTensor, source: torch.Tensor, *, asynchronous: bool) -> None:
        host, as_launched = target.host, source.clone()
        captured = self.device.capturing is not None
        if not asynchronous:
            self.device.wait("copy from pageable memory")
            host.copy_(as_launched)
            return

        def copy() -> None:
            # A graph reads what is there when it is replayed.
            if not captured and not torch.equal(_bytes(source), _bytes(as_launched)):
                raise RuntimeError("pinned memory was written to before the device had read it")
            host.copy_(source)

        self.enqueue("copy from pinned memory", copy, [target])

    def _item(self, own: CudaTensor) -> Any:
        self.device.wait("item")
        return own.host.item()

    def _equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        if not (isinstance(one, CudaTensor) and isinstance(other, CudaTensor)):
            raise _two_devices(aten.equal.default)
        self.device.wait("equal")
        return torch.equal(one.host, other.host)

    def _mm(
        self, one: torch.Tensor, other: torch.Tensor, out_dtype: torch.dtype, **named: torch.Tensor
    ) -> torch.Tensor:
        """torch has it on GPUs only."""
        if not (isinstance(one, CudaTensor) and isinstance(other, CudaTensor)):
            raise _two_devices(aten.mm.dtype)
        if one.dtype not in (torch.float16, torch.bfloat16) or out_dtype != torch.float32:
            raise RuntimeError("out_dtype must be the same as input dtype or fp32 for fp16/bf16 inputs")
        shape = torch.empty(one.shape[0], other.shape[1], dtype=out_dtype, device=META)
        out = named.get("out")
        made = self.empty(shape) if out is None else out
        if made.shape != shape.shape or made.dtype != out_dtype:
            raise RuntimeError(f"out is {made}, expected {tuple(shape.shape)} of {out_dtype}")
        left, right, target = one.host, other.host, _host(made)
        self.enqueue("mm", lambda: target.copy_(left.float() @ right.float()), [one, other, made])
        return made


def _host(own: torch.Tensor) -> torch.Tensor:
    if not isinstance(own, CudaTensor):
        raise TypeError(f"{own} is not on the simulated GPU")
    return own.host


def poison_values(host: torch.Tensor) -> None:
    """Fills a host tensor with what nothing should read."""
    if host.is_contiguous() and host.untyped_storage().nbytes() == host.nbytes:
        poison(host.untyped_storage(), host.dtype)


def _is_on_device(argument: Any) -> bool:
    """Whether an argument is a tensor of the device, or the device; which is META to C++ code that makes new ones."""
    return isinstance(argument, CudaTensor) or (
        isinstance(argument, torch.device) and argument.type in (CUDA.type, META.type)
    )


def _bound(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The schema's arguments with their values, as far as they are given."""
    arguments = func._schema.arguments
    named = [(argument, kwargs[argument.name]) for argument in arguments[len(args) :] if argument.name in kwargs]
    return [*zip(arguments, args, strict=False), *named]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_view(func: Any) -> bool:
    aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    returned = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
    return bool(aliases and returned) and not any(alias.is_write for alias in aliases)


def _two_devices(func: Any) -> RuntimeError:
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in {func})"
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # Of a new one, because a contiguous tensor of one number may have any stride.
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).view(-1).view(torch.uint8)
