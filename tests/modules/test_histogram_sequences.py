"""HistogramObserver against torch.ao's over sequences of batches: state and qparams after each."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.histogram_batches import KINDS, Batch, batches
from tests.modules import support as s
from tests.modules.histogram_support import new_pair, step

pytestmark = pytest.mark.interpreter

INF = float("inf")
FINITE = tuple(kind for kind in KINDS if kind not in ("nothing finite",))
# In the interpreter a loop over the old bins is slow where one new bin takes most of them.
BINS = (64, 100) if s.INTERPRETER else (2048, 2048, 512, 100)


@s.property_settings(30, 4)
@given(
    sequence=st.lists(batches(FINITE), min_size=1, max_size=4),
    kwargs=st.fixed_dictionaries(
        {"bins": st.sampled_from(BINS)},
        optional={
            "qscheme": st.sampled_from(s.PER_TENSOR_SCHEMES),
            "dtype": st.sampled_from((torch.quint8, torch.qint8, torch.int8, torch.uint16)),
            "reduce_range": st.just(True),
            "eps": st.sampled_from((1e-3, 1e-12)),
        },
    ),
)
def test_sequences(sequence: list[Batch], kwargs: dict, device: torch.device) -> None:
    try:
        mine, theirs = new_pair(device, **kwargs)
    except AssertionError:  # torch.ao's own limits
        return
    for batch in sequence:
        step(mine, theirs, batch.tensor(), device)


@pytest.mark.parametrize(
    "values", [[2.0] * 9, [0.0] * 9, [1.5], [0.0, 1e-45], [0.0, 3e38], [-3e38, 3e38], [-1e-4, 2e-4]]
)
@pytest.mark.parametrize("bins", [100 if s.INTERPRETER else 2048, 3])
def test_extreme_ranges(values: list[float], bins: int, device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=bins)
    step(mine, theirs, torch.tensor(values), device)
    step(mine, theirs, torch.tensor(values) * 0.5, device)


def test_an_empty_batch_and_one_of_integers(device: torch.device) -> None:
    mine, _ = new_pair(device)
    before = s.snapshot(mine)
    empty = torch.empty(0, 3, device=device)
    assert mine(empty) is empty
    with pytest.raises(TypeError, match="observe_histogram_: x must be float16"):
        mine(torch.arange(3, device=device))
    s.check_untouched(mine, before)


def test_what_half_makes_of_it(device: torch.device) -> None:
    mine, _ = new_pair(device, bins=64)
    mine.half()
    for size in (1.0, 2.0):
        mine(torch.linspace(-size, size, 65, device=device))
    assert mine.histogram.dtype == torch.float16
    assert mine.histogram.sum().item() == 130
    scale, _ = mine.calculate_qparams()
    assert scale.dtype == torch.float16 and 0.01 < scale.item() < 0.02


def test_buffers_are_written_in_place(device: torch.device) -> None:
    mine, _ = new_pair(device, bins=64)
    pointers = [b.data_ptr() for b in mine.buffers()]
    for size in (1.0, 2.0, 0.5):
        mine(torch.linspace(-size, size, 65, device=device))
    assert [b.data_ptr() for b in mine.buffers()] == pointers


def test_x_that_requires_a_gradient(device: torch.device) -> None:
    mine, _ = new_pair(device, bins=64)
    x = torch.linspace(-1, 1, 9, device=device, requires_grad=True)
    mine(x * 2)
    assert not any(b.requires_grad for b in mine.buffers())


@pytest.mark.skipif(s.INTERPRETER, reason="kernels drop infinities without telling the host")
def test_infinities_are_warned_of(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("kernels drop infinities without telling the host")
    mine, theirs = new_pair(device)
    for observer in (mine, theirs):
        with pytest.warns(UserWarning, match="torch.inf detected in input tensor, ignoring input"):
            observer(torch.tensor([1.0, INF, 2.0]))
    s.check_state(mine, theirs)


def test_more_than_2_to_the_24(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=4)
    for observer in (mine, theirs):
        place = observer.histogram.device
        observer(torch.tensor([0.0, 1.0], device=place))
        observer.histogram[0] = 2.0**24
        for _ in range(4):
            observer(torch.zeros(1, device=place))
    assert theirs.histogram[0].item() == 2**24
    assert mine.histogram[0].item() == 2**24 + 4
    again = copy.deepcopy(mine)
    again(torch.zeros(2, device=device))
    assert again.histogram[0].item() == 2**24 + 6
