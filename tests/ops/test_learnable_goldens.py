"""learnable_fake_quantize against recorded results: torch's operators where they are right, and three papers.

Where torch is wrong is listed in TORCH_IS_WRONG, with a test for each reason. See tests/golden/README.md.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import qkernels.ops as qops
from tests.oracles import assert_bits_equal, reference_fake_quantize
from tests.oracles_learnable import assert_learnable, reference_learnable

pytestmark = pytest.mark.interpreter

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = json.loads((GOLDEN / "native_learnable.json").read_text(encoding="utf-8"))
ARRAYS = np.load(GOLDEN / "native_learnable.npz")
LEARNABLE = [name for name in CASES if name.startswith(("LT", "LC"))]

# The backward of torch's per-tensor CPU operator; y is right in all of them. It takes a wrong zero point in LT29 too
# (-42 for -43), but nothing saturates there, so no number shows it; a test of its own below does.
TORCH_IS_WRONG = {
    "LT07": "codes are rint(x / scale + zp), the forward's rint(x / scale) + zp: they differ on ties with an odd zp",
    "LT10": "zero point 0.5 is 0 in the forward (half to even) and 1 in the backward (trunc(zp + 0.5))",
    "LT12": "zero point -1.5 is -2 in the forward and -1 in the backward",
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def array(name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(ARRAYS[name]))


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "cl":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "t":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "step":
        storage = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
        storage[..., ::2] = x
        return storage[..., ::2]
    assert layout == "c", layout
    return x


def learnable_case(name: str, device: torch.device) -> tuple[torch.Tensor, tuple[object, ...]]:
    """dy, and the operator's arguments from x to axis."""
    r = CASES[name]
    x = array(f"X_{r['x']}")
    dy = normal(650, *x.shape).to(device)
    scale, zero_point = (torch.tensor(r[k], device=device).reshape(-1) for k in ("scale", "zero_point"))
    x = laid_out(x.to(device), r["layout"])
    return dy, (x, scale, zero_point, r["quant_min"], r["quant_max"], r["grad_factor"], r.get("axis"))


def assert_close(actual: torch.Tensor, want: torch.Tensor, rounding: torch.Tensor | float, context: str) -> None:
    want, actual = want.double().reshape(-1), actual.cpu().double().reshape(-1)
    bad = (actual - want).abs() > 1e-5 * want.abs() + rounding
    assert not bad.any(), f"{context}: {actual.tolist()} for {want.tolist()}"


def rounding_of_y(
    dy: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, factor: float, axis: int | None
) -> torch.Tensor:
    """What dscale owes to rounding y: (y - x) / scale, where torch's compiler fuses the product in y with the sum."""
    shape = [-1 if d == axis else 1 for d in range(y.dim())]
    terms = (dy * y / scale.reshape(shape)).abs().double().cpu()
    return 2.0**-24 * factor * terms.sum([d for d in range(y.dim()) if axis is None or d != axis])


def test_the_recorded_cases_are_all_here() -> None:
    """Every recorded case is run by a test below; the list of what torch gets wrong names cases that exist."""
    assert len(LEARNABLE) == 21
    assert set(CASES) == {*LEARNABLE, "CM1", "FM1", "FM2", "S1", "S2", "S3", "SP1", "TQ1", "torch"}
    assert set(TORCH_IS_WRONG) < set(LEARNABLE)
    odd = {n for n in LEARNABLE if "zp_bwd" in CASES[n] and CASES[n]["zp_bwd"] != CASES[n]["zp_fwd"]}
    assert odd == set(TORCH_IS_WRONG) - {"LT07"} | {"LT29"}


@pytest.mark.parametrize("name", LEARNABLE)
def test_native_operators(name: str, device: torch.device) -> None:
    """y and dx exact; dscale and dzero_point to 1e-5, since torch adds up in float32, and the rounding of y."""
    dy, arguments = learnable_case(name, device)
    y = qops.learnable_fake_quantize(*arguments)
    assert_bits_equal(y, array(f"{name}_y"), context=f"{name} y")
    assert list(y.stride()) == CASES[name]["y_stride"]
    dx, dscale, dzero_point = qops.learnable_fake_quantize_backward(dy, *arguments)
    if name in TORCH_IS_WRONG and name != "LT07":
        assert_learnable(y, (dx, dscale, dzero_point), reference_learnable(dy, *arguments), arguments[1:3], name)
        return
    rule = "_forwardrule" if name == "LT07" else ""
    assert_bits_equal(dx, array(f"{name}{rule}_dx"), context=f"{name} dx")
    rounding = rounding_of_y(dy, y, arguments[1], *arguments[5:])
    assert_close(dscale, array(f"{name}{rule}_ds"), rounding, f"{name} dscale")
    assert_close(dzero_point, array(f"{name}{rule}_dz"), 0.0, f"{name} dzero_point")


@pytest.mark.parametrize("name", TORCH_IS_WRONG)
def test_torchs_backward_differs_where_it_is_wrong(name: str, device: torch.device) -> None:
    """Else the case belongs among the others. The recorded numbers follow from torch's zero point or rounding."""
    dy, arguments = learnable_case(name, device)
    dx, dscale, _ = qops.learnable_fake_quantize_backward(dy, *arguments)
    theirs = [array(f"{name}_{k}") for k in ("dx", "ds", "dz")]
    assert not torch.allclose(dscale.cpu(), theirs[1], rtol=1e-3)
    if name != "LT07":
        other = torch.tensor([CASES[name]["zp_bwd"]])
        want = reference_learnable(dy, arguments[0], arguments[1], other, *arguments[3:])
        assert_learnable(None, tuple(theirs), want, (arguments[1], other), f"{name} with the other zero point")
    else:
        assert int((dx.cpu() != theirs[0]).sum()) == 2


@pytest.mark.skipif("not torch.__version__.startswith('2.13')", reason="pins a defect of torch 2.13")
@pytest.mark.parametrize("zero_point", [-43, -1, -7, -100])
def test_torchs_forward_and_backward_disagree_for_negative_zero_points(zero_point: int, device: torch.device) -> None:
    """A gradient must pass exactly where y follows x: shown with y alone, no reference. Torch's is off by one code."""
    codes = torch.arange(-128 - 3, 127 + 4)
    x = (codes - zero_point) * 0.25  # exact
    scale, z = torch.tensor([0.25]), torch.tensor([float(zero_point)])

    def run(function, target: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().to(target).requires_grad_()
        y = function(leaf, scale.to(target), z.to(target), -128, 127, 1.0)
        y.sum().backward()
        return (y.detach().cpu() == x), leaf.grad.cpu() == 1

    follows, passes = run(qops.learnable_fake_quantize, device)
    assert torch.equal(follows, passes) and torch.equal(follows, (codes >= -128) & (codes <= 127))
    follows, passes = run(torch._fake_quantize_learnable_per_tensor_affine, torch.device("cpu"))
    assert torch.equal(follows, (codes >= -128) & (codes <= 127))
    assert codes[follows != passes].tolist() == [-129, 127]


def test_cachemask(device: torch.device) -> None:
    """Finite values are torch's; torch hides NaN, and per channel it wraps what leaves an int64: both listed here."""
    x = array("X_special")
    r = CASES["CM1"]
    scale = torch.tensor([r["scale"]], device=device)
    zero_point = torch.tensor([r["zero_point"]], dtype=torch.int32, device=device)
    for view, axis, prefix in ((x, None, "CM1"), (x.view(1, -1), 0, "CM1_pc")):
        arguments = (view.to(device), scale, zero_point, r["quant_min"], r["quant_max"], 1.0, axis)
        y = qops.learnable_fake_quantize(*arguments).cpu()
        wrong = torch.isnan(view) if axis is None else torch.isnan(view) | (view >= 1e19)
        assert wrong.flatten().tolist() == [True, axis == 0, False, axis == 0, *[False] * 5]
        assert_bits_equal(y, array(f"{prefix}_y"), where=~wrong, context=prefix)
        assert y[wrong].isnan().tolist() == [True] + [False] * (int(wrong.sum()) - 1)
        assert (y[wrong][1:] == r["quant_max"] * scale.cpu()).all(), "saturated"
        dx, _, _ = qops.learnable_fake_quantize_backward(torch.ones_like(view).to(device), *arguments)
        assert_bits_equal(dx, array(f"{prefix}_mask").float(), context=f"{prefix} mask")


def test_cachemask_with_a_fractional_zero_point(device: torch.device) -> None:
    """fake_quantize keeps it fractional, as torch; a learned one is rounded. So CM1_pcf is the former's case."""
    x = array("X_special").view(1, -1)
    r = CASES["CM1"]
    scale, zero_point = torch.tensor([r["scale"]]), torch.tensor([r["zero_point"] + 0.5])
    limits = (r["quant_min"], r["quant_max"])
    y = qops.fake_quantize(x.to(device), scale.to(device), zero_point.to(device), *limits, 0)
    sane = x.abs() < 1e19
    assert_bits_equal(y, array("CM1_pcf_y"), where=sane)
    learned = qops.learnable_fake_quantize(x.to(device), scale.to(device), zero_point.to(device), *limits, axis=0)
    rounded = reference_fake_quantize(x, scale, torch.zeros(1, dtype=torch.int32), *limits, 0)
    assert_bits_equal(learned, rounded)
    assert not torch.equal(learned.cpu()[sane], y.cpu()[sane])


@pytest.mark.parametrize("name", ["FM1", "FM2"])
def test_moving_average_then_learnable(name: str, device: torch.device) -> None:
    """The learnable operator continues from what the fused observer found: statistics, qparams and y exact."""
    r = CASES[name]
    state = [torch.tensor([v], device=device) for v in (math.inf, -math.inf, 1.0)]
    state.append(torch.zeros(1, dtype=torch.int32, device=device))
    limits = (r["qmin"], r["qmax"])
    rule = "fused_symmetric" if r["symmetric"] else "fused_affine"
    for batch in range(3):
        x = (normal(701 + batch, 5, 9) + np.float32(0.3)).to(device)
        qparams = qops.update_qparams_(x, *state, *limits, rule=rule, averaging_constant=r["averaging_const"])
        y = qops.learnable_fake_quantize(x, *qparams, *limits)
        assert_bits_equal(y, array(f"{name}_y")[batch], context=f"{name} batch {batch}")
    for tensor, key in zip(state, ("min", "max", "scale", "zp"), strict=True):
        assert_bits_equal(tensor, array(f"{name}_{key}"), context=f"{name} {key}")


# --------------------------------------------------------------------------------------------------------------------
# Papers, in float64, by autograd of the operator
# --------------------------------------------------------------------------------------------------------------------


def assert_paper(y: torch.Tensor, dx: torch.Tensor, name: str) -> None:
    """y to two roundings of float32 (the scale's and the product's), and dx, a selection of dy, exactly."""
    torch.testing.assert_close(y.detach().cpu().double(), array(f"{name}_y"), rtol=2.0**-22, atol=2.0**-24)
    assert_bits_equal(dx, array(f"{name}_dx").float(), context=name)


def assert_within(actual: torch.Tensor, want: float, dy: torch.Tensor, largest: float, context: str) -> None:
    """A sum of dy times slopes up to `largest`, each of which moves by 2^-24 of it with the rounding of the scale."""
    bound = 2e-6 * largest * float(dy.abs().sum())
    assert abs(actual.item() - want) <= bound < 0.01 * abs(want) + 1e-3, f"{context}: {actual.item()} for {want}"


@pytest.mark.parametrize("name", ["S1", "S2", "S3"])
def test_lsq(name: str, device: torch.device) -> None:
    """Esser's rule at 4, 8 and 2 bits: its own mask, and its gradient scale."""
    r = CASES[name]
    x, dy = array("X_m").to(device).requires_grad_(), normal(650, 6, 7).to(device)
    assert r["scale"] == pytest.approx(2 * x.detach().abs().mean().item() / math.sqrt(r["qp"]), rel=1e-6)
    assert r["g"] == pytest.approx(1 / math.sqrt(x.numel() * r["qp"]))
    scale = torch.tensor([r["scale"]], device=device, requires_grad=True)
    zero_point = torch.zeros(1, dtype=torch.int32, device=device)
    y = qops.learnable_fake_quantize(x, scale, zero_point, -r["qn"], r["qp"], r["g"], grad_mask="lsq")
    y.backward(dy)
    assert_paper(y, x.grad, name)
    assert_within(scale.grad, r["ds"], dy, r["g"] * r["qn"], name)
    rounded, _, _ = qops.learnable_fake_quantize_backward(dy, x, scale, zero_point, -r["qn"], r["qp"], r["g"])
    differ = int((rounded != x.grad).sum())
    assert differ == (3 if name == "S3" else 0), "at 2 bits the other mask gives other gradients"


def test_lsq_plus(device: torch.device) -> None:
    """y = fq(x - beta) + beta: the offset lies outside of the operator, and autograd finds sum of dy outside."""
    r = CASES["SP1"]
    x, dy = array("X_m").to(device).requires_grad_(), normal(650, 6, 7).to(device)
    scale = torch.tensor([r["scale"]], device=device, requires_grad=True)
    beta = torch.tensor(r["beta"], device=device, requires_grad=True)
    zero_point = torch.zeros(1, dtype=torch.int32, device=device)
    y = qops.learnable_fake_quantize(x - beta, scale, zero_point, r["n"], r["p"], grad_mask="lsq") + beta
    y.backward(dy)
    torch.testing.assert_close(y.detach().cpu().double(), array("SP1_y"), rtol=2.0**-22, atol=2.0**-23)
    assert_bits_equal(x.grad, array("SP1_dx").float())
    assert_within(scale.grad, r["ds"], dy, abs(r["n"]), "dscale")
    assert_within(beta.grad, r["dbeta"], dy, 1.0, "dbeta")


def test_tqt(device: torch.device) -> None:
    """A power of two, 2^ceil(log2 t), straight through the ceil; the chain rule gives Jain's scale * ln 2."""
    r = CASES["TQ1"]
    x, dy = array("X_m").to(device).requires_grad_(), normal(650, 6, 7).to(device)
    half = 2 ** (r["bits"] - 1)
    log2_t = torch.tensor([r["log2_t"]], device=device, requires_grad=True)
    exponent = log2_t + (log2_t.ceil() - log2_t).detach()
    scale = torch.exp2(exponent) / half
    y = qops.learnable_fake_quantize(x, scale, torch.zeros_like(scale), -half, half - 1)
    y.backward(dy)
    assert scale.item() == 2.0 ** math.ceil(r["log2_t"]) / half, "exact"
    assert_bits_equal(y, array("TQ1_y").float())
    assert_bits_equal(x.grad, array("TQ1_dx").float())
    assert_within(log2_t.grad, r["dlog2t"], dy, scale.item() * half * math.log(2), "dlog2t")
