"""The stages of a network, and the form (map or tokens) of their outputs, found by their shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from gpd_cli.errors import MethodError

Form = Literal["map", "map_last", "tokens"]
"""Form of a stage's output, in this order: ``[B, C, H, W]``, ``[B, H, W, C]`` or ``[B, N, C]``."""

_MOST_EXTRA_TOKENS = 8
"""Largest number of class tokens and registers to try, if the network does not state the number."""


@dataclass(frozen=True)
class Stage:
    """The end of a stage of a network, as the output (or input) of a module.

    Args:
        name: name of the module.
        form: form of the output.
        channels: number of channels, C, in the network that was run.
        height: height of the map, H, in positions.
        width: width of the map, W, in positions.
        before: whether the stage is the module's input instead of its output.
        extra: number of tokens (class tokens, registers) before the tokens of the map.
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
        """Convert an output of the stage to a map, ``[B, C, H, W]``, without class tokens.

        Images of another size than in the run that found the stage lead to maps of another size;
        tokens are arranged as a map of the same aspect ratio.

        Args:
            output: the output, in the stage's form.

        Raises:
            MethodError: when the tokens do not make up such a map.
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
                f"Module '{self.name}' gives {output.shape[1]} tokens, which do not form a map "
                f"with the aspect ratio of {self.height} x {self.width}; name other modules in "
                "--model.stages and --model.static_teacher.stages."
            )
        grid: Tensor = patches.unflatten(2, (height, count // height))
        return grid


@dataclass(frozen=True)
class ShapeHints:
    """What is known about the shapes of a network's features, to recognize maps and tokens.

    Args:
        image: height and width of the images; maps have the same aspect ratio.
        channels_last: whether the network says that its maps are ``[B, H, W, C]``.
        extra_tokens: number of tokens before the patches' tokens; None if the network does not say.
        reorders: whether the network keeps its tokens in another order than row by row, as Hiera
            does. Such tokens make up no map.
    """

    image: tuple[int, int]
    channels_last: bool = False
    extra_tokens: int | None = None
    reorders: bool = False

    @classmethod
    def of(cls, network: nn.Module, image: tuple[int, int]) -> ShapeHints:
        """Read the hints from the attributes that timm's models have.

        Args:
            network: the network.
            image: height and width of the images.
        """
        extra = getattr(network, "num_prefix_tokens", None)
        return cls(
            image,
            getattr(network, "output_fmt", None) == "NHWC",
            extra if isinstance(extra, int) else None,
            hasattr(network, "reroll"),
        )

    def stage(self, name: str, shape: tuple[int, ...], form: Form | None = None) -> Stage | None:
        """Make the stage of a module from the shape of the module's output.

        Args:
            name: name of the module.
            shape: shape of the module's output.
            form: form of the output, if known.

        Returns:
            The stage, or None if the output is neither a map nor tokens that make up a map.
        """
        if len(shape) == 3:
            grid = None if self.reorders else self._grid(shape[1])
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
        """Difference between the aspect ratios of a map and of the images; 0 if they are equal."""
        return abs(height * self.image[1] - width * self.image[0])

    def _fits(self, misfit: int) -> bool:
        # If a side is no multiple of the stride, the side of the map is rounded. This changes the
        # aspect ratio of maps unless the images are square.
        square = self.image[0] == self.image[1]
        return misfit == 0 if square else misfit <= sum(self.image)

    def _grid(self, tokens: int) -> tuple[int, int] | None:
        """Height and width of the map that some tokens make up; None if they make up no map.

        Args:
            tokens: number of tokens, N, including class tokens and registers.
        """
        said = [] if self.extra_tokens is None else [self.extra_tokens]
        found = [self._closest_grid(tokens - extra) for extra in said]
        # Fewer extra tokens are likelier, but not if only with more of them the aspect ratio of the
        # map is exactly that of the images.
        others = [self._closest_grid(tokens - extra) for extra in range(_MOST_EXTRA_TOKENS + 1)]
        exact = [grid for grid in others if grid is not None and self._misfit(*grid) == 0]
        return next((grid for grid in (*found, *exact, *others) if grid is not None), None)

    def _closest_grid(self, patches: int) -> tuple[int, int] | None:
        """Height and width of a map, as close as possible to the aspect ratio of the images.

        Args:
            patches: number of positions of the map.

        Returns:
            Height and width; None if no map of so many positions fits the images.
        """
        sides = [h for h in range(1, patches + 1) if patches % h == 0]
        grids = [(h, patches // h) for h in sides if self._fits(self._misfit(h, patches // h))]
        return min(grids, key=lambda grid: self._misfit(*grid), default=None)
