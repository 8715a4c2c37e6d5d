"""The model of the paper: Stable Diffusion's U-Net and a detail head."""
