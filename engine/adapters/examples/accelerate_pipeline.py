"""A diffusers pipeline on tubelet's kernels: `accelerate(pipe.transformer)`.

python accelerate_pipeline.py                                                   # a small random model: what changes, and that nothing does
python accelerate_pipeline.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat walks on grass" --out cat.mp4
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tubelet.engine.adapters import accelerate


def main(
    model: Annotated[str | None, typer.Option(help="A diffusers pipeline: a folder or a hub id. A small random Wan if not given.")] = None,
    prompt: str = "a cat walks on grass, realistic",
    precision: Annotated[str | None, typer.Option(help="'fp8' for the linears of the blocks in E4M3.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the blocks, after they were swapped.")] = False,
    frames: int = 81,
    out: Path = Path("out.mp4"),
) -> None:
    """Sample a video, or show the report of a small model."""
    if model is None:
        small(precision)
        return
    from diffusers import DiffusionPipeline
    from diffusers.utils import export_to_video

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16).to(device)
    report = accelerate(pipe.transformer, precision=precision)
    print(report)
    if compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    video = pipe(prompt, num_frames=frames).frames[0]
    print({op: {name: run.calls for name, run in runs.items()} for op, runs in report.engaged().items()})
    export_to_video(video, str(out), fps=16)


@torch.no_grad()
def small(precision: str | None) -> None:
    """The same numbers from a random model before and after, and how long a step takes."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=4, text_dim=64).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 8, 32, 32),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 64, 64),
    }
    before, untouched = timed(model, inputs)
    report = accelerate(model, precision=precision, strict=True)
    print(report)
    after, ours = timed(model, inputs)
    print(f"relative error {float((after - before).norm() / before.norm()):.1e}; {untouched:.2f} s a step before, {ours:.2f} s after")
    print({op: {name: run.calls for name, run in runs.items()} for op, runs in report.engaged().items()})
    report.restore()


def timed(model: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, float]:
    model(**inputs)
    start = time.perf_counter()
    return model(**inputs, return_dict=False)[0], time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
