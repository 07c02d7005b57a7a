"""The base class of the backbones, with timm's interface, and what their constructors share.

Shapes: B images, N tokens, C channels, H x W a token map.
"""

import functools
import itertools
import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from .blocks import Stage, check_image_size, check_images, create_classifier
from .positions import GRIDS_KEY, PositionTable, grid_at, recorded_grid, resize_grid, square_grid, stored_grids
from .windows import to_pair

logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """Base class of the classifiers (feature extractor and head), with the interface of timm's models.

    timm's FX feature extractor (``feature_cls="fx"``) treats the blocks as leaf modules. ``torch.fx.symbolic_trace`` and
    ``torch.jit.script`` do not work, because Python code computes windows, padding and masks from the size of the map; use
    ``torch.export`` instead. An export with a dynamic height or width is specialised to the code branches that its example
    image takes, and raises an error for sizes that take other branches.

    A subclass sets ``num_features`` (channels of the last map), ``norm`` and ``feature_info`` (``num_chs``, ``reduction``,
    ``module`` of every map), implements ``forward_stages``, ``stage_grids``, ``stage_blocks``, ``drop_stages`` and
    ``group_matcher``, and calls ``build_head`` at the end of its constructor.

    Args of every subclass, besides its own:
        img_size: native input size in pixels, an integer or (height, width). For images of other sizes, the model resizes its
            position tables by bicubic interpolation.
        global_pool: "avg" for the mean of the token map, or "" for no pooling.
        attn_type: see ``parse_attention_types``.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout of attention projections and MLPs.
        attn_drop_rate: dropout of the attention matrix of softmax blocks; linear blocks have no attention matrix.
        drop_path_rate: stochastic-depth rate of the last block; it increases linearly from 0 in the first block.
        linear: options of ``FocusedLinearAttention``: focusing_factor, kernel_size, kind, focusing, rank_restoration, backend.
        device, dtype: device and data type of the parameters; torch's defaults if None.

    Raises:
        ValueError: ``img_size`` is too small, an option is invalid, or ``attn_drop_rate`` is above 0 without softmax blocks.

    Attributes:
        output_fmt: layout of the features inside the model, as seen by forward hooks.
        global_pools: accepted values of ``global_pool``; "" disables pooling.
        first_conv: name of the model's first convolution.
        unused_entries: regular expression for the names of state-dict entries that the paper's code saves but never uses.
    """

    output_fmt = "NHWC"
    global_pools: tuple[str, ...] = ("avg", "")
    first_conv: str
    unused_entries = re.compile("(?!)")  # matches no name
    grad_checkpointing = False
    features_frozen = False

    num_features: int
    feature_info: list[dict]
    norm: nn.Module
    head_drop: nn.Module
    head: nn.Module

    def __init__(self, *, in_chans: int, num_classes: int, global_pool: str):
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = self.check_global_pool(global_pool)
        self.register_state_dict_post_hook(_record_grids)
        self.register_load_state_dict_pre_hook(_adapt_before_loading)

    def build_head(self, drop_rate: float, **factory) -> None:
        """Create the dropout and the classifier; ``num_features`` must be set. ``factory``: its device and dtype."""
        self.head_drop = nn.Dropout(drop_rate)
        self.head = create_classifier(self.num_features, self.num_classes, **factory)

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    # Implemented by subclasses.

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the map of each stage before the final norm. (B, 3, H, W) -> (B, h, w, C)."""
        raise NotImplementedError

    def stage_grids(self, img_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of every stage's token map for an image size in pixels."""
        raise NotImplementedError

    def stage_blocks(self) -> list[Iterable[nn.Module]]:
        """The blocks of every stage, in the order of ``stage_grids``."""
        raise NotImplementedError

    def drop_stages(self, num_kept: int) -> None:
        """Remove the stages after the first ``num_kept``."""
        raise NotImplementedError

    # Input size.

    @functools.cached_property
    def min_img_size(self) -> int:
        """Smallest supported image side in pixels; below it, a stage would have no tokens or no keys."""

        def fits(side: int) -> bool:
            maps = zip(self.stage_grids((side, side)), self.min_map_sides(), strict=True)
            return all(min(grid) >= smallest for grid, smallest in maps)

        return next(side for side in itertools.count(1) if fits(side))

    def min_map_sides(self) -> list[int]:
        """Minimum side of every stage's token map, in the order of ``stage_grids``."""
        return [1] * len(self.stage_grids((1, 1)))

    def native_grids(self, img_size: int | Iterable[int]) -> list[tuple[int, int]]:
        """Check a native image size and return its ``stage_grids``.

        Raises:
            ValueError: a side is smaller than ``min_img_size``.
        """
        size = to_pair(img_size, "img_size")
        check_image_size(size[0], size[1], self.min_img_size)
        return self.stage_grids(size)

    def set_input_size(self, img_size: int | Iterable[int]) -> None:
        """Change the native input size in place, and resize position tables (bicubic).

        The logits for images of the new size do not change, because forward passes resize tables in the same way. Parameters of
        resized tables are new objects, so create the optimizer afterwards.

        Args:
            img_size: pixels, an integer or (height, width).

        Raises:
            ValueError: a side is smaller than ``min_img_size``.
        """
        for blocks, grid in zip(self.stage_blocks(), self.native_grids(img_size), strict=True):
            for module in itertools.chain.from_iterable(block.modules() for block in blocks):
                if hasattr(module, "set_map_size"):
                    module.set_map_size(grid)

    # Forward passes.

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images. (B, 3, H, W), normalised -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map after the final norm. (B, 3, H, W), normalised -> (B, h, w, C).

        Raises:
            ValueError: x does not have four dimensions, or a side is smaller than ``min_img_size``.
        """
        check_images(x, self.min_img_size)
        for features in self.forward_stages(x):
            x = features  # keep only the last map, so that earlier ones are freed
        return self.norm(x)

    def resized_positions(
        self, table: Tensor, native: tuple[int, int], grid: tuple[int, int], num_prefix_tokens: int = 0
    ) -> Tensor:
        """Apply ``resize_grid`` in a forward pass.

        Subclasses call this method, not ``resize_grid``: timm's FX extractor excludes ``resize_grid`` from tracing only if it
        is called in a source file that defines the ``forward`` of a traced module, as this file does.
        """
        return resize_grid(table, native, grid, num_prefix_tokens)

    def pool(self, x: Tensor) -> Tensor:
        """Mean over the token map. (B, h, w, C) -> (B, C); unchanged if ``global_pool`` is ""."""
        return x.mean(dim=(1, 2)) if self.global_pool else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify. (B, h, w, C) -> (B, num_classes), or (B, C) with ``pre_logits``.

        With ``global_pool`` "" the head is applied to every token: (B, h, w, num_classes) or (B, h, w, C).
        """
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the selected stages, with the interface of timm's hierarchical models.

        Args:
            indices: indices into ``feature_info``; an integer n selects the last n maps, None selects all.
            norm: apply the final norm to the last stage's map, but not to other maps, whose numbers of channels differ.
            stop_early: skip the stages after the last selected one.
            output_fmt: NCHW or NHWC.
            intermediates_only: return only the maps.

        Returns:
            The output of the last computed stage, after the final norm if that stage is the model's last, and the selected maps
            in the order of the stages; with ``intermediates_only``, only the maps.

        Raises:
            ValueError: an index out of range, an unknown format, or an image side smaller than ``min_img_size``.
        """
        check_output_fmt(output_fmt, ("NCHW", "NHWC"))
        selected = self.take_indices(indices)
        features, maps = self.run_stages(x, selected, stop_early)
        last = len(self.feature_info) - 1
        if norm and max(selected) == last:
            maps[-1] = self.norm(maps[-1])
        if output_fmt == "NCHW":
            maps = [features_map.permute(0, 3, 1, 2).contiguous() for features_map in maps]
        if intermediates_only:
            return maps
        return (features if stop_early and max(selected) < last else self.norm(features)), maps

    def run_stages(self, x: Tensor, selected: Sequence[int], stop_early: bool) -> tuple[Tensor, list[Tensor]]:
        """Outputs, before the final norm, of the last computed stage and of the stages in ``selected``."""
        check_images(x, self.min_img_size)
        maps = []
        for index, features in enumerate(self.forward_stages(x)):
            if index in selected:
                maps.append(features)
            if stop_early and index == max(selected):
                break
        return features, maps

    def take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Resolve ``indices`` to non-negative indices into ``feature_info``.

        Raises:
            ValueError: an index out of range.
        """
        num_maps = len(self.feature_info)
        if indices is None:
            indices = num_maps
        if isinstance(indices, int):
            selected = list(range(num_maps - indices, num_maps))
        else:
            selected = [num_maps + index if index < 0 else index for index in indices]
        if not selected or min(selected) < 0 or max(selected) >= num_maps:
            raise ValueError(
                f"indices={indices}: the model has {num_maps} feature maps; give an integer from 1 to {num_maps}, "
                f"or a sequence of indices from {-num_maps} to {num_maps - 1}"
            )
        return selected

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the selected maps do not need, so that every remaining parameter is used."""
        selected = self.take_indices(indices)
        num_kept = max(selected) + 1
        if num_kept < len(self.feature_info):
            self.drop_stages(num_kept)
            self.feature_info = self.feature_info[:num_kept]
            self.__dict__.pop("min_img_size", None)  # fewer stages allow smaller images
        width = self.feature_info[-1]["num_chs"]
        changes_width = width != self.num_features
        self.num_features = width
        if prune_norm or changes_width:
            self.norm = nn.Identity()
        if prune_head or changes_width:
            self.reset_classifier(0, "")
        return selected

    # Head.

    def get_classifier(self) -> nn.Module:
        return self.head

    def check_global_pool(self, global_pool: str) -> str:
        if global_pool not in self.global_pools:
            choices = ", ".join(repr(choice) for choice in self.global_pools)
            raise ValueError(f"global_pool={global_pool!r}: choose one of {choices}")
        return global_pool

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head with a new one for ``num_classes`` classes, or with the identity for 0 classes.

        Args:
            global_pool: see the constructor; None keeps the current pooling.

        Raises:
            ValueError: an unsupported ``global_pool``.
        """
        if global_pool is not None:
            self.global_pool = self.check_global_pool(global_pool)
        self.num_classes = num_classes
        parameter = next(self.parameters())
        self.head = create_classifier(self.num_features, num_classes, device=parameter.device, dtype=parameter.dtype)
        self.head.train(self.training)

    # Training.

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass instead of storing them."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def freeze_features(self) -> None:
        """Train only the head: freeze all other parameters and run their modules in evaluation mode."""
        self.features_frozen = True
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.head.parameters():
            parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode and not self.features_frozen)
        if self.features_frozen:
            self.training = mode
            self.head_drop.train(mode)
            self.head.train(mode)
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to train without weight decay: norms, biases and relative-position bias tables."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim <= 1 or name.endswith((".bias", "relative_position_bias_table"))
        }

    # Checkpoints.

    def named_position_tables(self) -> Iterator[tuple[int, PositionTable]]:
        """Yield (index of the stage, table) for every position table, with names as in the state dict."""
        names = {module: name for name, module in self.named_modules()}
        for stage, blocks in enumerate(self.stage_blocks()):
            for module in itertools.chain.from_iterable(block.modules() for block in blocks):
                for table in getattr(module, "position_tables", list)():
                    yield stage, table._replace(name=f"{names[module]}.{table.name}")

    def resize_position_tables(
        self, state_dict: Mapping[str, Tensor], img_size: int | Iterable[int] | None = None
    ) -> dict[str, Tensor]:
        """Resize (bicubic) the position tables of a checkpoint that was trained at another input size.

        Args:
            state_dict: weights of the same model, trained at any input size.
            img_size: training image size of the checkpoint in pixels, an integer or (height, width): DATA.IMG_SIZE of its
                config. It determines the height and width of every stored table that ``stored_grids`` does not contain. Without
                it, a table with the model's shape is assumed to have the model's height and width, with a warning unless these
                are equal, and any other table is assumed to be square.

        Returns:
            Resized tables by name; unchanged tables are omitted.

        Raises:
            ValueError: a table does not match ``img_size``, or its height and width are ambiguous because ``img_size`` is None.
        """
        recorded, size = stored_grids(state_dict), None if img_size is None else to_pair(img_size, "img_size")
        resized, assumed = {}, []
        for stage, table in self.named_position_tables():
            own, stored = self.get_parameter(table.name), state_dict.get(table.name)
            if stored is None or stored.shape[-1] != own.shape[-1]:
                continue  # the caller reports missing tables and tables of another model
            rows = stored.flatten(0, -2)  # (prefix + positions, C)
            num_positions = rows.shape[0] - table.num_prefix_tokens
            grid = recorded_grid(recorded.get(table.name), num_positions)
            if grid is None and size is not None:
                grid = grid_at(table, num_positions, size, self.stage_grids(size)[stage])
            elif grid is None and stored.shape == own.shape:
                grid = table.grid
                if table.assume_square and grid[0] != grid[1]:
                    assumed.append(table.name)
            elif grid is None:
                grid = square_grid(table, num_positions)
            if grid != table.grid:
                new = resize_grid(rows.unsqueeze(0), grid, table.grid, table.num_prefix_tokens)
                resized[table.name] = new.reshape(own.shape)
        if assumed:
            logger.warning(
                "the weights do not record the height and width of %d position tables (the first is %s); they are loaded as if "
                "trained at this model's image size. If they were trained at another size with as many tokens, load "
                "model.adapt_state_dict(weights, img_size=(height, width)) instead",
                len(assumed),
                assumed[0],
            )
        return resized

    def position_grids(self) -> dict[str, tuple[int, int]]:
        """Height and width of every position table, by name."""
        return {table.name: table.grid for _, table in self.named_position_tables()}

    def with_grids(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy of a state dict that fits this model, with metadata that record the model's ``position_grids``."""
        copied = OrderedDict(state_dict)
        copied._metadata = {"": {GRIDS_KEY: self.position_grids()}}  # type: ignore[attr-defined]
        return copied

    def adapt_state_dict(
        self, state_dict: Mapping[str, Tensor], img_size: int | Iterable[int] | None = None
    ) -> dict[str, Tensor]:
        """Drop the entries that the paper's code saves but never uses, and resize position tables.

        ``load_state_dict`` calls this automatically, without an ``img_size``. See ``resize_position_tables``.
        """
        used = {name: value for name, value in state_dict.items() if not self.unused_entries.fullmatch(name)}
        resized = self.resize_position_tables(state_dict, img_size)
        if resized:
            logger.info("resized %d position tables, the first is %s", len(resized), next(iter(resized)))
        return self.with_grids(used | resized)


def check_output_fmt(output_fmt: str, choices: tuple[str, str]) -> None:
    if output_fmt not in choices:
        raise ValueError(f"output_fmt={output_fmt!r}: choose {choices[0]} or {choices[1]}")


def _record_grids(model: Backbone, state_dict: Mapping[str, Tensor], prefix: str, metadata: dict) -> None:
    """Hook of ``state_dict``: record the height and width of the position tables, which their shapes do not determine."""
    metadata[GRIDS_KEY] = model.position_grids()


def _adapt_before_loading(
    model: Backbone, state_dict: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors: list
) -> None:
    """Hook of ``load_state_dict``: apply ``adapt_state_dict`` to the entries of this model, in place."""
    stored = OrderedDict((name.removeprefix(prefix), value) for name, value in state_dict.items() if name.startswith(prefix))
    stored._metadata = {"": metadata}  # type: ignore[attr-defined]
    try:
        adapted = model.adapt_state_dict(stored)
    except ValueError as error:
        errors.append(str(error))
        return
    for name in stored.keys() - adapted.keys():
        del state_dict[prefix + name]
    state_dict.update({prefix + name: value for name, value in adapted.items()})
