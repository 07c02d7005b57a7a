"""Count kernel launches, bytes read and written, and bytes of live tensors. The counts do not depend on the device."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations by name.
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh"}
CONSTANTS = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}  # they do not read their argument
OVERWRITES = {"copy_", "fill_", "zero_"}  # they write their first argument without reading it


def num_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor; an expanded dimension counts once."""
    count = tensor.element_size()
    for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= side if stride else 1
    return count if tensor.numel() else 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class TrafficCounter(TorchDispatchMode):
    """Count kernel launches and the bytes that they read and write, assuming one pass over each tensor per kernel.

    Views and allocations are not counted. Traffic within a kernel, such as that of a convolution's workspace, is not counted.
    """

    def __init__(self):
        super().__init__()
        self.num_kernels = self.bytes_read = self.bytes_written = 0

    @property
    def num_bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name, schema = function.overloadpacket.__name__, function._schema
        if name in ALLOCATIONS:
            return out
        arguments = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        unread = {a.name for a in schema.arguments if a.name in written and (a.kwarg_only or name in OVERWRITES)}
        read = [leaf for key, value in arguments.items() if key not in unread for leaf in tree_leaves(value)]
        read = [leaf for leaf in read if isinstance(leaf, Tensor) and name not in CONSTANTS]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not written and results and all(_storage(result) in set(map(_storage, read)) for result in results):
            return out  # a view
        self.num_kernels += 1
        distinct = {(_storage(leaf), leaf.storage_offset(), leaf.shape, leaf.stride()): leaf for leaf in read}
        self.bytes_read += sum(map(num_bytes, distinct.values()))
        self.bytes_written += sum(map(num_bytes, results))
        return out


class MemoryCounter(TorchDispatchMode):
    """Count current and peak bytes of the tensors that operations create. Workspaces within operations are not counted."""

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf) not in known | self._known:
                self._watch(leaf.untyped_storage())
        self.peak = max(self.peak, self.current)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.current += size
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size
