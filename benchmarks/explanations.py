"""Why a row is below 1.0: the reasons, in words that the code bears out, by case, size and peer. CPU only so far.

Nothing has been measured on a GPU, so no reason is claimed there.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers import COMPILED

SMALL_ELEMENTS = 1 << 14  # up to which the calls weigh more than the elements

CALL = (
    "few elements, so the call is the time: ours is Python (argument checks, the operator, its ATen calls), "
    "torch's is C++ behind one call"
)
ATEN_CALLS = (
    "few elements, so the calls are the time, on both sides a row of ATen calls; ours goes through a custom operator "
    "with argument checks in Python besides"
)
NO_BRANCH = (
    "few elements, so ATen calls are the time: ours computes the case of no observation with where(), torch.ao reads "
    "the values on the host and branches, which CUDA graphs and compiled code cannot"
)
AUTOGRAD = (
    "few elements, so the calls are the time: ours goes through Python (argument checks, the choice of a path, "
    "operators) where torch's operators, backward too, are C++"
)
SAME_REDUCTION = "the same ATen reduction reads x once on both sides; ours adds an operator call in Python"
STORED_MASK = (
    "torch multiplies dy by a mask that its forward stored, one pass; ours keeps no mask and derives it from x in "
    "several ATen passes"
)
ONE_PASS_COUNT = (
    "ours compares with the range, finds bins and counts in ATen passes of their own; torch.histc does it all in one "
    "C++ loop"
)
NO_DIFFERENCE = "no difference was measured: the middle rounds fall on both sides of 1"
SAME_CONVOLUTIONS = "both sides run the same convolutions, which take most of the time; the observers are the rest"
ONE_LOOP = (
    "compiled, the peer is one generated C++ loop; ours is called eagerly here, as several ATen passes, and becomes "
    "such a loop under torch.compile too"
)

# By case: of small tensors, and of larger ones. None: not known to lose.
_OF_CASE: dict[str, tuple[str | None, str | None]] = {
    "aminmax": (CALL, SAME_REDUCTION),
    "aminmax axis=1": (CALL, None),
    "aminmax axis=0": (CALL, None),
    "aminmax axis=-1": (CALL, None),
    "observe_minmax_": (ATEN_CALLS, SAME_REDUCTION),
    "choose_qparams, 64 channels": (NO_BRANCH, None),
    "update_qparams_": (ATEN_CALLS, SAME_REDUCTION),
    "fake_quantize": (CALL, None),
    "fake_quantize_backward": (CALL, STORED_MASK),
    "fake_quantize fwd+bwd": (AUTOGRAD, None),
    "fake_quantize symmetric fwd+bwd": (AUTOGRAD, None),
    "fake_quantize axis=1 fwd+bwd": (AUTOGRAD, None),
    "fake_quantize axis=0 fwd+bwd": (AUTOGRAD, None),
    "fake_quantize axis=-1 fwd+bwd": (AUTOGRAD, None),
    "learnable_fake_quantize fwd+bwd": (AUTOGRAD, None),
    "learnable_fake_quantize axis=0 fwd+bwd": (AUTOGRAD, None),
    "learnable_fake_quantize axis=1 fwd+bwd": (AUTOGRAD, None),
    "LearnableFakeQuantize learning step": (AUTOGRAD, None),
    "LearnableFakeQuantize per channel learning step": (AUTOGRAD, None),
    "MinMaxObserver": (ATEN_CALLS, SAME_REDUCTION),
    "MovingAverageMinMaxObserver": (ATEN_CALLS, SAME_REDUCTION),
    "PerChannelMinMaxObserver ch_axis=1": (ATEN_CALLS, None),
    "MovingAveragePerChannelMinMaxObserver": (ATEN_CALLS, None),
    "MovingAverageMinMaxObserver.calculate_qparams": (NO_BRANCH, None),
    "PerChannelMinMaxObserver.calculate_qparams, 256 channels": (NO_BRANCH, None),
    "FakeQuantize step": (AUTOGRAD, None),
    "FakeQuantize per channel step": (AUTOGRAD, None),
    "FusedMovingAvgObsFakeQuantize step": (AUTOGRAD, None),
    "FixedQParamsFakeQuantize step": (AUTOGRAD, None),
    "histogram, 2048 bins": (CALL, ONE_PASS_COUNT),
    "HistogramObserver": (ATEN_CALLS, None),
    "HistogramObserver.calculate_qparams": (ATEN_CALLS, None),
    "FakeQuantize HistogramObserver step": (AUTOGRAD, None),
    "ResNet-18 calibration": (SAME_CONVOLUTIONS, SAME_CONVOLUTIONS),
}


def explanation(case: str, elements: int, peer: str, device_type: str) -> str | None:
    """Why ours may be slower than a peer in a case; None where no reason is known.

    Args:
        case: its name.
        elements: of the input.
        peer: whom it lost to.
        device_type: "cpu" or "cuda".
    """
    if device_type != "cpu":
        return None
    if peer == COMPILED:
        return ONE_LOOP
    small, large = _OF_CASE.get(case, (None, None))
    return small if elements <= SMALL_ELEMENTS else large


def explanations(
    case: str, elements: int, lost_to: Sequence[str], clearly_lost_to: Sequence[str], device_type: str
) -> str | None:
    """The reasons for all peers lost to, each once; None where a reason is missing for one of them."""
    reasons = [
        explanation(case, elements, peer, device_type) if peer in clearly_lost_to else NO_DIFFERENCE for peer in lost_to
    ]
    known = [reason for reason in reasons if reason is not None]
    return "; ".join(dict.fromkeys(known)) if known and len(known) == len(reasons) else None
