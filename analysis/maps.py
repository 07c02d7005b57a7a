"""Attention maps of a model, recomputed from the queries and keys of its attention modules.

Shapes: G groups of tokens that attend to each other (one group per image, or per window or stripe of an image), N queries,
M keys, H heads, C channels, D channels per head.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models import cswin, pvt, swin
from models.compared_attention import (
    COMPARED_ATTENTIONS,
    SoftmaxAttention,
    efficient_attention,
    relu_attention,
    softmax_attention,
)
from models.linear_attention import FocusedLinearAttention, mean_weights
from models.plain_attention import EPS, features, focus, linear_attention, split_heads, unpack
from models.positions import resize_grid
from models.windows import partition_windows

SOFTMAX_MODULES = (SoftmaxAttention, cswin.SoftmaxStripes, pvt.SoftmaxAttention)
# Forms of attention: attention functions that are compared on the same queries and keys.
FORMS = ("softmax", "linear", "focused", "efficient")


@dataclass(frozen=True, eq=False)
class Attention:
    """Inputs and output of one attention module in a forward pass.

    Args:
        name: name of the module in the model.
        q: (G, H, N, D).
        k, v: (G, H, M, D). The rows of v at masked keys are zero.
        grid, key_grid: height and width of the token maps of queries and keys.
        key_mask: (G, M), False for padding; None if no key is padding. Linear attention only.
        bias: added to the similarities, broadcastable to (G, H, N, M); None for no bias. Softmax attention only.
        output: (G, N, C), before the output projection. For CSwin's softmax attention, it excludes CSwin's depthwise
            convolution of v (LePE).
        map_grid: height and width of the block's whole token map, before it is divided into windows or stripes.
        num_prefix_tokens: number of tokens before the map tokens; 1 in DeiT (the class token), 0 in other models.
    """

    name: str
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int]
    key_grid: tuple[int, int]
    output: Tensor
    map_grid: tuple[int, int]
    num_prefix_tokens: int = 0
    key_mask: Tensor | None = None
    bias: Tensor | None = None

    @property
    def is_linear(self) -> bool:
        return isinstance(self.module, FocusedLinearAttention)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """Attention weights without the convolution: (G, H, N, M); (G, C, N, M) for ``hydra``, where each channel is a head."""
        if self.is_linear:
            return linear_weights(self.module, self.q, self.k, self.key_grid, self.key_mask)
        similarity = self.q @ self.k.transpose(-2, -1) * self.q.shape[-1] ** -0.5
        return (similarity if self.bias is None else similarity + self.bias).softmax(dim=-1)

    @torch.no_grad()
    def convolution(self, queries: Sequence[int] | None = None, *, mean: bool = False) -> Tensor | None:
        """Weights (C, R, M) of the depthwise convolution of v for R queries; None if the module has no convolution.

        For CSwin's linear attention, the weights include those of LePE.

        Args:
            queries: indices of the R queries, where prefix tokens come first; all queries by default.
            mean: return the mean over channels, (1, R, M).
        """
        kernel = self.module.local_filter()[0] if self.is_linear else None
        if kernel is None:
            return None
        kernel = kernel.mean(dim=0, keepdim=True) if mean else kernel
        return convolution_matrix(kernel, self.grid, self.k.shape[2], queries=queries, num_prefix_tokens=self.num_prefix_tokens)

    @torch.no_grad()
    def weights_of(self, form: str) -> Tensor:
        """Weights (G, H, N, M) of another form of attention for the same queries and keys, without masks or biases.

        Args:
            form: one of ``FORMS``. ``linear`` and ``focused`` apply relu to q and k; ``focused`` has focusing factor 3 and no
                learned scale.

        Raises:
            ValueError: the form is unknown.
        """
        return compare(form, self.q, self.k)


def linear_weights(
    module: FocusedLinearAttention, q: Tensor, k: Tensor, key_grid: tuple[int, int], key_mask: Tensor | None = None
) -> Tensor:
    """Attention weights of a module of any kind, without its convolution; zero for masked keys.

    Args:
        q, k: (G, H, N, D) and (G, H, M, D).
        key_grid: height and width of the token map of the keys.
        key_mask: (G, M), False for masked keys.

    Returns:
        (G, H, N, M); (G, C, N, M) for ``hydra``, where each channel is a head.
    """
    mask = None
    if key_mask is not None:  # if all keys are masked, the module attends to all of them, with values of zero
        mask = (key_mask | ~key_mask.any(dim=1, keepdim=True))[:, None, :, None]
    if module.kind == "focused":
        weights = focused_weights(module, q, k, key_grid, mask)
    elif (compared := COMPARED_ATTENTIONS[module.kind]).single_head:
        q, k = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (q, k))
        one_hot = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)[:, None, None, :, None]
        weights = compared.function(q, k, one_hot, mask)[:, :, 0].permute(1, 3, 2, 0)  # from (M, G, 1, N, C)
    else:
        weights = compared.function(q, k, one_hot_values(k), mask)
    return weights if key_mask is None else weights * key_mask[:, None, None]


def focused_weights(
    module: FocusedLinearAttention, q: Tensor, k: Tensor, key_grid: tuple[int, int], mask: Tensor | None
) -> Tensor:
    """Similarities of the features of queries and keys (eq. 6), divided by their mean over the unmasked keys plus EPS."""
    scale = F.softplus(module.scale)
    position = resize_grid(module.positional_encoding, module.key_grid, key_grid, module.num_prefix_tokens)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.transpose(1, 2).flatten(2).to(dtype) for x in (q, k))  # the norms of the features are over all heads
    q, k = (split_heads(features(x, scale, module.power), module.num_heads) for x in (q, k + position))
    weights = q @ k.transpose(-2, -1)
    weights = weights / k.shape[-2] if mask is None else weights * mean_weights(mask, k.dtype).transpose(-2, -1)
    return weights / (weights.sum(dim=-1, keepdim=True) + EPS)


def one_hot_values(k: Tensor) -> Tensor:
    """Values (..., M, M) for which the output of an attention function equals its weights."""
    return torch.eye(k.shape[-2], dtype=k.dtype, device=k.device).expand(*k.shape[:-1], -1)


def compare(form: str, q: Tensor, k: Tensor, *, power: float = 3) -> Tensor:
    """Attention weights (..., N, M) of one of ``FORMS`` for q (..., N, D) and k (..., M, D).

    ``focused`` applies the focused function (eq. 6) to each head separately, not to all channels as ``FocusedLinearAttention``
    does.

    Args:
        power: focusing factor of ``focused``.

    Raises:
        ValueError: the form is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: choose one of {', '.join(FORMS)}")
    one_hot = one_hot_values(k)
    if form == "softmax":
        return softmax_attention(q, k, one_hot)
    if form == "efficient":
        return efficient_attention(q, k, one_hot)
    if form == "linear":
        return relu_attention(q, k, one_hot)
    return linear_attention(focus(F.relu(q) + EPS, power), focus(F.relu(k) + EPS, power), one_hot)


def convolution_matrix(
    kernel: Tensor,
    grid: tuple[int, int],
    num_keys: int,
    *,
    queries: Sequence[int] | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """Express a depthwise convolution of a token map as one matrix per channel: its output is matrix @ tokens + bias.

    Args:
        kernel: (channels, 1, side, side).
        grid: height and width of the token map of the queries.
        num_keys: number M of value tokens, including prefix tokens. If their map is smaller than ``grid``, the matrix includes
            the linear interpolation of the flattened value tokens to the size of ``grid``.
        queries: indices of R queries, where prefix tokens come first; all queries by default.

    Returns:
        (channels, R, M). Rows and columns of prefix tokens are zero.
    """
    height, width = grid
    queries = range(num_prefix_tokens + height * width) if queries is None else queries
    rows = torch.zeros(len(queries), len(kernel), height * width, dtype=kernel.dtype, device=kernel.device)
    for row, query in enumerate(queries):
        if query >= num_prefix_tokens:
            rows[row, :, query - num_prefix_tokens] = 1
    # The transpose of a convolution maps an output token to the input tokens that it is computed from.
    padding = kernel.shape[-1] // 2
    maps = F.conv_transpose2d(rows.unflatten(-1, grid), kernel, padding=padding, groups=len(kernel)).flatten(2)
    if (num_values := num_keys - num_prefix_tokens) != height * width:
        eye = torch.eye(num_values, dtype=kernel.dtype, device=kernel.device).unsqueeze(0)
        maps = maps @ F.interpolate(eye, size=height * width, mode="linear", align_corners=False)[0].T
    return F.pad(maps.transpose(0, 1), (num_prefix_tokens, 0))


# --- Capture


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules of a model by name, from the first block to the last."""
    kinds = (FocusedLinearAttention, *SOFTMAX_MODULES)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def block_name(name: str) -> str:
    """Name of the block that contains an attention module."""
    return name.split(".attn")[0]


@dataclass
class _Recorder(TorchFunctionMode):
    """Records the arguments and result of ``F.scaled_dot_product_attention`` while a chosen softmax module runs."""

    attentions: list[Attention] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.running: tuple[str, nn.Module, dict] | None = None
        self.map_grid = (0, 0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.running is not None:
            self.record(out, *args, **(kwargs or {}))
        return out

    def record(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_options) -> None:
        name, module, grids = self.running
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
        if q.shape[1] != module.num_heads:  # windows are passed as heads, see SoftmaxAttention.attend
            windows_and_heads = (-1, module.num_heads)
            q, k, v, out = (x.unflatten(1, windows_and_heads).flatten(0, 1) for x in (q, k, v, out))
            attn_mask = attn_mask.unflatten(1, windows_and_heads).flatten(0, 1)
            attn_mask = attn_mask.repeat(len(q) // len(attn_mask), 1, 1, 1)
        out = out.transpose(1, 2).flatten(2)
        self.attentions.append(Attention(name, module, q, k, v, output=out, map_grid=self.map_grid, bias=attn_mask, **grids))


def _grid_arguments(module: nn.Module, inputs: tuple) -> dict:
    """Sizes of a softmax module's token maps, as keyword arguments of ``Attention``.

    Args:
        inputs: positional arguments of the module's forward pass.
    """
    if isinstance(module, swin.SoftmaxWindowAttention):
        return {"grid": inputs[1], "key_grid": inputs[1]}
    if isinstance(module, cswin.SoftmaxStripes):
        stripe, _ = module.layout(tuple(inputs[0].shape[1:3]))
        return {"grid": stripe, "key_grid": stripe}
    if isinstance(module, pvt.SoftmaxAttention):
        grid = tuple(inputs[0].shape[1:3])
        return {"grid": grid, "key_grid": pvt.reduce_grid(grid, module.reduction)}
    return {"grid": inputs[1], "key_grid": inputs[1], "num_prefix_tokens": 1}  # DeiT, with a class token


@contextmanager
def capture(model: nn.Module, names: Sequence[str] | None = None) -> Iterator[list[Attention]]:
    """Record inputs and outputs of a model's attention modules within the ``with`` block.

    Args:
        names: module names, see ``attention_modules``; all by default.

    Yields:
        A list to which each forward pass appends one ``Attention`` per module, in the order of execution.

    Raises:
        ValueError: an entry of ``names`` is not the name of an attention module.
    """
    modules = attention_modules(model)
    if unknown := [name for name in names or () if name not in modules]:
        raise ValueError(f"{unknown[0]}: not an attention module; choose among {', '.join(modules)}")
    chosen = {name: modules[name] for name in names or modules}
    recorder, handles, wrapped_modules = _Recorder(), [], []

    def record_map_grid(_block: nn.Module, inputs: tuple) -> None:
        recorder.map_grid = tuple(inputs[0].shape[1:3]) if inputs[0].ndim == 4 else inputs[1]

    def start_module(name: str, module: nn.Module, inputs: tuple) -> None:
        recorder.running = name, module, _grid_arguments(module, inputs)

    def stop_module(*_arguments: object) -> None:
        recorder.running = None

    for block in {block_name(name): None for name in chosen}:
        handles.append(model.get_submodule(block).register_forward_pre_hook(record_map_grid))
    for name, module in chosen.items():
        if isinstance(module, FocusedLinearAttention):
            module.attend = functools.partial(_record_linear, recorder, name, module, module.attend)
            wrapped_modules.append(module)
        else:
            handles.append(module.register_forward_pre_hook(functools.partial(start_module, name)))
            handles.append(module.register_forward_hook(stop_module))
    try:
        with recorder:
            yield recorder.attentions
    finally:
        for handle in handles:
            handle.remove()
        for module in wrapped_modules:
            del module.attend  # restores the method of the class


def _record_linear(
    recorder: _Recorder,
    name: str,
    module: FocusedLinearAttention,
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    grid: tuple[int, int] | None = None,
    key_grid: tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    out = attend(q, k, v, grid=grid, key_grid=key_grid, key_mask=key_mask)
    q, k, v = unpack(q, k, v)
    grid, key_grid = module.grids_of_call(grid, key_grid)
    if key_mask is not None:
        v = v * key_mask.unsqueeze(-1)
    heads = [x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
    recorder.attentions.append(
        Attention(
            name,
            module,
            *heads,
            grid=grid,
            key_grid=key_grid,
            output=out,
            map_grid=recorder.map_grid,
            num_prefix_tokens=module.num_prefix_tokens,
            key_mask=key_mask,
        )
    )
    return out


# --- Positions on the token map


def token_positions(model: nn.Module, attention: Attention) -> Tensor:
    """Positions of the tokens of each window or stripe on the block's token map.

    Returns:
        (windows, N) indices into the flattened map, -1 for padding. Prefix tokens are omitted.
    """
    block, grid = model.get_submodule(block_name(attention.name)), attention.map_grid
    height, width = grid
    positions = torch.arange(1, height * width + 1).view(1, height, width, 1)  # plus 1, so that 0 marks padding
    shift, size = (0, 0), grid
    if isinstance(block, swin.SwinBlock):
        size, shift, padded = block.layout(grid)
    elif isinstance(block, cswin.Block):
        size, padded = attention.module.layout(grid)
    else:
        padded = grid
    positions = F.pad(positions, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
    positions = positions.roll((-shift[0], -shift[1]), dims=(1, 2))
    return partition_windows(positions, size)[..., 0] - 1
