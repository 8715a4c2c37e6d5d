"""The part of Stable Diffusion that reaches a feature or an attention map, run by hand over diffusers' own blocks.

Every operation here lies on the way to an output; what lies behind the last output is not even loaded (see
:func:`drop_unused_layers`). The timestep is fixed, so its embedding is a constant of every residual block and moves
into the bias of the block's first convolution.

Letters: E draws of noise (the batch here; one image at a time), H heads, N = h*w tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

LATENT_STRIDE = 8
"""Pixels of the canvas per latent."""
FEATURE_STRIDES = (32, 16)
"""Strides of the outputs of up_blocks[0] and up_blocks[1]."""
Grid: TypeAlias = tuple[int, int]
"""(h, w)."""
CHUNK_BYTES = 1 << 24
"""Bound of one float32 chunk of attention probabilities and of one tile of a feed-forward layer."""


def drop_unused_layers(unet: Any) -> None:
    """Drop from a diffusers U-Net what lies behind its last output: q and k of up_blocks[2]'s last self-attention."""
    del unet.up_blocks[3]
    unet.up_blocks[2].upsamplers = None
    unet.conv_norm_out = unet.conv_act = unet.conv_out = None
    last = unet.up_blocks[2].attentions[-1]
    last.proj_out = None
    block = last.transformer_blocks[-1]
    block.attn1.to_v = block.attn1.to_out = None
    block.norm2 = block.attn2 = block.norm3 = block.ff = None


@torch.no_grad()
def fold_timestep(unet: Any, timestep: int) -> None:
    """Add the timestep's embedding to the bias of each residual block's first convolution."""
    embedding = F.silu(unet.time_embedding(unet.time_proj(torch.tensor([timestep]))))
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            _add_to_bias(block, embedding)
    unet.time_embedding = unet.time_proj = None


def _add_to_bias(block: Any, embedding: Tensor) -> None:
    block.conv1.bias = nn.Parameter(block.conv1.bias + block.time_emb_proj(embedding)[0])
    block.time_emb_proj = None


class MeanAttention:
    """Running mean of one grid's self-attention maps over heads, draws and layers: A [N,N] float32.

    Holds no more than a chunk of one layer's probabilities at a time, in buffers that the chunks share.
    """

    def __init__(self, valid: Tensor) -> None:
        """valid [h,w] bool: tokens at padding are masked as keys."""
        self.grid = (valid.shape[0], valid.shape[1])
        self._padding = None if bool(valid.all()) else ~valid.flatten()
        self._sum = torch.zeros(valid.numel(), valid.numel(), device=valid.device)
        self._layers = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer, [E,H,N,d] each -> [E,H,N,d], with its map added to the mean.

        The output attends to every token, as published; only the map leaves padding out.
        """
        values = value.flatten(0, 1)
        output = torch.empty_like(values)
        for maps, rows, probabilities in self._accumulate(query, key):
            output[maps, rows] = probabilities.to(values.dtype) @ values[maps]
        return output.view_as(value)

    def add(self, query: Tensor, key: Tensor) -> None:
        """Add the map of a layer whose output nobody needs."""
        for _ in self._accumulate(query, key):
            pass

    def mean(self) -> Tensor:
        """A [N,N] float32; rows sum to 1."""
        return self._sum / self._layers

    def _accumulate(self, query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Choose some of a layer's E*H maps and query rows, with their probabilities [maps,rows,N] float32.

        A chunk's probabilities last until the next chunk.
        """
        queries = query.flatten(0, 1).float() * query.shape[-1] ** -0.5
        key_columns = key.flatten(0, 1).float().transpose(-1, -2)
        count, tokens = queries.shape[:2]
        maps_at_once = max(1, CHUNK_BYTES // (4 * tokens * tokens))
        rows_at_once = math.ceil(tokens / math.ceil(4 * tokens * tokens / CHUNK_BYTES))
        buffer = queries.new_empty(maps_at_once, rows_at_once, tokens)
        for first in range(0, count, maps_at_once):
            maps = slice(first, min(count, first + maps_at_once))
            for top in range(0, tokens, rows_at_once):
                rows = slice(top, min(tokens, top + rows_at_once))
                chunk = buffer[: maps.stop - first, : rows.stop - top]
                torch.bmm(queries[maps, rows], key_columns[maps], out=chunk)
                seen = None if self._padding is None else chunk.masked_fill(self._padding, float("-inf")).softmax(-1)
                torch.softmax(chunk, dim=-1, out=chunk)
                self._add_to_sum(rows, chunk if seen is None else seen, count)
                yield maps, rows, chunk
        self._layers += 1

    def _add_to_sum(self, rows: slice, maps: Tensor, count: int) -> None:
        for matrix in maps:
            self._sum[rows].add_(matrix, alpha=1 / count)


def run_unet(
    unet: Any, noisy: Tensor, prompt: Tensor, maps: Mapping[Grid, MeanAttention] | None = None
) -> dict[int, Tensor]:
    """Features of noisy latents [E,4,h,w]: stride -> output of up_blocks[0] and up_blocks[1], [E,C,h,w].

    ``prompt`` [1,77,1024] is the text's embedding. ``maps``: grid -> where its self-attention is accumulated. The
    pass ends at the last feature, and with maps at the queries and keys of the last of them.
    """
    x = unet.conv_in(noisy)
    skips = [x]
    for block in unet.down_blocks:
        for resnet, transformer in _layers(block):
            x = _transform(transformer, residual(resnet, x), prompt, maps)
            skips.append(x)
        if block.downsamplers is not None:
            x = block.downsamplers[0](x)
            skips.append(x)
    middle = unet.mid_block
    x = _transform(middle.attentions[0], residual(middle.resnets[0], x), prompt, None)
    x = residual(middle.resnets[1], x)
    features = {}
    for stride, block in zip(FEATURE_STRIDES, unet.up_blocks, strict=False):
        x = features[stride] = block.upsamplers[0](_ascend(block, x, skips, prompt, maps))
    if maps is not None:
        _ascend(unet.up_blocks[2], x, skips, prompt, maps)
    return features


def encode(encoder: Any, quant_conv: nn.Module, image: Tensor) -> Tensor:
    """Moments of the VAE's posterior, [B,8,H/8,W/8] float32, of an image [B,3,H,W] in -1..1."""
    x = encoder.conv_in(image)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = residual(resnet, x)
        if block.downsamplers is not None:
            x = block.downsamplers[0](x)
    middle = encoder.mid_block
    x = middle.attentions[0](residual(middle.resnets[0], x))
    x = residual(middle.resnets[1], x)
    moments: Tensor = quant_conv(encoder.conv_out(_norm_silu(encoder.conv_norm_out, x)))
    return moments.float()


def residual(block: ResnetBlock2D, x: Tensor) -> Tensor:
    """A residual block [B,C,h,w] -> [B,C',h,w]; its timestep, if it had one, is in its bias."""
    h = block.conv1(_norm_silu(block.norm1, x))
    h = block.conv2(_norm_silu(block.norm2, h))
    return h.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=True)


def _layers(block: Any) -> Iterator[tuple[ResnetBlock2D, Any]]:
    """Residual blocks of a level with their transformers, None on levels that have none."""
    transformers = getattr(block, "attentions", [None] * len(block.resnets))
    return zip(block.resnets, transformers, strict=True)


def _ascend(
    block: Any, x: Tensor, skips: list[Tensor], prompt: Tensor, maps: Mapping[Grid, MeanAttention] | None
) -> Tensor:
    """The layers of an up block; takes its skip connections off the end of ``skips``."""
    for resnet, transformer in _layers(block):
        x = residual(resnet, torch.cat([x, skips.pop()], dim=1))
        x = _transform(transformer, x, prompt, maps)
    return x


def _transform(transformer: Any, x: Tensor, prompt: Tensor, maps: Mapping[Grid, MeanAttention] | None) -> Tensor:
    """A level's transformer on [E,C,h,w]; one cut short after its queries and keys hands ``x`` back unchanged."""
    if transformer is None:
        return x
    grid = (x.shape[2], x.shape[3])
    tokens = transformer.proj_in(transformer.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
    record = None if maps is None else maps.get(grid)
    for block in transformer.transformer_blocks:
        attended = _self_attention(block.attn1, block.norm1(tokens), record)
        if attended is None:
            return x
        tokens = attended.add_(tokens)
        tokens = _cross_attention(block.attn2, block.norm2(tokens), prompt).add_(tokens)
        tokens = _feed_forward(block.ff, block.norm3(tokens)).add_(tokens)
    return transformer.proj_out(tokens).unflatten(1, grid).permute(0, 3, 1, 2).add_(x)


def _self_attention(attn: Any, tokens: Tensor, record: MeanAttention | None) -> Tensor | None:
    """Tokens [E,N,C] -> the attention's output [E,N,C]; None where its values were dropped and only the map counts."""
    query, key = _heads(attn.to_q(tokens), attn.heads), _heads(attn.to_k(tokens), attn.heads)
    if attn.to_v is None:
        if record is not None:
            record.add(query, key)
        return None
    value = _heads(attn.to_v(tokens), attn.heads)
    attend = F.scaled_dot_product_attention if record is None else record.attend
    return _join_heads(attn, attend(query, key, value))


def _cross_attention(attn: Any, tokens: Tensor, prompt: Tensor) -> Tensor:
    """Tokens [E,N,C] attend to the prompt [1,77,1024], the same for every draw -> [E,N,C]."""
    query = _heads(attn.to_q(tokens), attn.heads)
    key, value = (
        _heads(project(prompt), attn.heads).expand(len(query), -1, -1, -1) for project in (attn.to_k, attn.to_v)
    )
    return _join_heads(attn, F.scaled_dot_product_attention(query, key, value))


def _feed_forward(layer: Any, tokens: Tensor) -> Tensor:
    """GEGLU feed-forward on [E,N,C], tile by tile: its inner width is 8 C."""
    expand, contract = layer.net[0].proj, layer.net[2]
    flat = tokens.flatten(0, 1)
    rows = max(1, CHUNK_BYTES // (expand.out_features * flat.element_size()))
    out = torch.empty_like(flat)
    for start in range(0, len(flat), rows):
        value, gate = expand(flat[start : start + rows]).chunk(2, dim=-1)
        out[start : start + rows] = contract(value * F.gelu(gate))
    return out.view_as(tokens)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[E,N,H*d] -> [E,H,N,d]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _join_heads(attn: Any, attended: Tensor) -> Tensor:
    """[E,H,N,d] -> [E,N,H*d], projected."""
    joined: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
    return joined
