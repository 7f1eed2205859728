"""The `tubelet` command."""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table

app = typer.Typer(help="Sample video from a spacetime diffusion transformer.", no_args_is_help=True, pretty_exceptions_enable=False)
train = typer.Typer(help="Train a model: first the VAE, then the transformer.", no_args_is_help=True)
app.add_typer(train, name="train")
tune = typer.Typer(help="Find the fastest settings of the kernels on this GPU, for later runs to use.", no_args_is_help=True)
app.add_typer(tune, name="tune")
console = Console()
errors = Console(stderr=True)

Model = Annotated[str | None, typer.Option(help="A folder or a hub id; the bundled model if not given.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU is taken if there is one.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder of the run; a run that is there already is resumed.")]
Data = Annotated[list[Path] | None, typer.Option(help="Folder(s) of videos with captions, in place of the procedural world.")]
Steps = Annotated[int, typer.Option(help="Training steps.")]
Minutes = Annotated[float | None, typer.Option(help="Train for this long in all, instead of a number of steps.")]
Rate = Annotated[float, typer.Option(help="The highest learning rate.")]
Precision = Annotated[str, typer.Option(help="bf16 (autocast) or fp32.")]
SamplingPrecision = Annotated[
    str, typer.Option("--precision", help="Of the transformer: fp32, bf16, or fp8 (bf16 with the products of its blocks in E4M3).")
]
Seed = Annotated[int, typer.Option(help="Of the data, the noise and the first weights.")]
LongestClip = Annotated[int, typer.Option(help="Frames of the longest clips.")]


def main() -> None:
    """Run the command. Bad input ends with its message and exit code 2, without a traceback (set TUBELET_DEBUG=1 to see it)."""
    known = {group.name for group in app.registered_groups}
    for command in entry_points(group="tubelet.commands"):  # of packages that build on the engine, such as the benchmarks
        if command.name not in known:
            app.add_typer(command.load(), name=command.name)
    try:
        app()
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("TUBELET_DEBUG"):
            raise
        errors.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def sample(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="NAME.mp4, .gif, .png (contact sheet), .npy, or a folder for PNG frames.")
    ] = Path("out.mp4"),
    image: Annotated[Path | None, typer.Option(help="An image that the video starts with.")] = None,
    last_image: Annotated[Path | None, typer.Option(help="An image that the video ends with.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to extend; the result holds it and what was made.")] = None,
    backward: Annotated[bool, typer.Option(help="Extend the video before its start.")] = False,
    loop: Annotated[bool, typer.Option(help="Make the last frame lead on to the first.")] = False,
    frames: Annotated[int, typer.Option(help="Number of frames; with --video, of new ones.")] = 16,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; 64x64, or that of the image or video.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler, heun or dpm++2m.")] = None,
    stagger: Annotated[int | None, typer.Option(help="Evaluations by which each frame lags behind the one before.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strongly the prompt steers.")] = None,
    negative: Annotated[str, typer.Option(help="What the video should not show.")] = "",
    seed: Annotated[int, typer.Option(help="Of the noise: the same seed gives the same video.")] = 0,
    save_frames: Annotated[Path | None, typer.Option(help="Also write every frame as a PNG to this folder.")] = None,
    model: Model = None,
    device: Device = None,
    precision: SamplingPrecision = "fp32",
) -> None:
    """Make a video from a prompt."""
    from .conditioning import extend_backward, extend_forward
    from .engine import Engine
    from .pretrained import check_parent
    from .video import FORMATS, Clip, fit, load_image

    if not prompt.strip():
        raise ValueError("prompt: expected a description of the video, got an empty one")
    for name, path in (("--out", out), ("--save-frames", save_frames)):
        if path is not None:
            check_parent(path)
            if (name == "--save-frames" or not path.suffix) and path.exists() and not path.is_dir():
                raise ValueError(f"{name}: expected a folder, or a name that ends in {', '.join(FORMATS)}, got the file {path}")
    if out == Path():
        raise ValueError("--out: expected a name or a folder, got an empty one, or the folder where you are")
    if out.suffix.lower() not in FORMATS and not out.is_dir() and out.suffix:
        raise ValueError(f"--out: expected a name that ends in {', '.join(FORMATS)}, or a folder, got {out}")
    if video is not None and (image is not None or last_image is not None or loop):
        raise ValueError("--video: cannot be combined with --image, --last-image or --loop")
    if backward and video is None:
        raise ValueError("--backward: needs a --video to extend")
    given = Clip.load(video) if video is not None else None
    beyond = f"{frames + (0 if given is None else len(given)):05d}.png"
    for name, folder in (("--out", out), ("--save-frames", save_frames)):
        if folder is not None and folder.is_dir() and (folder / beyond).exists():
            raise ValueError(f"{name}: {folder} holds frames of a longer video, from {beyond} on: expected them elsewhere, or removed")
    images = {index: load_image(path) for index, path in ((0, image), (-1, last_image)) if path is not None}

    with console.status("loading the model"):
        engine = Engine.from_pretrained(model, device=device, precision=precision)
    multiple = engine.vae.stride * engine.dit.config.patch[1]
    first = given.frames[0] if given is not None else next(iter(images.values()), None)
    height, width = _size(size, first, multiple, engine.config.trained_sides[1])
    known = {index: fit(picture[None], height, width)[0] for index, picture in images.items()}
    if given is not None:
        given = Clip(fit(given.frames, height, width), given.fps)
        seen = min(len(given), engine.config.trained_frames // 2)
        known = extend_backward(given[:seen]) if backward else extend_forward(given[-seen:])
        frames += seen
    with _progress() as bar:
        task = bar.add_task(f"{frames} frames of {width}x{height}", total=None)
        clip = engine.sample(
            prompt,
            frames=frames,
            height=height,
            width=width,
            seed=seed,
            guidance=guidance,
            negative_prompt=negative,
            known=known or None,
            loop=loop,
            steps=steps,
            solver=solver,
            stagger=stagger,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    if given is not None:
        made = Clip(clip[:-seen].frames if backward else clip[seen:].frames, given.fps)
        clip = made + given if backward else given + made
    clip.save(out)
    if save_frames is not None:
        clip.save_frames(save_frames)
    console.print(f"{out}: {len(clip)} frames of {clip.width}x{clip.height}, {clip.duration:.1f} s", highlight=False, soft_wrap=True)


@app.command()
def info(model: Model = None, precision: SamplingPrecision = "fp32") -> None:
    """Show the model, the versions, the device, and which implementation of each op can run here."""
    from importlib.metadata import PackageNotFoundError, version

    from .engine import Engine

    engine = Engine.from_pretrained(model, precision=precision)
    table = Table(show_header=False, box=None)
    for package in ("tubelet", "torch", "triton", "transformers", "av", "diffusers"):
        try:
            table.add_row(package, version(package))
        except PackageNotFoundError:
            table.add_row(package, "not installed")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: sampling runs on the CPU"
    table.add_row("GPU", gpu)
    table.add_row("CPU threads", str(torch.get_num_threads()))
    table.add_row("model", f"{engine.config.name}: {', '.join(f'{name} {_millions(part)}' for name, part in _parts(engine))}")
    low, high = engine.config.trained_sides
    table.add_row("trained on", f"sides of {low} to {high} pixels, up to {engine.config.trained_frames} frames")
    table.add_row(
        "sampling",
        f"{engine.config.solver}, {engine.config.steps} steps, guidance {engine.config.guidance:g}, shift {engine.config.shift:g}, "
        f"stagger {engine.config.stagger}",
    )
    console.print(table)
    # A sample of one step shows what really runs, rather than what should.
    from tubelet.kernels import engaged, reset_engaged

    reset_engaged()
    engine.sample("a test", frames=2, height=32, width=32, steps=1)
    ops = Table("op", "runs as", "calls", "passed over")
    for op, ran in sorted(engaged().items()):
        for name, engagement in ran.items():
            ops.add_row(op, name, str(engagement.calls), "; ".join(f"{k}: {v}" for k, v in engagement.passed_over.items()))
    console.print(ops)


@train.command("vae")
def train_vae(
    out: Out,
    data: Data = None,
    steps: Steps = 20_000,
    minutes: Minutes = None,
    learning_rate: Rate = 2e-3,
    kl_weight: Annotated[
        float, typer.Option(help="The price of a nat of rate: a high one makes the time latents carry what they can.")
    ] = 20.0,
    kl_warmup: Annotated[int, typer.Option(help="Steps over which the price rises from 0.")] = 2000,
    tokens: Annotated[int, typer.Option(help="Size of a step, in frames of 16x16 pixels.")] = 512,
    start: Annotated[Path | None, typer.Option(help="The folder of a VAE to start from, in place of random weights.")] = None,
    decoder_only: Annotated[bool, typer.Option(help="Train the decoder of --start alone; its latents stay as they are.")] = False,
    longest_clip: LongestClip = 16,
    precision: Precision = "bf16",
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Stage one: the VAE, to OUT/vae."""
    from .pretrained import pick_device
    from .training.stage_one import StageOne, StageOneConfig
    from .training.trainer import Trainer, TrainerConfig
    from .vae import VAEConfig, VideoVAE

    if decoder_only and start is None:
        raise ValueError("--decoder-only: needs a VAE to --start from")
    torch.manual_seed(seed)
    vae = (VideoVAE(VAEConfig()) if start is None else VideoVAE.from_pretrained(start)).to(pick_device(device)).train()
    config = StageOneConfig(tokens, longest_clip, kl_weight, kl_warmup, decoder_only=decoder_only, seed=seed)
    stage = StageOne(vae, _world(data, seed, pans=0.25), config)
    config = TrainerConfig(steps, minutes, learning_rate, warmup=100, precision=precision, seed=seed)
    trainer = Trainer(vae, out, config)
    trainer.run(stage.loss, "vae")
    with trainer.averaged():
        vae.save_pretrained(out / "vae")
    _trained(out, f"{out / 'vae'}: the VAE after {trainer.step} steps")


@train.command("dit")
def train_dit(
    context: typer.Context,
    out: Out,
    vae: Annotated[Path | None, typer.Option(help="The folder of the VAE, made by `train vae`.")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="A model to train on from ('bundled', a folder, a hub id), with its VAE, text encoder and sizes."),
    ] = None,
    data: Data = None,
    text: Annotated[
        str | None, typer.Option(help="A CLIP or T5 encoder (kept fixed); without it a small CLIP is made and trained along.")
    ] = None,
    train_text: Annotated[bool, typer.Option(help="Train the text encoder of --start or --text along.")] = False,
    width: Annotated[int, typer.Option(min=1, help="Channels of the transformer.")] = 192,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 4,
    blocks: Annotated[str, typer.Option(help="Kinds of blocks, such as factorised*4,frame_causal*2.")] = "factorised*6",
    local: Annotated[tuple[int, int], typer.Option(help="Convolutional blocks before and after the transformer.")] = (2, 2),
    latents: Annotated[str, typer.Option(help="What is diffused: 'space' latents (time latents follow from them), or 'both'.")] = "space",
    steps: Steps = 50_000,
    minutes: Minutes = None,
    learning_rate: Rate = 2e-3,
    tokens: Annotated[int, typer.Option(help="Tokens of a step's pack.")] = 2048,
    shift: Annotated[float, typer.Option(help="Shift of the noise levels: the higher, the more often near pure noise.")] = 2.0,
    longest_clip: LongestClip = 32,
    images: Annotated[float, typer.Option(help="Share of images; many at first teach appearance faster.")] = 0.1,
    usual: Annotated[float, typer.Option(help="Share, of the videos, of clips of 64x64 pixels and usual-frames frames.")] = 0.75,
    usual_frames: Annotated[int, typer.Option(min=1, help="Frames of these.")] = 16,
    beginnings: Annotated[float, typer.Option(help="Share, of the videos, of which only the first frames are seen.")] = 0.3,
    frame_times: Annotated[float, typer.Option(help="Share of clips whose frames differ in their noise levels.")] = 0.9,
    precision: Precision = "bf16",
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Stage two: the video transformer, to OUT/model, ready to sample."""
    from .dit import DiTConfig, VideoDiT
    from .engine import Engine, EngineConfig
    from .pretrained import pick_device
    from .text import TextEncoder, build_clip
    from .training.data import vocabulary_captions
    from .training.stage_two import StageTwo, StageTwoConfig
    from .training.trainer import Trainer, TrainerConfig
    from .vae import VideoVAE

    if latents not in ("both", "space"):
        raise ValueError(f"--latents: expected 'both' or 'space', got {latents!r}")
    if (vae is None) == (start is None):
        raise ValueError("--vae, --start: expected one of them, a VAE to train a new transformer for or a model to train on from")
    for name, of in (("text", "a text encoder"), *((name, "its sizes") for name in ("width", "heads", "blocks", "local", "latents"))):
        if start is not None and context.get_parameter_source(name).name != "DEFAULT":
            raise ValueError(f"--{name}: expected none with --start, whose model has {of}, got {context.params[name]!r}")
    kinds, where = _blocks(blocks), pick_device(device)
    torch.manual_seed(seed)
    world = _world(data, seed, pans=0.03)
    if start is not None:
        model = Engine.from_pretrained(None if start == "bundled" else start, device=where)
        encoder, dit, first, sampling = model.text, model.dit.train(), model.vae, model.config
    else:
        first = VideoVAE.from_pretrained(vae).to(where)
        if text is None:
            captions = [text for folder in world.worlds for text in folder.captions()] if data else vocabulary_captions(4000)
            encoder, train_text = build_clip(captions, out / "text", dim=128, layers=2, heads=4, max_length=64).to(where), True
        else:
            encoder = TextEncoder.from_pretrained(text, device=where)
        channels = first.config.latent_channels * (2 if latents == "both" else 1)
        dit = VideoDiT(DiTConfig(channels, width=width, heads=heads, blocks=kinds, local_blocks=local, text_width=encoder.dim)).to(where)
        sampling = EngineConfig(steps=12 if frame_times else 24, shift=shift, guidance=2.0, stagger=6 if frame_times else 0)
    config = StageTwoConfig(
        tokens,
        longest_clip=longest_clip,
        images=images,
        usual=usual,
        usual_frames=usual_frames,
        beginnings=beginnings,
        shift=shift,
        frame_times=frame_times,
        seed=seed,
    )
    stage = StageTwo(dit, encoder, first, world, config, train_text=train_text)
    hidden = [layer.weight for layer in dit.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    settings = TrainerConfig(steps, minutes, learning_rate, precision=precision, seed=seed)
    trainer = Trainer(stage, out, settings, hidden, slow=encoder.parameters())
    if trainer.step == 0 and start is None:
        stage.measure()
    trainer.run(stage.loss, "dit")
    with trainer.averaged():
        engine = Engine(encoder, dit, first, replace(sampling, trained_frames=longest_clip))
        engine.save_pretrained(out / "model", torch.float16)
    _trained(out, f"{out / 'model'}: the model after {trainer.step} steps")


@app.command("eval")
def evaluate(
    model: Model = None,
    prompts: Annotated[int, typer.Option(help="Number of prompts to sample.")] = 100,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the figures to this JSON file.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of sampled clips to this PNG file.")] = None,
    seed: Seed = 0,
    device: Device = None,
    precision: SamplingPrecision = "fp32",
) -> None:
    """Measure a model on held-out clips and prompts, read off the pixels by a fixed oracle."""
    from .engine import Engine
    from .pretrained import check_parent, write_whole
    from .training.evaluate import EvalConfig, evaluate
    from .video import contact_sheet, save_png

    for path in (out, sheet):
        if path is not None:
            check_parent(path)
    engine = Engine.from_pretrained(model, device=device, precision=precision)
    config = EvalConfig(prompts=prompts, clips=max(2, min(40, prompts)), streams=max(1, min(6, prompts // 10)), seed=seed)
    results, clips = evaluate(engine, config, lambda items, name: track(items, name, console=console))
    table = Table("what", "figure", "value")
    for part, figures in results.items():
        for name, value in figures.items():
            table.add_row(part, name.replace("_", " "), f"{value:g}")
    console.print(table)
    if out is not None:
        write_whole(out, (json.dumps(results, indent=2) + "\n").encode())
    if sheet is not None:
        shown = clips[:16]
        save_png(contact_sheet(shown, [clip.prompt or "" for clip in shown]), sheet)


@tune.command("attention")
def tune_attention(
    quick: Annotated[bool, typer.Option(help="A coarser search, of minutes for each class.")] = False,
    head_dim: Annotated[list[int] | None, typer.Option(help="Of the heads; may be repeated. 64 and 128 if not given.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float16, bfloat16 or float32; may be repeated. bfloat16 if not given.")] = None,
    mask: Annotated[
        list[str] | None, typer.Option(help="What is attended to: video, frame or site; may be repeated. All three if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder; that of TUBELET_TUNED, or that of the package, if not given.")
    ] = None,
) -> None:
    """Tune attention. Each class of shapes (a head dim, a dtype, a kind of mask) is written as soon as it is done, and others are kept."""
    from tubelet.kernels import tuned

    from .pretrained import write_json

    head_dims, dtypes, masks = head_dim or [64, 128], dtype or ["bfloat16"], mask or ["video", "frame", "site"]
    if wrong := [dim for dim in head_dims if not 1 <= dim <= 256]:
        raise ValueError(f"--head-dim: expected 1 to 256, got {wrong[0]}")
    for option, given, known in (
        ("--dtype", dtypes, ("float16", "bfloat16", "float32")),
        ("--mask", masks, ("video", "frame", "site")),
    ):
        if wrong := [name for name in given if name not in known]:
            raise ValueError(f"{option}: expected one of {', '.join(known)}, got {wrong[0]!r}")
    if not torch.cuda.is_available():
        raise ValueError("tune: needs a GPU, and torch finds none")
    from tubelet.kernels.attention import tune as search
    from tubelet.kernels.attention.configs import KERNELS, shape_class

    folder = out or Path(os.environ.get(tuned.VARIABLE) or tuned.FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out: {folder} cannot be written to")
    gpu = torch.device("cuda", torch.cuda.current_device())
    path = folder / tuned.file_name(gpu)
    tuned.read(path)  # a malformed file is told of before the work rather than after it
    classes = list(product(head_dims, [getattr(torch, name) for name in dtypes], masks))
    table = Table("class", "kernel", "by rule, ms", "tuned, ms", "gain", "settings")
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console, speed_estimate_period=600) as bar:
            task = bar.add_task("", total=len(classes) * len(KERNELS))

            def show(name: str, before: int, kernel: str, done: int, total: int, gain: float) -> None:
                completed = before + KERNELS.index(kernel) + done / total
                bar.update(task, completed=completed, description=f"{name}, {kernel}: {gain - 1:+.1%} so far")

            for i, each in enumerate(classes):
                name = shape_class(*each)
                found = search.tune(*each, gpu, quick=quick, progress=partial(show, name, i * len(KERNELS)))
                write_json(path, tuned.merged(tuned.read(path), search.header(gpu), "attention", name, found.entry()))
                for kernel, (rule, best) in found.milliseconds.items():
                    settings = search.describe(found.configs, kernel)
                    table.add_row(name, kernel, f"{rule:.4g}", f"{best:.4g}", f"{rule / best - 1:+.1%}", settings)
                for candidate, why in found.left_out.items():
                    bar.console.print(f"{name}: left out {candidate}: {' '.join(why.split())}", highlight=False, markup=False)
    finally:  # an interrupted run shows what it finished
        if table.row_count:
            console.print(table)
            console.print(f"{path}: written", highlight=False, soft_wrap=True)


def _size(size: str | None, picture: torch.Tensor | None, multiple: int, longest: int) -> tuple[int, int]:
    """(height, width): what was asked, or the nearest to the given picture's shape with no side above `longest`, or 64 x 64."""
    if size is not None:
        parts = size.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise ValueError(f"--size: expected WIDTHxHEIGHT, such as 96x64, got {size!r}")
        return int(parts[1]), int(parts[0])
    if picture is None:
        return 64, 64
    scale = min(1.0, longest / max(picture.shape[:2]))
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in picture.shape[:2])


def _blocks(text: str) -> tuple[str, ...]:
    """For "full,factorised*2": ("full", "factorised", "factorised")."""
    kinds: list[str] = []
    for part in text.split(","):
        kind, _, count = part.strip().partition("*")
        if count and not count.isdigit():
            raise ValueError(f"--blocks: expected kinds such as factorised*4,frame_causal*2, got {text!r}")
        kinds += [kind] * int(count or 1)
    return tuple(kinds)


def _trained(run: Path, message: str) -> None:
    from .training.plot import plot_log

    console.print(message, highlight=False, soft_wrap=True)
    try:
        console.print(f"{plot_log(run)}: its course", highlight=False, soft_wrap=True)
    except ImportError:
        console.print("install tubelet[train] for a plot of its course", markup=False)


def _world(data: list[Path] | None, seed: int, pans: float):
    from .training.data import Mixture, PanWorld, ShapesWorld, VideoFolder

    if data:
        return Mixture([(VideoFolder(folder, seed), 1.0) for folder in data], seed)
    return Mixture([(ShapesWorld(seed), 1 - pans), (PanWorld(seed), pans)], seed)


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)


def _parts(engine):
    return (("text", engine.text), ("transformer", engine.dit), ("VAE", engine.vae))


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"
