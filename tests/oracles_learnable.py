"""Independent reference for learnable_fake_quantize: NumPy, codes as the contract says, gradient terms in float64.

Codes and y are computed in float32 (float64 for a float64 x), operation by operation, so they and dx have no
tolerance. The terms of dscale and dzero_point are then taken and added in float64, and the sum of their magnitudes
gives the bound: 1e-6 of it, and one rounding to the parameter's dtype. A last part, below 1e-40 per element for any
scale and dy met in training, lets float32 products of subnormal size be off by one TINIEST each.

Nothing here imports qkernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tests.oracles import INTERPRETER, assert_bits_equal, assert_cast_equal, expand_channel, to_numpy32

RELATIVE = 1e-6  # of the sum of |terms|, numerics.md
TINIEST = 2.0**-149  # smallest float32: what one product that falls below 2**-126 may be off by


@dataclass(frozen=True)
class Learned:
    """What the operator and its backward have to give."""

    y: torch.Tensor  # before the one cast to x's dtype
    dx: torch.Tensor
    codes: np.ndarray  # unclamped, for failure texts
    inside: np.ndarray
    dscale: np.ndarray  # float64, (C,) or ()
    dzero_point: np.ndarray
    dscale_terms: np.ndarray  # sum of |terms|
    dzero_point_terms: np.ndarray
    dscale_underflow: np.ndarray


def learned_code(zero_point: torch.Tensor, quant_min: int, quant_max: int) -> np.ndarray:
    """clamp(rint(zero_point), quant_min, quant_max) as float32."""
    rounded = np.rint(to_numpy32(zero_point))
    return np.clip(rounded, np.float32(quant_min), np.float32(quant_max)).astype(np.float32)


def reference_learnable(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    axis: int | None = None,
    enabled: torch.Tensor | None = None,
    grad_mask: str = "rounded",
    learning: torch.Tensor | None = None,
) -> Learned:
    """Forward and backward from the contract; the arguments are those of the backward operator."""
    wide = x.dtype == torch.float64
    xs = x.detach().cpu().contiguous().numpy().copy() if wide else to_numpy32(x)
    s = expand_channel(to_numpy32(scale), xs.ndim, axis)
    z = expand_channel(learned_code(zero_point, quant_min, quant_max), xs.ndim, axis)
    low, high = np.float32(quant_min), np.float32(quant_max)
    on = enabled is None or bool(enabled.item())
    with np.errstate(all="ignore"):
        position = xs * (np.float32(1) / s)
        q = np.rint(position) + z
        if grad_mask == "lsq":
            inside = (position + z > low) & (position + z < high)
        else:
            inside = (q >= low) & (q <= high)
        # A code that is NaN although x is not (0 * inf, from a subnormal scale) becomes quant_min, outside.
        k = np.minimum(np.maximum(np.where(np.isnan(q), low, q), low), high) - z
        grid = k.astype(np.float64) * s.astype(np.float64)  # the term is rounded once, not y before it
        # Per tensor torch multiplies in float32 even for a float64 x.
        y = k.astype(np.float32) * s if axis is None else k * s.astype(k.dtype)
        y = np.where(np.isnan(xs), np.nan, y.astype(xs.dtype)).astype(xs.dtype)
    dy = dy.detach().cpu().contiguous()
    live = on and (learning is None or bool(learning.item()))
    sums = _sums(_terms(dy, xs, q, s, k, grid, inside), xs.ndim, axis, grad_factor, live)
    return Learned(
        torch.from_numpy(y if on else xs), dy * torch.from_numpy(np.array(inside)) if on else dy, q, inside, *sums
    )


def _terms(
    dy: torch.Tensor,
    xs: np.ndarray,
    q: np.ndarray,
    s: np.ndarray,
    k: np.ndarray,
    grid: np.ndarray,
    inside: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The addends of dscale and dzero_point, in float64, and of dscale's underflow; none where the code is NaN."""
    g, wide_s = dy.double().numpy(), s.astype(np.float64)
    with np.errstate(all="ignore"):
        slope = np.where(inside, (grid - xs.astype(np.float64)) / wide_s, k)
        number = ~np.isnan(q)
        dscale = np.where(number, g * slope, 0.0)
        dzero_point = np.where(number & ~inside, -wide_s * g, 0.0)
        # (y - x) may be off by TINIEST, and (y - x) * dy too, before either is divided by the scale.
        underflow = np.where(number & inside, TINIEST * (1 + np.abs(g)) / np.abs(wide_s), 0.0)
    return dscale, dzero_point, underflow


def _sums(
    terms: tuple[np.ndarray, np.ndarray, np.ndarray], ndim: int, axis: int | None, grad_factor: float, live: bool
) -> list[np.ndarray]:
    """Sums of the terms and of their magnitudes, all times grad_factor; zeros where nothing is learned."""
    dims = None if axis is None else tuple(d for d in range(ndim) if d != axis % ndim)
    with np.errstate(all="ignore"):
        sums = [np.asarray(t.sum(axis=dims)) * grad_factor for t in terms[:2]]
        sums += [np.asarray(np.abs(t).sum(axis=dims)) * abs(grad_factor) for t in terms]
    return sums if live else [np.zeros_like(t) for t in sums]


def assert_sum_close(
    actual: torch.Tensor, want: np.ndarray, terms: np.ndarray, context: str = "", underflow: np.ndarray | float = 0.0
) -> None:
    """A gradient of scale or zero point is within 1e-6 of the sum of |terms|, and one rounding to its dtype.

    Where the exact sum is infinite or NaN the result has to be the same, not merely not finite.
    """
    got = actual.detach().cpu().double().numpy().reshape(-1)
    want, terms = np.asarray(want).reshape(-1), np.asarray(terms).reshape(-1)
    assert got.shape == want.shape, f"{context}: {got.shape} instead of {want.shape}"
    info = torch.finfo(actual.dtype)
    # Half a unit in the last place; a whole one where the interpreter truncates to bfloat16.
    units = 1.0 if INTERPRETER and actual.dtype == torch.bfloat16 else 0.5
    with np.errstate(all="ignore"):
        bound = RELATIVE * terms + np.asarray(underflow).reshape(-1)
        bound = bound + units * info.eps * (np.abs(want) + bound) + info.tiny * info.eps
        fine = np.isfinite(want) & (np.abs(got - want) <= bound)
        same = ~np.isfinite(want) & ((got == want) | (np.isnan(got) & np.isnan(want)))
    bad = ~(fine | same)
    if bad.any():
        i = int(np.argmax(bad))
        raise AssertionError(
            f"{context}: {int(bad.sum())} of {bad.size} out of bound; first at {i}: got {got[i]!r}, want {want[i]!r}, "
            f"|terms| {terms[i]!r}, off by {abs(got[i] - want[i]) / terms[i] if terms[i] else np.inf:.3g} of them"
        )


def assert_learnable(
    y: torch.Tensor | None,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    want: Learned,
    qparams: tuple[torch.Tensor, torch.Tensor] | None = None,
    context: str = "",
) -> None:
    """y and dx bit for bit, the other gradients within their bound and of their parameter's shape and dtype."""
    if y is not None:
        assert_cast_equal(y, want.y, codes=want.codes, context=f"{context} y")
    if gradients is None:
        return
    dx, dscale, dzero_point = gradients
    assert_bits_equal(dx, want.dx, codes=want.codes, context=f"{context} dx")
    for gradient, parameter in zip((dscale, dzero_point), qparams or (), strict=False):
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        assert gradient.dtype == dtype and gradient.shape == parameter.shape, f"{context}: {gradient.dtype}"
    assert_sum_close(dscale, want.dscale, want.dscale_terms, f"{context} dscale", want.dscale_underflow)
    assert_sum_close(dzero_point, want.dzero_point, want.dzero_point_terms, f"{context} dzero_point")
