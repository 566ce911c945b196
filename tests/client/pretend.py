"""A device for machines that have but a CPU: its tensors hide CPU tensors, and mix with those as
little as a GPU's do.

It takes the place that PyTorch leaves free for others' devices (PrivateUse1), so all that
PyTorch decides by a tensor's device it decides here: what is moved, which generator is asked,
which optimizer is fused, where a backward pass runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import (
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
_ATEN = torch.ops.aten
_INDEXING = {
    _ATEN.index,
    _ATEN.index_put,
    _ATEN.index_put_,
    _ATEN._index_put_impl_,
}
"""What takes indices of the CPU for a tensor of a GPU, but not the other way round."""


_new_tensor = torch.tensor


class _Module:
    """``torch.pretend``, as far as PyTorch asks for it."""

    free = 2**30

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.free, 2 * self.free


class Pretended(torch.Tensor):
    """A tensor on the device."""

    hidden: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> Pretended:
        about = real.size(), real.stride(), real.storage_offset()
        with torch.inference_mode(
            False
        ):  # where it is on, a view of a tensor from outside of it may not be a new one
            device = torch.device(NAME, 0)
            self = torch.Tensor._make_wrapper_subclass(
                cls, *about, dtype=real.dtype, device=device
            )
        self.hidden = real
        return self

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, *args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Any:
        # PyTorch would make tensors of lists, on the device, below of where this one is.
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(
            tuple(
                torch.tensor(part) if isinstance(part, list) else part
                for part in parts
            )
        )

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                "can't convert a tensor on another device to numpy; use Tensor.cpu()"
            )
        return self.detach().cpu().numpy()


def _compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Do an operation on the tensors within."""
    if (
        func is _ATEN._has_compatible_shallow_copy_type.default
    ):  # asked for by ``tensor.data = ...``
        return True
    tensors = [
        leaf
        for leaf in tree_leaves((args, kwargs))
        if isinstance(leaf, torch.Tensor)
    ]
    given = {
        id(tensor.hidden if isinstance(tensor, Pretended) else tensor): tensor
        for tensor in tensors
    }
    together = tensors
    if func.overloadpacket in _INDEXING and isinstance(args[0], Pretended):
        together = [
            leaf
            for leaf in (args[0], *args[2:])
            if isinstance(leaf, torch.Tensor)
        ]
    mixed = {isinstance(tensor, Pretended) for tensor in together if tensor.dim()}
    if len(mixed) > 1 and func.overloadpacket is not _ATEN.copy_:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device"
        )
    if (
        isinstance(generator := kwargs.get("generator"), torch.Generator)
        and generator.device.type == "cpu"
    ):
        raise RuntimeError(
            f"{func}: expected a generator of the device, found one of the CPU"
        )
    outward = kwargs.get("device") is not None and kwargs["device"].type == "cpu"
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map_only(
        Pretended, lambda tensor: tensor.hidden, (args, kwargs)
    )
    result = func(*args, **kwargs)
    if outward:
        return result
    for tensor in (
        tensors
    ):  # where an operation changed a tensor's shape, so does what hides it
        if isinstance(tensor, Pretended) and _looks(tensor) != _looks(
            tensor.hidden
        ):
            tensor.data = Pretended(tensor.hidden)
    # What was given comes back as what it was: operations in place return their argument.
    return tree_map_only(
        torch.Tensor,
        lambda tensor: (
            given[id(tensor)] if id(tensor) in given else Pretended(tensor)
        ),
        result,
    )


def _looks(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> torch.Tensor:
    """``torch.tensor``, which cannot make a tensor on a device that is written in Python."""
    tensor = _new_tensor(data, **kwargs)
    return tensor if device is None else tensor.to(device)


def set_up() -> torch.device:
    """Have PyTorch know the device from now on; once a process."""
    if not hasattr(torch, NAME):
        _setup_privateuseone_for_python_backend(NAME, _Module())
        library = torch.library.Library("_", "IMPL")
        library.fallback(_compute, "PrivateUse1")
        set_up.library = library  # type: ignore[attr-defined]  # it is undone when nobody holds it
        torch.tensor = _tensor
        # ``parameter.data = ...``, which modules are moved by otherwise, would leave the hidden
        # tensor behind.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
    return torch.device(NAME, 0)
