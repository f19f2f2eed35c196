"""The networks that QAT steps and calibration are timed on, in plain torch.nn, each with a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Tensor]


def conv_bn_relu(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    """A convolution without bias, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def digits_cnn() -> Made:
    """Two convolutions on 64 images of 8 x 8: what the demo trains. Dispatch is most of its time."""
    layers = [*conv_bn_relu(1, 16), nn.MaxPool2d(2), *conv_bn_relu(16, 32), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)), torch.randn(64, 1, 8, 8)


def narrow_cnn() -> Made:
    """Four convolutions of 32 and 64 channels on 16 images of 32 x 32: elementwise work weighs as much as it can."""
    layers = [*conv_bn_relu(3, 32), *conv_bn_relu(32, 32), *conv_bn_relu(32, 64, 2), *conv_bn_relu(64, 64)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head), torch.randn(16, 3, 32, 32)


def wide_cnn() -> Made:
    """Three convolutions of 128 channels on 8 images of 28 x 28, as in a ResNet-50's middle: convolutions dominate."""
    layers = [*conv_bn_relu(3, 128), *conv_bn_relu(128, 128), *conv_bn_relu(128, 128)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *head), torch.randn(8, 3, 28, 28)


def without_batch_norm(make: Callable[[], Made]) -> Callable[[], Made]:
    """The same model without batch norm, which torch.ao's QAT modules fold at the price of two more passes."""

    def build() -> Made:
        model, x = make()
        return nn.Sequential(*(layer for layer in model.children() if not isinstance(layer, nn.BatchNorm2d))), x

    build.__doc__ = f"{make.__doc__} Without batch norm."
    return build


class Residual(nn.Module):
    """relu(body(x) + shortcut(x))."""

    def __init__(self, body: list[nn.Module], shortcut: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*shortcut)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """ResNet-18's: two 3x3 convolutions."""
    return _residual(conv_bn_relu(inputs, width, stride) + conv_bn_relu(width, width), inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """ResNet-50's: 1x1, 3x3 and 1x1 convolutions, the last to four times the width."""
    body = conv_bn_relu(inputs, width, kernel=1) + conv_bn_relu(width, width, stride)
    return _residual(body + conv_bn_relu(width, 4 * width, kernel=1), inputs, 4 * width, stride)


def _residual(body: list[nn.Module], inputs: int, outputs: int, stride: int) -> Residual:
    same = stride == 1 and inputs == outputs
    return Residual(body[:-1], [] if same else conv_bn_relu(inputs, outputs, stride, kernel=1)[:-1])


def resnet(
    block: Callable[[int, int, int], Residual], expansion: int, depths: tuple[int, ...], width: int = 64
) -> nn.Module:
    """A ResNet: a stem, four stages of blocks, a classifier of 10 classes (torchvision's has 1000)."""
    layers = [*conv_bn_relu(3, width, stride=2, kernel=7), nn.MaxPool2d(3, 2, padding=1)]
    channels = width
    for stage, depth in enumerate(depths):
        for index in range(depth):
            layers.append(block(channels, width << stage, 2 if stage and not index else 1))
            channels = (width << stage) * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet18() -> Made:
    """ResNet-18's shapes on 8 images of 64 x 64."""
    return resnet(basic_block, 1, (2, 2, 2, 2)), torch.randn(8, 3, 64, 64)


def resnet50() -> Made:
    """ResNet-50's shapes on 8 images of 64 x 64."""
    return resnet(bottleneck, 4, (3, 4, 6, 3)), torch.randn(8, 3, 64, 64)


class Attention(nn.Module):
    """Causal self-attention with one projection to queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project_in(x).chunk(3, -1)  # taken by index below: FX does not iterate
        q, k, v = (parts[i].unflatten(-1, (self.heads, -1)).transpose(1, 2) for i in range(3))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project_out(y.transpose(1, 2).flatten(2))


class GPTBlock(nn.Module):
    """LayerNorm, attention, LayerNorm, MLP, with residual connections: one layer of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LastToken(nn.Module):
    """What is at the last position of each sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


def gpt_block() -> Made:
    """One layer of GPT-2 small, width 768 and 12 heads, on 4 sequences of 128 tokens; 10 classes from the last one."""
    return nn.Sequential(GPTBlock(768, 12), LastToken(), nn.Linear(768, 10)), torch.randn(4, 128, 768)


SMALL_MODELS: dict[str, Callable[[], Made]] = {
    "digits": digits_cnn,
    "narrow": narrow_cnn,
    "narrow, no batch norm": without_batch_norm(narrow_cnn),
    "wide": wide_cnn,
    "wide, no batch norm": without_batch_norm(wide_cnn),
}
LARGE_MODELS: dict[str, Callable[[], Made]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "gpt block": gpt_block,
}
MODELS = SMALL_MODELS | LARGE_MODELS
