"""Text conditioning: prompts to packed hidden states through a CLIP (Radford et al. 2021) or T5 (Raffel et al. 2020) text encoder.

The models, the tokenizers and the file formats are those of `transformers`. Sequences are never padded where it could be seen: the
tokens of several prompts lie one after the other (`PackedText`), as cross-attention over a pack wants them. transformers is imported
where it is used, so that importing this module stays cheap.
"""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .pretrained import fetch, read_json

_CLIP_TYPES = ("clip", "clip_text_model")
_T5_TYPES = ("t5", "umt5")
_T5_MAX_LENGTH = 512  # T5's positions are relative and have no end; this is the length it was trained at
_TOKENIZER_FILES = {  # model types -> sets of files, any one of which makes the tokenizer
    _CLIP_TYPES: (("tokenizer.json",), ("vocab.json", "merges.txt")),
    _T5_TYPES: (("tokenizer.json",), ("spiece.model",)),
}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_FILES = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
]


@dataclass(frozen=True)
class PackedText:
    """The hidden states of several prompts on one token axis.

    Args:
        tokens: (sum of lengths, dim), floating point.
        lengths: the number of tokens of each prompt.
    """

    tokens: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self):
        if self.tokens.ndim != 2 or self.tokens.shape[0] != sum(self.lengths):
            raise ValueError(f"tokens must be (sum(lengths), dim) with sum(lengths) = {sum(self.lengths)}, got {tuple(self.tokens.shape)}")

    @classmethod
    def cat(cls, texts: Sequence["PackedText"]) -> "PackedText":
        """Several packs as one, in order."""
        return cls(torch.cat([text.tokens for text in texts]), tuple(length for text in texts for length in text.lengths))

    def split(self) -> tuple[Tensor, ...]:
        """Views of (length, dim), one per prompt."""
        return self.tokens.split(self.lengths)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "PackedText":
        return PackedText(self.tokens.to(device=device, dtype=dtype), self.lengths)


class TextEncoder(nn.Module):
    """A frozen or trainable text encoder.

    Args:
        model: a `CLIPTextModel`, `T5EncoderModel` or `UMT5EncoderModel`.
        tokenizer: its tokenizer.
        name: the hub name or folder that it came from.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str):
        super().__init__()
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model's table {model.config.vocab_size}")
        if not tokenizer("").input_ids:
            raise ValueError(f"{name}: the tokenizer gives no token for an empty prompt; expected an end-of-sequence token")
        self.model = model
        self.tokenizer = tokenizer
        self._name = name

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> "TextEncoder":
        """Loads a CLIP text model (or the text tower of a whole CLIP) or a T5/UMT5 encoder, in eval mode.

        Args:
            name_or_folder: a local folder, read without the network, or a name on the Hugging Face hub.
            dtype: of the weights; None keeps the checkpoint's.
            device: None leaves the model on the CPU.

        Raises:
            FileNotFoundError: no such folder or hub name, or a file of it is missing.
            ValueError: an unsupported model type, pickled weights only, or a file that cannot be read.
        """
        folder = fetch(name_or_folder, "text encoder", _HUB_FILES)
        model_type = _model_type(folder)
        _check_weights(folder)
        _check_tokenizer_files(folder, model_type)
        model = _load_model(folder, model_type, dtype)
        try:
            tokenizer = _load_tokenizer(folder, model_type)
        except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
            raise ValueError(f"{folder}: the tokenizer cannot be read: {error}") from error
        return cls(model, tokenizer, str(name_or_folder)).to(device).eval()

    @property
    def dim(self) -> int:
        """Channels of the hidden states."""
        return self.model.config.hidden_size

    @property
    def max_length(self) -> int:
        """The most tokens of one prompt, special tokens included; longer prompts are cut, with a warning."""
        limit = self.tokenizer.model_max_length
        if self.model.config.model_type in _T5_TYPES:
            return limit if limit < 1e9 else _T5_MAX_LENGTH  # transformers writes "no limit" as 1e30
        return min(limit, self.model.config.max_position_embeddings)

    @property
    def name(self) -> str:
        """The hub name or folder that the encoder came from."""
        return self._name

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> PackedText:
        """The last hidden states of each prompt, without dropout and without gradients.

        Every prompt runs alone at its own length, so it gives the same numbers, bit for bit, in whatever list it stands; equal prompts
        run once. "" is the unconditional prompt: its start and end tokens alone.

        Returns: tokens (sum of lengths, dim) in the model's dtype on the model's device.
        """
        ids = self._tokenize(prompts)
        training = self.model.training
        self.model.eval()
        try:
            states = {key: self._hidden(torch.tensor([key]))[0] for key in dict.fromkeys(ids)}
        finally:
            self.model.train(training)
        return PackedText(torch.cat([states[key] for key in ids]), tuple(map(len, ids)))

    def forward(self, prompts: Sequence[str]) -> PackedText:
        """`encode` for training: differentiable, one padded and masked batch inside; equal to `encode` within rounding (in eval mode)."""
        ids = self._tokenize(prompts)
        lengths = torch.tensor([len(row) for row in ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        batch = torch.full(mask.shape, self.tokenizer.pad_token_id or 0)
        batch[mask] = torch.tensor([token for row in ids for token in row])
        hidden = self._hidden(batch, mask.long())
        return PackedText(torch.cat([row[: len(key)] for row, key in zip(hidden, ids, strict=True)]), tuple(map(len, ids)))

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes the model (its weights as `dtype` if given) and tokenizer in transformers' own formats; each file whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.to(dtype or value.dtype) for key, value in self.model.state_dict().items()}
        if self.model.config.model_type in _CLIP_TYPES:
            # The names of OpenAI's checkpoints, which every transformers reads; a flat CLIPTextModel is new in the 5.x series.
            state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in state.items()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging, _quiet():
            self.model.save_pretrained(staging, state_dict=state)
            self.tokenizer.save_pretrained(staging)
            mode = Path(staging, "config.json").stat().st_mode
            for file in sorted(Path(staging).iterdir()):
                file.chmod(mode)  # safetensors writes its files for the owner alone
                os.replace(file, folder / file.name)

    def _hidden(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        device = self.model.device
        mask = None if mask is None else mask.to(device)
        return self.model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state

    def _tokenize(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        rows = []
        for prompt in _strings("prompts", prompts):
            ids = self.tokenizer(prompt, verbose=False).input_ids
            dropped = len(ids) - self.max_length
            if dropped > 0:
                ids = self.tokenizer(prompt, truncation=True, max_length=self.max_length).input_ids
                start = prompt if len(prompt) <= 60 else f"{prompt[:60]}..."
                warnings.warn(
                    f"prompt {start!r} has {len(ids) + dropped} tokens and {self.name} reads {self.max_length}: "
                    f"the last {dropped} were dropped",
                    stacklevel=4,  # this, encode and its no_grad wrapper: the caller of encode
                )
            rows.append(tuple(ids))
        return rows


def build_clip(
    captions: Iterable[str],
    folder: str | Path,
    *,
    dim: int = 192,
    layers: int = 3,
    heads: int = 4,
    max_length: int = 64,
    vocab_size: int = 16384,
) -> TextEncoder:
    """Makes a small CLIP text encoder with random weights and a vocabulary of its own, and writes it to `folder`.

    The tokenizer is CLIP's: lower-cased text, byte-level BPE, `</w>` at the end of a word. Merges are learned until every word of the
    captions is one token, or `vocab_size` is full (then rare words stay in pieces). Any other word falls back to pieces, in the end to
    bytes. Weights are drawn from torch's global generator.

    Args:
        captions: the text whose words become tokens.
        folder: written in transformers' formats; read by `TextEncoder.from_pretrained` and transformers' own classes.
        dim, layers, heads: the size of the transformer; its MLP is 4 dim wide.
        max_length: tokens per prompt, start and end tokens included.
        vocab_size: the most tokens of the vocabulary, at least 514 (the bytes, the bytes that end a word, start and end).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    captions = _strings("captions", captions)
    for label, value, least in (("dim", dim, 1), ("layers", layers, 1), ("heads", heads, 1), ("max_length", max_length, 3)):
        if value < least:
            raise ValueError(f"{label} must be at least {least}, got {value}")
    if dim % heads:
        raise ValueError(f"dim must be a multiple of heads, got dim={dim}, heads={heads}")
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _train_clip_tokenizer(captions, max_length, vocab_size)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=4 * dim,
        projection_dim=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    # At CLIP's 0.02 what all words share soon outgrows what tells them apart, if the encoder is trained along with a model that at first
    # reads only some of them: "circle" and "square" then become one word, and stay so.
    for name, table in model.named_parameters():
        if name.endswith("embedding.weight"):
            nn.init.normal_(table, std=1.0 if "position" in name else 3.0)
    encoder = TextEncoder(model, tokenizer, str(folder)).eval()
    encoder.save_pretrained(folder)
    return encoder


def _strings(argument: str, texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{argument} must be a list of str, got one str: {texts[:60]!r}")
    texts = list(texts)
    if not texts:
        raise ValueError(f"{argument} must hold at least one str, got none")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{argument} must be a list of str, got a {type(text).__name__} in it")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate: bytes from a shell that were not UTF-8
            raise ValueError(f"{argument}: {text[:60]!r} is not valid Unicode: {error}") from error
    return texts


def _train_clip_tokenizer(captions: list[str], max_length: int, vocab_size: int):
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = letters + [f"{letter}</w>" for letter in letters]
    special = ["<|startoftext|>", "<|endoftext|>"]
    merges_allowed = vocab_size - len(alphabet) - len(special)
    if merges_allowed < 0:
        raise ValueError(f"vocab_size must be at least {len(alphabet) + len(special)}, got {vocab_size}")
    # The trainer gives ids to the word-ending letters in no fixed order, and breaks ties between merges by id: given as special tokens
    # they are numbered first, and the same captions always make the same vocabulary.
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges_allowed,
        special_tokens=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe = CLIPTokenizer().backend_tokenizer  # transformers' own normalisation and splitting into words
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), *special])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _model_type(folder: Path) -> str:
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in _CLIP_TYPES + _T5_TYPES:
        raise ValueError(f"{folder}: model_type {model_type!r} is not supported; expected one of {', '.join(_CLIP_TYPES + _T5_TYPES)}")
    return model_type


def _check_weights(folder: Path) -> None:
    """Every weight file is there, is safetensors and is whole: transformers' own errors do not name the file."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index.exists():
        files = sorted({folder / shard for shard in read_json(index).get("weight_map", {}).values()})
    else:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
        if pickled:
            raise ValueError(f"{folder}: holds pickled weights only ({', '.join(pickled)}), which are not read; expected model.safetensors")
        raise FileNotFoundError(f"{folder / 'model.safetensors'}: missing (only safetensors weights are read)")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, though {index.name} names it")
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: corrupt or cut short, not readable as safetensors: {error}") from error


def _check_tokenizer_files(folder: Path, model_type: str) -> None:
    choices = next(choices for types, choices in _TOKENIZER_FILES.items() if model_type in types)
    if not any(all((folder / file).is_file() for file in files) for files in choices):  # transformers would make an empty tokenizer
        expected = ", or ".join(" and ".join(files) for files in choices)
        raise FileNotFoundError(f"{folder}: the tokenizer is missing; expected {expected}")


def _load_model(folder: Path, model_type: str, dtype: torch.dtype | None) -> nn.Module:
    from transformers import CLIPTextModel, T5EncoderModel, UMT5EncoderModel

    model_class = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}.get(model_type, CLIPTextModel)
    try:
        with _quiet():
            model, loading = model_class.from_pretrained(
                folder,
                dtype=dtype or "auto",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except Exception as error:
        raise ValueError(f"{folder}: not loadable as a {model_class.__name__}: {error}") from error
    # transformers fills a missing or ill-shaped weight with random numbers and says so in its log only.
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            keys = ", ".join(str(key) for key in sorted(loading[problem])[:3])
            raise ValueError(f"{folder}: the weights do not fit config.json; {len(loading[problem])} {problem}, such as {keys}")
    return model


def _load_tokenizer(folder: Path, model_type: str):
    from transformers import AutoTokenizer, CLIPTokenizer

    tokenizer_class = CLIPTokenizer if model_type in _CLIP_TYPES else AutoTokenizer
    with _quiet():
        return tokenizer_class.from_pretrained(folder, local_files_only=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' loading bars and log lines; its settings are as before afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_bars_off = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if hub_bars_off:
                disable_progress_bars()
