"""HistogramObserver against torch.ao's: construction, batches, qparams, checkpoints, swapping, compile."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.ao.quantization as stock
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels
import qkernels.modules as ours
from qkernels.ops.registration import LIBRARY  # noqa: F401  (the operators)
from tests.histogram_batches import KINDS, Batch, batches, stock_step
from tests.modules import support as s

pytestmark = pytest.mark.interpreter

INF = float("inf")
FINITE = tuple(kind for kind in KINDS if kind not in ("nothing finite",))
# In the interpreter a loop over the old bins is slow where one new bin takes most of them.
BINS = (64, 100) if s.INTERPRETER else (2048, 2048, 512, 100)


def new_pair(device: torch.device, **kwargs: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    return s.pair("HistogramObserver", device, **kwargs)


def step(mine: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor, device: torch.device) -> None:
    """Both observe the batch; same state, same qparams."""
    mine_x = x.to(device)
    with s.quiet():
        assert mine(mine_x) is mine_x
    stock_step(theirs, x)
    s.check_state(mine, theirs)
    s.check_qparams(mine, theirs)


# ------------------------------------------------------------------------------------------ construction


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bins": 100},
        {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric},
        {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric, "reduce_range": True},
        {"quant_min": 0, "quant_max": 15},
        {"dtype": torch.uint16},
        {"dtype": torch.qint32},
        {"eps": 1e-3},
        {"factory_kwargs": {"dtype": torch.float64}},
    ],
    ids=str,
)
def test_construction(kwargs: dict, device: torch.device) -> None:
    mine, theirs = new_pair(torch.device("cpu"), **kwargs)
    s.check_state(mine, theirs)
    assert repr(mine) == repr(theirs)
    for name in ("bins", "upsample_rate", "dst_nbins", "quant_min", "quant_max", "dtype", "qscheme", "reduce_range"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert isinstance(mine, stock.HistogramObserver)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"qscheme": torch.per_channel_affine},
        {"is_dynamic": True},
        {"dtype": torch.float8_e4m3fn},
        {"dtype": torch.float32},
        {"quant_min": 3, "quant_max": 200},
        {"quant_min": -5, "quant_max": -1},
    ],
    ids=str,
)
def test_what_torch_ao_refuses(kwargs: dict) -> None:
    with s.quiet(), pytest.raises(Exception) as theirs:
        stock.HistogramObserver(**kwargs)
    with s.quiet(), pytest.raises(type(theirs.value)) as mine:
        ours.HistogramObserver(**kwargs)
    assert str(mine.value) == str(theirs.value)


def test_with_args_and_positional_arguments() -> None:
    factory = ours.HistogramObserver.with_args(reduce_range=True)
    assert factory().reduce_range and factory() is not factory()
    assert ours.HistogramObserver(16, torch.qint8, torch.per_tensor_symmetric).bins == 16


def test_asked_before_the_first_batch(device: torch.device) -> None:
    mine, theirs = new_pair(device)
    with pytest.warns(UserWarning) as said:
        scale, zero_point = mine.calculate_qparams()
    with pytest.warns(UserWarning) as said_ref:
        scale_ref, zero_point_ref = theirs.calculate_qparams()
    assert [str(w.message) for w in said] == [str(w.message) for w in said_ref]
    s.check_same(scale, scale_ref, "scale")
    s.check_same(zero_point, zero_point_ref, "zero_point")


def test_another_number_of_bins_is_torch_aos_error(device: torch.device) -> None:
    mine, theirs = new_pair(device)
    for observer in (mine, theirs):
        observer(torch.linspace(-1, 1, 9).to(observer.histogram.device))
        observer.bins = 7
    with pytest.raises(AssertionError) as error_ref:
        theirs.calculate_qparams()
    with pytest.raises(AssertionError) as error:
        mine.calculate_qparams()
    assert str(error.value) == str(error_ref.value)


# ------------------------------------------------------------------------------------------ batches


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


# ------------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_in_both_directions(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64)
    for seed in range(2):
        step(mine, theirs, Batch("normal", 500, 1.0 + seed, seed=seed).tensor(), device)
    mine, theirs = s.crossed(mine, theirs, lambda: new_pair(device, bins=64))
    s.check_state(mine, theirs)
    step(mine, theirs, Batch("normal", 500, 1.5, seed=7).tensor(), device)


def test_an_old_checkpoint(device: torch.device) -> None:
    """Before version 3 an observer that saw nothing had a range without elements."""
    for observer in new_pair(device, bins=8):
        old = observer.state_dict()
        old._metadata[""]["version"] = 2
        old["min_val"] = old["max_val"] = torch.empty(0)
        observer.load_state_dict(old)
        assert (observer.min_val.item(), observer.max_val.item()) == (INF, -INF)


def test_a_loaded_state_drops_the_remainder(device: torch.device) -> None:
    mine, _ = new_pair(device, bins=4)
    fresh = copy.deepcopy(mine.state_dict())
    mine.histogram_remainder.fill_(1.0)
    mine.load_state_dict(fresh)
    assert not mine.histogram_remainder.any()
    assert "histogram_remainder" not in fresh


def test_copies(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64)
    step(mine, theirs, Batch("normal", 500).tensor(), device)
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    for copied in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), torch.load(file, weights_only=False)):
        reference = copy.deepcopy(theirs)
        step(copied, reference, Batch("normal", 500, 1.4, seed=3).tensor(), device)


def test_reset_parameters(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64, eps=1e-3)
    mine(torch.linspace(-1, 1, 9, device=device))
    mine.to_empty(device=device)
    mine.reset_parameters()
    s.check_state(mine, theirs)
    with pytest.raises(NotImplementedError):  # as torch.ao's
        mine.reset_min_max_vals()


# ------------------------------------------------------------------------------------------ swap


def test_swap_keeps_state_and_numbers(device: torch.device) -> None:
    theirs = stock.HistogramObserver(bins=64)
    stock_step(theirs, Batch("normal", 300).tensor())
    mine = copy.deepcopy(theirs).to(device)
    (entry,) = qkernels.swap(mine).swapped
    assert entry.new.endswith("HistogramObserver") and type(mine) is ours.HistogramObserver
    s.check_state(mine, theirs)
    step(mine, theirs, Batch("normal", 300, 2.0, seed=1).tensor(), device)


def test_verify_and_freeze() -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(), stock.HistogramObserver(bins=64), stock.FakeQuantize())
    report = qkernels.verify(model, [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    assert report, str(report)
    qkernels.freeze(model)
    before = s.snapshot(model)
    model(torch.randn(9) * 100)
    s.check_untouched(model, before)


def test_factories() -> None:
    observer, theirs = ours.default_histogram_observer(), stock.default_histogram_observer()
    assert type(observer) is ours.HistogramObserver
    assert repr(observer) == repr(theirs) and observer.quant_max == theirs.quant_max
    quantizer = ours.default_histogram_fake_quant()
    assert type(quantizer) is ours.FakeQuantize
    assert type(quantizer.activation_post_process) is ours.HistogramObserver
    assert type(ours.get_default_qconfig("x86").activation()) is ours.HistogramObserver


def test_inside_fake_quantizers(device: torch.device) -> None:
    """Ours in ours, ours in torch.ao's, eagerly."""
    theirs = stock.FakeQuantize(observer=stock.HistogramObserver, bins=64)
    quantizers = [
        library.FakeQuantize(observer=ours.HistogramObserver, bins=64).to(device) for library in (ours, stock)
    ]
    for seed in range(4):
        if seed == 3:
            for module in (theirs, *quantizers):
                module.disable_observer()
        x = Batch("normal", 200, 1.0 + seed % 2, seed=seed).tensor()
        expected = theirs(x)
        for module in quantizers:
            s.check_bits(module(x.to(device)), expected, "y")
            s.check_state(module, theirs)


# ------------------------------------------------------------------------------------------ what runs


class _Calls(TorchDispatchMode):
    """Counts ATen's calls, those inside our operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.aten = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            self.aten += 1
            return func(*args, **(kwargs or {}))
        with self:
            return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))


@pytest.mark.skipif(s.INTERPRETER, reason="about the CPU's code alone")
@pytest.mark.parametrize("kind", ["normal", "relu", "heavy", "uniform", "constant", "sparse", "offset"])
def test_qparams_take_at_most_30_calls(kind: str) -> None:
    """torch.ao: 597 for a ReLU's output, 888 for normal values. A walk to its end is 10 chunks."""
    mine, theirs = new_pair(torch.device("cpu"))
    step(mine, theirs, Batch(kind, 20000).tensor(), torch.device("cpu"))
    with _Calls() as calls:
        mine.calculate_qparams()
    assert 5 <= calls.aten <= 30
    if kind in ("normal", "relu"):
        with _Calls() as calls:
            theirs.calculate_qparams()
        assert calls.aten > 300


@pytest.mark.skipif(s.INTERPRETER, reason="about the CPU's code alone")
def test_the_longest_search_takes_30_calls_too() -> None:
    """Values so small that every error is 0: the walk is taken to its end, 2047 candidates."""
    mine, _ = new_pair(torch.device("cpu"))
    mine(Batch("uniform", 20000, 1e-16).tensor())
    with _Calls() as calls:
        mine.calculate_qparams()
    assert calls.aten <= 30


@pytest.mark.skipif(s.INTERPRETER, reason="compiles")
def test_fullgraph_and_no_recompilation(device: torch.device) -> None:
    mine, theirs = new_pair(device, bins=64)
    compiled = torch.compile(mine, fullgraph=True)
    for seed in range(4):
        x = Batch("normal", 300, 1.0 + seed % 3, seed=seed).tensor()
        compiled(x.to(device))
        stock_step(theirs, x)
        s.check_state(mine, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    qparams = torch.compile(lambda: mine.calculate_qparams(), fullgraph=True)
    scale, zero_point = qparams()
    scale_ref, zero_point_ref = theirs.calculate_qparams()
    s.check_same(scale, scale_ref, "scale")
    s.check_same(zero_point, zero_point_ref, "zero_point")


@pytest.mark.skipif(s.INTERPRETER, reason="exports")
def test_operators_pass_opcheck_and_export(device: torch.device) -> None:
    x, ends = torch.linspace(-1, 1, 99, device=device), [torch.tensor(v, device=device) for v in (-1.0, 1.0)]
    torch.library.opcheck(torch.ops.qkernels.histogram.default, (x, 8, *ends))
    histogram = torch.ops.qkernels.histogram.default(x, 8, *ends).float()
    torch.library.opcheck(torch.ops.qkernels.search_histogram_range.default, (histogram, *ends, 256))
    state = (histogram.clone(), *(end.clone() for end in ends), torch.zeros(8, device=device))
    torch.library.opcheck(torch.ops.qkernels.observe_histogram_.default, (x * 2, *state))
    program = torch.export.export(new_pair(device, bins=64)[0], (x,))
    assert "observe_histogram_" in program.graph_module.code


# ------------------------------------------------------------------------------------------ merge, two passes


def observed(device: torch.device, *seeds: int, bins: int = 64) -> torch.nn.Module:
    observer, _ = new_pair(device, bins=bins)
    for seed in seeds:
        observer(Batch("normal", 400, 1.0 + seed % 3, seed=seed).tensor().to(device))
    return observer


def test_merged_range_and_mass_are_one_process(device: torch.device) -> None:
    parts = [observed(device, 0, 1), observed(device), observed(device, 2, 3)]
    whole = observed(device, 0, 1, 2, 3)
    parts[0].merge_(*parts[1:])
    merged = parts[0]
    s.check_same(merged.min_val, whole.min_val.cpu(), "min")
    s.check_same(merged.max_val, whole.max_val.cpu(), "max")
    assert merged.histogram.sum().item() == whole.histogram.sum().item() == 1600
    # A part goes whole to the bin of its middle, once here and up to three times there: by at most a bin either way.
    away = (merged.histogram.cumsum(0) - whole.histogram.cumsum(0)).abs()
    assert away.max() <= 2 * whole.histogram.max()
    scale, whole_scale = merged.calculate_qparams()[0], whole.calculate_qparams()[0]
    assert abs(scale.item() / whole_scale.item() - 1) < 0.05


def test_two_passes_are_exact(device: torch.device) -> None:
    """Two processes that agree on the range, then count: their sum is torch.histc of everything."""
    batches_of = [[Batch("normal", 400, 1.0 + i, seed=i).tensor() for i in part] for part in ((0, 1), (2, 3))]
    parts = [observed(device, bins=64) for _ in batches_of]
    for observer, xs in zip(parts, batches_of, strict=True):
        for x in xs:
            observer(x.to(device))
        observer.forget_counts()
    low = min(observer.min_val.item() for observer in parts)
    high = max(observer.max_val.item() for observer in parts)
    for observer, xs in zip(parts, batches_of, strict=True):
        observer.min_val.fill_(low), observer.max_val.fill_(high)
        for x in xs:
            observer(x.to(device))
    parts[0].merge_(parts[1])
    everything = torch.cat([x for xs in batches_of for x in xs])
    s.check_same(parts[0].histogram, torch.histc(everything, 64, low, high), "histogram")


def test_merging_keeps_large_counts_and_refuses_other_shapes(device: torch.device) -> None:
    mine, other = observed(device, bins=4), observed(device, bins=4)
    for observer in (mine, other):
        observer(torch.tensor([0.0, 1.0], device=device))
        observer.histogram[0] = 2.0**24
    other(torch.zeros(3, device=device))
    mine.merge_(other)
    assert mine.histogram[0].item() + mine.histogram_remainder[0].item() == 2**25 + 3
    before = s.snapshot(mine)
    with pytest.raises(
        ValueError, match=r"HistogramObserver.merge_: every histogram must have shape \(4,\); got \(5,\)"
    ):
        mine.merge_(other, observed(device, bins=5))
    s.check_untouched(mine, before)


def test_merging_channels(device: torch.device) -> None:
    xs = [torch.randn(3, 50, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2)]
    parts = [ours.PerChannelHistogramObserver(bins=16).to(device) for _ in xs]
    for observer, x in zip(parts, xs, strict=True):
        observer(x)
    parts[0].merge_(parts[1])
    assert parts[0].histogram.sum(1).tolist() == [100.0] * 3
    s.check_same(parts[0].max_val, torch.stack(xs).amax((0, 2)).cpu(), "max")


# ------------------------------------------------------------------------------------------ per channel


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("qscheme", [torch.per_channel_affine, torch.per_channel_symmetric], ids=str)
def test_per_channel(axis: int, qscheme: torch.qscheme, device: torch.device) -> None:
    """Every channel is an observer of its own."""
    kwargs = {"bins": 50, "dtype": torch.qint8}
    mine = ours.PerChannelHistogramObserver(ch_axis=axis, qscheme=qscheme, **kwargs).to(device)
    scheme = torch.per_tensor_affine if qscheme == torch.per_channel_affine else torch.per_tensor_symmetric
    shape = (3, 4, 5)
    singles = [stock.HistogramObserver(qscheme=scheme, **kwargs) for _ in range(shape[axis])]
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        mine(x.to(device))
        for channel, single in enumerate(singles):
            stock_step(single, x.select(axis, channel).reshape(-1))
    scale, zero_point = mine.calculate_qparams()
    expected = [single.calculate_qparams() for single in singles]
    s.check_same(scale, torch.cat([pair[0] for pair in expected]), "scale")
    s.check_same(zero_point, torch.cat([pair[1] for pair in expected]), "zero_point")
    s.check_same(mine.histogram, torch.stack([single.histogram for single in singles]), "histogram")


def test_per_channel_state(device: torch.device) -> None:
    mine = ours.PerChannelHistogramObserver(bins=16, ch_axis=1).to(device)
    with pytest.warns(UserWarning, match="must run observer"):
        assert mine.calculate_qparams()[0].tolist() == [1.0]
    x = Batch("normal", 60).tensor().reshape(5, 3, 4).to(device)
    mine(x)
    fresh = ours.PerChannelHistogramObserver(bins=16, ch_axis=1).to(device)
    fresh.load_state_dict(mine.state_dict())
    mine(x * 2), fresh(x * 2)
    s.check_state(fresh.cpu(), mine.cpu())
    mine.reset_min_max_vals()
    assert mine.histogram.shape == (0, 16)
    mine(torch.ones(2, 7))
    assert mine.min_val.shape == (7,)
    with pytest.raises(ValueError, match=r"histogram must have shape \(C, bins\) with C = 3; got \(7, 16\)"):
        mine(torch.ones(2, 3))
    with pytest.raises(ValueError, match="PerChannelHistogramObserver: axis must be in"):
        mine(torch.ones(2))


def test_per_channel_arguments() -> None:
    with pytest.raises(NotImplementedError, match="qscheme must be per_channel_affine or per_channel_symmetric"):
        ours.PerChannelHistogramObserver(qscheme=torch.per_tensor_affine)
    with pytest.raises(NotImplementedError, match="is_dynamic must be False"):
        ours.PerChannelHistogramObserver(is_dynamic=True)


def test_per_channel_inside_a_fake_quantizer(device: torch.device) -> None:
    kwargs = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_channel_symmetric}
    module = ours.FakeQuantize(observer=ours.PerChannelHistogramObserver, bins=64, ch_axis=0, **kwargs).to(device)
    x = Batch("normal", 300).tensor().reshape(3, 100).to(device)
    y = module(x)
    assert module.scale.shape == (3,)
    assert (y - x).abs().max() <= x.abs().max()
    expected = torch.fake_quantize_per_channel_affine(
        x.cpu(), module.scale.cpu(), module.zero_point.cpu().to(torch.int32), 0, -128, 127
    )
    s.check_same(y, expected, "y")
