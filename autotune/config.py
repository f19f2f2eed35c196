"""Launch configurations: what a launcher may choose, the rules a choice must keep, and their form in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

MAX_TILE = 1 << 16  # elements of a tile; Triton itself ends at 2**20
NUM_WARPS = (1, 2, 4, 8, 16, 32)

Config = TypeVar("Config", bound="LaunchConfig")


@dataclass(frozen=True)
class LaunchConfig:
    """What the kinds of configuration share: fields are integers with a rule each, and plain JSON objects.

    Raises:
        TypeError: a field is not an int.
        ValueError: a field breaks its rule, which the message names.
    """

    _POWERS_OF_TWO: ClassVar[tuple[str, ...]] = ()
    _LEAST: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name, value in vars(self).items():
            if type(value) is not int:
                raise TypeError(f"{kind}: {name} must be an int; got {value!r}")
            if name == "num_warps" and value not in NUM_WARPS:
                raise ValueError(f"{kind}: num_warps must be one of {NUM_WARPS}; got {value}")
            if name in self._POWERS_OF_TWO and not (0 < value <= MAX_TILE and value & (value - 1) == 0):
                raise ValueError(f"{kind}: {name} must be a power of two, at most {MAX_TILE}; got {value}")
            if value < self._LEAST.get(name, 1):
                raise ValueError(f"{kind}: {name} must be at least {self._LEAST.get(name, 1)}; got {value}")

    def to_dict(self) -> dict[str, int]:
        """The fields by name, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[Config], values: Any) -> Config:
        """The configuration with these fields, all of them and no others.

        Raises:
            TypeError: `values` is not a mapping, or a field is not an int.
            ValueError: a field is missing, unknown or breaks its rule.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__}: expected an object with named fields; got {values!r}")
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"{cls.__name__}: the fields must be {sorted(names)}; got {sorted(map(str, values))}")
        return cls(**values)


@dataclass(frozen=True)
class FlatConfig(LaunchConfig):
    """Launch of a kernel over n consecutive elements.

    Attributes:
        block: elements per tile, a power of two.
        num_warps: warps per program.
        programs: size of the grid; for reductions at most what the device holds at once. 0: one program per tile.
        block_parts: partials combined per step by the finishing program of a reduction, a power of two.
    """

    block: int
    num_warps: int
    programs: int = 0
    block_parts: int = 1

    _POWERS_OF_TWO = ("block", "block_parts")
    _LEAST = {"programs": 0}  # noqa: RUF012 (a constant of the class, declared in the base)


@dataclass(frozen=True)
class TiledConfig(LaunchConfig):
    """Launch of a kernel over tiles (rows, lanes) per channel, or per block of channels.

    Attributes:
        groups: channels, or blocks of channels when the channel is innermost.
        parts: programs that share the tiles of one group.
        block_rows: rows per tile, a power of two.
        block_lanes: run elements (or channels) per tile, a power of two.
        num_warps: warps per program.
        block_parts: parts combined per step by the finishing program of a reduction, a power of two.
    """

    groups: int
    parts: int
    block_rows: int
    block_lanes: int
    num_warps: int
    block_parts: int = 1

    _POWERS_OF_TWO = ("block_rows", "block_lanes", "block_parts")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_rows * self.block_lanes > MAX_TILE:
            raise ValueError(
                f"TiledConfig: a tile must have at most {MAX_TILE} elements; got {self.block_rows} x {self.block_lanes}"
            )
