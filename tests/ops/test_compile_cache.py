"""The compile cache never serves code of an older formula: the numerics version is part of its key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import qkernels.ops  # noqa: F401  (extends the key)

ROOT = Path(__file__).resolve().parents[2]

_CACHE_CHILD = """
    import json, sys
    import torch
    from torch._dynamo.utils import counters

    patch, version = sys.argv[1] == "patched", sys.argv[2]
    if patch:  # stands for a new release with another decomposition
        register = torch.library.register_torch_dispatch

        def doubled(mode, func, types, args, kwargs):
            with mode:
                return args[0] * 2

        def register_patched(op, torch_dispatch_class, func=None, /, **kwargs):
            if str(op) in ("qkernels.fake_quantize.default", "qkernels::fake_quantize"):
                func = doubled
            return register(op, torch_dispatch_class, func, **kwargs)

        torch.library.register_torch_dispatch = register_patched
    import qkernels.ops
    from qkernels.ops import registration
    if version != "same":
        old = f"qkernels:{registration.NUMERICS_VERSION}"
        registration.NUMERICS_VERSION = int(version)
        torch.compiler.config.cache_key_tag = torch.compiler.config.cache_key_tag.replace(old, "")
        registration.extend_cache_key()

    def function(x, s, z):
        return torch.ops.qkernels.fake_quantize(torch.relu(x), s, z, -128, 127) + 1

    import torch._inductor.config

    torch._inductor.config.cpp_cache_precompile_headers = False  # pays off from the third compilation on only
    torch._inductor.config.compile_threads = 1
    x, s, z = torch.full((8,), 0.3), torch.tensor([0.1]), torch.zeros(1, dtype=torch.int32)
    y = torch.compile(function, fullgraph=True)(x, s, z)
    report = {k: v for k, v in counters["aot_autograd"].items() if "cache" in k}
    print("REPORT" + json.dumps({"y": round(y[0].item(), 4), "tag": torch.compiler.config.cache_key_tag, **report}))
"""


def run_child(cache: Path, patch: str, version: str) -> dict[str, object]:
    env = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    env.pop("TRITON_INTERPRET", None)
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CACHE_CHILD), patch, version],
        env=env, cwd=cache, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    (line,) = [x for x in child.stdout.splitlines() if x.startswith("REPORT")]
    return json.loads(line.removeprefix("REPORT"))


def test_numerics_version_is_in_the_cache_key() -> None:
    from qkernels.ops.registration import NUMERICS_VERSION, extend_cache_key

    tag = torch.compiler.config.cache_key_tag
    assert f"qkernels:{NUMERICS_VERSION}" in tag.split("|")
    extend_cache_key()
    assert torch.compiler.config.cache_key_tag == tag, "importing twice must not grow the tag"


def test_two_processes_and_one_cache(tmp_path: Path) -> None:
    """The AOTAutograd cache keys on the graph before decomposition: only the version keeps stale code out.

    One cache directory, one graph. The second process, with another decomposition and the old version, shows that the
    cache is shared at all and what the danger is (a hit, stale numbers); the third has the same new decomposition and
    the version raised: it must miss and give the new numbers.
    """
    first = run_child(tmp_path, "original", "same")
    assert first["y"] == 1.3 and first.get("autograd_cache_miss") == 1
    stale = run_child(tmp_path, "patched", "same")
    assert stale["y"] == 1.3 and stale.get("autograd_cache_hit") == 1, "the trap this test guards against is gone"
    fresh = run_child(tmp_path, "patched", "999")
    assert fresh["y"] == 1.6 and fresh.get("autograd_cache_miss") == 1 and "autograd_cache_hit" not in fresh
    assert "qkernels:999" in fresh["tag"]
