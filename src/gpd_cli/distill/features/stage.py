"""The end of a stage, and the form of its output, derived from the output's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from gpd_cli.errors import MethodError

Form = Literal["map", "map_last", "tokens"]
"""Form of a stage's output: ``[B, C, H, W]``, ``[B, H, W, C]`` or ``[B, N, C]``."""

_MOST_EXTRA_TOKENS = 8
"""Most class tokens and registers to try, where the network does not say how many it has."""


@dataclass(frozen=True)
class Stage:
    """The end of a stage.

    Args:
        name: name of the module whose output the stage is.
        form: form of the output.
        channels: C, in the network that was run.
        height: height of the map, in positions.
        width: width of the map, in positions.
        before: whether the stage is the module's input instead of its output.
        extra: number of tokens before the tokens of the map.
        overwritten: whether the network changes the output in place later on, so that a hook has to
            copy the output.
    """

    name: str
    form: Form
    channels: int
    height: int
    width: int
    before: bool = False
    extra: int = 0
    overwritten: bool = False

    @property
    def positions(self) -> int:
        """Number of positions of the map, H x W."""
        return self.height * self.width

    def as_map(self, output: Tensor) -> Tensor:
        """An output of the stage as a map, ``[B, C, H, W]``, without class tokens.

        Images of another size than in the recorded run give maps of another size and the same
        aspect.

        Raises:
            MethodError: when the tokens do not make up a map.
        """
        if self.form == "map":
            return output
        if self.form == "map_last":
            return output.permute(0, 3, 1, 2)
        patches = output[:, self.extra :].transpose(1, 2)
        count = patches.shape[2]
        height = round(self.height * math.sqrt(count / self.positions))
        if height == 0 or count % height:
            raise MethodError(
                f"Module '{self.name}' gives {output.shape[1]} tokens, which are no map of the "
                f"aspect of {self.height} x {self.width} as in images of the network's own size; "
                "name other modules in --model.stages and --model.static_teacher.stages."
            )
        grid: Tensor = patches.unflatten(2, (height, count // height))
        return grid


@dataclass(frozen=True)
class ShapeHints:
    """What a network says about the shapes of its features.

    Args:
        image: height and width of the images; maps have the same aspect.
        channels_last: whether the network says that its maps are ``[B, H, W, C]``.
        extra_tokens: number of tokens before the patches' tokens, or None if not said.
    """

    image: tuple[int, int]
    channels_last: bool = False
    extra_tokens: int | None = None

    @classmethod
    def of(cls, network: nn.Module, image: tuple[int, int]) -> ShapeHints:
        """The hints in a network's attributes, as timm's models have them."""
        extra = getattr(network, "num_prefix_tokens", None)
        return cls(
            image,
            getattr(network, "output_fmt", None) == "NHWC",
            extra if isinstance(extra, int) else None,
        )

    def stage(self, name: str, shape: tuple[int, ...], form: Form | None = None) -> Stage | None:
        """The stage that a module's output of some shape is.

        Args:
            name: name of the module.
            shape: shape of the module's output.
            form: form of the output, if known.

        Returns:
            The stage, or None if the output is no feature map.
        """
        if len(shape) == 3:
            grid = self._grid(shape[1])
            if grid is None:
                return None
            return Stage(name, "tokens", shape[2], *grid, extra=shape[1] - grid[0] * grid[1])
        if len(shape) != 4:
            return None
        if form is None:
            first, last = self._misfit(*shape[2:]), self._misfit(*shape[1:3])
            if not self._fits(min(first, last)):
                return None
            form = "map_last" if last < first or (last == first and self.channels_last) else "map"
        if form == "map_last":
            return Stage(name, form, shape[3], shape[1], shape[2])
        return Stage(name, form, *shape[1:])

    def _misfit(self, height: int, width: int) -> int:
        """Distance between the aspects of a map and of the images; 0 for equal aspects."""
        return abs(height * self.image[1] - width * self.image[0])

    def _fits(self, misfit: int) -> bool:
        # Strides round sides that are no multiples of them, height and width differently.
        square = self.image[0] == self.image[1]
        return misfit == 0 if square else misfit <= sum(self.image)

    def _grid(self, tokens: int) -> tuple[int, int] | None:
        """Height and width of the map of tokens, without extra tokens; None if there is no map."""
        said = [] if self.extra_tokens is None else [self.extra_tokens]
        for extra in (*said, *range(_MOST_EXTRA_TOKENS + 1)):
            patches = tokens - extra
            sides = [h for h in range(1, patches + 1) if patches % h == 0]
            grids = [(h, patches // h) for h in sides if self._fits(self._misfit(h, patches // h))]
            if grids:
                return min(grids, key=lambda grid: self._misfit(*grid))
        return None
