"""Configurations and decisions: JSON and back, and every rule refused by name."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from qkernels.autotune.config import FlatConfig, TiledConfig
from qkernels.autotune.decision import FUNCTIONS, Decision
from qkernels.autotune.search import heuristic_for
from tests.autotune.support import CPU, FLAT, TILED

FLAT_CONFIG = FlatConfig(2048, num_warps=4, programs=264, block_parts=1024)
TILED_CONFIG = TiledConfig(groups=256, parts=2, block_rows=1, block_lanes=2048, num_warps=8, block_parts=128)


@pytest.mark.parametrize("config", [FLAT_CONFIG, TILED_CONFIG, FlatConfig(1024, 4)], ids=str)
def test_json_and_back(config: FlatConfig | TiledConfig) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    assert all(type(value) is int for value in values.values())
    assert type(config).from_dict(values) == config


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"block": 1000}, ValueError, "FlatConfig: block must be a power of two, at most 65536; got 1000"),
        ({"block": 0}, ValueError, "block must be a power of two"),
        ({"block": 1 << 17}, ValueError, "block must be a power of two, at most 65536; got 131072"),
        ({"block": 1024.0}, TypeError, "FlatConfig: block must be an int; got 1024.0"),
        ({"block": True}, TypeError, "block must be an int; got True"),
        ({"block": "1024"}, TypeError, "block must be an int; got '1024'"),
        ({"num_warps": 3}, ValueError, "num_warps must be one of (1, 2, 4, 8, 16, 32); got 3"),
        ({"num_warps": 64}, ValueError, "num_warps must be one of"),
        ({"programs": -1}, ValueError, "programs must be at least 0; got -1"),
        ({"block_parts": 3}, ValueError, "block_parts must be a power of two"),
        ({"num_stages": 2}, ValueError, "the fields must be ['block', 'block_parts', 'num_warps', 'programs']"),
    ],
)
def test_a_broken_rule_is_named(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        FlatConfig.from_dict(FLAT_CONFIG.to_dict() | changes)


def test_a_missing_field_and_what_is_no_object() -> None:
    with pytest.raises(ValueError, match="the fields must be"):
        FlatConfig.from_dict({"block": 1024})
    with pytest.raises(TypeError, match=re.escape("expected an object with named fields; got [1024, 4]")):
        FlatConfig.from_dict([1024, 4])


def test_a_tile_has_a_largest_size() -> None:
    with pytest.raises(ValueError, match=re.escape("at most 65536 elements; got 64 x 2048")):
        TiledConfig(groups=1, parts=1, block_rows=64, block_lanes=2048, num_warps=8)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("flat_sum", {"n": 1}, "no function 'flat_sum'"),
        (None, {}, "no function None"),
        (["flat_reduction"], {}, "no function"),
        ("flat_reduction", {"m": 1}, "flat_reduction takes ('n',); got {'m': 1}"),
        ("flat_reduction", None, "flat_reduction takes ('n',); got None"),
        ("flat_reduction", {"n": 0}, "n must be a positive int; got 0"),
        ("flat_reduction", {"n": True}, "n must be a positive int; got True"),
        ("tiled_accumulation", {"n_rows": 1, "run": 1, "channels": 1, "channel_innermost": 1},
         "channel_innermost must be true or false; got 1"),
    ],
)  # fmt: skip
def test_a_decision_that_is_none(function: object, arguments: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Decision.from_dict(function, arguments)


INNER = Decision("tiled_reduction", (100_000, 1, 200, True, 4))


@pytest.mark.parametrize(
    ("decision", "config", "message"),
    [
        (FLAT, FlatConfig(2048, 4, programs=0), "programs must be at least 1"),
        (FLAT, FlatConfig(4096, 4, programs=257), "at most the 256 tiles"),
        (Decision("flat_reduction", (1 << 30,)), FlatConfig(1024, 4, programs=1025), "and 1024"),
        (Decision("flat_accumulation", (5000,)), FlatConfig(1024, 4, programs=6), "at most the 5 tiles"),
        (Decision("flat_elementwise", (4,)), FlatConfig(1024, 4, programs=7), "programs must be 0"),
        (FLAT, TILED_CONFIG, "the configuration must be a FlatConfig"),
        (TILED, FLAT_CONFIG, "the configuration must be a TiledConfig"),
        (TILED, TiledConfig(255, 1, 1, 2048, 8), "groups must be 256 to reach every channel once"),
        (INNER, TiledConfig(200, 1, 64, 32, 8), "groups must be 7 to reach every channel once"),
        (TILED, TiledConfig(256, 65, 1, 2048, 8, 128), "parts must be at most the 64 tiles of a group"),
        (Decision("tiled_elementwise", (10**6, 10**6, 8, False, 4)), TiledConfig(8, 65536, 1, 1024, 4), "and 65535"),
        (Decision("tiled_reduction", (32, 3136, 2000, False, 4)), TiledConfig(2000, 2, 1, 2048, 8, 128),
         "2000 groups cannot be shared: a workspace counts arrivals for 1024"),
        (INNER, TiledConfig(4, 8, 64, 64, 8, 2048), "block_parts partials of a group"),
    ],
)  # fmt: skip
def test_what_kernels_take_for_granted_is_checked(
    decision: Decision, config: FlatConfig | TiledConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        decision.config_from_dict(config.to_dict()) if "must be a " not in message else decision.check(config)
    assert str(caught.value).startswith(str(decision))


SIZES = (1, 3, 16, 49, 1000, 4096, 50_257, 1 << 20)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_answer_of_a_heuristic_is_valid(function: str) -> None:
    names = FUNCTIONS[function].arguments
    choices = {"itemsize": (2, 4), "channel_innermost": (False, True), "n": (*SIZES, 1023, 1025, 2**31 + 1)}
    for arguments in itertools.product(*(choices.get(name, SIZES) for name in names)):
        decision = Decision(function, arguments)
        decision.check(heuristic_for(decision, CPU))
