"""What a convolution costs: parameters, products, bytes, sizes, receptive fields and floors, from shapes alone.

>>> import triton_conv as tc
>>> print(tc.cost.of(model, (1, 3, 224, 224), device="H100"))        # a table of layers
>>> tc.cost.standard_macs(5, 5, 3, 256, 8, 8), tc.cost.separable_macs(5, 5, 3, 256, 8, 8)
(1228800, 53952)
"""

from .fields import Axis, Field
from .formulas import (
    FORMULAS,
    Formula,
    Transposed,
    bilinear_weight,
    bottleneck_macs,
    deformable_offsets,
    depthwise_macs,
    depthwise_parameters,
    dilated_extent,
    evaluate,
    full_sharing,
    group_channel,
    grouped_macs,
    grouped_parameters,
    mobile_block_parameters,
    no_sharing,
    output_size,
    parameters,
    partial_sharing,
    receptive_field,
    separable_macs,
    separable_ratio,
    separable_weights,
    sharing_ratios,
    shuffle_unit_macs,
    shuffled_channel,
    standard_macs,
    transposed,
)
from .layers import Cost, Layer, find_device, summary
from .trace import of
from .variants import FORMS, Form, Sharing, compare, forms, sharing, sharing_table

__all__ = [
    "FORMS",
    "FORMULAS",
    "Axis",
    "Cost",
    "Field",
    "Form",
    "Formula",
    "Layer",
    "Sharing",
    "Transposed",
    "bilinear_weight",
    "bottleneck_macs",
    "compare",
    "deformable_offsets",
    "depthwise_macs",
    "depthwise_parameters",
    "dilated_extent",
    "evaluate",
    "find_device",
    "forms",
    "full_sharing",
    "group_channel",
    "grouped_macs",
    "grouped_parameters",
    "mobile_block_parameters",
    "no_sharing",
    "of",
    "output_size",
    "parameters",
    "partial_sharing",
    "receptive_field",
    "separable_macs",
    "separable_ratio",
    "separable_weights",
    "sharing",
    "sharing_ratios",
    "sharing_table",
    "shuffle_unit_macs",
    "shuffled_channel",
    "standard_macs",
    "summary",
    "transposed",
]
