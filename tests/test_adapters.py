"""`accelerate` itself: what it refuses, what it survives, what it says."""

import copy
import sys

import adapter_table
import pytest
import torch
from adapter_checks import Tiny, assert_same, make, run
from torch import nn
from tubelet.engine.adapters import accelerate
from tubelet.kernels import engaged, reset_engaged

diffusers = pytest.importorskip("diffusers")

from test_adapters_wan import MODELS, SIZES, call  # noqa: E402 (it needs diffusers)

WAN = MODELS["Wan 2.1"]
INPUTS = call(2, (3, 6, 4), 9)


def outputs_of(model: torch.nn.Module, tiny: Tiny, inputs: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return run(model, tiny, inputs)


def forward(model: nn.Module, inputs: dict = INPUTS) -> list[torch.Tensor]:
    return outputs_of(model, WAN, inputs)


class TestRefuses:
    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"precision": "int4"}, "^precision: expected None or 'fp8', got 'int4'"),
            ({"implementation": "cuda"}, "^implementation: expected"),
        ],
    )
    def test_unknown_choices(self, how, message):
        with pytest.raises(ValueError, match=message):
            accelerate(make(WAN), **how)

    def test_what_is_no_module(self):
        with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module .* got str"):
            accelerate("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")

    def test_twice(self):
        model = make(WAN)
        report = accelerate(model)
        with pytest.raises(ValueError, match=r"^model: expected one that is not accelerated yet"):
            accelerate(model)
        report.restore()
        accelerate(model)

    @pytest.mark.parametrize("how", ["wrapped", "in place", "blocks"])
    def test_what_is_compiled_already(self, how):
        model = make(WAN)
        if how == "wrapped":
            model = torch.compile(model)
        elif how == "in place":
            model.compile()
        else:
            model.compile_repeated_blocks()
        with pytest.raises(ValueError, match=r"^model: expected one that is compiled after this call"):
            accelerate(model)


class TestReport:
    def test_names_every_site_and_what_ran(self):
        model = make(WAN)
        report = accelerate(model)
        assert not report.engaged()
        forward(model)
        assert report.engaged()["attention"]["torch"].calls == 4
        text = str(report)
        for part in ("WanTransformer3DModel: ", "blocks.*.attn1 (2)", "qk_norm_rope, attention", "left alone: the library's product"):
            assert part in text

    def test_strict_names_what_could_be_served_and_changes_nothing(self):
        model = make(WAN)
        before = forward(model)
        model.blocks[1].attn2.set_processor(diffusers.models.attention_processor.AttnProcessor())
        with pytest.raises(ValueError, match=r"^strict: .* 1 are not: attention at blocks\.1\.attn2: its processor is a AttnProcessor"):
            accelerate(model, strict=True)
        assert not any("forward" in vars(module) for module in model.modules())
        report = accelerate(model)
        assert [site.where for site in report.left if site.servable] == ["blocks.1.attn2"]
        report.restore()
        model.blocks[1].attn2.set_processor(diffusers.models.transformers.transformer_wan.WanAttnProcessor())
        assert torch.equal(forward(model)[0], before[0])

    def test_warns_of_a_version_that_is_not_known(self, monkeypatch):
        monkeypatch.setattr(sys.modules["tubelet.engine.adapters.accelerate"], "version", lambda name: "0.99.1")
        with pytest.warns(UserWarning, match=r"diffusers 0\.99\.1 is not known"):
            accelerate(make(WAN))


def test_the_table_in_the_docs_is_of_today():
    text = adapter_table.PAGE.read_text()
    assert adapter_table.page(text) == text, "run `python tests/adapter_table.py`"


class TestOtherModels:
    def test_of_no_known_class_are_served_by_their_attention(self):
        torch.manual_seed(0)
        model = diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=8,
            time_embed_dim=8, condition_dim=4,
        ).eval()  # fmt: skip
        self.check(model, {
            "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 6, 8), "timestep": torch.tensor([3]),
            "original_size": torch.tensor([[8.0, 8]]), "target_size": torch.tensor([[8.0, 8]]), "crop_coords": torch.zeros(1, 2),
        }, served=0)  # fmt: skip

    def test_of_the_dispatcher(self):
        torch.manual_seed(0)
        model = diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ).eval()  # fmt: skip
        self.check(model, {
            "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": torch.randn(1, 7, 16), "timestep": torch.tensor([0.5]),
            "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.int64), "img_shapes": [(1, 4, 4)],
        }, served=2)  # fmt: skip

    def test_with_the_library_s_own_attention(self):
        torch.manual_seed(0)
        model = diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16, in_channels=4,
            cross_attention_dim=24, out_channels=8, norm_num_groups=1, use_additional_conditions=False,
        ).eval()  # fmt: skip
        self.check(model, {
            "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 16), "timestep": torch.tensor([3, 5]),
            "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }, served=4)  # fmt: skip

    def check(self, model: nn.Module, inputs: dict, served: int):
        with torch.no_grad():
            before = model(**inputs, return_dict=False)[0]
            report = accelerate(model)
            assert report.notes == [f"{type(model).__name__} is not known: its attention sites alone are served"]
            assert len(report.served) == served
            assert {site.op for site in report.served} <= {"attention"}
            reset_engaged()
            assert_same([model(**inputs, return_dict=False)[0]], [before])
            assert bool(engaged()) == bool(served)
            report.restore()
            assert torch.equal(model(**inputs, return_dict=False)[0], before)

    def test_without_attention(self):
        report = accelerate(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        assert not report.served
        assert report.notes[-1] == "no attention module with a processor, as diffusers has them, was found"

    def test_of_a_class_derived_from_a_known_one(self):
        class Mine(diffusers.WanTransformer3DModel):
            def forward(self, *args, **kwargs):
                return tuple(2 * x for x in super().forward(*args, **kwargs))

        model = make(Tiny(lambda: Mine(**SIZES), {}, frozenset()))
        before = forward(model)
        report = accelerate(model)
        assert "Mine has not the forward of WanTransformer3DModel" in str(report)
        assert_same(forward(model), before)


class TestSurvives:
    def test_a_copy(self):
        model = make(WAN)
        accelerate(model)
        other, before = copy.deepcopy(model), forward(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not forward(other)[0].count_nonzero()
        assert torch.equal(forward(model)[0], before[0])

    def test_fused_projections(self):
        model = make(WAN)
        before = forward(model)
        model.fuse_qkv_projections()
        accelerate(model, strict=True)
        assert_same(forward(model), before)

    def test_gradient_checkpointing(self):
        model = make(WAN).train()
        accelerate(model)
        grads = []
        for checkpointing in (False, True):
            if checkpointing:
                model.enable_gradient_checkpointing()
            model.zero_grad()
            run(model, WAN, INPUTS)[0].square().sum().backward()
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    def test_hooks_that_are_added_later(self):
        model = make(WAN)
        report = accelerate(model)
        before = forward(model)
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        assert_same(forward(model), before, 0.02)  # weights are rounded to bfloat16
        report.restore()  # the hooks are on linears, which were not swapped
        assert_same(forward(model), before, 0.02)

    def test_hooks_on_what_was_swapped_are_not_lost(self):
        from diffusers.hooks.hooks import HookRegistry, ModelHook

        model = make(WAN)
        report = accelerate(model)
        before = forward(model)
        registry = HookRegistry.check_if_exists_or_initialize(model.blocks[0])
        registry.register_hook(ModelHook(), "mine")
        assert torch.equal(forward(model)[0], before[0])
        with pytest.raises(ValueError, match=r"^restore: the forward of a WanTransformerBlock was wrapped"):
            report.restore()
        assert torch.equal(forward(model)[0], before[0])
        registry.remove_hook("mine")

    def test_hooks_that_were_there(self):
        from diffusers.hooks.hooks import HookRegistry, ModelHook

        model = make(WAN)
        before = forward(model)
        HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(ModelHook(), "mine")
        report = accelerate(model)
        missed = [site for site in report.left if site.servable]
        assert [site.where for site in missed] == ["blocks.0", ""]  # and with it the model's table of rows
        assert "hooks of offloading or caching" in missed[0].reason and "a block is not served" in missed[1].reason
        assert_same(forward(model), before)

    @pytest.mark.parametrize("family", ["Wan 2.2, a timestep for each token", "SkyReels-V2, causal blocks", "Helios"])
    def test_hooks_on_one_block_of_a_model_with_rows_of_modulation(self, family):
        import test_adapters_helios
        import test_adapters_skyreels
        from diffusers.hooks.hooks import HookRegistry, ModelHook

        tiny = (MODELS | test_adapters_skyreels.MODELS | test_adapters_helios.MODELS)[family]
        model, inputs = make(tiny), next(iter(tiny.inputs.values()))
        with torch.no_grad():
            before = run(model, tiny, inputs)
            HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(ModelHook(), "mine")
            report = accelerate(model)
            assert any(site.servable for site in report.left)
            assert_same(run(model, tiny, inputs), before)
            assert "attention" in report.engaged()

    def test_offloading_of_the_whole_model(self):
        hooks = pytest.importorskip("accelerate").hooks
        model = make(WAN)
        before = forward(model)
        hooks.add_hook_to_module(model, hooks.ModelHook())
        report = accelerate(model)
        assert "attention" in {site.op for site in report.served}
        assert_same(forward(model), before)

    def test_offloading_of_single_layers_is_refused(self):
        library = pytest.importorskip("accelerate")
        model = make(WAN)
        before = forward(model)
        library.cpu_offload(model, execution_device=torch.device("cpu"))
        report = accelerate(model)
        missed = {site.reason for site in report.left if site.servable and site.where}
        assert missed and all("offloading" in reason for reason in missed)
        assert_same(forward(model), before)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("where", ["attn1", "ffn"])
    def test_hooks_see_no_rows_in_e4m3(self, where, when):
        from diffusers.hooks.hooks import HookRegistry, ModelHook

        class Hook(ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                seen.extend(isinstance(x, torch.Tensor) for x in (*args, *kwargs.values())[:1])
                return args, kwargs

        model, seen = make(WAN), []
        before = forward(model)
        if when == "after":
            accelerate(model, precision="fp8")
        HookRegistry.check_if_exists_or_initialize(model.blocks[0].get_submodule(where)).register_hook(Hook(), "mine")
        if when == "before":
            accelerate(model, precision="fp8")
        assert_same(forward(model), before, 0.15)
        assert seen and all(seen)

    def test_a_backend_that_is_set_later_is_refused(self):
        model = make(WAN)
        report = accelerate(model)
        model.blocks[0].attn1.set_attention_backend("_native_math")
        with pytest.raises(ValueError, match=r"^model: expected no attention backend after accelerate, got .*_native_math"):
            forward(model)
        report.restore()
        forward(model)

    def test_low_rank_adapters(self):
        peft = pytest.importorskip("peft")
        model = make(WAN)
        report = accelerate(model, precision="fp8")
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "ffn.net.2"], init_lora_weights=False))
        with_adapter = forward(model)
        report.restore()
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(with_adapter, forward(model), strict=True)]
        assert all(error < 0.1 for error in errors), errors  # of FP8, not of the adapter, which changes all:
        model.disable_adapters()
        assert float((forward(model)[0] - with_adapter[0]).norm() / with_adapter[0].norm()) > 0.1

    @pytest.mark.parametrize("first", ["adapter", "accelerate"])
    def test_an_adapter_fused_into_weights_in_fp8(self, first):
        peft = pytest.importorskip("peft")
        model, low_rank = make(WAN), peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "ffn.net.2"], init_lora_weights=False)
        before = forward(model)[0]
        if first == "adapter":
            model.add_adapter(low_rank)
        accelerate(model, precision="fp8")
        if first == "accelerate":
            model.add_adapter(low_rank)
        apart = forward(model)[0]
        model.fuse_lora()
        assert (forward(model)[0] - apart).norm() < 0.1 * apart.norm() < (apart - before).norm()  # errors of FP8; the adapter's part
        model.unfuse_lora()
        model.disable_adapters()
        assert (forward(model)[0] - before).norm() < 0.1 * before.norm()

    def test_weights_that_change_are_quantised_again(self):
        model, expected, other = make(WAN), make(WAN), make(WAN)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.3)
        accelerate(model, precision="fp8")
        forward(model)
        for each in (model, expected):
            each.load_state_dict(other.state_dict())
        accelerate(expected, precision="fp8")
        assert all(torch.equal(a, b) for a, b in zip(forward(model), forward(expected), strict=True))

    def test_quantised_weights(self):
        torchao = pytest.importorskip("torchao.quantization")
        model = make(WAN)
        torchao.quantize_(model.blocks, torchao.Int8WeightOnlyConfig())
        before = forward(model)
        report = accelerate(model, precision="fp8")
        assert "its weight is a Int8Tensor" in str(report) or "AffineQuantizedTensor" in str(report)
        assert_same(forward(model), before, 1e-4)

    @pytest.mark.parametrize("family", ["Wan", "Mochi"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_sharded_weights(self, tmp_path, family, dtype):
        import test_adapters_mochi
        from torch.distributed import destroy_process_group, init_process_group
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        tiny = WAN if family == "Wan" else test_adapters_mochi.MODELS["Mochi"]
        model, inputs = make(tiny), next(iter(tiny.inputs.values()))
        before = outputs_of(model, tiny, inputs)
        init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            policy = MixedPrecisionPolicy(param_dtype=dtype)
            for block in model.blocks if family == "Wan" else model.transformer_blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            report = accelerate(model)
            ours = [out.float() for out in outputs_of(model, tiny, inputs)]
            assert_same(ours, before, 1e-5 if dtype == torch.float32 else 0.03)
            assert {"attention", "modulated_norm", "gated_residual"} <= set(report.engaged())
        finally:
            destroy_process_group()


class TestFP8:
    def test_moving_and_casting_keeps_the_weights(self):
        model = make(WAN)
        accelerate(model, precision="fp8")
        before = forward(model)
        model.to(torch.float64).to(torch.float32)
        assert_same(forward(model), before)

    def test_has_no_gradient_and_says_so(self):
        model = make(WAN)
        accelerate(model, precision="fp8")
        with pytest.raises(ValueError, match="expected no gradient to be required"):
            run(model, WAN, INPUTS)
