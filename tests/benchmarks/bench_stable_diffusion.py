"""Time and memory of the paper's model at Stable Diffusion 2.1's size, on random weights: no download needed.

    python tests/benchmarks/bench_stable_diffusion.py [--dtype float32 bfloat16] [--side limit ours published]

Each side runs in a process of its own on the same threads:

- limit: the work that reaches an output, at the rate of a 4096 x 4096 matrix product measured in the same run;
- ours: seconds an image, the reference's pass apart, as it runs once per run;
- published: the published code's way, in float32: each of the E draws encodes the image, the whole U-Net runs, the
  probabilities of the needed layers are held per head and per layer, and the reference runs for every image.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from icm_cli.model.contracts import Features, ReferenceFeatures
from icm_cli.model.core import InContextMatting
from icm_cli.model.similarity import AttentionMatrix
from icm_cli.model.stable_diffusion.backbone import StableDiffusion, StableDiffusionConfig, StableDiffusionParts
from icm_cli.model.stable_diffusion.detail_head import FUSION_STRIDES, DetailConfig, DetailHead, DetailReferences
from icm_cli.model.stable_diffusion.unet import MeanAttention, drop_unused_layers, fold_timestep

SIDES = ("limit", "ours", "published")
CANVAS_PX = 768
ENSEMBLE = 4
TIMESTEP = 200
UNET = {
    "sample_size": 96,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": CANVAS_PX,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
MATRIX_SIDE = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--side", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.side[0], getattr(torch, options.dtype[0]))))
        return
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {CANVAS_PX} px, E = {ENSEMBLE}",
        flush=True,
    )
    published = in_own_process("published", "float32") if "published" in options.side else {}
    for dtype in options.dtype:
        limit = in_own_process("limit", dtype) if "limit" in options.side else {}
        ours = in_own_process("ours", dtype) if "ours" in options.side else {}
        print_table(dtype, limit, ours, published)


def in_own_process(side: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--only", "--side", side, "--dtype", dtype]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def print_table(dtype: str, limit: dict[str, float], ours: dict[str, float], published: dict[str, float]) -> None:
    print(f"\n{dtype}")
    if limit:
        attention = limit["attention_tflop"]
        print(f"  work        {limit['tflop']:7.2f} TFLOP an image, {attention:.2f} in attention's products")
        print(f"  product     {limit['gflop_per_s']:7.0f} GFLOP/s, {MATRIX_SIDE} x {MATRIX_SIDE}")
        print(f"  limit       {limit['image_s']:7.1f} s an image, {limit['projection_s']:.1f} s without these products")
    if ours:
        print(f"  ours        {ours['image_s']:7.1f} s an image, {ours['peak_gb']:.1f} GB peak")
        print(f"  reference   {ours['reference_s']:7.1f} s, once per run")
    if published:
        image_s, peak_gb = published["image_s"], published["peak_gb"]
        print(f"  published   {image_s:7.1f} s an image with its reference, {peak_gb:.1f} GB peak, float32")
    if ours and limit:
        whole, part = (ours["image_s"] / limit[key] for key in ("image_s", "projection_s"))
        print(f"  ours / limit      {whole:.2f} ({part:.2f} with attention's products left out of the limit)")
    if ours and published:
        print(f"  published / ours  {published['image_s'] / ours['image_s']:.2f}", flush=True)


def measure(side: str, dtype: torch.dtype) -> dict[str, float]:
    """Run one side in this process."""
    torch.manual_seed(0)
    figures = {"limit": limit, "ours": ours, "published": lambda _: published()}[side](dtype)
    return {**figures, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


@torch.inference_mode()
def limit(dtype: torch.dtype) -> dict[str, float]:
    """What the machine could reach: the work that reaches an output over the rate of a plain matrix product."""
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE).to(dtype) for _ in range(2))
    rate = 2 * MATRIX_SIDE**3 / min(seconds(lambda: a @ b) for _ in range(5))
    work = needed_flop()
    total = sum(work.values())
    attention = work[torch.ops.aten.bmm]
    return {
        "image_s": total / rate,
        "projection_s": (total - attention) / rate,
        "tflop": total / 1e12,
        "attention_tflop": attention / 1e12,
        "gflop_per_s": rate / 1e9,
    }


def ours(dtype: torch.dtype) -> dict[str, float]:
    model = build_ours(lambda module: fill(module.to_empty(device="cpu"))).to_device(torch.device("cpu"), dtype)
    image, valid, guidance = inputs()
    prepared: list[Any] = []
    with torch.inference_mode():
        reference_s = seconds(lambda: prepared.append(model.prepare_references([(image, guidance, valid)])))
        image_s = seconds(lambda: model.infer(image, valid, prepared[0]))
    return {"image_s": image_s, "reference_s": reference_s}


@torch.inference_mode()
def published() -> dict[str, float]:
    unet, vae, scheduler = build_diffusers()
    for module in (unet, vae):
        fill(module.to_empty(device="cpu"))
    head = fill(DetailHead(DetailConfig()))
    kept = keep_probabilities(unet)
    image, valid, guidance = inputs()

    def extract() -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        kept.clear()
        latents = vae.encode((2 * image - 1).expand(ENSEMBLE, -1, -1, -1)).latent_dist.sample() * 0.18215
        noisy = scheduler.add_noise(latents, torch.randn_like(latents), torch.tensor([TIMESTEP]))
        features: dict[int, Tensor] = {}
        hooks = [
            unet.up_blocks[i].register_forward_hook(lambda *call, s=stride: features.update({s: call[2].mean(0, True)}))
            for i, stride in enumerate(FUSION_STRIDES)
        ]
        unet(noisy, TIMESTEP, torch.randn(1, 77, 1024).expand(ENSEMBLE, -1, -1))
        for hook in hooks:
            hook.remove()
        maps = {
            s: torch.stack([p.mean((0, 1)) for p in kept if p.shape[-1] == (CANVAS_PX // s) ** 2])
            for s in FUSION_STRIDES
        }
        return features, {stride: layers.mean(0, keepdim=True) for stride, layers in maps.items()}

    def image_and_reference() -> None:
        grid_valid = torch.ones(1, CANVAS_PX // 16, CANVAS_PX // 16, dtype=torch.bool)
        reference = Features(extract()[0][16], grid_valid, {}, {})
        prepared = head.prepare_references([ReferenceFeatures(reference, guidance, valid)])
        features, maps = extract()
        grids = {s: AttentionMatrix(maps[s], (CANVAS_PX // s, CANVAS_PX // s)) for s in FUSION_STRIDES}
        head(Features(features[16], grid_valid, features, grids), [prepared], image, valid)

    return {"image_s": seconds(image_and_reference)}


def keep_probabilities(unet: Any) -> list[Tensor]:
    """Make the self-attentions at strides 32 and 16 hold their probabilities [E,H,N,N]; returns where they land."""
    kept: list[Tensor] = []
    needed = {(CANVAS_PX // stride) ** 2 for stride in FUSION_STRIDES}

    def attend(attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, tokens in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        if encoder_hidden_states is None and query.shape[2] in needed:
            probabilities = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
            kept.append(probabilities)
            out = probabilities @ value
        else:
            out = nn.functional.scaled_dot_product_attention(query, key, value)
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected

    unet.set_attn_processor(attend)
    return kept


@torch.no_grad()
def needed_flop() -> dict[Any, int]:
    """Floating-point operations of one image by operator, counted by running the model on tensors without values."""
    model = build_ours(lambda module: module)
    backbone: Any = model.backbone
    image, valid, _ = (tensor.to("meta") for tensor in inputs())
    masks = {
        stride: torch.ones(CANVAS_PX // stride, CANVAS_PX // stride, dtype=torch.bool) for stride in FUSION_STRIDES
    }
    maps = {stride: MeanAttention(mask) for stride, mask in masks.items()}
    for attention in maps.values():
        attention._sum = attention._sum.to("meta")
    reference_tokens = torch.empty(256, DetailConfig().feature_channels, device="meta")
    with FlopCounterMode(display=False) as counter:
        latents = backbone.encode_moments(image)[:, :4]
        features = backbone.mean_features(latents.expand(ENSEMBLE, -1, -1, -1), maps)
        intra = {stride: AttentionMatrix(maps[stride].mean()[None], maps[stride].grid) for stride in FUSION_STRIDES}
        target = Features(features[16], masks[16][None].to("meta"), features, intra)
        model.head(target, [DetailReferences([reference_tokens])], image, valid)
    return dict(counter.get_flop_counts()["Global"])


def build_ours(give_values: Callable[[Any], Any]) -> InContextMatting:
    """The model as it is after loading; ``give_values`` turns modules without values into ones with."""
    unet, vae, scheduler = build_diffusers()
    drop_unused_layers(unet)
    vae.decoder = vae.post_quant_conv = None
    unet, vae = give_values(unet), give_values(vae)
    device = unet.conv_in.weight.device
    with device:
        fold_timestep(unet, TIMESTEP)
        head, prompt = DetailHead(DetailConfig()), torch.randn(1, 77, 1024)
    parts = StableDiffusionParts(unet, vae.encoder, vae.quant_conv, scheduler, 0.18215, prompt)
    backbone = StableDiffusion(StableDiffusionConfig(ensemble=ENSEMBLE, timestep=TIMESTEP), parts, seed=0)
    return InContextMatting(backbone, head).eval()


def build_diffusers() -> tuple[Any, Any, Any]:
    """U-Net and VAE of Stable Diffusion 2.1's size without values, and the scheduler."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    return unet.eval(), vae.eval(), DDIMScheduler(**SCHEDULER)


@torch.no_grad()
def fill(module: Any) -> Any:
    """Random weights that keep activations near their size; norms pass everything through."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            parameter.uniform_(-1, 1).mul_((3 / fan_in) ** 0.5)
        else:
            parameter.fill_(float(name.endswith("weight")))
    return module


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """An image of noise, all of it valid, and a guidance that covers its middle."""
    image = torch.rand(1, 3, CANVAS_PX, CANVAS_PX)
    guidance = torch.zeros(1, 1, CANVAS_PX, CANVAS_PX)
    guidance[..., 256:512, 256:512] = 1
    return image, torch.ones(1, CANVAS_PX, CANVAS_PX, dtype=torch.bool), guidance


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
