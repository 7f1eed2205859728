"""Mochi, on tubelet's kernels: the same numbers."""

import pytest
import torch
from adapter_checks import AdapterTests, Tiny, assert_same, logged, look_from_outside, make, noise, run
from tubelet.engine.adapters import accelerate, ops
from tubelet.kernels import reset_engaged

diffusers = pytest.importorskip("diffusers")

OPS = frozenset({"attention", "qk_norm_rope", "modulated_norm", "gated_residual", "patch_embed", "final_layer"})
SIZES = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "pooled_projection_dim": 96,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
}
WORDS = 6


def seen(*texts: str) -> torch.Tensor:
    """Which tokens of texts are there."""
    return torch.tensor([[letter == "x" for letter in text] for text in texts])


def call(size: tuple[int, int, int], mask: torch.Tensor, **more) -> dict:
    batch = len(mask)
    return {
        "hidden_states": noise(batch, more.pop("channels", 4), *size),
        "encoder_hidden_states": noise(batch, WORDS, 16),
        "timestep": torch.arange(1, batch + 1) * 100.0,
        "encoder_attention_mask": mask,
        **more,
    }


def build(**config):
    return lambda: diffusers.MochiTransformer3DModel(**SIZES | config)


MODELS = {
    "Mochi": Tiny(
        build(),
        {
            "two texts": call((2, 4, 6), seen("xxx...", "xxxxxx")),
            "three clips, odd sizes, no text": call((3, 6, 10), seen("xxxx..", "......", "x.....")),
            "as many clips as heads and tokens": call((1, 2, 6), seen("xxx...", "x.....", "xxxxxx")),
            "one clip": call((1, 4, 4), seen("xxxx..")),
            "padding anywhere": call((2, 2, 4), seen("..xxxx", ".x.xx.")),
            "masks of numbers": call((2, 2, 4), seen("xx....", "x.xxxx").float()),
        },
        OPS,
    ),
    "Mochi, another feed-forward, more channels out": Tiny(
        build(activation_fn="gelu-approximate", num_layers=1, in_channels=8, out_channels=4),
        {"two texts": call((2, 4, 6), seen("xxx...", "xxxxx."), channels=8)},
        OPS,
    ),
    "Mochi, patches of one pixel": Tiny(build(patch_size=1, num_layers=3), {"two clips": call((2, 3, 5), seen("x.....", "xxxxxx"))}, OPS),
}


class TestModels(AdapterTests):
    """Of this file's MODELS."""


def test_a_batch_attends_in_one_call_a_layer_and_the_host_waits_for_nothing():
    tiny, case = MODELS["Mochi"], "three clips, odd sizes, no text"
    with pytest.raises(AssertionError):  # for the library's own
        logged(tiny, case, make(tiny))
    model = make(tiny)
    report = accelerate(model)
    assert [name for name, _ in logged(tiny, case, model).found].count("sort") == 1  # which tokens are there
    reset_engaged()
    run(model, tiny, tiny.inputs[case])
    assert [runs.calls for runs in report.engaged()["attention"].values()] == [len(model.transformer_blocks)]


def test_nothing_of_the_size_of_pairs_is_made_and_of_hidden_states_only_what_attends_is_put_together(monkeypatch):
    look_from_outside(monkeypatch, ops)
    tokens = 3 * 3 * 5
    log = logged(Tiny(build(), {"": call((3, 6, 10), seen("xxxx..", "x....x"))}, OPS), "")
    assert not [shape for shape in log.shapes() if sum(side in (tokens, tokens + WORDS) for side in shape) > 1]
    whole = [(2, tokens + WORDS, 3, 16)] * 3 + [(2, tokens, 48)]  # queries, keys, values; what to_out reads, a part of attention's result
    assert log.copies(2 * tokens * 48) == whole * 2


def test_words_that_are_not_there_change_nothing():
    tiny = MODELS["Mochi"]
    model, inputs = make(tiny), dict(tiny.inputs["two texts"])
    accelerate(model)
    with torch.no_grad():
        before = run(model, tiny, inputs)
        hidden = ~inputs["encoder_attention_mask"][..., None]
        inputs["encoder_hidden_states"] = torch.where(hidden, 100.0, inputs["encoder_hidden_states"])
        assert_same(run(model, tiny, inputs), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels would be given tensors of a CPU")
def test_frequencies_learn_and_where_they_do_not_the_kernel_has_a_backward():
    tiny = Tiny(build(num_layers=1), {"": call((1, 2, 4), seen("xxxx.."))}, OPS)
    gradients = []
    for implementation in ("auto", "triton"):
        model = make(tiny).train()
        model.pos_frequencies.requires_grad_(implementation == "auto")
        report = accelerate(model, implementation=implementation)
        run(model, tiny, tiny.inputs[""])[0].square().sum().backward()
        assert implementation == "auto" or set(report.engaged()["qk_norm_rope"]) == {"triton"}
        assert implementation == "triton" or model.pos_frequencies.grad.count_nonzero()
        gradients.append([each.grad for name, each in model.named_parameters() if each.grad is not None and "to_q.weight" in name])
    assert_same(gradients[1], gradients[0])
