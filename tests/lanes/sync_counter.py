"""Count what would make the host wait for a device: reads of values, and operations whose shape depends on values.

Works on CPU tensors and without a GPU. Two modes, because not every read passes the dispatcher. What hides inside a C++
composite (an `.item()` in ATen's own code) is not seen here; running on the meta device finds that, see `meta_copy`.
Private interfaces used (torch 2.11 and 2.13): `torch.utils._python_dispatch.TorchDispatchMode`, `OpOverload._op_dk`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Operations that read values on the host, or need a value to know the shape of their result.
_READS = frozenset(
    {
        "_local_scalar_dense",
        "is_nonzero",
        "item",
        "equal",
        "nonzero",
        "nonzero_numpy",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "repeat_interleave",
        "is_pinned",
    }
)
# Methods that copy to the host without an operation of their own when the tensor is on the CPU already.
_COPIES = {torch.Tensor.cpu: "cpu()", torch.Tensor.numpy: "numpy()", torch.Tensor.tolist: "tolist()"}


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[-1]
        if name in _READS:
            self.found[name] += 1
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.found[f"{name} with a boolean mask"] += 1
        if func.namespace == "aten":
            return func(*args, **(kwargs or {}))
        # The implementation of an operator in Python runs with this mode off, so what it does would not be seen. Its
        # CPU kernel is called directly instead, with the mode on.
        with self:
            return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _COPIES:
            self.found[_COPIES[func]] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def count_host_reads() -> Iterator[Counter[str]]:
    """Count host reads inside the block, by operation, also inside operators that are implemented in Python (on CPU
    tensors). The backward pass counts too when it runs inside.
    """
    found: Counter[str] = Counter()
    with _Called(found), _Dispatched(found):
        yield found


def meta_copy(values: Any) -> Any:
    """Replace every tensor in a nest of tuples, lists and dicts by one without values: reading from it raises."""
    return tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), values)
