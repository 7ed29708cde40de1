"""The networks of other projects, written anew from what is published of them: their module names,
so that their checkpoints' keys, and what their forward computes. Nothing of this package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every norm of all of them


def randomised(model: nn.Module, seed: int = 3) -> nn.Module:
    """The model in eval mode with every trained parameter random, norms and biases too."""
    random = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                scale = 0.2 if p.dim() == 1 else p[0].numel() ** -0.5
                p.copy_(torch.randn(p.shape, generator=random) * scale)
                if id(p) in norms:
                    p.add_(0.7)
    return model.eval()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax over the keys of q^T k / sqrt(C), for (N, C, L) each."""
    weights = torch.softmax(q.mT @ k / math.sqrt(q.shape[1]), dim=-1)
    return v @ weights.mT


# ---- w86763777/pytorch-ddpm ----------------------------------------------------------------------


class W86Attention(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(GROUPS, c)
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.proj_q, self.proj_k, self.proj_v))
        return x + self.proj(attend(q, k, v).view_as(x))


class W86Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, temb: int, attended: bool):
        super().__init__()
        self.block1 = nn.Sequential(
            nn.GroupNorm(GROUPS, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(temb, c_out))
        self.block2 = nn.Sequential(
            nn.GroupNorm(GROUPS, c_out), nn.SiLU(), nn.Dropout(0.1),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attn = W86Attention(c_out) if attended else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.block1(x) + self.temb_proj(temb)[:, :, None, None]
        return self.attn(self.block2(h) + self.shortcut(x))


class W86Resample(nn.Module):
    def __init__(self, c: int, stride: int):
        super().__init__()
        self.main = nn.Conv2d(c, c, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        up = self.main.stride == (1, 1)
        return self.main(F.interpolate(x, scale_factor=2) if up else x)


class W86(nn.Module):
    """w86763777/pytorch-ddpm's UNet."""

    def __init__(
        self, T: int = 50, ch: int = 32, ch_mult=(1, 2), attn=(1,), num_res_blocks: int = 1
    ):
        super().__init__()
        rates = torch.exp(-math.log(10000) * torch.arange(0, ch, 2) / ch)
        angles = torch.arange(T)[:, None] * rates
        table = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)
        self.time_embedding = nn.Module()
        self.time_embedding.timembedding = nn.Sequential(
            nn.Embedding.from_pretrained(table), nn.Linear(ch, 4 * ch), nn.SiLU(),
            nn.Linear(4 * ch, 4 * ch),
        )  # fmt: skip
        self.head = nn.Conv2d(3, ch, 3, padding=1)
        self.downblocks, self.upblocks = nn.ModuleList(), nn.ModuleList()
        skips, c = [ch], ch
        for i, mult in enumerate(ch_mult):
            for _ in range(num_res_blocks):
                self.downblocks.append(W86Block(c, ch * mult, 4 * ch, i in attn))
                c = ch * mult
                skips.append(c)
            if i < len(ch_mult) - 1:
                self.downblocks.append(W86Resample(c, 2))
                skips.append(c)
        self.middleblocks = nn.ModuleList(
            (W86Block(c, c, 4 * ch, True), W86Block(c, c, 4 * ch, False))
        )
        for i, mult in reversed(list(enumerate(ch_mult))):
            for _ in range(num_res_blocks + 1):
                self.upblocks.append(W86Block(c + skips.pop(), ch * mult, 4 * ch, i in attn))
                c = ch * mult
            if i > 0:
                self.upblocks.append(W86Resample(c, 1))
        self.tail = nn.Sequential(nn.GroupNorm(GROUPS, c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.time_embedding.timembedding(t)
        hs = [self.head(x)]
        for layer in self.downblocks:
            hs.append(layer(hs[-1], temb))
        h = hs[-1]
        for layer in self.middleblocks:
            h = layer(h, temb)
        for layer in self.upblocks:
            h = layer(torch.cat((h, hs.pop()), 1) if isinstance(layer, W86Block) else h, temb)
        return self.tail(h)


# ---- tqch/ddpm-torch -----------------------------------------------------------------------------


class TqchNorm(nn.GroupNorm):
    def __init__(self, c: int):
        super().__init__(GROUPS, c, eps=1e-6)


class TqchAttention(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.norm = TqchNorm(c)
        self.project_in, self.project_out = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        q, k, v = self.project_in(self.norm(x)).flatten(2).chunk(3, dim=1)
        return x + self.project_out(attend(q, k, v).view_as(x))


class TqchBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, embed: int):
        super().__init__()
        self.norm1, self.conv1 = TqchNorm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.fc = nn.Linear(embed, c_out)
        self.norm2, self.conv2 = TqchNorm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.fc(F.silu(t_emb))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.skip(x)


class TqchSequential(nn.Sequential):
    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, t_emb)
        return x


class Tqch(nn.Module):
    """tqch/ddpm-torch's UNet."""

    def __init__(
        self, hid_channels: int = 32, ch_multipliers=(1, 2), num_res_blocks: int = 1,
        apply_attn=(False, True), in_channels: int = 3,
    ):  # fmt: skip
        super().__init__()
        hid, top = hid_channels, len(ch_multipliers) - 1
        widths = [hid * m for m in ch_multipliers]
        self.hid, self.blocks = hid, num_res_blocks
        self.embed = nn.Sequential(nn.Linear(hid, 4 * hid), nn.SiLU(), nn.Linear(4 * hid, 4 * hid))
        self.in_conv = nn.Conv2d(in_channels, hid, 3, padding=1)
        self.downsamples, self.upsamples = nn.ModuleDict(), nn.ModuleDict()

        def block(level: int, c_in: int) -> nn.Module:
            one = TqchBlock(c_in, widths[level], 4 * hid)
            attended = apply_attn[level]
            return TqchSequential(one, TqchAttention(widths[level])) if attended else one

        for i, c in enumerate(widths):
            before = widths[i - 1] if i else hid
            down = nn.ModuleList(block(i, c if j else before) for j in range(num_res_blocks))
            if i < top:
                pad = nn.ZeroPad2d((0, 1, 0, 1))  # TF's SAME for an even size
                down.append(nn.Sequential(pad, nn.Conv2d(c, c, 3, stride=2)))
            self.downsamples[f"level_{i}"] = down
            after = widths[min(i + 1, top)]
            ends = [after + c, *[2 * c] * (num_res_blocks - 1), before + c]
            up = nn.ModuleList(block(i, c_in) for c_in in ends)
            if i > 0:
                up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
            self.upsamples[f"level_{i}"] = up
        c = widths[-1]
        self.middle = TqchSequential(
            TqchBlock(c, c, 4 * hid), TqchAttention(c), TqchBlock(c, c, 4 * hid)
        )
        self.out_conv = nn.Sequential(
            TqchNorm(hid), nn.SiLU(), nn.Conv2d(hid, in_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.hid // 2
        angles = t[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
        t_emb = self.embed(torch.cat((angles.sin(), angles.cos()), dim=1))
        hs = [self.in_conv(x)]
        for level in self.downsamples.values():
            for j, layer in enumerate(level):
                hs.append(layer(hs[-1], t_emb) if j < self.blocks else layer(hs[-1]))
        h = self.middle(hs[-1], t_emb)
        for level in reversed(self.upsamples.values()):
            for j, layer in enumerate(level):
                last = j == self.blocks + 1
                h = layer(h) if last else layer(torch.cat((h, hs.pop()), dim=1), t_emb)
        return self.out_conv(h)


# ---- OpenAI's improved-diffusion and guided-diffusion --------------------------------------------


class OpenAIAttention(nn.Module):
    def __init__(self, c: int, heads: int, head_channels: int, new_order: bool):
        super().__init__()
        self.heads = heads if head_channels == -1 else c // head_channels
        self.new_order = new_order
        self.norm = nn.GroupNorm(GROUPS, c)
        self.qkv, self.proj_out = nn.Conv1d(c, 3 * c, 1), nn.Conv1d(c, c, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x).flatten(2))
        n, width, length = qkv.shape
        c = width // 3 // self.heads
        if self.new_order:  # all q, all k, all v; the heads within each
            parts = [part.reshape(n * self.heads, c, length) for part in qkv.chunk(3, dim=1)]
        else:  # head by head, each its q, k, v
            parts = list(qkv.reshape(n * self.heads, 3 * c, length).split(c, dim=1))
        return x + self.proj_out(attend(*parts).reshape(n, -1, length)).view_as(x)


class OpenAIBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, emb: int, scale_shift: bool, resample: str = ""):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, c_out * (1 + scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, c_out), nn.SiLU(), nn.Dropout(0.1),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )  # fmt: skip
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2)
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resampled(self.in_layers[:2](x)))
        x = self.resampled(x)
        said = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = said.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + said)
        return self.skip_connection(x) + h


class OpenAIDown(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class OpenAIUp(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2))


class OpenAI(nn.Module):
    """OpenAI's UNetModel."""

    def __init__(
        self, *, in_channels: int = 3, model_channels: int = 32, out_channels: int = 3,
        num_res_blocks: int = 1, attention_resolutions=(2,), channel_mult=(1, 2),
        num_classes: int | None = None, num_heads: int = 4, num_head_channels: int = -1,
        use_scale_shift_norm: bool = True, resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ):  # fmt: skip
        super().__init__()
        c0, emb = model_channels, 4 * model_channels

        def block(c_in: int, c_out: int, resample: str = "") -> OpenAIBlock:
            return OpenAIBlock(c_in, c_out, emb, use_scale_shift_norm, resample)

        def attention(c: int) -> OpenAIAttention:
            return OpenAIAttention(c, num_heads, num_head_channels, use_new_attention_order)

        self.c0 = c0
        self.time_embed = nn.Sequential(nn.Linear(c0, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)
        first = nn.ModuleList([nn.Conv2d(in_channels, c0, 3, padding=1)])
        self.input_blocks = nn.ModuleList([first])
        skips, c, rate = [c0], c0, 1
        for i, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [block(c, c0 * mult)]
                c = c0 * mult
                if rate in attention_resolutions:
                    layers.append(attention(c))
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(c)
            if i < len(channel_mult) - 1:
                down = block(c, c, "down") if resblock_updown else OpenAIDown(c)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(c)
                rate *= 2
        self.middle_block = nn.ModuleList([block(c, c), attention(c), block(c, c)])
        self.output_blocks = nn.ModuleList()
        for i, mult in reversed(list(enumerate(channel_mult))):
            for j in range(num_res_blocks + 1):
                layers = [block(c + skips.pop(), c0 * mult)]
                c = c0 * mult
                if rate in attention_resolutions:
                    layers.append(attention(c))
                if i > 0 and j == num_res_blocks:
                    layers.append(block(c, c, "up") if resblock_updown else OpenAIUp(c))
                    rate //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(GROUPS, c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.c0 // 2
        rates = torch.exp(-math.log(10000) / half * torch.arange(half))
        angles = timesteps[:, None] * rates
        emb = self.time_embed(torch.cat((angles.cos(), angles.sin()), dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)
        hs = [self.input_blocks[0][0](x)]
        for layers in self.input_blocks[1:]:
            h = hs[-1]
            for layer in layers:
                h = layer(h, emb)
            hs.append(h)
        h = hs[-1]
        for layer in self.middle_block:
            h = layer(h, emb)
        for layers in self.output_blocks:
            h = torch.cat((h, hs.pop()), dim=1)
            for layer in layers:
                h = layer(h, emb)
        return self.out(h)


# ---- pesser/pytorch_diffusion, the port of the paper's code --------------------------------------


def as_port(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a UNet of ours under the port's names: q, k, v and proj_out are 1x1
    convolutions."""
    weights = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        block, _, kind = name.rpartition(".")
        if block.endswith(".qkv"):
            for part, value in zip("qkv", tensor.chunk(3), strict=True):
                value = value[:, :, None, None] if kind == "weight" else value
                weights[f"{block.removesuffix('qkv')}{part}.{kind}"] = value.clone()
        elif block.endswith(".proj_out") and kind == "weight":
            weights[name] = tensor[:, :, None, None]
        else:
            weights[name] = tensor
    return weights
