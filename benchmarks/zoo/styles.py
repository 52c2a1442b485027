"""Models in the styles that people write."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

Made = tuple[nn.Module, Any]


class Residual(nn.Module):
    """x + f(norm(x))."""

    def __init__(self, norm: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = norm, inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class NanoAttention(nn.Module):
    """The width of a head is that of the stream over the heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.n_head, self.n_embd = heads, width
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.n_head, width // self.n_head)
        q, k, v = (
            part.view(shape).transpose(1, 2)
            for part in self.c_attn(x).split(self.n_embd, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(
            mixed.transpose(1, 2).contiguous().view(batch, length, width)
        )


class FunctionalNorm(nn.Module):
    """nanoGPT's layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(width)),
            nn.Parameter(torch.zeros(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoGPT(nn.Module):
    """Tied embeddings, targets in the forward."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(40, 32),
                "wpe": nn.Embedding(16, 32),
                "h": nn.ModuleList(
                    nn.Sequential(
                        Residual(norm(32), NanoAttention(32, 4)),
                        Residual(norm(32), mlp(32, 96)),
                    )
                    for _ in range(3)
                ),
                "ln_f": norm(32),
            }
        )
        self.lm_head = nn.Linear(32, 40, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(
        self, ids: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](
            torch.arange(ids.shape[1], device=ids.device)
        )
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        loss = (
            None
            if targets is None
            else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        )
        return logits, loss


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class RotaryAttention(nn.Module):
    """Grouped queries, rotary positions as complex numbers, as Llama's reference does."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.wq = nn.Linear(width, heads * self.head_dim, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(heads * self.head_dim, width, bias=False)

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        angles = torch.outer(
            torch.arange(x.shape[1]).float(),
            100.0 ** -torch.arange(self.head_dim // 2).float(),
        )
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.rotate(
            self.wq(x).view(batch, length, self.heads, self.head_dim)
        ).transpose(1, 2)
        k = self.rotate(
            self.wk(x).view(batch, length, self.kv_heads, self.head_dim)
        ).transpose(1, 2)
        v = self.wv(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        times = self.heads // self.kv_heads
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
            nn.Linear(width, hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def llama() -> Made:
    blocks = [
        nn.Sequential(
            Residual(RMSNorm(32), RotaryAttention(32, 4, 2)),
            Residual(RMSNorm(32), SwiGLU(32, 64)),
        )
        for _ in range(3)
    ]
    net = nn.Sequential(
        nn.Embedding(40, 32), *blocks, RMSNorm(32), nn.Linear(32, 40, bias=False)
    )
    return net, torch.randint(0, 40, (2, 7))


class Sandwich(nn.Module):
    """x + norm(f(norm(x))), as Gemma 2 and OLMo 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after, self.inner = (
            nn.RMSNorm(width),
            nn.RMSNorm(width),
            mlp(width, 2 * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.after(self.inner(self.before(x)))


class ViT(nn.Module):
    """A class token, learned positions, nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.cls, self.pos = (
            nn.Parameter(torch.randn(1, 1, 32)),
            nn.Parameter(torch.randn(1, 17, 32)),
        )
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.encoder(x))[:, 0])


class Perceiver(nn.Module):
    """Learned queries read the input."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(6, 32))
        self.inp = nn.Linear(8, 32)
        self.cross = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.mlp, self.out = nn.LayerNorm(32), mlp(32, 64), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(len(x), -1, -1)
        x = self.inp(x)
        q = q + self.cross(q, x, x, need_weights=False)[0]
        return self.out((q + self.mlp(self.norm(q))).mean(1))


class PreAct(nn.Module):
    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = (
            nn.BatchNorm2d(into),
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
        )
        self.bn2, self.conv2 = (
            nn.BatchNorm2d(out),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
        )
        self.shortcut = (
            nn.Conv2d(into, out, 1, stride, bias=False)
            if stride > 1 or into != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        skip = self.shortcut(y) if self.shortcut is not None else x
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + skip


def wide_resnet() -> Made:
    stages = [
        PreAct(16, 32),
        PreAct(32, 32),
        PreAct(32, 32),
        PreAct(32, 64, 2),
        PreAct(64, 64),
        PreAct(64, 64),
    ]
    pool = [
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *stages, *pool), torch.randn(
        2, 3, 16, 16
    )


class UNet(nn.Module):
    """Skips by concatenation, transposed convolutions, group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.block(3, 16), self.block(16, 32)
        self.middle = self.block(32, 64)
        self.up2, self.up1 = (
            nn.ConvTranspose2d(64, 32, 2, 2),
            nn.ConvTranspose2d(32, 16, 2, 2),
        )
        self.back2, self.back1 = self.block(64, 32), self.block(32, 16)
        self.out = nn.Conv2d(16, 2, 1)

    @staticmethod
    def block(into: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(into, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.middle(F.max_pool2d(b, 2)))
        y = self.up1(self.back2(torch.cat([y, b], 1)))
        return self.out(self.back1(torch.cat([y, a], 1)))


class C2f(nn.Module):
    """YOLO's: a split by one number, and everything joined again."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.c = out // 2
        self.cv1, self.cv2 = (
            nn.Conv2d(into, 2 * self.c, 1),
            nn.Conv2d(4 * self.c, out, 1),
        )
        self.m = nn.ModuleList(
            nn.Conv2d(self.c, self.c, 3, padding=1) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).split((self.c, self.c), 1))
        for layer in self.m:
            parts.append(F.silu(layer(parts[-1])))
        return self.cv2(torch.cat(parts, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class Tagger(nn.Module):
    """Embeddings, a recurrent layer, scores."""

    def __init__(self, recurrent: Callable[..., nn.Module], **settings: Any) -> None:
        super().__init__()
        sides = 2 if settings.get("bidirectional") else 1
        self.embed = nn.Embedding(40, 12)
        self.rnn = recurrent(12, 16, batch_first=True, **settings)
        self.out = nn.Linear(settings.get("proj_size", 16) * sides, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rnn(self.embed(ids))[0])


class CellLoop(nn.Module):
    """A cell, called step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(5, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.cell.hidden_size)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state)


class VAE(nn.Module):
    def __init__(self, z_dim: int = 6) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.encode = nn.Sequential(
            nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2 * z_dim)
        )
        self.decode = nn.Sequential(nn.Linear(z_dim, 32), nn.ReLU(), nn.Linear(32, 20))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(x).chunk(2, -1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decode(mean + noise * (0.5 * logvar).exp()), mean, logvar


class Generator(nn.Module):
    """DCGAN's."""

    def __init__(self, nz: int = 10, ngf: int = 8) -> None:
        super().__init__()
        self.nz = nz
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 4, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(-1, self.nz, 1, 1))


def discriminator() -> Made:
    norm = parametrizations.spectral_norm
    net = nn.Sequential(
        norm(nn.Conv2d(3, 8, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        norm(nn.Conv2d(8, 16, 4, 2, 1)),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        norm(nn.Linear(256, 1)),
    )
    return net, torch.randn(2, 3, 16, 16)


class Causal(nn.Module):
    """A block of a temporal convolutional net, weight-normed."""

    def __init__(
        self, width: int, dilation: int, wrap: Callable[[nn.Module], nn.Module]
    ) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.one = wrap(nn.Conv1d(width, 24, 3, dilation=dilation))
        self.two = wrap(nn.Conv1d(24, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.one(F.pad(x, (self.pad, 0))))))


def tcn(wrap: Callable[[nn.Module], nn.Module]) -> Made:
    net = nn.Sequential(
        nn.Conv1d(2, 12, 1),
        *[Causal(12, 2**i, wrap) for i in range(3)],
        nn.Conv1d(12, 1, 1),
    )
    return net, torch.randn(2, 2, 20)


def pruned() -> Made:
    net = nn.Sequential(
        nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    for layer in (net[0], net[2]):
        prune.l1_unstructured(layer, "weight", 0.3)
    return net, torch.randn(4, 10)


class NoisyLinear(nn.Module):
    """Of a Rainbow agent; the noise of evaluation is none."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.mu, self.sigma = (
            nn.Parameter(torch.randn(out, into) / 5),
            nn.Parameter(torch.full((out, into), 0.02)),
        )
        self.bias = nn.Parameter(torch.zeros(out))
        self.register_buffer("noise", torch.randn(out, into))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mu + self.sigma * self.noise if self.training else self.mu
        return F.linear(x, weight, self.bias)


class Dueling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.value = nn.Sequential(NoisyLinear(32, 16), nn.ReLU(), NoisyLinear(16, 1))
        self.advantage = nn.Sequential(
            NoisyLinear(32, 16), nn.ReLU(), NoisyLinear(16, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(1, keepdim=True)


class GraphNet(nn.Module):
    """Messages along edges, summed at their ends."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.message = nn.ModuleList(nn.Linear(32, 24) for _ in range(2))
        self.update = nn.ModuleList(nn.Linear(40, 16) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.inp(x)
        source, target = edges
        for message, update in zip(self.message, self.update, strict=True):
            sent = F.relu(message(torch.cat([x[source], x[target]], -1)))
            summed = torch.zeros(
                len(x), sent.shape[-1], device=x.device, dtype=x.dtype
            ).index_add(0, target, sent)
            x = x + update(torch.cat([x, summed], -1))
        return self.out(x)


class SpectralConv(nn.Module):
    """A Fourier neural operator's."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)[..., : self.modes]
        mixed = torch.einsum(
            "bim,iom->bom", spectrum, torch.view_as_complex(self.weight)
        )
        return torch.fft.irfft(mixed, n=x.shape[-1])


class FNO(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.drop = nn.Conv1d(2, 12, 1), nn.Conv1d(12, 1, 1)
        self.spectral = nn.ModuleList(SpectralConv(12, 5) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.drop(x)


class MoE(nn.Module):
    """Every expert runs; a softmax weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.out = (
            nn.Linear(8, 24),
            nn.Linear(24, 3),
            nn.Linear(24, 4),
        )
        self.experts = nn.ModuleList(mlp(24, 40) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        weights = self.gate(x).softmax(-1)
        given = torch.stack([expert(x) for expert in self.experts], -1)
        return self.out(x + (given * weights.unsqueeze(-2)).sum(-1))


class Siren(nn.Module):
    """A field of positions: sines, and their input once more half-way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Linear(30, 32),
            nn.Linear(32, 32),
            nn.Linear(62, 32),
        )
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        scales = 2.0 ** torch.arange(5, device=x.device, dtype=x.dtype) * math.pi
        angles = (x[..., None] * scales).flatten(-2)
        code = torch.cat([angles.sin(), angles.cos()], -1)
        y = torch.sin(self.second(torch.sin(self.first(code))))
        return self.out(torch.sin(self.third(torch.cat([y, code], -1))))


class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi, self.rho = (
            nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 16)),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.phi(x)
        return self.rho(torch.cat([y.mean(1), y.amax(1)], -1))


class Mixer(nn.Module):
    """Norms, then positions and channels in turn."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = mlp(tokens, 12), mlp(width, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class FeatureTokens(nn.Module):
    """A table's columns as tokens, bare parameters for their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(6, 16)),
            nn.Parameter(torch.randn(6, 16)),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                Residual(nn.LayerNorm(16), NanoAttention(16, 2)),
                Residual(nn.LayerNorm(16), mlp(16, 32)),
            )
            for _ in range(2)
        )
        self.out = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1) * self.weight + self.bias
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(1))


def sequence(*layers: nn.Module, example: Tensor) -> Made:
    return nn.Sequential(*layers), example


def _ids() -> Tensor:
    return torch.randint(0, 40, (2, 7))


STYLES: dict[str, Callable[[], Made]] = {
    "mlp": lambda: sequence(
        nn.Linear(9, 32),
        nn.ReLU(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
        example=torch.randn(4, 9),
    ),
    "nanogpt": lambda: (NanoGPT(), (_ids(), _ids())),
    "nanogpt_functional_norm": lambda: (NanoGPT(FunctionalNorm), (_ids(),)),
    "llama": llama,
    "sandwich_norms": lambda: sequence(
        nn.Linear(5, 16),
        *[Sandwich(16) for _ in range(3)],
        nn.Linear(16, 3),
        example=torch.randn(2, 6, 5),
    ),
    "vit": lambda: (ViT(), torch.randn(2, 3, 16, 16)),
    "perceiver": lambda: (Perceiver(), torch.randn(2, 9, 8)),
    "feature_tokens": lambda: (FeatureTokens(), torch.randn(4, 6)),
    "mixer": lambda: sequence(
        nn.Linear(5, 24),
        *[Mixer(7, 24) for _ in range(3)],
        nn.LayerNorm(24),
        nn.Linear(24, 3),
        example=torch.randn(2, 7, 5),
    ),
    "transformer": lambda: (
        nn.Transformer(32, 4, 2, 2, 64, batch_first=True, norm_first=True),
        (torch.randn(2, 7, 32), torch.randn(2, 5, 32)),
    ),
    "wide_resnet": wide_resnet,
    "unet": lambda: (UNet(), torch.randn(2, 3, 16, 16)),
    "c2f": lambda: sequence(
        nn.Conv2d(3, 16, 3),
        nn.SiLU(),
        C2f(16, 32),
        C2f(32, 16),
        nn.Flatten(),
        nn.Linear(16 * 36, 4),
        example=torch.randn(2, 3, 8, 8),
    ),
    "squeeze_excite": lambda: sequence(
        nn.Conv2d(3, 16, 3),
        SqueezeExcite(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        example=torch.randn(2, 3, 9, 9),
    ),
    "group_norm_1": lambda: sequence(
        nn.Conv2d(3, 16, 3, padding=1),
        *[
            Residual(
                nn.GroupNorm(1, 16),
                nn.Sequential(nn.Conv2d(16, 24, 1), nn.GELU(), nn.Conv2d(24, 16, 1)),
            )
            for _ in range(3)
        ],
        nn.Conv2d(16, 2, 1),
        example=torch.randn(2, 3, 8, 8),
    ),
    "lstm": lambda: (Tagger(nn.LSTM), _ids()),
    "lstm_two_ways": lambda: (
        Tagger(nn.LSTM, num_layers=2, bidirectional=True),
        _ids(),
    ),
    "gru_deep": lambda: (Tagger(nn.GRU, num_layers=3), _ids()),
    "gru_cell": lambda: (CellLoop(), torch.randn(2, 6, 5)),
    "vae": lambda: (VAE(), torch.randn(4, 20)),
    "dcgan": lambda: (Generator(), torch.randn(4, 10)),
    "spectral_norm": discriminator,
    "weight_norm": partial(tcn, parametrizations.weight_norm),
    "weight_norm_old": partial(tcn, weight_norm),
    "pruned": pruned,
    "noisy_dueling": lambda: (Dueling(), torch.randn(4, 8)),
    "graph": lambda: (GraphNet(), (torch.randn(9, 6), torch.randint(0, 9, (2, 20)))),
    "fourier_operator": lambda: (FNO(), torch.randn(2, 2, 16)),
    "experts": lambda: (MoE(), torch.randn(4, 8)),
    "siren": lambda: (Siren(), torch.rand(5, 3)),
    "deep_sets": lambda: (DeepSets(), torch.randn(3, 6, 3)),
}
"""By name, what makes one with an example of its call."""
