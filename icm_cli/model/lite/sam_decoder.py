"""Segment Anything's mask decoder, asked with a coarse alpha alone.

After Kirillov et al., "Segment Anything" (ICCV 2023), section 3 and appendix A: an embedding of the picture, to which
that of a mask is added, and a few tokens attend to one another in turn; each token then gives a mask. Points and boxes,
which Segment Anything is asked with too, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.model.lite.sam_encoder import WIDTH, ChannelNorm

FINER = 4
"""Cells of the masks, and of the coarse alpha, along one of the embedding's."""
MASKS = 4
LAYERS = 2
HEADS = 8
PERCEPTRON = 2048
FULL_CELLS = 64
"""Cells along the embedding of the largest picture, by which positions are measured."""


class MaskDecoder(nn.Module):
    """Embedding [B,256,h,w] and the logit of a coarse alpha [B,1,4h,4w] -> logits of masks [B,4,4h,4w]."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(2, WIDTH // 2))
        self.ask = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2),
            ChannelNorm(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, 2),
            ChannelNorm(16),
            nn.GELU(),
            nn.Conv2d(16, WIDTH, 1),
        )
        self.tokens = nn.Parameter(torch.zeros(1 + MASKS, WIDTH))
        self.layers = nn.ModuleList(TwoWay(index > 0) for index in range(LAYERS))
        self.last = CrossAttention(WIDTH // 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.enlarge = nn.Sequential(
            nn.ConvTranspose2d(WIDTH, WIDTH // 4, 2, 2),
            ChannelNorm(WIDTH // 4),
            nn.GELU(),
            nn.ConvTranspose2d(WIDTH // 4, WIDTH // 8, 2, 2),
            nn.GELU(),
        )
        self.weigh = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH // 8)
            )
            for _ in range(MASKS)
        )

    def forward(self, embedding: Tensor, logit: Tensor) -> Tensor:
        dtype = self.norm.weight.dtype
        count, _, height, width = embedding.shape
        keys = (embedding.to(dtype) + self.ask(logit.to(dtype))).flatten(2).transpose(1, 2)
        places = self._places(height, width).to(dtype)
        asked = self.tokens.expand(count, -1, -1)
        tokens = asked
        for layer in self.layers:
            tokens, keys = layer(tokens, keys, asked, places)
        tokens = self.norm(tokens + self.last(tokens + asked, keys + places, keys))
        cells = self.enlarge(keys.transpose(1, 2).unflatten(2, (height, width)))
        weights = torch.stack([each(tokens[:, 1 + index]) for index, each in enumerate(self.weigh)], dim=1)
        masks: Tensor = torch.einsum("bmc,bchw->bmhw", weights, cells)
        return masks

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Bring the weights to ``dtype``; positions are computed in float32."""
        frequencies = self.frequencies
        self.to(dtype)
        self.frequencies = frequencies

    def _places(self, height: int, width: int) -> Tensor:
        """Fourier features [h*w,256] of the cells' middles."""
        rows, columns = (
            (torch.arange(cells, device=self.frequencies.device) + 0.5) / FULL_CELLS * 2.0 - 1.0
            for cells in (height, width)
        )
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(-1, 2)
        angles = 2.0 * math.pi * grid @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class CrossAttention(nn.Module):
    """Attention of queries [B,N,256] to keys and values [B,M,256], computed in ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, width) for _ in range(3))
        self.project = nn.Linear(width, WIDTH)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (self.query(query), self.key(key), self.value(value))
        query, key, value = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in parts)
        attended = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.project(attended.transpose(1, 2).flatten(2))
        return y


class TwoWay(nn.Module):
    """Tokens attend to one another, then to the picture, and the picture to the tokens."""

    def __init__(self, knows_tokens: bool) -> None:
        super().__init__()
        self.knows_tokens = knows_tokens
        self.among = CrossAttention(WIDTH)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.to_picture = CrossAttention(WIDTH // 2)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, PERCEPTRON), nn.ReLU(), nn.Linear(PERCEPTRON, WIDTH))
        self.norm3 = nn.LayerNorm(WIDTH)
        self.to_tokens = CrossAttention(WIDTH // 2)
        self.norm4 = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor, keys: Tensor, asked: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        if self.knows_tokens:
            named = tokens + asked
            tokens = tokens + self.among(named, named, tokens)
        else:  # the first layer's tokens are what was asked
            tokens = self.among(tokens, tokens, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.to_picture(tokens + asked, keys + places, keys))
        tokens = self.norm3(tokens + self.perceptron(tokens))
        keys = self.norm4(keys + self.to_tokens(keys + places, tokens + asked, tokens))
        return tokens, keys


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of Segment Anything's prompt encoder and mask decoder under our names, without those that points, boxes
    and the prediction of quality need."""
    found = {
        "frequencies": tensors["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"],
        "tokens": torch.cat([tensors["mask_decoder.iou_token.weight"], tensors["mask_decoder.mask_tokens.weight"]]),
    }
    renamed = (
        ("prompt_encoder.mask_downscaling.", "ask."),
        ("mask_decoder.output_upscaling.", "enlarge."),
        ("mask_decoder.transformer.final_attn_token_to_image.", "last."),
        ("mask_decoder.transformer.norm_final_attn.", "norm."),
        ("mask_decoder.transformer.layers.", "layers."),
        ("mask_decoder.output_hypernetworks_mlps.", "weigh."),
    )
    parts = (
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("out_proj", "project"),
        ("self_attn", "among"),
        ("cross_attn_token_to_image", "to_picture"),
        ("cross_attn_image_to_token", "to_tokens"),
        ("mlp.lin1", "perceptron.0"),
        ("mlp.lin2", "perceptron.2"),
    )
    for name, tensor in tensors.items():
        ours = next((to + name.removeprefix(start) for start, to in renamed if name.startswith(start)), None)
        if ours is None:
            continue
        if ours.startswith("weigh."):
            _, mask, _, layer, kind = ours.split(".")
            ours = f"weigh.{mask}.{2 * int(layer)}.{kind}"
        for theirs, to in parts:
            ours = ours.replace(theirs, to)
        found[ours] = tensor
    return found
