"""Parts that many layers and models share, one idea a file."""

from glocal.nn.blocks.drop_path import DropPath, drop_path, drop_rates
from glocal.nn.blocks.ffn import ConvMlp, DepthwiseConv, Mlp
from glocal.nn.blocks.init import init_linears
from glocal.nn.blocks.layer_scale import gamma, scaled
from glocal.nn.blocks.layout import LayerNorm2d, SameConv2d, conv, pad_multiple, pad_to, to_nchw, to_nhwc
from glocal.nn.blocks.norm import LayerNorm
from glocal.nn.blocks.patch import NormConvMerge, PatchEmbed, PatchMerge, StridedConvEmbed, StridedConvMerge
from glocal.nn.blocks.position import ConvPosition
from glocal.nn.blocks.relative import relative_index, resize_flat_table, resize_table, window_bias
from glocal.nn.blocks.squeeze import SqueezeExcite

__all__ = [
    "ConvMlp",
    "ConvPosition",
    "DepthwiseConv",
    "DropPath",
    "LayerNorm",
    "LayerNorm2d",
    "Mlp",
    "NormConvMerge",
    "PatchEmbed",
    "PatchMerge",
    "SameConv2d",
    "SqueezeExcite",
    "StridedConvEmbed",
    "StridedConvMerge",
    "conv",
    "drop_path",
    "drop_rates",
    "gamma",
    "init_linears",
    "pad_multiple",
    "pad_to",
    "relative_index",
    "resize_flat_table",
    "resize_table",
    "scaled",
    "to_nchw",
    "to_nhwc",
    "window_bias",
]
