"""Every option of ``icm`` and of its Python API, defined once, in groups.

A command's options are one frozen dataclass whose fields are groups. The command line, the arguments in Python, checks,
help, digest membership and ``docs/options.md`` come from these definitions; :mod:`icm_cli.options.definition` says how.
Imports nothing heavy, so that ``icm --help`` stays fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from icm_cli.errors import PROBLEM_KINDS, UsageError
from icm_cli.options.definition import CommandOptions, DigestPart, Option, OptionGroup, Panel, keyword_arguments, option

__all__ = ["EvaluateOptions", "LoadOptions", "MatteOptions", "ReviewOptions", "TrainOptions", "keyword_arguments"]

MaskOrientation = Literal["auto", "upright", "stored"]
GuidanceRule = Literal["mask", "paper"]
MatchRule = Literal["kind", "same"]
EdgeMethod = Literal["model", "closed-form", "vitmatte"]
DtypeName = Literal["auto", "float32", "float16", "bfloat16"]
ImageFormat = Literal["png", "tiff", "exr"]
BitDepth = Literal["8", "16", "half", "float"]
ForegroundMode = Literal["none", "auto", "straight", "premultiplied"]
TrimapMode = Literal["none", "also", "instead"]
MissingPolicy = Literal["skip", "report", "error"]
ProgressMode = Literal["auto", "plain", "none", "json", "openjd"]
Split = Literal["test", "train"]
ScoredSize = Literal["original", "long1024", "square768"]
Region = Literal["whole", "unknown"]
MetricVariant = Literal["composition", "aim"]
DatasetName = Literal[
    "aim500",
    "icm57",
    "am2k",
    "p3m500np",
    "p3m500p",
    "ppm100",
    "rwp636",
    "rw100",
    "composition1k",
    "d646",
    "transparent460",
    "davis16",
    "openimages",
    "folder",
]


def _preset_names() -> Sequence[str]:
    from icm_cli.config import preset_paths

    return sorted(preset_paths())


def _device_names() -> Sequence[str]:
    return ("auto", "cpu", "cuda", "cuda:0", "cuda:all", "mps")


WEIGHTS = Option(
    help="Weights of the backbone: a folder, or a repository of the Hugging Face hub.",
    metavar="DIR|ID",
    shown_default="those that the model names",
    digest=DigestPart.MODEL,
)
MAX_LEARN_STEPS = 100_000
DEFAULT_REVIEW_BELOW = 0.8
"""Alphas with a lower quality should be looked at by a person."""
ONE_DEVICE = "(cpu|cuda|mps)(:[0-9]{1,3})?"
DEVICE = Option(
    help="Device: auto, cpu, cuda, cuda:N or mps.",
    metavar="DEVICE",
    pattern=f"auto|{ONE_DEVICE}",
    expected="auto, cpu, cuda, cuda:N or mps",
    suggestions=_device_names,
)
OFFLINE = Option(help="Do not download anything.")


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions(OptionGroup):
    """Reference images and their masks."""

    panel: ClassVar[Panel] = Panel.REFERENCES

    ref: tuple[Path, ...] = option(
        help="Image that shows the object. An RGBA cut-out needs no mask. Repeatable.",
        digest=DigestPart.REFERENCES,
        is_everyday=True,
    )
    mask: tuple[Path, ...] = option(
        (),
        help="Mask of the reference: white on the object, black elsewhere. Or a JSON file of labelme or COCO. Give "
        "one for each --ref. Repeatable.",
        digest=DigestPart.REFERENCES,
        is_everyday=True,
    )
    mask_label: str | None = option(
        None,
        help="Label of the object, if the mask has several: a number, a colour such as #fa3253, or in a JSON file the "
        "name of a label or category.",
        metavar="LABEL",
        digest=DigestPart.REFERENCES,
    )
    mask_orientation: MaskOrientation = option(
        "auto",
        help="Orientation of the mask, if the reference is stored rotated (EXIF): upright (as the reference is "
        "displayed), stored (as its pixels are stored), or auto (decided by the size of the mask).",
        digest=DigestPart.REFERENCES,
    )
    point: tuple[tuple[float, float], ...] = option(
        (),
        help="Point on the object, instead of a mask: x and y in pixels of the displayed image, from its top left "
        "corner. Only with a single --ref. Repeatable.",
        metavar="X,Y",
        expected="x and y in pixels, such as 640,360",
        digest=DigestPart.REFERENCES,
    )
    not_point: tuple[tuple[float, float], ...] = option(
        (),
        help="Point off the object. Repeatable.",
        metavar="X,Y",
        expected="x and y in pixels, such as 640,360",
        digest=DigestPart.REFERENCES,
    )
    box: tuple[float, float, float, float] | None = option(
        None,
        help="Box around the object, instead of a mask: two opposite corners in pixels. Only with a single --ref.",
        metavar="X0,Y0,X1,Y1",
        expected="two corners in pixels, such as 100,50,640,360",
        digest=DigestPart.REFERENCES,
    )
    scribble: Path | None = option(
        None,
        help="Image with strokes, instead of a mask: white or green on the object, black or red off it, transparent or "
        "mid-grey elsewhere. It has the size of the --ref. Only with a single --ref.",
        digest=DigestPart.REFERENCES,
    )
    guidance: GuidanceRule = option(
        "mask",
        help="How points and strokes are used: mask (lite makes the mask of the object from them), or paper (the "
        "self-attention of icm-sd21 extends them, as in the paper).",
        digest=DigestPart.REFERENCES,
    )
    save_mask: Path | None = option(
        None,
        help="Write the mask of the --ref to this .png file, also with --dry-run. Only with a single --ref.",
    )
    not_ref: tuple[Path, ...] = option(
        (),
        help="Image of what is not the object, such as a similar object that was taken for it. Repeatable.",
        digest=DigestPart.REFERENCES,
    )
    not_mask: tuple[Path, ...] = option(
        (),
        help="Mask of a --not-ref: white on what is not the object. The first mask belongs to the first --not-ref, "
        "and so on. Without a mask, the whole image is not the object. Repeatable.",
        digest=DigestPart.REFERENCES,
    )

    @property
    def files(self) -> list[Path]:
        """All files that are read, except negative references, which may be matted."""
        scribbles = [] if self.scribble is None else [self.scribble]
        return [*self.ref, *self.mask, *scribbles, *self.not_mask]

    @property
    def has_prompts(self) -> bool:
        """Whether points, a box or strokes are given instead of a mask."""
        return bool(self.point or self.not_point or self.box or self.scribble)

    def check_conflicts(self) -> None:
        self._check_prompts()
        if self.guidance == "paper":
            self._check_guidance_paper()
        if self.save_mask and len(self.ref) > 1:
            raise UsageError(f"--save-mask writes one mask, and {len(self.ref)} references were given; give one --ref")
        if self.save_mask and self.save_mask.suffix.lower() != ".png":
            raise UsageError(f"--save-mask {self.save_mask} is not a .png file; give it the suffix .png")

    def _check_prompts(self) -> None:
        """Raise UsageError for prompts of several references, next to a mask, or without a mark on the object."""
        prompts = {
            "--point": self.point,
            "--not-point": self.not_point,
            "--box": self.box,
            "--scribble": self.scribble,
        }
        for flag in (flag for flag, value in prompts.items() if value):
            if self.mask:
                raise UsageError(f"{flag} makes the mask of the reference, and --mask gives it; omit one of the two")
            if len(self.ref) > 1:
                raise UsageError(
                    f"{flag} is for a single reference, and {len(self.ref)} were given; give one --ref, or a JSON file "
                    "of labelme for each one as its --mask"
                )
        if self.not_point and not (self.point or self.box or self.scribble):
            raise UsageError(
                "--not-point excludes parts of an object, and nothing marks the object; give --point or --box"
            )

    def _check_guidance_paper(self) -> None:
        """Raise UsageError for options that ``--guidance paper`` does not support."""
        if not (self.point or self.scribble):
            raise UsageError(
                "--guidance paper extends points and strokes on the object, and there are none; give --point or "
                "--scribble, or omit --guidance"
            )
        if self.not_point or self.box or self.save_mask:
            raise UsageError(
                "--guidance paper uses only points and strokes on the object, and makes no mask; omit --not-point, "
                "--box and --save-mask"
            )


@dataclass(frozen=True, kw_only=True)
class SourceOptions(OptionGroup):
    """Images to matte."""

    panel: ClassVar[Panel] = Panel.SOURCES

    src: str = option(
        help="Images to matte: a folder (searched recursively), an image, a quoted glob, frames such as "
        "shot.####.exr, a text file with one path per line, or - to read paths from standard input.",
        metavar="PATH",
        is_everyday=True,
    )
    root: Path | None = option(
        None,
        help="Source folder whose tree of subfolders the outputs repeat.",
        metavar="DIR",
        shown_default="the source folder; for a glob, its part without wildcards; for a list, the working directory",
    )
    include: tuple[str, ...] = option(
        (), help="Matte only images whose path or name matches this glob. Repeatable.", metavar="GLOB"
    )
    exclude: tuple[str, ...] = option(
        (), help="Skip images whose path or name matches this glob. Repeatable.", metavar="GLOB"
    )


@dataclass(frozen=True, kw_only=True)
class HintOptions(OptionGroup):
    """Hints, garbage mattes and keep mattes."""

    panel: ClassVar[Panel] = Panel.HINTS

    hints: str | None = option(
        None,
        help="Corrections of single images: a folder, or frames such as hints/sh010.####.json. For the image a.jpg, "
        "the folder contains a.json (labelme, with the labels fg, bg, keep and drop) or a.png (white on the object, "
        "black off it, grey or transparent elsewhere).",
        metavar="PATH",
        digest=DigestPart.IMAGE,
    )
    garbage: str | None = option(
        None,
        help="Garbage matte: alpha is 0 where it is white, and the model does not see that area. One image for all "
        "images, or frames such as garbage.####.exr.",
        metavar="PATH",
        digest=DigestPart.IMAGE,
    )
    keep: str | None = option(
        None,
        help="Keep matte (core matte): alpha is 1 where it is white, also where the garbage matte is white. One image "
        "for all images, or frames such as keep.####.exr.",
        metavar="PATH",
        digest=DigestPart.IMAGE,
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(OptionGroup):
    """Files that are written for each image."""

    panel: ClassVar[Panel] = Panel.OUTPUT

    out: str = option(
        help="Folder for the alphas, with the subfolders of the sources; or frames such as out/matte.####.exr.",
        metavar="PATH",
        is_everyday=True,
    )
    name: str | None = option(
        None,
        help="Template of the file names, such as {stem}_matte{frame}. For shot.1001.exr, {stem} is shot, {frame} is "
        ".1001 and {suffix} is .exr.",
        metavar="TEMPLATE",
        shown_default="{stem}{frame}",
    )
    keep_suffix: bool = option(
        False, help="Keep the extension of the image in the name of its alpha, such as a.jpg.png for a.jpg."
    )
    format: ImageFormat | None = option(
        None,
        help="File format of the alphas.",
        shown_default="from the extension of --out, else png",
        digest=DigestPart.FORMAT,
    )
    depth: BitDepth | None = option(
        None,
        help="Bit depth: 8 or 16 for PNG; 8, 16 or float for TIFF; half or float for EXR.",
        shown_default="8, or half for EXR; a foreground keeps the depth of its source",
        digest=DigestPart.VALUE,
    )
    channel: str = option("A", help="Name of the alpha channel in EXR files.", metavar="NAME", digest=DigestPart.VALUE)
    foreground: ForegroundMode = option(
        "none",
        help="Write RGBA: the colours of the object without the background, straight or premultiplied. auto is "
        "premultiplied for EXR and straight otherwise.",
        digest=DigestPart.VALUE,
    )
    invert: bool = option(False, help="Write the holdout matte, 1 - alpha.", digest=DigestPart.VALUE)
    trimap: TrimapMode = option(
        "none",
        help="Write a trimap: also (next to the alpha, as NAME.trimap.png), or instead of the alpha.",
        digest=DigestPart.VALUE,
    )
    trimap_band: int = option(
        10,
        help="Distance from the edge, in pixels, within which the trimap is unknown.",
        metavar="PX",
        minimum=1,
        maximum=10_000,
        digest=DigestPart.VALUE,
    )
    overwrite: bool = option(
        False, help="Recompute all alphas. Replace even reviewed and retouched ones, and files that icm did not write."
    )
    keep_existing: bool = option(
        False,
        help="Keep every alpha that icm made from the same source, even if another version or other settings made it.",
    )

    def check_conflicts(self) -> None:
        if self.overwrite and self.keep_existing:
            raise UsageError(
                "--overwrite recomputes existing alphas and --keep-existing keeps them; give only one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """The model and the device it runs on."""

    panel: ClassVar[Panel] = Panel.MODEL

    model: str | None = option(
        None,
        help="Model: a name that icm matte --list-models prints, such as lite, or a .yaml file.",
        metavar="NAME|FILE",
        shown_default="that of the checkpoint, else lite",
        suggestions=_preset_names,
        digest=DigestPart.MODEL,
        is_everyday=True,
    )
    checkpoint: Path | None = option(
        None, help="Trained weights: the published .ckpt, or a .safetensors file of icm.", digest=DigestPart.MODEL
    )
    weights: str | None = option(None, WEIGHTS)
    match: MatchRule | None = option(
        None,
        help="Objects that are matted: kind (all of the same kind, such as any dog), or same (only those that look "
        "like the same instance, such as this dog or this model of a car).",
        shown_default="kind",
        digest=DigestPart.MODEL,
    )
    min_similarity: float | None = option(
        None,
        help="With --match same: smallest similarity to the object of the reference, from -1 to 1, at which an object "
        "is kept.",
        metavar="VALUE",
        minimum=-1,
        maximum=1,
        shown_default="0.7",
        digest=DigestPart.MODEL,
    )
    edges: EdgeMethod = option(
        "model",
        help="Method that refines the edges of the alpha: that of the model, closed-form matting or ViTMatte.",
        digest=DigestPart.MODEL,
    )
    edges_weights: str | None = option(
        None,
        help="Weights of ViTMatte: a folder, or a repository of the Hugging Face hub.",
        metavar="DIR|ID",
        shown_default="hustvl/vitmatte-small-composition-1k",
        digest=DigestPart.MODEL,
    )
    device: str = option("auto", DEVICE)
    dtype: DtypeName = option(
        "auto",
        help="Data type of the computation.",
        shown_default="auto: float16 on CUDA, else float32; on CPUs, bfloat16 in transformer networks if faster",
        digest=DigestPart.DTYPE,
    )
    seed: int = option(
        0,
        help="Seed of the noise that Stable Diffusion backbones add.",
        minimum=0,
        maximum=2**32 - 1,
        digest=DigestPart.VALUE,
    )
    offline: bool = option(False, OFFLINE)


@dataclass(frozen=True, kw_only=True)
class MatteModelOptions(ModelOptions):
    """The model, which may run on several devices."""

    device: str = option(
        "auto",
        replace(
            DEVICE,
            help="Device: auto, cpu, cuda, cuda:N or mps; or several of one kind, such as cuda:0,cuda:1 or cuda:all.",
            pattern=f"auto|cuda:all|{ONE_DEVICE}( *, *{ONE_DEVICE})*",
            expected="auto, cpu, cuda, cuda:N, cuda:all or mps, or several such as cuda:0,cuda:1",
        ),
    )
    list_models: bool = option(
        False, help="List the models with their requirements and licences, and exit.", is_in_api=False
    )


@dataclass(frozen=True, kw_only=True)
class ResourceOptions(OptionGroup):
    """Resources that a run may use."""

    panel: ClassVar[Panel] = Panel.MODEL

    batch_size: int | Literal["auto"] = option(
        "auto",
        help="Number of images per batch on each device. It is halved when memory runs out.",
        metavar="N|auto",
        minimum=1,
        maximum=1024,
        shown_default="auto: 8 on CUDA, else 1",
    )
    workers: int | None = option(
        None,
        help="Number of reader threads, of writer threads and of scoring processes.",
        minimum=1,
        maximum=256,
        shown_default="half of the cores, at most 4",
    )


@dataclass(frozen=True, kw_only=True)
class ColourOptions(OptionGroup):
    """Colour spaces of sources and references."""

    panel: ClassVar[Panel] = Panel.COLOUR

    colorspace: str = option(
        "auto",
        help="Colour space of the sources: a name of the OpenColorIO configuration such as ACEScg, or auto. auto uses "
        "the colour space that the file states. If it states none: linear Rec.709 for EXR and HDR, sRGB for other "
        "formats.",
        metavar="NAME",
        digest=DigestPart.VALUE,
    )
    ref_colorspace: str | None = option(
        None,
        help="Colour space of the references.",
        metavar="NAME",
        shown_default="that of the sources",
        digest=DigestPart.REFERENCES,
    )
    layer: str | None = option(
        None,
        help="Layer of EXR sources: the name of a part, or a channel prefix such as beauty.",
        metavar="NAME",
        shown_default="the channels R, G and B of the first part that has them",
        digest=DigestPart.VALUE,
    )
    ref_layer: str | None = option(
        None,
        help="Layer of EXR references.",
        metavar="NAME",
        shown_default="that of the sources",
        digest=DigestPart.REFERENCES,
    )
    ocio: str | None = option(
        None,
        help="OpenColorIO configuration: a file, or ocio:// followed by the name of a built-in configuration.",
        metavar="PATH",
        shown_default="$OCIO, else the built-in studio configuration",
        digest=DigestPart.COLOUR_CONFIG,
    )
    view: str | None = option(
        None,
        help="OpenColorIO view that converts scene-referred images for the model.",
        metavar="NAME",
        shown_default="Un-tone-mapped",
        digest=DigestPart.VALUE,
    )
    exposure: float = option(
        0.0,
        help="Stops by which scene-referred images are brightened for the model, before the view is applied.",
        metavar="STOPS",
        minimum=-30,
        maximum=30,
        digest=DigestPart.VALUE,
    )
    white: float | None = option(
        None,
        help="Value that is white in images of more than 8 bits, such as 255 for floats from 0 to 255.",
        metavar="VALUE",
        minimum=1e-6,
        maximum=1e12,
        expected="a number above 0",
        shown_default="the maximum of the integer type; 1 for floats",
        digest=DigestPart.VALUE,
    )


@dataclass(frozen=True, kw_only=True)
class ShotOptions(OptionGroup):
    """How frames of shots are matted."""

    panel: ClassVar[Panel] = Panel.SEQUENCES

    shot: bool = option(
        False,
        help="Treat the images as frames of shots. The model first learns the references. Alphas are then propagated "
        "from frame to frame along the motion.",
        digest=DigestPart.PROPAGATION,
    )
    learn_steps: int | None = option(
        None,
        help="Number of steps in which the model learns the references before it mattes.",
        minimum=0,
        maximum=MAX_LEARN_STEPS,
        shown_default="140 with --shot if the model can learn, else 0",
        digest=DigestPart.LEARN_STEPS,
    )


@dataclass(frozen=True, kw_only=True)
class SequenceOptions(ShotOptions):
    """Frames, shots, and runs on several machines."""

    frames: str | None = option(
        None,
        help="Frames to matte, such as 1001-1100, or 1001-1100x2 for every second frame.",
        metavar="RANGE",
        shown_default="all",
    )
    missing: MissingPolicy = option(
        "skip",
        help="What to do about missing frames: skip them with a notice, report them as failed images, or stop with an "
        "error before anything is written.",
    )
    shard: str | None = option(
        None,
        help="Part of the images that this machine mattes, such as 2/8 for the second of eight parts.",
        metavar="I/N",
        shown_default="all",
    )
    fail_fast: bool = option(False, help="Stop at the first image that fails.")
    ray: str | None = option(
        None,
        help="Matte on a Ray cluster, one model per GPU: auto, or the address of the cluster. Needs the extra 'ray'.",
        metavar="auto|ADDRESS",
        pattern=r"auto|(\[[0-9A-Fa-f:.]+\]|[\w.-]+):[0-9]{1,5}",
        expected="auto, or an address such as 10.0.0.1:6379",
    )
    ray_cpus: int | None = option(
        None, help="With --ray: number of CPU cores to use instead of GPUs.", minimum=1, maximum=100_000
    )


REPORT = Option(
    help="Write a report. The extension sets the format: .csv (one row per image), .json (all results and settings) or "
    ".html (a page with images). Repeatable."
)


@dataclass(frozen=True, kw_only=True)
class MatteReportOptions(OptionGroup):
    """Reports and scores of a matting run."""

    panel: ClassVar[Panel] = Panel.REPORTS

    report: tuple[Path, ...] = option((), REPORT)
    contact_sheet: Path | None = option(
        None,
        help="Write a contact sheet (.png). It shows the references, then up to 48 images, lowest quality first: "
        "source, alpha, and object on magenta.",
    )
    review_list: Path | None = option(
        None,
        help="Write a .txt file with the paths of the images whose alpha has a quality below --review-below, worst "
        "first. Give this file as --src to matte them again.",
    )
    review_below: float = option(
        DEFAULT_REVIEW_BELOW,
        help="Quality, from 0 to 1, below which an alpha should be reviewed.",
        metavar="QUALITY",
        minimum=0,
        maximum=1,
    )
    gt: str | None = option(
        None,
        help="True alphas (ground truth): a folder, or frames such as gt.####.png. The report then states MSE, SAD, "
        "GRAD, CONN and MAD.",
        metavar="PATH",
    )
    dry_run: bool = option(
        False,
        help="Compute no alphas. List every source with its output, and say which alphas would be kept or recomputed, "
        "and why.",
    )


@dataclass(frozen=True, kw_only=True)
class DisplayOptions(OptionGroup):
    """Messages in the terminal."""

    panel: ClassVar[Panel] = Panel.DISPLAY

    quiet: bool = option(False, help="Print errors only.", flags=("--quiet", "-q"), is_in_api=False)
    verbose: bool = option(
        False, help="Print details, and a line for every image.", flags=("--verbose", "-v"), is_in_api=False
    )

    def check_conflicts(self) -> None:
        if self.quiet and self.verbose:
            raise UsageError("--quiet prints errors only and --verbose prints details; give only one of the two")


@dataclass(frozen=True, kw_only=True)
class MatteDisplayOptions(DisplayOptions):
    """Messages in the terminal, and progress for other programs."""

    progress: ProgressMode = option(
        "auto",
        help="Progress: auto (a bar in a terminal, else lines), plain lines, none, json (one object per event), or "
        "openjd (lines for Deadline Cloud and other Open Job Description workers).",
        is_in_api=False,
    )


@dataclass(frozen=True)
class MatteOptions(CommandOptions):
    """Options of ``icm matte``."""

    positional: ClassVar[tuple[str, ...]] = ("ref", "mask")

    references: ReferenceOptions
    sources: SourceOptions
    hints: HintOptions
    output: OutputOptions
    model: MatteModelOptions
    resources: ResourceOptions
    colour: ColourOptions
    sequences: SequenceOptions
    reports: MatteReportOptions
    display: MatteDisplayOptions


@dataclass(frozen=True)
class LoadOptions(CommandOptions):
    """Arguments of ``icm_cli.load``."""

    positional: ClassVar[tuple[str, ...]] = ("model",)

    model: ModelOptions


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(OptionGroup):
    """The dataset that is evaluated."""

    panel: ClassVar[Panel] = Panel.DATASET

    dataset: DatasetName | None = option(
        None, help="Name of a published dataset, or folder for your own images.", is_everyday=True
    )
    data_root: Path | None = option(None, help="Folder that contains the dataset.", metavar="DIR", is_everyday=True)
    images: str | None = option(
        None, help="With --dataset folder: images, as a folder or a quoted glob.", metavar="PATH"
    )
    alphas: str | None = option(
        None, help="With --dataset folder: ground-truth alphas, named like the images.", metavar="PATH"
    )
    trimaps: str | None = option(None, help="With --dataset folder: trimaps, named like the images.", metavar="PATH")
    groups: Path | None = option(
        None,
        help="JSON file that says which images show the same object or class (docs/evaluate.md shows one).",
        shown_default="the published groups, if there are any",
    )
    backgrounds: Path | None = option(
        None, help="Folder of background images, for datasets that contain only foregrounds.", metavar="DIR"
    )
    split: Split = option("test", help="Split of the dataset that is scored.")
    video: bool = option(False, help="Treat every group as a video, and score its flicker (dtSSD).")


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions(OptionGroup):
    """How alphas are scored."""

    panel: ClassVar[Panel] = Panel.PROTOCOL

    pred: Path | None = option(
        None,
        help="Score the alphas in this folder, made by any tool, instead of matting.",
        metavar="DIR",
        is_everyday=True,
    )
    references: Path | None = option(
        None,
        help="Use the references of an earlier run: its JSON report, or the file that its --write-references wrote.",
    )
    rounds: int | None = option(
        None,
        help="Number of rounds, each with other references. Reports give the mean and the standard deviation over "
        "the rounds.",
        minimum=1,
        maximum=1000,
        shown_default="1",
    )
    region: tuple[Region, ...] = option(
        (), help="Region that is scored. Repeatable.", shown_default="that of the dataset"
    )
    size: ScoredSize | None = option(None, help="Size at which alphas are scored.", shown_default="that of the dataset")
    metric_variant: MetricVariant | None = option(
        None,
        help="Variant of the metrics GRAD and CONN: composition (code of Composition-1k) or aim (code of AIM-500).",
        shown_default="that of the dataset",
    )
    trimap_kernel: int | None = option(
        None,
        help="Size of the unknown region, if the dataset has no trimaps: the pixels with 0 < alpha < 1 are dilated by "
        "a square of this side, in pixels.",
        metavar="PX",
        minimum=1,
        maximum=1000,
        shown_default="25",
    )
    allow: tuple[str, ...] = option(
        (),
        help="Accept bad data of this kind, such as empty-alpha: it does not change the exit code. Repeatable.",
        metavar="KIND",
        choices=tuple(PROBLEM_KINDS),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluatedMattingOptions(ShotOptions):
    """How a dataset is matted, with references from the dataset itself."""

    panel: ClassVar[Panel] = Panel.SEQUENCES

    shot: bool = option(
        False, help="Matte every group as a shot, as icm matte --shot does.", digest=DigestPart.PROPAGATION
    )
    refs_per_group: int | None = option(
        None, help="Number of references for each group.", minimum=1, maximum=1000, shown_default="1"
    )
    write_references: Path | None = option(
        None, help="Write the references of the run to this .json file, for --references of a later run."
    )
    save_alphas: Path | None = option(
        None, help="Keep the alphas in this folder. By default, they are deleted at the end of the run.", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationReportOptions(OptionGroup):
    """Reports of an evaluation."""

    panel: ClassVar[Panel] = Panel.REPORTS

    report: tuple[Path, ...] = option((), REPORT)
    note: str | None = option(None, help="Text that is added to every report.", metavar="TEXT")
    compare: tuple[Path, Path] | None = option(
        None,
        help="Compare two JSON reports image by image, and exit.",
        metavar="A.json B.json",
        expected="two JSON reports",
        is_in_api=False,
    )


@dataclass(frozen=True)
class EvaluateOptions(CommandOptions):
    """Options of ``icm eval``."""

    positional: ClassVar[tuple[str, ...]] = ("dataset", "data_root")

    dataset: DatasetOptions
    protocol: ProtocolOptions
    model: ModelOptions
    resources: ResourceOptions
    matting: EvaluatedMattingOptions
    reports: EvaluationReportOptions
    display: DisplayOptions

    @classmethod
    def matting_names(cls) -> list[str]:
        """Names of the options that only matting reads, so that they have no effect with ``--pred``."""
        names = [field.name for field in cls.option_fields() if field.group in ("model", "resources", "matting")]
        return [name for name in names if name != "workers"]  # scoring has workers, too


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(OptionGroup):
    """A training run."""

    panel: ClassVar[Panel] = Panel.TRAINING

    config: str = option(
        help="Model and training recipe: a .yaml file, or a preset such as lite or icm-sd21.",
        metavar="NAME|FILE",
        suggestions=_preset_names,
        is_everyday=True,
    )
    data: Path | None = option(
        None,
        help="A .yaml file that lists the training sources, the backgrounds and the validation data.",
        shown_default="the section data of --config",
        is_everyday=True,
    )
    out: str | None = option(
        None, help="Folder for checkpoints and logs.", metavar="DIR", shown_default="runs/CONFIG", is_everyday=True
    )
    resume: bool = option(False, help="Continue the run in the folder --out, if there is one.", is_everyday=True)
    checkpoint: Path | None = option(None, help="Weights to start from, instead of random ones.", shown_default="none")
    overrides: tuple[str, ...] = option(
        (),
        help="Override a setting of --config, such as train.steps=500. Repeatable.",
        flags=("--set",),
        metavar="KEY=VALUE",
        pattern=r"\w+(\.\w+)*=.*",
        expected="KEY=VALUE, such as train.steps=500",
    )
    preview: int = option(
        0, help="Write an image of N training samples (preview.png), and exit.", minimum=0, maximum=1000
    )
    pack: Path | None = option(
        None, help="Also write the trained model, with its backbone, to one small .safetensors file."
    )


@dataclass(frozen=True, kw_only=True)
class TrainingDeviceOptions(OptionGroup):
    """The device of a training run, and its data loading."""

    panel: ClassVar[Panel] = Panel.MODEL

    weights: str | None = option(None, WEIGHTS)
    device: str = option("auto", DEVICE)
    workers: int | None = option(
        None,
        help="Number of processes that prepare training samples. With 0, the main process prepares them.",
        minimum=0,
        maximum=256,
        shown_default="half of the cores, at most 4",
    )
    offline: bool = option(False, OFFLINE)


@dataclass(frozen=True)
class TrainOptions(CommandOptions):
    """Options of ``icm train``."""

    positional: ClassVar[tuple[str, ...]] = ("config",)

    training: TrainingOptions
    device: TrainingDeviceOptions
    display: DisplayOptions


@dataclass(frozen=True, kw_only=True)
class ReviewPageOptions(OptionGroup):
    """The run that is reviewed, and the page that shows it."""

    panel: ClassVar[Panel] = Panel.REVIEW

    alphas: Path = option(
        help="Folder with the alphas of a run of icm matte, its --out.", metavar="DIR", is_positional=True
    )
    hints: Path | None = option(
        None,
        help="Folder for the hint files of corrected images.",
        metavar="DIR",
        shown_default="--hints of the run, if it is a folder; else ALPHAS/.icm/hints",
        is_everyday=True,
    )
    device: str | None = option(None, replace(DEVICE, shown_default="that of the run", is_everyday=True))
    host: str = option(
        "127.0.0.1",
        help="Address that the page is served at. Unless it is 127.0.0.1 or localhost, everyone in the network who "
        "has the link can open and change the review.",
        metavar="ADDRESS",
        pattern=r"[0-9A-Za-z.:_-]+",
        expected="an address or a host name, such as 127.0.0.1 or 10.0.0.5",
        is_everyday=True,
    )
    port: int = option(
        0, help="Port of the page; 0: any free port.", metavar="N", minimum=0, maximum=65535, is_everyday=True
    )
    no_browser: bool = option(False, help="Only print the link, and open no browser.", is_everyday=True)


@dataclass(frozen=True)
class ReviewOptions(CommandOptions):
    """Options of ``icm review``."""

    page: ReviewPageOptions
    display: DisplayOptions
