"""What a launcher decides: a function of `qkernels.autotune` with its arguments, and what every answer must respect.

A configuration may come from a file, so nothing that a kernel takes for granted is left to the file: `Decision.check`
refuses a grid that would miss channels, more arrival counters than a workspace has, and the like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkernels.autotune.config import MAX_TILE, FlatConfig, LaunchConfig, TiledConfig
from qkernels.autotune.heuristics import MAX_PARTIALS, MAX_SHARED_GROUPS

MAX_PARTS = 65535  # extent of a CUDA grid in y


@dataclass(frozen=True)
class Function:
    """One function that launchers call for a configuration.

    Attributes:
        config: the kind of configuration it returns.
        arguments: names of its arguments, the device aside.
        sources: files of the package `qkernels` with the kernels it serves; a change in them makes tuned answers stale.
        persistent: whether its grid is meant to be resident at once.
    """

    config: type[FlatConfig] | type[TiledConfig]
    arguments: tuple[str, ...]
    sources: tuple[str, ...]
    persistent: bool


_TILED = ("n_rows", "run", "channels", "channel_innermost")
_SHARED = ("device_math.py", "layout.py")
_MINMAX = ("minmax.py", "qparams.py", *_SHARED)
_FAKE_QUANT = ("fake_quant.py", *_SHARED)
_LSQ = ("lsq.py", *_SHARED)

FUNCTIONS: Mapping[str, Function] = {
    "flat_reduction": Function(FlatConfig, ("n",), _MINMAX, True),
    "flat_elementwise": Function(FlatConfig, ("itemsize",), _FAKE_QUANT, False),
    "flat_accumulation": Function(FlatConfig, ("n",), _LSQ, True),
    "tiled_reduction": Function(TiledConfig, (*_TILED, "itemsize"), _MINMAX, False),
    "tiled_elementwise": Function(TiledConfig, (*_TILED, "itemsize"), _FAKE_QUANT, False),
    "tiled_accumulation": Function(TiledConfig, _TILED, _LSQ, False),
}


@dataclass(frozen=True)
class Decision:
    """One call of one function: `flat_reduction n=4096`.

    Attributes:
        function: a name in `FUNCTIONS`.
        arguments: its arguments in order, the device aside.

    Raises:
        ValueError: no such function, or arguments that are none.
    """

    function: str
    arguments: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"no function {self.function!r}; there are {sorted(FUNCTIONS)}")
        names = FUNCTIONS[self.function].arguments
        if len(self.arguments) != len(names):
            raise ValueError(f"{self.function} takes {names}; got {self.arguments}")
        for name, value in zip(names, self.arguments, strict=True):
            kind = bool if name == "channel_innermost" else int
            if type(value) is not kind or (kind is int and value < 1):
                rule = "true or false" if kind is bool else "a positive int"
                raise ValueError(f"{self.function}: {name} must be {rule}; got {value!r}")

    def __str__(self) -> str:
        return " ".join([self.function, *(f"{name}={value}" for name, value in self.named().items())])

    def named(self) -> dict[str, int]:
        """The arguments by name."""
        return dict(zip(FUNCTIONS[self.function].arguments, self.arguments, strict=True))

    @classmethod
    def from_dict(cls, function: Any, arguments: Any) -> Decision:
        """The decision that a file's entry names.

        Raises:
            ValueError: the entry names none.
        """
        if not isinstance(function, str) or function not in FUNCTIONS:
            raise ValueError(f"no function {function!r}; there are {sorted(FUNCTIONS)}")
        names = FUNCTIONS[function].arguments
        if not isinstance(arguments, Mapping) or set(arguments) != set(names):
            raise ValueError(f"{function} takes {names}; got {arguments!r}")
        return cls(function, tuple(arguments[name] for name in names))

    def config_from_dict(self, values: Any) -> LaunchConfig:
        """The configuration with these fields, checked for this decision.

        Raises:
            TypeError: a value of the wrong kind.
            ValueError: a rule is broken, which the message names.
        """
        config = FUNCTIONS[self.function].config.from_dict(values)
        self.check(config)
        return config

    def check(self, config: LaunchConfig) -> None:
        """Raise ValueError if the kernels that this decision is for cannot take `config`."""
        if isinstance(config, FlatConfig) and FUNCTIONS[self.function].config is FlatConfig:
            problem = self._flat_problem(config)
        elif isinstance(config, TiledConfig) and FUNCTIONS[self.function].config is TiledConfig:
            problem = self._tiled_problem(config)
        else:
            problem = f"the configuration must be a {FUNCTIONS[self.function].config.__name__}"
        if problem:
            raise ValueError(f"{self}: {problem}; got {config}")

    def _flat_problem(self, config: FlatConfig) -> str | None:
        if self.function == "flat_elementwise":
            return None if config.programs == 0 else "programs must be 0, one program per tile"
        tiles = -(-self.named()["n"] // config.block)
        if not 1 <= config.programs <= min(tiles, MAX_PARTIALS):
            return f"programs must be at least 1 and at most the {tiles} tiles and {MAX_PARTIALS}"
        return None

    def _tiled_problem(self, config: TiledConfig) -> str | None:
        arguments = self.named()
        inner = arguments["channel_innermost"]
        groups = -(-arguments["channels"] // config.block_lanes) if inner else arguments["channels"]
        if config.groups != groups:
            return f"groups must be {groups} to reach every channel once"
        tiles = -(-arguments["n_rows"] // config.block_rows)
        tiles *= 1 if inner else -(-arguments["run"] // config.block_lanes)
        if config.parts > min(tiles, MAX_PARTS):
            return f"parts must be at most the {tiles} tiles of a group and {MAX_PARTS}"
        if self.function == "tiled_reduction" and config.parts > 1:
            if groups > MAX_SHARED_GROUPS:
                return f"{groups} groups cannot be shared: a workspace counts arrivals for {MAX_SHARED_GROUPS}"
            if config.block_parts * (config.block_lanes if inner else 1) > MAX_TILE:
                return f"block_parts partials of a group must be at most {MAX_TILE} elements"
        return None
