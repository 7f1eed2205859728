"""A whole sample run takes the Triton kernel of every op that it has, as on a GPU; interpreted, with a tiny random model."""

import numpy as np
import pytest
import torch
from tubelet.engine import DiTConfig, Engine, EngineConfig, Request, VAEConfig, VideoDiT, VideoVAE
from tubelet.engine.text import build_clip
from tubelet.engine.training.data import vocabulary_captions
from tubelet.engine.training.evaluate import psnr
from tubelet.kernels import dispatch, engaged, reset_engaged

pytest.importorskip("triton", reason="the record of Triton's kernels needs triton")
from triton import language as tl
from triton.runtime import interpreter

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled"),
    pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]

ALWAYS = {"attention", "modulated_norm", "gated_residual", "qk_norm_rope", "patch_embed", "final_layer", "guided_step"}
IN_FP8 = {"quantize_rows", "gelu_quantize_rows", "fp8_linear"}
# Not there: group_norm_silu, since this VAE normalises the channels of each pixel; unpatchify, since the sampler stays in tokens, which
# `final_layer` makes, and puts them back into clips once, without a product.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of every kind of block; random, for outputs and gates start at zero."""
    torch.manual_seed(0)
    text = build_clip(vocabulary_captions(400), tmp_path_factory.mktemp("text"), dim=32, layers=1, heads=2, max_length=32)
    vae = VideoVAE(VAEConfig(latent_channels=4, width=8, encoder_blocks=1, decoder_blocks=1, time_width=32, time_layers=1, time_heads=2))
    blocks = ("factorised", "full", "frame_causal")
    dit = VideoDiT(DiTConfig(channels=8, width=32, heads=2, blocks=blocks, text_width=32, local_blocks=(1, 1), local_width=16))
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if parameter.dim() > 1 or name == "known":
                parameter.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("model")
    Engine(text, dit, vae, EngineConfig(steps=2, guidance=2.0, time_latents="recomputed")).save_pretrained(folder)
    return folder


@pytest.fixture
def interpreted(monkeypatch):
    """Called, it makes "auto" take Triton's kernels, as on a GPU. The interpreter (3.7.1) takes the bits of bfloat16 for the factors of a
    product; here their numbers are.
    """

    def as_on_a_gpu():
        multiply = interpreter.InterpreterBuilder.create_dot

        def create_dot(self, a, b, *rest):
            return multiply(self, *map(_widened, (a, b)), *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        monkeypatch.setattr(dispatch, "triton_first", lambda x: True)

    return as_on_a_gpu


def _widened(x):
    if x.dtype.scalar != tl.bfloat16:
        return x
    return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy on exponentials that underflow
@pytest.mark.parametrize(("precision", "ops", "least"), [("fp32", ALWAYS, 60), ("fp8", ALWAYS | IN_FP8, 35)])
def test_a_sample_run_takes_every_kernel(folder, interpreted, precision, ops, least):
    engine = Engine.from_pretrained(folder, device="cpu", precision=precision)
    image = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    requests = [Request("a red circle", 3, 32, 48, known={0: image}), Request("a blue square", 2, 32, 32, seed=1, guidance=3.0)]
    wanted = engine.sample(requests)
    interpreted()
    reset_engaged()
    found = engine.sample(requests)
    record = engaged()
    assert {op: list(ran) for op, ran in record.items()} == {op: ["triton"] for op in ops}
    assert record["attention"]["triton"].kernels.keys() == {"block_forward", "temporal_forward"}
    assert [(op, ran["triton"].passed_over) for op, ran in record.items() if ran["triton"].passed_over.keys() - {"gluon"}] == []
    for ours, torchs in zip(found, wanted, strict=True):  # measured: 83 dB and more in float32, 42 in FP8
        assert psnr(ours.frames, torchs.frames) >= least
