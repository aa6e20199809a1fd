"""Small networks that between them use every operation the engine knows, and some that it must hand to autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(weight: list[list[float]], bias: list[float] | None = None) -> nn.Conv2d:
    """A convolution of single positions, for arithmetic done by hand."""
    layer = nn.Conv2d(len(weight[0]), len(weight), 1, bias=bias is not None)
    layer.weight.data = torch.tensor(weight).to(layer.weight)[:, :, None, None]
    if layer.bias is not None:
        layer.bias.data = torch.tensor(bias).to(layer.weight)
    return layer


def randomised(model: nn.Module) -> nn.Module:
    """Batch norms with statistics, gains of both signs and shifts, as a trained network would have."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(outputs)
    )


class Head(nn.Module):
    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(x), 1))


class Function(nn.Module):
    """A network whose forward is a function of its modules."""

    def __init__(self, forward: Callable[[nn.ModuleDict, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.parts, x)


def chain(*, inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 6), nn.ReLU(inplace), *conv_bn(6, 8), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Dropout(),
        nn.Conv2d(8, 7, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), nn.ReLU6(inplace),
        nn.Conv2d(7, 6, 3), nn.ReLU(inplace), Head(6),
    )  # fmt: skip


def activations(*, inplace: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2, inplace), nn.Conv2d(4, 5, 3), nn.SiLU(inplace),
        nn.Conv2d(5, 4, 1), nn.GELU(approximate="tanh"), nn.Conv2d(4, 4, 1), nn.Hardswish(inplace),
        nn.Conv2d(4, 5, 1), nn.ELU(0.7, inplace), nn.Conv2d(5, 4, 1), nn.Mish(inplace), nn.Conv2d(4, 4, 1),
        nn.PReLU(4), nn.Conv2d(4, 4, 1), nn.Softplus(), nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1), nn.Sigmoid(),
        nn.Conv2d(4, 4, 1), nn.Hardsigmoid(inplace), nn.Conv2d(4, 4, 1), nn.Hardtanh(-0.5, 0.5, inplace),
        nn.Conv2d(4, 4, 1), nn.ReLU6(inplace), nn.ReLU(), nn.ReLU6(), nn.Conv2d(4, 6, 1),
        nn.GELU(), nn.CELU(0.5), nn.SELU(), nn.Conv2d(6, 4, 3, padding="same"), Head(4),
    )  # fmt: skip


def overlapping_pools(kernel: int = 3, stride: int = 2, *, ceil: bool = False) -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 6), nn.ReLU(), nn.MaxPool2d(kernel, stride, kernel // 2, ceil_mode=ceil),
        *conv_bn(6, 6, 3), nn.ReLU6(), nn.MaxPool2d((2, kernel), (2, stride), ceil_mode=ceil),
        nn.Conv2d(6, 5, 2, stride=2, padding=1), nn.ReLU(), Head(5),
    )  # fmt: skip


class Residual(nn.Module):
    """ResNet's stem and blocks: overlapping pooling, skips, a projection, and an option-A shortcut."""

    def __init__(self, *, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.a1, self.a2 = conv_bn(4, 4), conv_bn(4, 4)
        self.b1, self.b2 = conv_bn(4, 6, stride=2), conv_bn(6, 6)
        self.down = conv_bn(4, 6, 1, stride=2)
        self.c1, self.c2 = conv_bn(6, 10, stride=2), conv_bn(10, 10)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        out = self.a2(self.relu(self.a1(x)))
        out += x
        x = self.relu(out)
        x = self.relu(self.b2(self.relu(self.b1(x))) + self.down(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = self.relu(self.c2(self.relu(self.c1(x))) + short)
        return self.head(x)


class PreActivation(nn.Module):
    """Skips that pass no activation: derivatives of two paths add with their signs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, padding=1, stride=2)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x - 0.5 * self.bn1(x)  # the same source by two paths
        x = x + self.conv1(F.relu(self.bn2(x)))
        x = self.conv2(x * torch.sigmoid(x) / 2 + 1)
        return self.head(F.relu(x))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.BatchNorm2d(c), nn.Conv2d(c, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1)])
            for c in (4, 7, 10)
        )
        self.norm, self.transition = nn.BatchNorm2d(13), nn.Conv2d(13, 6, 1)
        self.last = nn.Conv2d(6, 5, 3)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)]
        for norm1, conv1, norm2, conv2 in self.layers:
            features.append(conv2(F.relu(norm2(conv1(F.relu(norm1(torch.cat(features, 1))))))))
        x = F.avg_pool2d(self.transition(F.relu(self.norm(torch.cat(features, 1)))), 2)
        return self.head(self.last(F.leaky_relu(x)))


class Inception(nn.Module):
    """Branches and concatenation; max and average pooling of stride 1 before conv convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 5)
        self.b1, self.b2, self.b3, self.b4 = (conv_bn(5, 3, 1), conv_bn(5, 4, 3), conv_bn(5, 2, 1), conv_bn(5, 3, 1))
        self.factor = nn.Conv2d(12, 4, (1, 5), padding=(0, 2))
        self.side = nn.Conv2d(12, 4, 1)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branches = [
            self.b1(x),
            self.b2(x),
            self.b3(F.max_pool2d(x, 3, 1, 1)),
            self.b4(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
        ]
        x = F.relu(torch.cat(branches, 1))
        return self.head(torch.cat([self.factor(x), self.side(x)], 1))


class Inverted(nn.Module):
    """MobileNet blocks: depthwise and grouped convolution, ReLU6, squeeze-excite gate, hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 4)
        self.expand, self.deep = conv_bn(4, 8, 1), conv_bn(8, 16, 3, groups=8)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = conv_bn(16, 4, 1)
        self.grouped = conv_bn(4, 6, 3, groups=2, stride=2)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        inner = F.hardswish(self.deep(F.relu6(self.expand(x))))
        gate = F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(inner, 1)))))
        x = x + self.project(gate * inner)
        return self.head(F.relu(self.grouped(x)))


class Reused(nn.Module):
    """One convolution called three times, and a functional one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, stride=2)
        for _ in range(3):
            x = self.act(self.conv(x)) + x
        return self.head(x)


class Aliased(nn.Module):
    """Writes through views and shared memory, which no record of a single tensor sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.conv3, self.conv4 = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        half = x[:, :3]
        half.mul_(2).relu_()
        x = self.conv2(x)
        buffer = torch.zeros_like(x)
        buffer[:, 2:] = x[:, :4]
        x = self.conv3(buffer)
        kept = x.detach()
        x = self.conv4(F.relu(x) + kept.round())
        return self.head(x)


class Shuffled(nn.Module):
    """Operations that the closed form does not cover: each must fall back to autograd and still be right."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.conv3, self.conv4 = nn.Conv2d(4, 4, 3, stride=2), nn.Conv2d(8, 4, 3)
        self.conv5, self.conv6 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 2)
        self.conv7 = nn.Conv2d(1, 4, 1)
        self.head = Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.conv2(x))
        x = self.conv3(self.up(x))
        x = self.conv4(torch.cat([F.relu(x), F.relu(-x)], 1))  # each source channel reaches two channels
        x = self.conv5(F.max_pool2d(F.silu(x), 3, 1, 1))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.conv6(F.max_pool2d(x, 3, 1, 1))
        return self.head(self.conv7(F.pixel_shuffle(x, 2)))


class Split(nn.Module):
    """Channel and position slices, reshapes, means, clamps, asymmetric padding, and cropping."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(4, 3, 3), nn.Conv2d(2, 3, 1)
        self.conv2, self.conv3 = nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        left, right = torch.split(x, [4, 2], dim=1)
        left = self.left(F.pad(left, (0, 3, 1, 0)))
        right = self.right(right[:, :, 1:-1, :])[:, :, : left.shape[2], : left.shape[3]]
        left = F.pad(left, (0, right.shape[3] - left.shape[3], 0, right.shape[2] - left.shape[2]), value=0.7)
        x = torch.cat([left, right], 1).clamp(-0.3, 0.4)
        n, c, h, w = x.shape
        x = self.conv2(F.hardtanh(x.flatten(2).view(n, c, h, w) * torch.linspace(-1, 1, c).to(x).view(c, 1, 1)))
        x = self.conv3(x.mean((2, 3), keepdim=True).abs().sub(0.1).exp())
        return self.head(x.mean((2, 3)))


class Perceptron(nn.Module):
    """Linear maps as route layers, behind a flattening and batch norm over features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc1, self.bn1, self.fc2, self.fc3 = nn.LazyLinear(7), nn.BatchNorm1d(7), nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = F.relu(self.bn1(self.fc1(torch.flatten(x, 1))))
        return self.fc3(F.gelu(self.fc2(x)))


def tokens() -> nn.Module:
    """A mixer over tokens: linear maps on (N, T, C), normalisation over positions, and a skip."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["embed"](x).flatten(2).transpose(1, 2)
        x = x + parts["fc2"](F.gelu(parts["fc1"](parts["norm"](x.transpose(1, 2)).transpose(1, 2))))
        return parts["head"](x.mean(1))

    return Function(
        forward,
        embed=nn.Conv2d(3, 4, 4, stride=4),
        norm=nn.InstanceNorm1d(4, affine=True),
        fc1=nn.Linear(4, 6),
        fc2=nn.Linear(6, 4),
        head=nn.Linear(4, 5),
    )


def dynamic() -> nn.Module:
    """A kernel that is computed from an earlier layer's output, over all samples."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        z = parts["a"](x)
        kernel = F.relu(z).mean((0, 2, 3)).view(1, 4, 1, 1) * x.new_ones(3, 4, 3, 3)
        return parts["head"](F.conv2d(F.relu(parts["b"](x)), kernel))

    return Function(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), head=Head(3))


CLOSED: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "chain in place": lambda: chain(inplace=True),
    "activations": activations,
    "activations in place": lambda: activations(inplace=True),
    "overlapping pools": overlapping_pools,
    "overlapping pools, ceil": lambda: overlapping_pools(ceil=True),
    "residual": Residual,
    "residual out of place": lambda: Residual(inplace=False),
    "pre-activation": PreActivation,
    "dense": Dense,
    "inception": Inception,
    "inverted": Inverted,
    "reused": Reused,
    "split": Split,
}
"""Networks whose every edge has a closed form."""

MIXED: dict[str, Callable[[], nn.Module]] = {
    "aliased": Aliased,
    "shuffled": Shuffled,
    "wide pools": lambda: overlapping_pools(3, 1),
}
"""Networks with edges that only the Jacobian path computes."""
