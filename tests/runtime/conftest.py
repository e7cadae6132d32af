"""Folders with tiny tokenizers in the official file formats, trained here in milliseconds."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "What is the total on the receipt? The total is 12.50.",
    "user\nassistant\nsystem\nHow many red circles are there?",
    "请问这张发票的总金额是多少？你好，世界。",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "it's we're they'll  two  spaces   three",
    "image Image-1: context end start img im human bot USER ASSISTANT",
]
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]
INTERNVL_TOKENS = [*IMAGE_TOKENS, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
CHATML = ["<|im_end|>", "<|im_start|>"]
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def added_token(text: str, *, special: bool = True, rstrip: bool = False) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": not special, "rstrip": rstrip, "single_word": False, "special": special}
    return {"content": text, **flags}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def train_sentencepiece(**options: Any) -> bytes:
    model = io.BytesIO()
    settings = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
        **options,
    }
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(CORPUS * 5), model_writer=model, **settings)
    return model.getvalue()


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make(tokens, rstrip, config, **training)`: a folder with a `tokenizer.model` and the files that add `tokens`.

    The added tokens are special and numbered from the end of the vocabulary.
    """

    def make(
        tokens: Sequence[str] = (*CHATML, *INTERNVL_TOKENS),
        rstrip: bool = False,
        config: Mapping[str, Any] = MappingProxyType({}),
        **training: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp("sentencepiece")
        model = train_sentencepiece(**training)
        (folder / "tokenizer.model").write_bytes(model)
        base = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
        added = {i: added_token(text) for i, text in enumerate(("<unk>", "<s>", "</s>"))}
        added |= {base + i: added_token(text, rstrip=rstrip) for i, text in enumerate(tokens)}
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "additional_special_tokens": [*tokens]}
        write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, **names, **config})
        return folder

    return make


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make(words)`: a folder with Qwen2's `vocab.json` and `merges.txt`, and the files that add its tokens.

    `words` are added tokens that are not special.
    """

    def make(words: Sequence[str] = ("<tool_call>", "<think>", "</think>")) -> Path:
        folder = tmp_path_factory.mktemp("qwen2")
        byte_pairs = Tokenizer(models.BPE())
        byte_pairs.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        byte_pairs.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        byte_pairs.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        byte_pairs.train_from_iterator(CORPUS * 5, trainer)
        byte_pairs.model.save(str(folder))
        base = byte_pairs.get_vocab_size()
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        added = {base + i: added_token(text) for i, text in enumerate(tokens)}
        added |= {base + 3 + i: added_token(text, special=False) for i, text in enumerate(words)}
        added |= {base + 3 + len(words) + i: added_token(text) for i, text in enumerate(INTERNVL_TOKENS)}
        named = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
        listed = {"additional_special_tokens": [*tokens[1:], *INTERNVL_TOKENS], "tokenizer_class": "Qwen2Tokenizer"}
        write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, **named, **listed})
        return folder

    return make
