"""The mask decoder of Segment Anything, prompted with a coarse alpha.

Source: Kirillov et al., "Segment Anything" (ICCV 2023), section 3 and appendix A. The embedding of
    the mask is added to
that of the image. The result and a few tokens then attend to each other, and each token produces a mask. Point and box
prompts are not implemented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.model.lite.sam_encoder import EMBED_DIM, ChannelNorm

MASK_SCALE = 4
"""Resolution of the masks and of the coarse alpha, relative to the embedding."""
MASKS = 4
"""Number of masks."""
DECODER_LAYERS = 2
"""Number of two-way attention layers."""
DECODER_HEADS = 8
"""Attention heads."""
MLP_WIDTH = 2048
"""Hidden units of the MLP."""
FULL_CELLS = 64
"""Side of the embedding of the largest image, in cells. Positions are relative to it."""


class MaskDecoder(nn.Module):
    """Computes the logits of masks, [B,4,4h,4w].

    Its inputs are the embedding of the image, [B,256,h,w], and the logit of a coarse alpha, [B,1,4h,4w].
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(2, EMBED_DIM // 2))
        self.mask_encoder = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2),
            ChannelNorm(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, 2),
            ChannelNorm(16),
            nn.GELU(),
            nn.Conv2d(16, EMBED_DIM, 1),
        )
        self.tokens = nn.Parameter(torch.zeros(1 + MASKS, EMBED_DIM))
        self.layers = nn.ModuleList(TwoWayAttention(index > 0) for index in range(DECODER_LAYERS))
        self.final_attention = CrossAttention(EMBED_DIM // 2)
        self.norm = nn.LayerNorm(EMBED_DIM)
        self.upscaling = nn.Sequential(
            nn.ConvTranspose2d(EMBED_DIM, EMBED_DIM // 4, 2, 2),
            ChannelNorm(EMBED_DIM // 4),
            nn.GELU(),
            nn.ConvTranspose2d(EMBED_DIM // 4, EMBED_DIM // 8, 2, 2),
            nn.GELU(),
        )
        self.mask_mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(EMBED_DIM, EMBED_DIM),
                nn.ReLU(),
                nn.Linear(EMBED_DIM, EMBED_DIM),
                nn.ReLU(),
                nn.Linear(EMBED_DIM, EMBED_DIM // 8),
            )
            for _ in range(MASKS)
        )

    def forward(self, embedding: Tensor, logit: Tensor) -> Tensor:
        dtype = self.norm.weight.dtype
        count, _, height, width = embedding.shape
        keys = (embedding.to(dtype) + self.mask_encoder(logit.to(dtype))).flatten(2).transpose(1, 2)
        positions = self._encode_positions(height, width).to(dtype)
        tokens = initial_tokens = self.tokens.expand(count, -1, -1)
        for layer in self.layers:
            tokens, keys = layer(tokens, keys, initial_tokens, positions)
        tokens = self.norm(tokens + self.final_attention(tokens + initial_tokens, keys + positions, keys))
        cells = self.upscaling(keys.transpose(1, 2).unflatten(2, (height, width)))
        weights = torch.stack([each(tokens[:, 1 + index]) for index, each in enumerate(self.mask_mlps)], dim=1)
        masks: Tensor = torch.einsum("bmc,bchw->bmhw", weights, cells)
        return masks

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Convert the weights to ``dtype``. The frequencies of the positions stay float32."""
        frequencies = self.frequencies
        self.to(dtype)
        self.frequencies = frequencies

    def _encode_positions(self, height: int, width: int) -> Tensor:
        """Return the Fourier features of the cell centres, [h*w,256]."""
        rows, columns = (
            (torch.arange(cells, device=self.frequencies.device) + 0.5) / FULL_CELLS * 2.0 - 1.0
            for cells in (height, width)
        )
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(-1, 2)
        angles = 2.0 * math.pi * grid @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class CrossAttention(nn.Module):
    """Attention of queries [B,N,256] to keys and values [B,M,256], in ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(EMBED_DIM, width) for _ in range(3))
        self.project = nn.Linear(width, EMBED_DIM)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = (self.query(query), self.key(key), self.value(value))
        query, key, value = (each.unflatten(2, (DECODER_HEADS, -1)).transpose(1, 2) for each in parts)
        attended = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.project(attended.transpose(1, 2).flatten(2))
        return y


class TwoWayAttention(nn.Module):
    """Two-way attention layer: tokens attend to each other, then to the image, and the image attends to the tokens."""

    def __init__(self, adds_initial_tokens: bool) -> None:
        super().__init__()
        self.adds_initial_tokens = adds_initial_tokens
        self.self_attention = CrossAttention(EMBED_DIM)
        self.norm1 = nn.LayerNorm(EMBED_DIM)
        self.token_to_image = CrossAttention(EMBED_DIM // 2)
        self.norm2 = nn.LayerNorm(EMBED_DIM)
        self.mlp = nn.Sequential(nn.Linear(EMBED_DIM, MLP_WIDTH), nn.ReLU(), nn.Linear(MLP_WIDTH, EMBED_DIM))
        self.norm3 = nn.LayerNorm(EMBED_DIM)
        self.image_to_token = CrossAttention(EMBED_DIM // 2)
        self.norm4 = nn.LayerNorm(EMBED_DIM)

    def forward(self, tokens: Tensor, keys: Tensor, initial_tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.adds_initial_tokens:
            queries = tokens + initial_tokens
            tokens = tokens + self.self_attention(queries, queries, tokens)
        else:  # the tokens of the first layer are the initial tokens
            tokens = self.self_attention(tokens, tokens, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.token_to_image(tokens + initial_tokens, keys + positions, keys))
        tokens = self.norm3(tokens + self.mlp(tokens))
        keys = self.norm4(keys + self.image_to_token(keys + positions, tokens + initial_tokens, tokens))
        return tokens, keys


def convert_decoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the prompt encoder and mask decoder by their names in this module.

    Tensors for points, boxes and quality prediction are not included.
    """
    converted = {
        "frequencies": tensors["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"],
        "tokens": torch.cat([tensors["mask_decoder.iou_token.weight"], tensors["mask_decoder.mask_tokens.weight"]]),
    }
    renamed_modules = (
        ("prompt_encoder.mask_downscaling.", "mask_encoder."),
        ("mask_decoder.output_upscaling.", "upscaling."),
        ("mask_decoder.transformer.final_attn_token_to_image.", "final_attention."),
        ("mask_decoder.transformer.norm_final_attn.", "norm."),
        ("mask_decoder.transformer.layers.", "layers."),
        ("mask_decoder.output_hypernetworks_mlps.", "mask_mlps."),
    )
    renamed_parts = (
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("out_proj", "project"),
        ("self_attn", "self_attention"),
        ("cross_attn_token_to_image", "token_to_image"),
        ("cross_attn_image_to_token", "image_to_token"),
        ("mlp.lin1", "mlp.0"),
        ("mlp.lin2", "mlp.2"),
    )
    for name, tensor in tensors.items():
        ours = next((to + name.removeprefix(start) for start, to in renamed_modules if name.startswith(start)), None)
        if ours is None:
            continue
        if ours.startswith("mask_mlps."):
            _, mask, _, layer, kind = ours.split(".")
            ours = f"mask_mlps.{mask}.{2 * int(layer)}.{kind}"
        for theirs, to in renamed_parts:
            ours = ours.replace(theirs, to)
        converted[ours] = tensor
    return converted
