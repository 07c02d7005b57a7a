"""Count kernel launches, bytes read and written, and bytes of live tensors, from the operations that torch dispatches."""

import weakref
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import kernel_operator

# Registered operator -> the function that launches its kernels.
OPERATORS = getattr(torch.ops, kernel_operator.NAMESPACE)
KERNEL_OPERATORS = {
    OPERATORS.focused_attention.default: kernel_operator.run_forward,
    OPERATORS.focused_attention_backward.default: kernel_operator.run_backward,
}
# Names of operations that launch no kernel.
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh"}
# Names of operations that read only the shape and type of their argument.
CONSTANTS = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}
# Names of operations that write their first argument without reading it.
OVERWRITES = {"copy_", "fill_", "zero_"}


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor; an expanded dimension counts once."""
    size = tensor.element_size()
    for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= side if stride else 1
    return size if tensor.numel() else 0


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class TrafficCounter(TorchDispatchMode):
    """Count kernel launches and the bytes that they read and write, assuming one pass over each tensor per kernel.

    Views, allocations and traffic within a kernel, such as accesses to the workspace of a convolution, are not counted.
    """

    def __init__(self):
        super().__init__()
        self.num_kernels = self.bytes_read = self.bytes_written = 0

    @property
    def num_bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in KERNEL_OPERATORS:
            return self._count_launches(KERNEL_OPERATORS[function], args)
        out = function(*args, **kwargs)
        name, schema = function.overloadpacket.__name__, function._schema
        if name in ALLOCATIONS:
            return out
        arguments = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        written_names = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        # Written arguments that are keyword-only, such as ``out``, are not read.
        unread_names = {a.name for a in schema.arguments if a.name in written_names and (a.kwarg_only or name in OVERWRITES)}
        inputs = [leaf for key, value in arguments.items() if key not in unread_names for leaf in tree_leaves(value)]
        inputs = [leaf for leaf in inputs if isinstance(leaf, Tensor) and name not in CONSTANTS]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not written_names and results and all(_storage_id(result) in set(map(_storage_id, inputs)) for result in results):
            return out  # a view
        self.num_kernels += 1
        distinct_inputs = {(_storage_id(leaf), leaf.storage_offset(), leaf.shape, leaf.stride()): leaf for leaf in inputs}
        self.bytes_read += sum(map(num_bytes, distinct_inputs.values()))
        self.bytes_written += sum(map(num_bytes, results))
        return out

    def _count_launches(self, operator: Callable, args: tuple):
        """Run the host code of an operator of ``models/kernel_operator.py``; count its launches instead of executing them."""

        def count(kernel: str, num_programs: int, inputs: list, outputs: list, *_) -> None:
            self.num_kernels += 1
            self.bytes_read += sum(num_bytes(tensor) for tensor in inputs if tensor is not None)
            self.bytes_written += sum(num_bytes(tensor) for tensor in outputs if tensor is not None)

        with mock.patch.object(kernel_operator, "launch", count), self:  # also counts the torch operations of the host code
            return operator(*args)


class MemoryCounter(TorchDispatchMode):
    """Count current and peak bytes of the tensors that operations create. Workspaces within operations are not counted."""

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self._counted_storages: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        input_storages = {_storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage_id(leaf) not in input_storages | self._counted_storages:
                self._watch(leaf.untyped_storage())
        self.peak = max(self.peak, self.current)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._counted_storages.add(key)
        self.current += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._counted_storages.discard(key)
        self.current -= size
