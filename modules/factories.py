"""torch.ao's factories, qconfigs and qconfig mappings, built from our classes.

Each is derived from torch.ao's own by exchanging the classes, so that the arguments cannot differ. What has no
counterpart here stays torch.ao's.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch.ao.quantization import QConfigMapping
from torch.ao.quantization import fake_quantize as stock_fake_quantize
from torch.ao.quantization import observer as stock_observer
from torch.ao.quantization import qconfig as stock_qconfig
from torch.ao.quantization import qconfig_mapping as stock_mapping
from torch.ao.quantization.qconfig import QConfig

from qkernels.modules.counterparts import counterparts


def counterpart(factory: Any) -> Any:
    """Our class or factory in place of a stock one.

    Args:
        factory: a class, a `with_args` factory of torch.ao or torchao, or a functools.partial.

    Returns:
        The same with every class that has a counterpart exchanged, in keyword arguments (`observer=...`) too; the
        argument itself if there is none to exchange.
    """
    if isinstance(factory, type):
        return counterparts().get(factory, factory)
    if isinstance(factory, functools.partial):
        keywords = {name: counterpart(value) for name, value in factory.keywords.items()}
        return functools.partial(counterpart(factory.func), *factory.args, **keywords)
    if hasattr(factory, "p") and hasattr(factory, "callable_args"):  # the partial wrapper of torch.ao or torchao
        exchanged = copy.copy(factory)
        exchanged.p = counterpart(factory.p)
        exchanged.callable_args = dict(factory.callable_args)
        return exchanged
    return factory


def swap_qconfig(qconfig: QConfig | None) -> QConfig | None:
    """The same qconfig with our factories; None stays None."""
    return None if qconfig is None else type(qconfig)(*(counterpart(factory) for factory in qconfig))


def swap_qconfig_mapping(mapping: QConfigMapping) -> QConfigMapping:
    """A new mapping with our factories in every qconfig. The argument is left as it was.

    Args:
        mapping: torch.ao's, as prepare_fx and prepare_qat_fx take it.
    """
    swapped = copy.copy(mapping)
    swapped.global_qconfig = swap_qconfig(mapping.global_qconfig)
    for name, qconfigs in vars(mapping).items():
        if isinstance(qconfigs, dict):
            setattr(swapped, name, type(qconfigs)((key, swap_qconfig(q)) for key, q in qconfigs.items()))
    return swapped


default_observer = counterpart(stock_observer.default_observer)
default_placeholder_observer = counterpart(stock_observer.default_placeholder_observer)
default_per_channel_weight_observer = counterpart(stock_observer.default_per_channel_weight_observer)
default_histogram_observer = counterpart(stock_observer.default_histogram_observer)
default_debug_observer = counterpart(stock_observer.default_debug_observer)
default_weight_observer = counterpart(stock_observer.default_weight_observer)
default_dynamic_quant_observer = counterpart(stock_observer.default_dynamic_quant_observer)
default_float_qparams_observer = counterpart(stock_observer.default_float_qparams_observer)
default_float_qparams_observer_4bit = counterpart(stock_observer.default_float_qparams_observer_4bit)
default_fixed_qparams_range_neg1to1_observer = counterpart(stock_observer.default_fixed_qparams_range_neg1to1_observer)
default_fixed_qparams_range_0to1_observer = counterpart(stock_observer.default_fixed_qparams_range_0to1_observer)
default_symmetric_fixed_qparams_observer = counterpart(stock_observer.default_symmetric_fixed_qparams_observer)
default_affine_fixed_qparams_observer = counterpart(stock_observer.default_affine_fixed_qparams_observer)
default_reuse_input_observer = counterpart(stock_observer.default_reuse_input_observer)
weight_observer_range_neg_127_to_127 = counterpart(stock_observer.weight_observer_range_neg_127_to_127)
per_channel_weight_observer_range_neg_127_to_127 = counterpart(
    stock_observer.per_channel_weight_observer_range_neg_127_to_127
)

default_fake_quant = counterpart(stock_fake_quantize.default_fake_quant)
default_weight_fake_quant = counterpart(stock_fake_quantize.default_weight_fake_quant)
default_dynamic_fake_quant = counterpart(stock_fake_quantize.default_dynamic_fake_quant)
default_fixed_qparams_range_neg1to1_fake_quant = counterpart(
    stock_fake_quantize.default_fixed_qparams_range_neg1to1_fake_quant
)
default_fixed_qparams_range_0to1_fake_quant = counterpart(
    stock_fake_quantize.default_fixed_qparams_range_0to1_fake_quant
)
default_symmetric_fixed_qparams_fake_quant = counterpart(stock_fake_quantize.default_symmetric_fixed_qparams_fake_quant)
default_affine_fixed_qparams_fake_quant = counterpart(stock_fake_quantize.default_affine_fixed_qparams_fake_quant)
default_per_channel_weight_fake_quant = counterpart(stock_fake_quantize.default_per_channel_weight_fake_quant)
default_embedding_fake_quant = counterpart(stock_fake_quantize.default_embedding_fake_quant)
default_embedding_fake_quant_4bit = counterpart(stock_fake_quantize.default_embedding_fake_quant_4bit)
default_histogram_fake_quant = counterpart(stock_fake_quantize.default_histogram_fake_quant)
default_fused_act_fake_quant = counterpart(stock_fake_quantize.default_fused_act_fake_quant)
default_fused_wt_fake_quant = counterpart(stock_fake_quantize.default_fused_wt_fake_quant)
default_fused_per_channel_wt_fake_quant = counterpart(stock_fake_quantize.default_fused_per_channel_wt_fake_quant)
fused_wt_fake_quant_range_neg_127_to_127 = counterpart(stock_fake_quantize.fused_wt_fake_quant_range_neg_127_to_127)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = counterpart(
    stock_fake_quantize.fused_per_channel_wt_fake_quant_range_neg_127_to_127
)

default_qconfig = swap_qconfig(stock_qconfig.default_qconfig)
default_debug_qconfig = swap_qconfig(stock_qconfig.default_debug_qconfig)
default_per_channel_qconfig = swap_qconfig(stock_qconfig.default_per_channel_qconfig)
default_dynamic_qconfig = swap_qconfig(stock_qconfig.default_dynamic_qconfig)
float16_dynamic_qconfig = swap_qconfig(stock_qconfig.float16_dynamic_qconfig)
float16_static_qconfig = swap_qconfig(stock_qconfig.float16_static_qconfig)
per_channel_dynamic_qconfig = swap_qconfig(stock_qconfig.per_channel_dynamic_qconfig)
float_qparams_weight_only_qconfig = swap_qconfig(stock_qconfig.float_qparams_weight_only_qconfig)
float_qparams_weight_only_qconfig_4bit = swap_qconfig(stock_qconfig.float_qparams_weight_only_qconfig_4bit)
default_quint8_weight_qconfig = swap_qconfig(stock_qconfig.default_quint8_weight_qconfig)
default_qat_qconfig = swap_qconfig(stock_qconfig.default_qat_qconfig)
default_dynamic_qat_qconfig = swap_qconfig(stock_qconfig.default_dynamic_qat_qconfig)
default_weight_only_qconfig = swap_qconfig(stock_qconfig.default_weight_only_qconfig)
default_activation_only_qconfig = swap_qconfig(stock_qconfig.default_activation_only_qconfig)
default_qat_qconfig_v2 = swap_qconfig(stock_qconfig.default_qat_qconfig_v2)
default_reuse_input_qconfig = swap_qconfig(stock_qconfig.default_reuse_input_qconfig)
default_symmetric_qnnpack_qconfig = swap_qconfig(stock_qconfig.default_symmetric_qnnpack_qconfig)
default_per_channel_symmetric_qnnpack_qconfig = swap_qconfig(
    stock_qconfig.default_per_channel_symmetric_qnnpack_qconfig
)
default_symmetric_qnnpack_qat_qconfig = swap_qconfig(stock_qconfig.default_symmetric_qnnpack_qat_qconfig)
default_per_channel_symmetric_qnnpack_qat_qconfig = swap_qconfig(
    stock_qconfig.default_per_channel_symmetric_qnnpack_qat_qconfig
)
default_embedding_qat_qconfig = swap_qconfig(stock_qconfig.default_embedding_qat_qconfig)
default_embedding_qat_qconfig_4bit = swap_qconfig(stock_qconfig.default_embedding_qat_qconfig_4bit)


def _swapping(stock: Callable[..., Any], swap: Callable[[Any], Any]) -> Callable[..., Any]:
    """A torch.ao function whose result is swapped; its signature, name and documentation."""

    @functools.wraps(stock)
    def function(*args: Any, **kwargs: Any) -> Any:
        return swap(stock(*args, **kwargs))

    return function


get_default_qconfig = _swapping(stock_qconfig.get_default_qconfig, swap_qconfig)
get_default_qat_qconfig = _swapping(stock_qconfig.get_default_qat_qconfig, swap_qconfig)
get_default_qconfig_mapping = _swapping(stock_mapping.get_default_qconfig_mapping, swap_qconfig_mapping)
get_default_qat_qconfig_mapping = _swapping(stock_mapping.get_default_qat_qconfig_mapping, swap_qconfig_mapping)
