"""tubelet.engine.text: packing, bitwise independence of prompts, file formats and errors. No network: sockets are shut."""

import json
import shutil
import socket
import subprocess
import sys
import unicodedata

import pytest
import torch
from safetensors.torch import load_file, save_file
from tubelet.engine.text import PackedText, TextEncoder, build_clip

CAPTIONS = [
    f"A {colour} {shape}, {size}, moves {way} on the camera's background."
    for colour in ("red", "green", "turquoise")
    for shape in ("circle", "triangle")
    for size in ("small", "large")
    for way in ("left", "right")
]
WORDS_OF_FIRST_CAPTION = ["a", "red", "circle", ",", "small", ",", "moves", "left", "on", "the", "camera", "'s", "background", "."]
PROMPTS = ["a red circle", "", "Zebra crossing 漢字 🙂 at 12:30", "a red circle", CAPTIONS[5]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "clip"
    torch.manual_seed(0)
    build_clip(CAPTIONS, folder, dim=32, layers=2, heads=2, max_length=40)
    return folder


@torch.no_grad()
def test_a_new_encoder_tells_words_and_places_apart(clip_folder):
    encoder = TextEncoder.from_pretrained(clip_folder)

    def difference(a: str, b: str) -> float:
        a, b = (encoder([text]).tokens for text in (a, b))
        return float((a - b).norm(dim=1).max() / a.norm(dim=1).mean())

    for other in ("a red triangle moves left", "a green circle moves left", "a red circle moves right"):
        assert difference("a red circle moves left", other) > 0.5
    assert difference("red green", "green red") > 0.5


@pytest.fixture(scope="module")
def clip(clip_folder):
    return TextEncoder.from_pretrained(clip_folder)


def make_t5(kind, folder):
    """A random encoder whose tokenizer knows whole words only."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    config_class, model_class = {"t5": (T5Config, T5EncoderModel), "umt5": (UMT5Config, UMT5EncoderModel)}[kind]
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    model_class(config_class(vocab_size=len(vocab), feed_forward_proj="gated-gelu", **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folders(tmp_path_factory):
    return {kind: make_t5(kind, tmp_path_factory.mktemp("text") / kind) for kind in ("t5", "umt5")}


@pytest.fixture(params=["t5", "umt5"])
def t5_folder(request, t5_folders):
    return t5_folders[request.param]


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a model folder that a test may damage."""
    return lambda folder: shutil.copytree(folder, tmp_path / "copy")


def words_of(encoder, text):
    """The tokens of a text without the start and end tokens."""
    return encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer(text).input_ids)[1:-1]


class TestPackedText:
    def test_split_and_cat(self):
        a = PackedText(torch.arange(10.0).reshape(5, 2), (2, 0, 3))
        both = PackedText.cat([a, a])
        assert both.lengths == (2, 0, 3, 2, 0, 3)
        assert [tuple(part.shape) for part in both.split()] == [(2, 2), (0, 2), (3, 2)] * 2
        assert torch.equal(both.split()[5], a.tokens[2:])

    def test_to(self):
        a = PackedText(torch.ones(3, 2), (3,))
        assert a.to(dtype=torch.bfloat16).tokens.dtype == torch.bfloat16
        assert a.to("meta").tokens.device.type == "meta"

    def test_lengths_must_fit(self):
        with pytest.raises(ValueError, match=r"sum\(lengths\) = 4, got \(3, 2\)"):
            PackedText(torch.ones(3, 2), (1, 3))


class TestBuildClip:
    def test_each_word_is_one_token(self, clip):
        assert words_of(clip, CAPTIONS[0]) == [f"{word}</w>" for word in WORDS_OF_FIRST_CAPTION]

    def test_case_and_spaces_do_not_matter(self, clip):
        assert words_of(clip, "A  Turquoise\nCIRCLE ") == ["a</w>", "turquoise</w>", "circle</w>"]

    @pytest.mark.parametrize("text", ["zebra", "circlesque", "ünïcode", "漢字", "🙂", "\x00\x7f", "e\u0301", "ﷺ" * 3, "\u200b"])
    def test_other_words_fall_back_to_pieces(self, clip, text):
        """Bytes in, bytes out: nothing is unknown (CLIP's unknown token is its end token)."""
        ids = clip.tokenizer(text).input_ids
        assert clip.tokenizer.eos_token_id not in ids[1:-1]
        assert clip.tokenizer.decode(ids[1:-1]).replace(" ", "") == unicodedata.normalize("NFC", text).lower()

    def test_special_ids(self, clip):
        start, end = clip.tokenizer("").input_ids
        config = clip.model.config
        assert (start, end, end) == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert end == config.vocab_size - 1 == len(clip.tokenizer) - 1

    def test_vocabulary_does_not_depend_on_the_order_of_captions(self, clip, tmp_path):
        again = build_clip(reversed(CAPTIONS), tmp_path, dim=16, layers=1, heads=2)
        assert again.tokenizer.get_vocab() == clip.tokenizer.get_vocab()

    def test_vocab_size_is_a_limit(self, tmp_path):
        small = build_clip(CAPTIONS, tmp_path, dim=16, layers=1, heads=2, vocab_size=530)
        assert len(small.tokenizer) == 530
        assert small.encode(CAPTIONS[:1]).lengths[0] > len(WORDS_OF_FIRST_CAPTION) + 2

    def test_files_load_in_transformers(self, clip, clip_folder):
        from transformers import AutoModel, AutoTokenizer, CLIPTokenizerFast

        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in clip_folder.iterdir()}
        ids = clip.tokenizer(PROMPTS[2]).input_ids
        for tokenizer_class in (AutoTokenizer, CLIPTokenizerFast):
            assert tokenizer_class.from_pretrained(clip_folder).encode(PROMPTS[2]) == ids
        model = AutoModel.from_pretrained(clip_folder).eval()
        with torch.no_grad():
            assert torch.equal(model(torch.tensor([ids])).last_hidden_state[0], clip.encode([PROMPTS[2]]).tokens)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dim": 30, "heads": 4}, "dim must be a multiple of heads, got dim=30, heads=4"),
            ({"layers": 0}, "layers must be at least 1, got 0"),
            ({"max_length": 2}, "max_length must be at least 3, got 2"),
            ({"vocab_size": 513}, "vocab_size must be at least 514, got 513"),
        ],
    )
    def test_bad_sizes(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            build_clip(CAPTIONS, tmp_path / "new", **arguments)
        assert not (tmp_path / "new").exists()

    def test_bad_captions(self, tmp_path):
        with pytest.raises(TypeError, match="captions must be a list of str, got one str"):
            build_clip("a red circle", tmp_path)
        with pytest.raises(ValueError, match="captions must hold at least one"):
            build_clip([], tmp_path)


class TestEncode:
    @pytest.fixture(params=["clip", "t5", "umt5"])
    def encoder(self, request, clip, t5_folders):
        return clip if request.param == "clip" else TextEncoder.from_pretrained(t5_folders[request.param])

    def test_alone_equals_in_a_list_bitwise(self, encoder):
        packed = encoder.encode(PROMPTS)
        assert packed.tokens.shape == (sum(packed.lengths), encoder.dim)
        assert not packed.tokens.requires_grad
        for prompt, part in zip(PROMPTS, packed.split(), strict=True):
            alone = encoder.encode([prompt])
            assert alone.lengths == (len(part),)
            assert torch.equal(alone.tokens, part)

    def test_equal_prompts_run_once(self, encoder, monkeypatch):
        shapes = []
        hook = encoder.model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        packed = encoder.encode(PROMPTS)
        hook.remove()
        assert [tuple(shape) for shape in shapes] == [(1, n) for n in (*packed.lengths[:3], packed.lengths[4])]

    def test_empty_prompt_has_its_special_tokens(self, clip):
        assert clip.encode([""]).lengths == (2,)

    def test_encode_ignores_and_keeps_train_mode(self, encoder):
        expected = encoder.encode(PROMPTS).tokens
        encoder.train()
        assert torch.equal(encoder.encode(PROMPTS).tokens, expected)
        assert encoder.model.training
        encoder.eval()

    def test_forward_agrees_with_encode(self, encoder):
        packed, batched = encoder.encode(PROMPTS), encoder(PROMPTS)
        assert batched.lengths == packed.lengths
        torch.testing.assert_close(batched.tokens, packed.tokens, rtol=1e-4, atol=1e-5)

    def test_gradients_flow_and_padding_has_none(self, encoder):
        """The gradient of the batch is the sum of the gradients of its prompts alone: no padding leaks in."""

        def gradient(*batches):
            encoder.zero_grad()
            for prompts in batches:
                encoder(prompts).tokens.square().sum().backward()
            return {name: p.grad.clone() for name, p in encoder.named_parameters()}

        together, apart = gradient(PROMPTS[:3]), gradient(*([prompt] for prompt in PROMPTS[:3]))
        encoder.zero_grad()
        assert all(grad.isfinite().all() and grad.any() for name, grad in together.items() if "k_proj.bias" not in name)
        for name in together:
            torch.testing.assert_close(together[name], apart[name], rtol=1e-3, atol=1e-3)

    def test_too_long_prompts_are_cut_with_a_warning(self, clip):
        prompt = "red " * 50
        with pytest.warns(UserWarning, match=r"has 52 tokens and .* reads 40: the last 12 were dropped") as caught:
            packed = clip.encode([prompt])
        assert caught[0].filename == __file__
        assert packed.lengths == (40,)
        torch.testing.assert_close(packed.tokens[:-1], clip.encode(["red " * 38]).tokens[:-1], rtol=0, atol=0)

    @pytest.mark.parametrize("prompts", ["a red circle", ["a", 3], ["a", None]])
    def test_not_a_list_of_str(self, clip, prompts):
        with pytest.raises(TypeError, match="prompts must be a list of str"):
            clip.encode(prompts)

    def test_no_prompts_and_broken_unicode(self, clip):
        with pytest.raises(ValueError, match="prompts must hold at least one"):
            clip.encode([])
        with pytest.raises(ValueError, match="not valid Unicode"):
            clip.encode(["a \ud800 circle"])


class TestFiles:
    def test_properties(self, clip, clip_folder, t5_folder):
        assert (clip.dim, clip.max_length, clip.name) == (32, 40, str(clip_folder))
        t5 = TextEncoder.from_pretrained(t5_folder)
        assert (t5.dim, t5.max_length, t5.name) == (24, 512, str(t5_folder))
        assert not clip.training

    def test_built_saved_and_loaded_are_bitwise_equal(self, tmp_path):
        built = build_clip(CAPTIONS, tmp_path / "a", dim=16, layers=1, heads=2)
        expected = built.encode(PROMPTS)
        loaded = TextEncoder.from_pretrained(str(tmp_path / "a"))
        loaded.save_pretrained(tmp_path / "b")
        for encoder in (loaded, TextEncoder.from_pretrained(tmp_path / "b")):
            packed = encoder.encode(PROMPTS)
            assert packed.lengths == expected.lengths
            assert torch.equal(packed.tokens, expected.tokens)
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in (tmp_path / "b").iterdir())
        assert len({file.stat().st_mode for file in (tmp_path / "b").iterdir()}) == 1

    def test_saving_over_a_folder_replaces_it(self, tmp_path):
        encoder = build_clip(CAPTIONS, tmp_path, dim=16, layers=1, heads=2)
        with torch.no_grad():
            encoder.model.final_layer_norm.weight.mul_(2)
        encoder.save_pretrained(tmp_path)
        assert torch.equal(TextEncoder.from_pretrained(tmp_path).encode(PROMPTS).tokens, encoder.encode(PROMPTS).tokens)

    def test_t5_saved_and_loaded(self, t5_folder, tmp_path):
        from transformers import AutoTokenizer, T5EncoderModel, UMT5EncoderModel

        encoder = TextEncoder.from_pretrained(t5_folder)
        packed = encoder.encode(PROMPTS)
        assert packed.lengths[1] == 1
        model = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}[t5_folder.name].from_pretrained(t5_folder).eval()
        with torch.no_grad():
            ids = AutoTokenizer.from_pretrained(t5_folder)(CAPTIONS[5], return_tensors="pt").input_ids
            assert torch.equal(packed.split()[4], model(input_ids=ids).last_hidden_state[0])
        encoder.save_pretrained(tmp_path)
        assert torch.equal(TextEncoder.from_pretrained(tmp_path).encode(PROMPTS).tokens, packed.tokens)

    def test_a_whole_clip_gives_its_text_tower(self, clip, clip_folder, copy_of):
        from transformers import CLIPConfig, CLIPModel

        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(text_config=clip.model.config.to_dict(), vision_config=vision | {"image_size": 32, "patch_size": 16})
        whole = CLIPModel(config).eval()
        folder = copy_of(clip_folder)
        whole.save_pretrained(folder)
        encoder = TextEncoder.from_pretrained(folder)
        with torch.no_grad():
            ids = torch.tensor([encoder.tokenizer(PROMPTS[0]).input_ids])
            expected = whole.text_model(ids).last_hidden_state[0]
        assert torch.equal(encoder.encode(PROMPTS[:1]).tokens, expected)
        encoder.save_pretrained(folder / "text")
        assert torch.equal(TextEncoder.from_pretrained(folder / "text").encode(PROMPTS[:1]).tokens, expected)

    def test_sharded_weights(self, clip, clip_folder, copy_of):
        folder = copy_of(clip_folder)
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shards = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(state)}
        for shard in set(shards.values()):
            save_file({key: state[key] for key in state if shards[key] == shard}, folder / shard, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        assert torch.equal(TextEncoder.from_pretrained(folder).encode(PROMPTS).tokens, clip.encode(PROMPTS).tokens)
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"copy.model-00002-of-00002\.safetensors: missing"):
            TextEncoder.from_pretrained(folder)

    def test_dtype(self, clip_folder, tmp_path):
        half = TextEncoder.from_pretrained(clip_folder, dtype=torch.bfloat16, device="cpu")
        assert half.encode(["a"]).tokens.dtype == torch.bfloat16
        half.save_pretrained(tmp_path)
        assert TextEncoder.from_pretrained(tmp_path).encode(["a"]).tokens.dtype == torch.bfloat16

    def test_loading_is_quiet_and_leaves_the_settings(self, clip_folder, capfd):
        from transformers.utils import logging

        before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        TextEncoder.from_pretrained(clip_folder)
        assert capfd.readouterr() == ("", "")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before

    def test_importing_does_not_import_transformers(self):
        code = "import sys, tubelet.engine.text; sys.exit('transformers' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestErrors:
    def test_missing_folder(self, tmp_path):
        for name in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", "a/b/c"):
            with pytest.raises(FileNotFoundError, match=r"(nothing|a/b/c)'?: no such folder"):
                TextEncoder.from_pretrained(name)

    @pytest.mark.parametrize("name", ["someone/something", "not a name!"])
    def test_a_name_that_the_hub_cannot_give(self, name, monkeypatch):
        import huggingface_hub

        def refuse(*args, **kwargs):
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(FileNotFoundError, match=f"{name}.*hub: offline"):
            TextEncoder.from_pretrained(name)

    def test_a_hub_name_is_loaded_from_its_snapshot(self, clip_folder, monkeypatch):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(clip_folder))
        assert TextEncoder.from_pretrained("someone/something").name == "someone/something"

    def test_not_a_name(self):
        with pytest.raises(TypeError, match="text encoder: expected a folder or a hub id, got a int"):
            TextEncoder.from_pretrained(3)

    @pytest.mark.parametrize(("file", "named"), [("config.json", "config.json"), ("model.safetensors", "model.safetensors")])
    def test_missing_file(self, clip_folder, copy_of, file, named):
        folder = copy_of(clip_folder)
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{folder / named}: (missing|no such file)"):
            TextEncoder.from_pretrained(folder)

    def test_missing_tokenizer(self, clip_folder, copy_of):
        folder = copy_of(clip_folder)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(FileNotFoundError, match=rf"{folder}: the tokenizer is missing; expected tokenizer.json, or vocab.json and"):
            TextEncoder.from_pretrained(folder)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated_weights(self, clip_folder, copy_of, keep):
        folder = copy_of(clip_folder)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ValueError, match=f"{file}: corrupt or cut short") as caught:
            TextEncoder.from_pretrained(folder)
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize("content", ["", "{", "[1]", '{"model_type": "clip_text_model", "hidden_size": "wide"}'])
    def test_corrupt_config(self, clip_folder, copy_of, content):
        folder = copy_of(clip_folder)
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=str(folder)):
            TextEncoder.from_pretrained(folder)

    def test_corrupt_tokenizer(self, clip_folder, copy_of):
        folder = copy_of(clip_folder)
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match=f"{folder}: the tokenizer cannot be read"):
            TextEncoder.from_pretrained(folder)

    def test_pickled_weights_only(self, clip_folder, copy_of):
        folder = copy_of(clip_folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=rf"{folder}: holds pickled weights only \(pytorch_model.bin\)"):
            TextEncoder.from_pretrained(folder)

    @pytest.mark.parametrize("model_type", ["bert", None])
    def test_unsupported_model_type(self, clip_folder, copy_of, model_type):
        folder = copy_of(clip_folder)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(ValueError, match=f"{folder}: model_type {model_type!r} is not supported; expected one of clip, .*, umt5"):
            TextEncoder.from_pretrained(folder)

    def test_a_missing_weight_is_not_filled_with_noise(self, clip_folder, copy_of):
        folder = copy_of(clip_folder)
        state = load_file(folder / "model.safetensors")
        del state["text_model.final_layer_norm.weight"]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{folder}: the weights do not fit config.json; 1 missing_keys, such as .*final_layer_norm"):
            TextEncoder.from_pretrained(folder)

    def test_a_weight_of_another_shape(self, clip_folder, copy_of):
        folder = copy_of(clip_folder)
        config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 48}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"{folder}: the weights do not fit config.json; \d+ mismatched_keys, such as .*mlp"):
            TextEncoder.from_pretrained(folder)

    def test_a_tokenizer_larger_than_the_model(self, clip_folder, copy_of, tmp_path):
        folder = copy_of(clip_folder)
        build_clip(["entirely other words"], tmp_path / "other", dim=32, layers=2, heads=2, max_length=40).model.save_pretrained(folder)
        with pytest.raises(ValueError, match=rf"{folder}: the tokenizer has \d+ tokens, the model's table \d+"):
            TextEncoder.from_pretrained(folder)
