"""The part of Stable Diffusion that computes the features and attention maps, on the modules of diffusers.

The timestep is fixed, so its embedding is added to the bias of the first convolution of every residual block.

Letters: E noise samples of one image (the batch), H heads, N = h*w tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

FEATURE_STRIDES = (32, 16)
"""Strides of the outputs of up_blocks[0] and up_blocks[1]."""
Grid: TypeAlias = tuple[int, int]
"""Size (h, w) of a feature grid."""
CHUNK_BYTES = 1 << 24
"""Largest size of a float32 chunk of attention probabilities, and of a chunk of a feed-forward layer."""


def drop_unused_layers(unet: Any) -> None:
    """Remove the layers of a diffusers U-Net that do not affect its features and attention maps.

    The last layers that are kept compute query and key of the last self-attention in ``up_blocks[2]``.
    """
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
    """Add the embedding of the timestep to the bias of the first convolution of each residual block."""
    embedding = F.silu(unet.time_embedding(unet.time_proj(torch.tensor([timestep]))))
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.conv1.bias = nn.Parameter(block.conv1.bias + block.time_emb_proj(embedding)[0])
            block.time_emb_proj = None  # type: ignore[assignment]
    unet.time_embedding = unet.time_proj = None


class MeanAttention:
    """Running mean A of the self-attention maps of one grid over heads, noise samples and layers, float32 [N,N].

    Tokens in the padding, where ``valid`` [h,w] is False, are masked as keys. Only one chunk of a layer's probabilities
    is in memory at a time.
    """

    def __init__(self, valid: Tensor) -> None:
        self.grid = (valid.shape[0], valid.shape[1])
        self._padding = None if bool(valid.all()) else ~valid.flatten()
        self._sum = torch.zeros(valid.numel(), valid.numel(), device=valid.device)
        self._layers = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the output of one attention layer, and add its map to the mean.

        All tensors are [E,H,N,d]. As in the published code, the output uses every token; only the map excludes the
        padding.
        """
        values = value.flatten(0, 1)
        output = torch.empty_like(values)
        for heads, rows, probabilities in self._accumulate_maps(query, key):
            output[heads, rows] = probabilities.to(values.dtype) @ values[heads]
        return output.view_as(value)

    def add_map(self, query: Tensor, key: Tensor) -> None:
        """Add the map of a layer to the mean, without computing the output of the layer."""
        for _ in self._accumulate_maps(query, key):
            pass

    def mean(self) -> Tensor:
        """Return A, float32 [N,N]; its rows sum to 1."""
        return self._sum / self._layers

    def _accumulate_maps(self, query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Add the attention maps of a layer to the sum, in chunks.

        Yields for each chunk the slices of its maps and query rows, and its probabilities, float32 [maps,rows,N]. The
        next chunk overwrites their memory. Only the sum leaves out padding; the network itself attends to it.
        """
        queries = query.flatten(0, 1).float() * query.shape[-1] ** -0.5
        key_columns = key.flatten(0, 1).float().transpose(-1, -2)
        count, tokens = queries.shape[:2]
        # A chunk has several complete maps, or if one map is too large, some of its rows.
        map_bytes = 4 * tokens * tokens
        maps_at_once = max(1, CHUNK_BYTES // map_bytes)
        rows_at_once = math.ceil(tokens / math.ceil(map_bytes / CHUNK_BYTES))
        buffer = queries.new_empty(maps_at_once, rows_at_once, tokens)
        for first in range(0, count, maps_at_once):
            maps = slice(first, min(count, first + maps_at_once))
            for top in range(0, tokens, rows_at_once):
                rows = slice(top, min(tokens, top + rows_at_once))
                chunk = buffer[: maps.stop - first, : rows.stop - top]
                torch.bmm(queries[maps, rows], key_columns[maps], out=chunk)
                without_padding = None
                if self._padding is not None:  # before the scores are overwritten
                    without_padding = chunk.masked_fill(self._padding, float("-inf")).softmax(-1)
                torch.softmax(chunk, dim=-1, out=chunk)
                for probabilities in chunk if without_padding is None else without_padding:
                    self._sum[rows].add_(probabilities, alpha=1 / count)
                yield maps, rows, chunk
        self._layers += 1


def run_unet(
    unet: Any, noisy: Tensor, prompt_embedding: Tensor, maps: Mapping[Grid, MeanAttention] | None = None
) -> dict[int, Tensor]:
    """Run a U-Net to which :func:`drop_unused_layers` and :func:`fold_timestep` were applied.

    ``noisy``: latents [E,4,h,w]. ``prompt_embedding``: [1,77,1024]. ``maps`` accumulate the self-attention of each
    grid. Returns the features: stride -> output of ``up_blocks[0]`` or ``up_blocks[1]``, [E,C,h,w].
    """
    x = unet.conv_in(noisy)
    skips = [x]
    for block in unet.down_blocks:
        for resnet, transformer in _block_layers(block):
            x = _run_transformer(transformer, run_residual_block(resnet, x), prompt_embedding, maps)
            skips.append(x)
        if block.downsamplers is not None:
            x = block.downsamplers[0](x)
            skips.append(x)
    middle = unet.mid_block
    x = _run_transformer(middle.attentions[0], run_residual_block(middle.resnets[0], x), prompt_embedding, None)
    x = run_residual_block(middle.resnets[1], x)
    features = {}
    for stride, block in zip(FEATURE_STRIDES, unet.up_blocks[: len(FEATURE_STRIDES)], strict=True):
        x = block.upsamplers[0](_run_up_block(block, x, skips, prompt_embedding, maps))
        features[stride] = x
    if maps is not None:  # only for its attention maps; its output is not used
        _run_up_block(unet.up_blocks[2], x, skips, prompt_embedding, maps)
    return features


def encode_image(encoder: Any, quant_conv: nn.Module, image: Tensor) -> Tensor:
    """Return mean and log-variance of the VAE's latents, float32 [B,8,H/8,W/8], for images [B,3,H,W] in -1..1."""
    x = encoder.conv_in(image)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = run_residual_block(resnet, x)
        if block.downsamplers is not None:
            x = block.downsamplers[0](x)
    middle = encoder.mid_block
    x = middle.attentions[0](run_residual_block(middle.resnets[0], x))
    x = run_residual_block(middle.resnets[1], x)
    moments: Tensor = quant_conv(encoder.conv_out(_norm_silu(encoder.conv_norm_out, x)))
    return moments.float()


def run_residual_block(block: ResnetBlock2D, x: Tensor) -> Tensor:
    """Run a residual block without timestep: [B,C,h,w] -> [B,C',h,w]."""
    h = block.conv1(_norm_silu(block.norm1, x))
    h = block.conv2(_norm_silu(block.norm2, h))
    return h.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=True)


def _block_layers(block: Any) -> Iterator[tuple[ResnetBlock2D, Any]]:
    """Yield the residual blocks of a level, each with its transformer or None."""
    transformers = getattr(block, "attentions", [None] * len(block.resnets))
    return zip(block.resnets, transformers, strict=True)


def _run_up_block(
    block: Any, x: Tensor, skips: list[Tensor], prompt_embedding: Tensor, maps: Mapping[Grid, MeanAttention] | None
) -> Tensor:
    """Run the layers of an up block. Its skip connections are removed from the end of ``skips``."""
    for resnet, transformer in _block_layers(block):
        x = run_residual_block(resnet, torch.cat([x, skips.pop()], dim=1))
        x = _run_transformer(transformer, x, prompt_embedding, maps)
    return x


def _run_transformer(
    transformer: Any, x: Tensor, prompt_embedding: Tensor, maps: Mapping[Grid, MeanAttention] | None
) -> Tensor:
    """Run a transformer on [E,C,h,w].

    Returns ``x`` if there is no transformer, or if it is the last one, which only computes an attention map.
    """
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
        tokens = _cross_attention(block.attn2, block.norm2(tokens), prompt_embedding).add_(tokens)
        tokens = _feed_forward(block.ff, block.norm3(tokens)).add_(tokens)
    return transformer.proj_out(tokens).unflatten(1, grid).permute(0, 3, 1, 2).add_(x)


def _self_attention(attn: Any, tokens: Tensor, record: MeanAttention | None) -> Tensor | None:
    """Run self-attention on tokens [E,N,C]; None if the layer has no values, because only its map is needed.

    ``record`` accumulates the map.
    """
    query = _split_heads(attn.to_q(tokens), attn.heads)
    key = _split_heads(attn.to_k(tokens), attn.heads)
    if attn.to_v is None:
        if record is not None:
            record.add_map(query, key)
        return None
    value = _split_heads(attn.to_v(tokens), attn.heads)
    attend = F.scaled_dot_product_attention if record is None else record.attend
    return _join_heads(attn, attend(query, key, value))


def _cross_attention(attn: Any, tokens: Tensor, prompt_embedding: Tensor) -> Tensor:
    """Run cross-attention of tokens [E,N,C] to the embedded prompt [1,77,1024]."""
    query = _split_heads(attn.to_q(tokens), attn.heads)
    key = _split_heads(attn.to_k(prompt_embedding), attn.heads).expand(len(query), -1, -1, -1)
    value = _split_heads(attn.to_v(prompt_embedding), attn.heads).expand(len(query), -1, -1, -1)
    return _join_heads(attn, F.scaled_dot_product_attention(query, key, value))


def _feed_forward(layer: Any, tokens: Tensor) -> Tensor:
    """Run a GEGLU feed-forward layer on [E,N,C] in chunks, because its inner width is 8 C."""
    expand, contract = layer.net[0].proj, layer.net[2]
    flat = tokens.flatten(0, 1)
    rows = max(1, CHUNK_BYTES // (expand.out_features * flat.element_size()))
    out = torch.empty_like(flat)
    for start in range(0, len(flat), rows):
        value, gate = expand(flat[start : start + rows]).chunk(2, dim=-1)
        out[start : start + rows] = contract(value * F.gelu(gate))
    return out.view_as(tokens)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Rearrange [E,N,H*d] to [E,H,N,d]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _join_heads(attn: Any, attended: Tensor) -> Tensor:
    """Rearrange [E,H,N,d] to [E,N,H*d] and apply the output projection."""
    return attn.to_out[0](attended.transpose(1, 2).flatten(2))
