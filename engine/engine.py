"""The engine: prompts and known frames in, clips out.

    engine = Engine.from_pretrained()
    clip = engine.sample("a red circle bounces on a blue background", frames=16, height=64, width=64)
    clip.save("out.mp4")

What is the same to the bit, and what to rounding: noise, text and decoding of a request do not depend on its pack, and neither do this
project's own ops. The matrix products of the transformer are the library's, which may choose another algorithm for another number of
tokens; videos of a request alone and in a pack then differ by rounding (PSNR of 50 dB and more).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tubelet.kernels import guided_step, unpatchify

from .conditioning import KnownFrames, resolve
from .conditioning import loop as loop_frames
from .dit import VideoDiT
from .flow import SOLVERS, Step, check_stagger, plan, staggered
from .graphs import Repeated
from .packing import Pack, Part, Request
from .precision import check_precision
from .pretrained import fetch, pick_device, read_config, write_json
from .text import TextEncoder
from .vae import VideoVAE
from .video import Clip, to_float

LARGEST_GRAPH = 16_384 * 1536
"""Tokens times channels of the largest pack whose evaluations are captured in CUDA graphs. On an H200, four blocks of 16,384 tokens and
1536 channels took as long with one as without, of 1,024 tokens a tenth.
"""
BUNDLED = Path(__file__).parent / "assets" / "model"


@dataclass(frozen=True)
class EngineConfig:
    """How a model is best sampled; the defaults of `Engine.sample`. stagger: of the frames, for a model that was trained on frames of
    different noise levels. time_latents: "sampled" ones are decoded as they are, "recomputed" ones from the space latents.
    """

    name: str = "tubelet"
    fps: float = 8.0
    steps: int = 24
    solver: str = "dpm++2m"
    shift: float = 3.0
    guidance: float = 1.5
    stagger: int = 0
    time_latents: str = "sampled"
    trained_frames: int = 16
    trained_sides: tuple[int, int] = (32, 96)

    def __post_init__(self):
        if self.time_latents not in ("sampled", "recomputed"):
            raise ValueError(f"time_latents: expected 'sampled' or 'recomputed', got {self.time_latents!r}")
        check_stagger(self.stagger)


class Engine:
    """A text encoder, a video transformer and a VAE, sampling together."""

    def __init__(self, text: TextEncoder, dit: VideoDiT, vae: VideoVAE, config: EngineConfig | None = None):
        if dit.config.text_width != text.dim:
            raise ValueError(f"text: expected an encoder of {dit.config.text_width} channels as the transformer has, got {text.dim}")
        if dit.config.channels not in (vae.config.latent_channels, 2 * vae.config.latent_channels):
            raise ValueError(
                f"vae: expected one whose latents make {dit.config.channels} channels, got {vae.config.latent_channels} of each kind"
            )
        self.text, self.dit, self.vae = text.eval(), dit.eval(), vae.eval()
        self.config = config or EngineConfig()

    @classmethod
    def from_pretrained(
        cls, name: str | Path | None = None, *, device: str | torch.device | None = None, precision: str = "fp32"
    ) -> "Engine":
        """The bundled model, a folder, or a hub id. Default device: CUDA if there is a GPU, else the CPU.

        precision: of the transformer, "fp32", "bf16" or "fp8" (`VideoDiT.set_precision`); text encoder, VAE and the sampler's sums are
        float32. Of FP8 any device gives the numbers, and GPUs that have E4M3 the speed.

        A model is a folder with engine.json and the folders text, dit and vae. Raises FileNotFoundError for what is missing,
        ValueError for what does not fit or is corrupt, or for a precision that there is not.
        """
        check_precision(precision)
        folder = (
            BUNDLED
            if name is None
            else fetch(name, "model", ["*.json", "*.txt", "*.safetensors", "*/*.json", "*/*.txt", "*/*.safetensors"])
        )
        config = read_config(folder / "engine.json", EngineConfig)
        device = pick_device(device)
        text = TextEncoder.from_pretrained(folder / "text", dtype=torch.float32, device=device)
        dit, vae = (part.from_pretrained(folder / where).to(device) for part, where in ((VideoDiT, "dit"), (VideoVAE, "vae")))
        return cls(text, dit.set_precision(precision), vae, config)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model as a folder that `from_pretrained` reads, weights as `dtype` if given. Raises ValueError for one in FP8."""
        folder = Path(folder)
        self.dit.save_pretrained(folder / "dit", dtype)  # first: it refuses FP8
        self.text.save_pretrained(folder / "text", dtype)
        self.vae.save_pretrained(folder / "vae", dtype)
        write_json(folder / "engine.json", asdict(self.config))

    @torch.inference_mode()
    def sample(
        self,
        prompt: str | Request | Sequence[Request],
        *,
        frames: int = 16,
        height: int = 64,
        width: int = 64,
        seed: int = 0,
        guidance: float | None = None,
        negative_prompt: str = "",
        known: Mapping[int, Any] | Any | None = None,
        extend: str = "forward",
        loop: bool = False,
        steps: int | None = None,
        solver: str | None = None,
        shift: float | None = None,
        stagger: int | None = None,
        graphs: bool | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Clip | list[Clip]:
        """Sample a prompt, or a list of requests of any sizes and lengths in one pack.

        The arguments up to `extend` describe the video of a prompt, as in `Request`. loop: the last frame leads on to the first. steps,
        solver ("euler", "heun", "dpm++2m"), shift (of the noise schedule) and stagger (by how many evaluations of the model each frame
        lags behind the one before; 0: all frames together, as those between known frames always are) default to what the model was tuned
        for. graphs: whether evaluations that repeat are captured in CUDA graphs; None: on a GPU, for packs so small that the host would
        else take longer than the GPU. progress(done, of) is called after every evaluation of the model.

        Returns a Clip, or a list of them for a list. Known frames come out as they went in. Raises ValueError or TypeError for a bad
        request.
        """
        steps = self.config.steps if steps is None else steps
        solver = self.config.solver if solver is None else solver
        shift = self.config.shift if shift is None else shift
        if solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
        stagger = self.config.stagger if stagger is None else stagger
        check_stagger(stagger)
        if graphs and self.dit.device.type != "cuda":
            raise ValueError(f"graphs: expected None or False for a model on {self.dit.device}, which has no CUDA graphs, got True")
        schedule = plan(solver, steps, shift)
        if isinstance(prompt, str):
            request = Request(prompt, frames, height, width, seed, guidance, negative_prompt, known, extend)
            if loop:
                return self._sample_loop(request, schedule, stagger, graphs, progress)
            return self._sample([request], schedule, stagger, graphs, progress)[0]
        if loop:
            raise ValueError("loop: expected False with requests; loop one prompt at a time")
        own = {"frames": frames != 16, "height": height != 64, "width": width != 64, "seed": seed != 0, "guidance": guidance is not None}
        own |= {"negative_prompt": negative_prompt != "", "known": known is not None, "extend": extend != "forward"}
        if any(own.values()):
            raise ValueError(f"{next(name for name in own if own[name])}: expected in the requests, which each have their own")
        requests = [prompt] if isinstance(prompt, Request) else list(prompt)
        for i, request in enumerate(requests):
            if not isinstance(request, Request):
                raise TypeError(f"prompt: expected text, a Request or a list of Requests, got {type(request).__name__} at {i}")
        if not requests:
            raise ValueError("prompt: expected at least one request, got none")
        clips = self._sample(requests, schedule, stagger, graphs, progress)
        return clips[0] if isinstance(prompt, Request) else clips

    def stream(
        self, prompt: str, frames: int, *, chunk: int | None = None, overlap: int | None = None, known: Any | None = None, **options
    ) -> Iterator[Clip]:
        """A long video, chunk by chunk in bounded memory: each chunk is sampled knowing the last `overlap` frames before it.

        chunk: the frames sampled together, the trained length by default; overlap: half of that. known: a clip to go on from, or an image.
        options: as of `sample`, but `extend` and `loop`; `seed` for the first chunk. Yields clips of new frames, `frames` in all. Raises
        ValueError or TypeError, at once, for what it cannot do.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected text, got {type(prompt).__name__}; stream one prompt at a time")
        for name in ("extend", "loop"):
            if name in options:
                raise ValueError(f"{name}: expected none for a stream, which goes on forwards, got {options[name]!r}")
        if isinstance(known, Mapping):
            raise TypeError("known: expected a clip or an image to go on from, got frames by number")
        if isinstance(known, Tensor) and known.dim() == 3:
            known = known[None]
        chunk = chunk or self.config.trained_frames
        overlap = chunk // 2 if overlap is None else overlap
        if not 0 < overlap < chunk:
            raise ValueError(f"overlap: expected from 1 to {chunk - 1} frames for chunks of {chunk}, got {overlap}")
        if frames < 1:
            raise ValueError(f"frames: expected at least 1, got {frames}")
        return self._stream(prompt, frames, chunk, overlap, known, **options)

    def _stream(self, prompt: str, frames: int, chunk: int, overlap: int, known: Any | None, seed: int = 0, **options) -> Iterator[Clip]:
        tail, made = known, 0
        while made < frames:
            seen = 0 if tail is None else len(tail[-overlap:])
            length = min(chunk, seen + frames - made)
            clip = self.sample(prompt, frames=length, known=None if tail is None else tail[-overlap:], seed=seed, **options)
            new = clip[seen:]
            tail = clip
            made, seed = made + len(new), seed + 1
            yield new

    def _sample_loop(self, request: Request, schedule: list[Step], stagger: int, graphs: bool | None, progress) -> Clip:
        """A loop of T frames is T + 1 frames with one image at both ends, less the last. Without a given first frame, that is sampled
        before.
        """
        request.check(self.vae.stride * self.dit.config.patch[1])
        if request.frames < 2:
            raise ValueError(f"frames: expected at least 2 for a loop, got {request.frames}")
        given = resolve(request.known, request.frames, request.height, request.width, request.extend)
        if given.indices not in ((), (0,)):
            raise ValueError(f"known: expected no more than the first frame of a loop, got frames {given.indices}")
        how = schedule, stagger, graphs, progress
        first = given.images[0] if given.indices else self._sample([replace(request, known=None)], *how)[0][0]
        whole = replace(request, frames=request.frames + 1, known=loop_frames(first), extend="forward")
        return self._sample([whole], *how)[0][:-1]

    def _sample(self, requests: list[Request], schedule: list[Step], stagger: int, graphs: bool | None, progress) -> list[Clip]:
        own = self.config.guidance
        requests = [replace(request, guidance=own) if request.guidance is None else request for request in requests]
        pack = Pack.build(requests, self.dit, self.vae, self.text)
        tokens = self._denoise(pack, schedule, stagger, graphs, progress)
        if not tokens.isfinite().all():
            raise ValueError("model: expected finite numbers from the transformer, got NaN or infinity: its weights are broken")
        codes = unpatchify(tokens, pack.layout, self.dit.config.channels, self.dit.config.patch)
        clips = []
        for code, known, request in zip(codes, pack.known, requests, strict=True):
            frames = known.paste(self._decode(self.dit.denormalise(code), known))
            clips.append(Clip(frames, fps=self.config.fps, prompt=request.prompt, seed=request.seed))
        return clips

    def _denoise(self, pack: Pack, schedule: list[Step], stagger: int, graphs: bool | None, progress) -> Tensor:
        """The reverse process over the tokens of the pack; guided requests are evaluated with and without their prompt in one pack."""
        x, x0 = pack.start.clone(), torch.zeros_like(pack.start)
        orders = [_order(clip.known) for clip in pack.layout.clips]
        plans = staggered(schedule, [n for order in orders for n in order], stagger)

        def counts(done: int) -> tuple[int, ...]:
            """The frames of each clip that an evaluation takes: those that have not started tell a causal transformer nothing."""
            return tuple(
                1 + max(i for i, (n, known) in enumerate(zip(order, clip.known, strict=True)) if known or n * stagger <= done)
                if self.dit.causal
                else clip.frames
                for order, clip in zip(orders, pack.layout.clips, strict=True)
            )

        times, coefficients = (table.to(x.device) for table in plans)
        if graphs is None:
            graphs = x.device.type == "cuda" and len(x) * (1 + (pack.guidance is not None)) * self.dit.config.width <= LARGEST_GRAPH
        captured = [] if graphs else None
        for frames, group in groupby(range(len(times)), key=counts):
            evaluations, part = list(group), pack.part(frames)
            evaluate = Repeated(partial(self._evaluate, pack, part, x, x0), len(evaluations), captured)
            for i in evaluations:
                evaluate(times[i], coefficients[i])
                if progress is not None:
                    progress(i + 1, len(times))
        return x

    def _evaluate(self, pack: Pack, part: Part, x: Tensor, x0: Tensor, times: Tensor, coefficients: Tensor) -> None:
        """One evaluation of the transformer, and what the solver makes of it: x and x0 of the part's tokens, in place. Nothing of it waits
        for the device or copies from the host: it may be in a CUDA graph.
        """
        guided = pack.guidance is not None
        now, before = x[part.tokens], x0[part.tokens]
        times = (times[part.frames] * ~part.layout.frame_known).repeat(1 + guided)
        velocity = self.dit(now.repeat(1 + guided, 1), times, pack.text.tokens, part.model_layout, pack.text_layout)
        cond, uncond = velocity.chunk(2) if guided else (velocity, None)
        x[part.tokens], x0[part.tokens] = guided_step(
            now,
            cond,
            uncond,
            before,
            coefficients[part.frames],
            guidance=pack.guidance[part.layout.frame_clips] if guided else None,
            rows=part.layout.rows("frame"),
            known=part.layout.coordinates.known,
        )

    def _decode(self, code: Tensor, known: KnownFrames) -> Tensor:
        """Code (channels, T, h, w) to frames, uint8 (T, H, W, 3). Each clip is decoded by itself."""
        space = code[None, : self.vae.config.latent_channels].to(self.vae.dtype)
        if code.shape[0] == 2 * self.vae.config.latent_channels and self.config.time_latents == "sampled":
            video = self.vae.decode(space, code[None, self.vae.config.latent_channels :].to(self.vae.dtype))
        else:
            pixels = to_float(known.images).to(space.device, space.dtype)
            video = self.vae.decode_space(space, given={index: pixels[None, :, i] for i, index in enumerate(known.indices)})
        return Clip.from_float(video[0].float().cpu()).frames


def _order(known: Sequence[bool]) -> list[int]:
    """When each frame of a clip is to be made, by number; of known ones, no matter what. Frames between known ones are made together: one
    after the other they would reach the end where they cannot meet it any more.
    """
    made = [i for i, each in enumerate(known) if not each]
    if made and known[0] and any(known[made[0] :]):
        return [0] * len(known)
    return [i - sum(known[:i]) for i in range(len(known))]
