"""Models as users write them; nothing in them knows of growth. Each entry: a factory and an example input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    def __init__(
        self,
        act: Callable[[], nn.Module] = nn.ReLU,
        norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 12, bias=bias)
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.act = act()
        self.fc2 = nn.Linear(12, 9, bias=bias)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.fc2(self.act(self.norm(self.fc1(x))))))


class BNConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8 * 4 * 4, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class BasicBlock(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        return F.relu(skip + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet18(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        into = width
        for i in range(4):
            out = width * 2**i
            blocks = nn.Sequential(
                BasicBlock(into, out, 1 if i == 0 else 2), BasicBlock(out, out, 1)
            )
            setattr(self, f"layer{i + 1}", blocks)
            into = out
        self.fc = nn.Linear(into, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class InvertedResidual(nn.Module):
    def __init__(self, into: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = into * expand
        self.residual = stride == 1 and into == out
        self.conv = nn.Sequential(
            nn.Conv2d(into, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()
        )
        self.blocks = nn.Sequential(
            InvertedResidual(6, 6, 1, 2),
            InvertedResidual(6, 8, 2, 3),
            InvertedResidual(8, 8, 1, 3),
        )
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, into: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = (
            nn.BatchNorm2d(into),
            nn.Conv2d(into, 2 * growth, 1, bias=False),
        )
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(2 * growth),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.block = nn.Sequential(
            DenseLayer(6, 4), DenseLayer(10, 4), DenseLayer(14, 4)
        )
        self.norm, self.fc = nn.BatchNorm2d(18), nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.block(self.stem(x)))).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = (
            nn.Conv2d(3, 5, 3, padding=1),
            nn.Conv2d(5, 7, 3, padding=1),
        )
        self.up = nn.ConvTranspose2d(7, 6, 2, stride=2)
        self.merge, self.out = nn.Conv2d(11, 5, 3, padding=1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.avg_pool2d(a, 2)))
        return self.out(F.relu(self.merge(torch.cat([a, self.up(b)], 1))))


class GLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = (
            nn.Linear(10, 16),
            nn.Linear(8, 12),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, -1)
        return self.down(F.glu(self.mid(value * F.silu(gate)), -1))


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(10, 6)
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t(), self.bias)


class Attention(nn.Module):
    """nanoGPT's way: one fused projection, head count and width as integers of the module."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (
            y.view(b, t, self.n_head, c // self.n_head).transpose(1, 2)
            for y in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class ResidualBlock(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + update


class Residual(nn.Module):
    """A stem, two pre-norm blocks and a head of three classes."""

    def __init__(self, stem: nn.Module, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = (
            nn.LayerNorm(width),
            Attention(width, heads),
            nn.LayerNorm(width),
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(13, 8), nn.Embedding(11, 8)
        self.h = nn.ModuleList(GPTBlock(8, 2) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(8), nn.Linear(8, 13, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class GroupNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.conv2, self.norm2 = (
            nn.Conv2d(8, 6, 3, padding=1),
            nn.InstanceNorm2d(6, affine=True),
        )
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            F.silu(self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))
        )


class NormedMLP(nn.Module):
    """Layer norm and RMS norm directly on a hidden width."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(10, 8), nn.LayerNorm(8)
        self.fc2, self.norm2 = nn.Linear(8, 6), nn.RMSNorm(6, eps=1e-5)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm2(self.fc2(F.gelu(self.norm1(self.fc1(x)))))))


class BareParameters(nn.Module):
    """Parameters without a module, einsum, a weight used twice, and a functional call with another module's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = (
            nn.Parameter(torch.randn(7, 10) / 3),
            nn.Parameter(torch.randn(7) / 3),
        )
        self.w2 = nn.Parameter(torch.randn(5, 7) / 3)
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("bi,oi->bo", x, self.w1) + self.b1)
        h = torch.tanh(h @ self.w2.t())
        h = torch.tanh(self.shared(torch.tanh(self.shared(h))))
        return F.linear(h, self.head.weight, self.head.bias)


class Conv1dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv1d(3, 6, 3, padding=1),
            nn.Conv1d(6, 8, 3, padding=1, groups=2),
        )
        self.prelu, self.head = nn.PReLU(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.prelu(self.conv2(F.leaky_relu(self.conv1(x)))).mean(-1))


class Conv3dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = (
            nn.Conv3d(2, 4, 3, padding=1),
            nn.BatchNorm3d(4),
            nn.Conv3d(4, 3, 1),
        )
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(3 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.head(self.drop(F.max_pool3d(x, 2).flatten(1)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = (
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            nn.LayerNorm(width),
        )
        self.pwconv1, self.pwconv2 = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.gamma = nn.Parameter(1e-6 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))).permute(
            0, 3, 1, 2
        )


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(ConvNeXtBlock(6), ConvNeXtBlock(6)),
                nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8)),
            ]
        )
        self.down, self.norm, self.head = (
            nn.Conv2d(6, 8, 2, 2),
            nn.LayerNorm(8),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[1](self.down(self.stages[0](self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(
            nn.Linear(tokens, 10), nn.GELU(), nn.Linear(10, tokens)
        )
        self.channels = nn.Sequential(
            nn.Linear(width, 14), nn.GELU(), nn.Linear(14, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 4, 4)
        self.blocks, self.head = (
            nn.Sequential(MixerBlock(4, 6), MixerBlock(4, 6)),
            nn.Linear(6, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Encoder(nn.Module):
    """torch's own encoder layers; post-norm as they come."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def _images(size: int = 8) -> Tensor:
    return torch.randn(3, 3, size, size)


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (MLP, lambda: torch.randn(3, 10)),
    "mlp_norm": (lambda: MLP(norm=True, bias=False), lambda: torch.randn(3, 10)),
    "bn_conv": (BNConvNet, lambda: _images(16)),
    "resnet18": (ResNet18, lambda: _images(32)),
    "mobilenet": (MobileNet, lambda: _images(16)),
    "densenet": (DenseNet, _images),
    "unet": (UNet, _images),
    "glu": (GLU, lambda: torch.randn(3, 10)),
    "tied": (TiedAutoencoder, lambda: torch.randn(3, 10)),
    "nanogpt": (NanoGPT, lambda: torch.randint(0, 13, (3, 7))),
    "group_norm": (GroupNormNet, _images),
    "normed_mlp": (NormedMLP, lambda: torch.randn(3, 10)),
    "bare": (BareParameters, lambda: torch.randn(3, 10)),
    "conv1d": (Conv1dNet, lambda: torch.randn(3, 3, 9)),
    "convnext": (ConvNeXt, _images),
    "mixer": (Mixer, _images),
    "pre_norm": (lambda: Encoder(True), lambda: torch.randn(3, 7, 5)),
    "post_norm": (lambda: Encoder(False), lambda: torch.randn(3, 7, 5)),
    "conv3d": (Conv3dNet, lambda: torch.randn(3, 2, 4, 2, 4)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A model with random weights, norm statistics included, and its example input."""
    factory, example = ZOO[name]
    model = factory().to(dtype)
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
            assert tensor_name
    x = example()
    return model, x.to(dtype) if x.is_floating_point() else x
