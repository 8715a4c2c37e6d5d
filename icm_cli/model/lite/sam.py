"""The networks of MobileSAM: TinyViT-5M, which embeds an image, and the mask decoder of Segment Anything.

Sources: Zhang et al., "Faster Segment Anything: Towards Lightweight SAM for Mobile Applications" (2023), section 3; Wu
et al., "TinyViT" (ECCV 2022), whose last stage does not reduce the resolution here; Kirillov et al., "Segment Anything"
(ICCV 2023), section 3 and appendix A. Prompts are a coarse alpha, points and boxes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.model.contracts import IMAGENET_MEAN, IMAGENET_STD
from icm_cli.model.decoding import gelu

CELL_PX = 16
"""Side of a cell of the embedding, in px."""
EMBED_DIM = 256
"""Channels of the embedding."""
STAGES = ((64, 2, 0, 0), (128, 2, 4, 7), (160, 6, 5, 14), (320, 2, 10, 7))
"""Per stage: channels, blocks, attention heads, and side of the attention windows in cells; 0: no attention."""
STAGE_STRIDES = (2, 2, 1)
"""Strides between the stages. A cell of the first stage is 4 px."""
EXPANSION_RATIO = 4
"""Ratio of the hidden channels of a block to its channels."""
MASK_SCALE = 4
"""Pixels of the masks and of the coarse alpha per cell of the embedding, along a side."""
MASKS = 4
"""Number of masks."""
POINT_LABELS = 4
"""Number of labels of a point: 0 off the object, 1 on it, 2 and 3 the first and the last corner of a box."""
NO_POINT = -1
"""Label of a placeholder that follows the points of an image without a box, as in the published code."""
DECODER_LAYERS = 2
DECODER_HEADS = 8
MLP_WIDTH = 2048
FULL_CELLS = 64
"""Side of the embedding of the largest image, in cells. Positions are relative to it."""


class TinyViT(nn.Module):
    """Computes the embedding [B,256,H/16,W/16] of images, sRGB [B,3,H,W] in 0..1; H and W are multiples of 16.

    ``patches`` makes cells of 4 px. Between two ``stages``, one of ``steps`` changes the number of channels and,
    by its stride, the size of a cell. These names are part of the checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [width for width, *_ in STAGES]
        self.patches = nn.Sequential(
            ConvNorm(3, widths[0] // 2, 3, stride=2), nn.GELU(), ConvNorm(widths[0] // 2, widths[0], 3, stride=2)
        )
        self.stages = nn.ModuleList()
        for width, depth, heads, window in STAGES:
            self.stages.append(nn.Sequential(*(_make_block(width, heads, window) for _ in range(depth))))
        self.steps = nn.ModuleList(
            InvertedBottleneck(before, after, after, stride)
            for (before, after), stride in zip(itertools.pairwise(widths), STAGE_STRIDES, strict=True)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], EMBED_DIM, 1, bias=False),
            ChannelNorm(EMBED_DIM),
            nn.Conv2d(EMBED_DIM, EMBED_DIM, 3, padding=1, bias=False),
            ChannelNorm(EMBED_DIM),
        )

    def forward(self, image: Tensor) -> Tensor:
        mean = torch.tensor(IMAGENET_MEAN, device=image.device)[:, None, None]
        std = torch.tensor(IMAGENET_STD, device=image.device)[:, None, None]
        x = self.patches((image.float() - mean).div_(std).to(next(self.parameters()).dtype))
        x = self.stages[0](x)
        for step, stage in zip(self.steps, self.stages[1:], strict=True):
            x = stage(step(x))
        return self.neck(x)

    def fold_batch_norms(self) -> None:
        """Fold all BatchNorms into their convolutions, for inference."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold_norm()


class ConvNorm(nn.Module):
    """Convolution without bias, and BatchNorm."""

    def __init__(self, inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Fold the BatchNorm into the convolution. The module can then not be trained or saved."""
        norm = self.norm
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            self.conv.weight.mul_(scale[:, None, None, None])
            self.conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale, requires_grad=False)
            self.norm = nn.Identity()


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each cell of [B,C,h,w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], self.weight, self.bias, 1e-6)
        return y.permute(0, 3, 1, 2)


class InvertedBottleneck(nn.Module):
    """Expansion to ``inner`` channels, depthwise convolution and reduction; optionally added to the input."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int = 1, *, is_residual: bool = False) -> None:
        super().__init__()
        self.is_residual = is_residual
        self.expand = ConvNorm(inputs, inner, 1)
        self.depthwise = ConvNorm(inner, inner, 3, stride=stride, groups=inner)
        self.reduce = ConvNorm(inner, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.reduce(gelu(self.depthwise(gelu(self.expand(x)))))
        return gelu(x + y) if self.is_residual else y


class WindowBlock(nn.Module):
    """Attention within windows, a depthwise convolution across their borders, and an MLP."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attention = WindowAttention(width, heads, window)
        self.local = ConvNorm(width, width, 3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, EXPANSION_RATIO * width)
        self.reduce = nn.Linear(EXPANSION_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend_in_windows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        cells = self.local(x).permute(0, 2, 3, 1)
        cells = cells + self.reduce(gelu(self.expand(self.norm(cells))))
        return cells.permute(0, 3, 1, 2)

    def _attend_in_windows(self, x: Tensor) -> Tensor:
        """Compute the attention of [B,h,w,C] in windows, padded with zeros."""
        count, height, width, channels = x.shape
        side = self.window
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side  # of windows
        windows = x.reshape(count, rows, side, columns, side, channels).transpose(2, 3)
        attended = self.attention(windows.reshape(-1, side * side, channels))
        windows = attended.reshape(count, rows, columns, side, side, channels)
        return windows.transpose(2, 3).reshape(count, rows * side, columns * side, channels)[:, :height, :width]


def _make_block(width: int, heads: int, window: int) -> nn.Module:
    """Return a block of a stage: with attention, or without it if ``heads`` is 0."""
    if heads:
        return WindowBlock(width, heads, window)
    return InvertedBottleneck(width, EXPANSION_RATIO * width, width, is_residual=True)


class WindowAttention(nn.Module):
    """Attention between the cells of a window, with a learned bias for each distance in rows and columns."""

    offsets: Tensor
    """Index of the bias of each pair of cells, int64 [window ** 2, window ** 2]."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.biases = nn.Parameter(torch.zeros(heads, window * window))
        cells = torch.arange(window * window)
        rows, columns = cells // window, cells % window
        offsets = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # In the pretrained weights, query, key and value of a head are adjacent.
        query, key, value = self.qkv(self.norm(x)).unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        bias = self.biases[None, :, self.offsets].to(query.dtype)  # 4 axes: with 3 the kernel is twice as slow
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.project(attended.transpose(1, 2).flatten(2))


class MaskDecoder(nn.Module):
    """Computes the logits of masks [B,4,4h,4w] from the embedding of an image, the logit of a coarse alpha, and points.

    The embedding of the coarse alpha is added to that of the image. The result and these tokens attend to each other:
    one token that predicts the IoU of the masks, one for each mask, and one for each point.
    """

    frequencies: Tensor
    """Frequencies in x and y of the Fourier features of positions, float32 [2,128]."""

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
        self.no_mask = nn.Parameter(torch.zeros(EMBED_DIM))
        self.point_labels = nn.Parameter(torch.zeros(POINT_LABELS, EMBED_DIM))
        self.no_point = nn.Parameter(torch.zeros(EMBED_DIM))
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
        self.mask_mlps = nn.ModuleList(_make_mlp(EMBED_DIM // 8) for _ in range(MASKS))
        self.iou_mlp = _make_mlp(MASKS)

    def forward(self, embedding: Tensor, logit: Tensor) -> Tensor:
        """Decode an embedding [B,256,h,w] and a logit [B,1,4h,4w]."""
        return self.decode(embedding, logit)[0]

    def decode(
        self, embedding: Tensor, logit: Tensor | None, points: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of the masks [B,4,4h,4w], and their predicted IoU [B,4].

        ``embedding``: [B,256,h,w]. ``logit``: logit of the coarse alpha, [B,1,4h,4w]; None without one. ``points``:
        positions, float32 [B,N,2], x and y as fractions of the largest image (FULL_CELLS); and labels, int64 [B,N], see
        POINT_LABELS.
        """
        dtype = self.norm.weight.dtype
        count, _, height, width = embedding.shape
        dense = self.no_mask[:, None, None] if logit is None else self.mask_encoder(logit.to(dtype))
        keys = (embedding.to(dtype) + dense).flatten(2).transpose(1, 2)
        positions = self._encode_cells(height, width).to(dtype)
        tokens = self.tokens.expand(count, -1, -1)
        if points is not None:
            tokens = torch.cat([tokens, self._embed_points(*points).to(dtype)], dim=1)
        initial_tokens = tokens
        for layer in self.layers:
            tokens, keys = layer(tokens, keys, initial_tokens, positions)
        tokens = self.norm(tokens + self.final_attention(tokens + initial_tokens, keys + positions, keys))
        iou_token, mask_tokens = tokens[:, 0], tokens[:, 1 : 1 + MASKS]
        cells = self.upscaling(keys.transpose(1, 2).unflatten(2, (height, width)))  # type: ignore[no-untyped-call]
        weights = torch.stack([mlp(mask_tokens[:, index]) for index, mlp in enumerate(self.mask_mlps)], dim=1)
        return torch.einsum("bmc,bchw->bmhw", weights, cells), self.iou_mlp(iou_token)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Convert the weights to ``dtype``. The frequencies of the positions stay float32."""
        frequencies = self.frequencies
        self.to(dtype)
        self.frequencies = frequencies

    def _encode_cells(self, height: int, width: int) -> Tensor:
        """Return the Fourier features of the cell centres, [h*w,256]."""
        device = self.frequencies.device
        rows = (torch.arange(height, device=device) + 0.5) / FULL_CELLS
        columns = (torch.arange(width, device=device) + 0.5) / FULL_CELLS
        centres = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        return self._encode_positions(centres.reshape(-1, 2))

    def _encode_positions(self, positions: Tensor) -> Tensor:
        """Return the Fourier features of positions (x, y) in 0..1, [...,2], as [...,256]."""
        with torch.autocast(positions.device.type, enabled=False):  # bfloat16 would move points by several px
            angles = 2.0 * math.pi * (positions * 2.0 - 1.0) @ self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def _embed_points(self, positions: Tensor, labels: Tensor) -> Tensor:
        """Return the tokens of points, [B,N,256]; those labelled NO_POINT have no position."""
        is_point = (labels != NO_POINT)[..., None]
        tokens = self._encode_positions(positions) + self.point_labels[labels.clamp(min=0)]
        return torch.where(is_point, tokens, self.no_point)


def _make_mlp(outputs: int) -> nn.Sequential:
    """Return an MLP of three layers, from a token to ``outputs`` values."""
    return nn.Sequential(
        nn.Linear(EMBED_DIM, EMBED_DIM),
        nn.ReLU(),
        nn.Linear(EMBED_DIM, EMBED_DIM),
        nn.ReLU(),
        nn.Linear(EMBED_DIM, outputs),
    )


class CrossAttention(nn.Module):
    """Attention of queries [B,N,256] to keys and values [B,M,256], in ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(EMBED_DIM, width) for _ in range(3))
        self.project = nn.Linear(width, EMBED_DIM)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        projected = (self.query(query), self.key(key), self.value(value))
        heads = [tokens.unflatten(2, (DECODER_HEADS, -1)).transpose(1, 2) for tokens in projected]
        attended = F.scaled_dot_product_attention(*heads)
        return self.project(attended.transpose(1, 2).flatten(2))


class TwoWayAttention(nn.Module):
    """Tokens attend to each other, then to the image, and the image attends to the tokens.

    ``forward`` takes the tokens [B,N,256], the cells of the image ``keys`` [B,h*w,256], the tokens before the first
    layer, and the Fourier features of the cells' ``positions``. Returns new tokens and keys.
    """

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


ENCODER_PARTS = {
    ".c.": ".conv.",
    ".bn.": ".norm.",
    "conv1": "expand",
    "conv2": "depthwise",
    "conv3": "reduce",
    "local_conv": "local",
    "attn.attention_biases": "attention.biases",
    "attn.proj": "attention.project",
    "attn.": "attention.",
    "mlp.norm": "norm",
    "mlp.fc1": "expand",
    "mlp.fc2": "reduce",
}
DECODER_MODULES = {
    "prompt_encoder.mask_downscaling.": "mask_encoder.",
    "mask_decoder.output_upscaling.": "upscaling.",
    "mask_decoder.transformer.final_attn_token_to_image.": "final_attention.",
    "mask_decoder.transformer.norm_final_attn.": "norm.",
    "mask_decoder.transformer.layers.": "layers.",
    "mask_decoder.output_hypernetworks_mlps.": "mask_mlps.",
    "mask_decoder.iou_prediction_head.": "iou_mlp.",
}
DECODER_PARTS = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "project",
    "self_attn": "self_attention",
    "cross_attn_token_to_image": "token_to_image",
    "cross_attn_image_to_token": "image_to_token",
    "mlp.lin1": "mlp.0",
    "mlp.lin2": "mlp.2",
}
"""Names in the published file -> names in this module, in the order of their replacement."""


def convert_encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the published tensors of the encoder by their names in this module, without the unused classifier."""
    converted = {}
    for published, tensor in tensors.items():
        start, _, name = published.partition(".")
        if start != "image_encoder" or name.startswith(("head.", "norm_head.")):
            continue
        if not name.startswith("neck."):
            name = _replace_parts(name, ENCODER_PARTS).replace("patch_embed.seq.", "patches.")
        if name.startswith("layers."):
            _, stage, rest = name.split(".", 2)
            if rest.startswith("downsample."):
                name = f"steps.{stage}.{rest.removeprefix('downsample.')}"
            else:
                name = f"stages.{stage}.{rest.removeprefix('blocks.')}"
        converted[name] = tensor
    return converted


def convert_decoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the published tensors of the prompt encoder and mask decoder by their names in this module."""
    points = [tensors[f"prompt_encoder.point_embeddings.{label}.weight"] for label in range(POINT_LABELS)]
    converted = {
        "no_mask": tensors["prompt_encoder.no_mask_embed.weight"][0],
        "no_point": tensors["prompt_encoder.not_a_point_embed.weight"][0],
        "point_labels": torch.cat(points),
        "frequencies": tensors["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"],
        "tokens": torch.cat([tensors["mask_decoder.iou_token.weight"], tensors["mask_decoder.mask_tokens.weight"]]),
    }
    for published, tensor in tensors.items():
        name = _decoder_name(published)
        if name is not None:
            converted[name] = tensor
    return converted


def _decoder_name(published: str) -> str | None:
    """Return the name in this module of a published tensor; None if it is not of one of DECODER_MODULES."""
    for start, module in DECODER_MODULES.items():
        if published.startswith(start):
            name = _replace_parts(module + published.removeprefix(start), DECODER_PARTS)
            if module in ("mask_mlps.", "iou_mlp."):  # the published layers are numbered without their activations
                mlp, _, rest = name.partition(".layers.")
                layer, _, kind = rest.partition(".")
                name = f"{mlp}.{2 * int(layer)}.{kind}"
            return name
    return None


def _replace_parts(name: str, parts: Mapping[str, str]) -> str:
    """Replace published parts of a name by ours, in the order of ``parts``."""
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return name
