"""The tokenizer: ids of the official slow tokenizers, text that stays text, answers decoded as they arrive."""

import contextlib
import functools
import itertools
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from vitrail.runtime.errors import CheckpointError, InvalidRequestError, UnsupportedError, VitrailError
from vitrail.runtime.tokenizer import Control, Tokenizer, load_tokenizer

Make = Callable[..., Path]

CHATML = ["<|im_end|>", "<|im_start|>"]
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]
MARKUP = ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
TOKENS = [*CHATML, "<img>", "</img>", "<IMG_CONTEXT>", *MARKUP]
WORDS = ["<tool_call>", "<think>", "</think>"]
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FRAGMENTS = [
    "What is the total",
    "请问",
    "发票",
    "你好，世界",
    "😀",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "12.50",
    "it's",
    "\n",
    "\n\n",
]
SPACES = [" ", "  ", "   ", "\t", "▁", "\u00a0", "\u3000", "\r\n", "\x00", "<", "|>"]
fragments = st.lists(st.sampled_from(FRAGMENTS + SPACES) | st.text(max_size=4), max_size=8).map("".join)
# what a hostile user might type: pieces of control tokens, and whole ones
hostile = st.lists(
    st.sampled_from(
        [*TOKENS, "<s>", "</s>", "<unk>", "<|endoftext|>", "[UNUSED_1]", "<|", "im_end", "|>", "▁", " ", "a"]
    ),
    max_size=8,
).map("".join)


def plain(text: str) -> bool:
    return not any(token in text for token in [*TOKENS, *WORDS, "<s>", "</s>", "<unk>", "<|"])


texts = fragments.filter(plain)
turns = st.tuples(st.sampled_from([*CHATML, *IMAGE_TOKENS, "</s>"]).map(Control), texts)
# texts with control tokens between them, as a template renders them
prompts = st.tuples(texts, st.lists(turns, max_size=4)).map(lambda drawn: [drawn[0], *itertools.chain(*drawn[1])])
examples = settings(max_examples=60)


def as_string(pieces: list[str | Control]) -> str:
    return "".join(piece if isinstance(piece, str) else piece.token for piece in pieces)


@pytest.fixture(scope="module")
def internlm2(sentencepiece_folder: Make) -> Path:
    return sentencepiece_folder(config={"tokenizer_class": "InternLM2Tokenizer"}, add_dummy_prefix=False)


@pytest.fixture(scope="module")
def llamas(sentencepiece_folder: Make) -> dict[bool, Path]:
    return {
        legacy: sentencepiece_folder(config={"tokenizer_class": "LlamaTokenizer", "legacy": legacy})
        for legacy in (True, False)
    }


@pytest.fixture(scope="module")
def qwen2(qwen2_folder: Make) -> Path:
    return qwen2_folder(WORDS)


@pytest.fixture(scope="module")
def tokenizers(internlm2: Path, llamas: dict[bool, Path], qwen2: Path, sentencepiece_folder: Make) -> list[Tokenizer]:
    squeezing = sentencepiece_folder(remove_extra_whitespaces=True)
    return [load_tokenizer(folder) for folder in (internlm2, *llamas.values(), qwen2, squeezing)]


@pytest.fixture(scope="module")
def spacings(sentencepiece_folder: Make) -> list[Path]:
    """Models that decode one leading space away, none, and all of them."""
    options: list[dict[str, Any]] = [{}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True}]
    return [sentencepiece_folder(**option) for option in options]


# ---- ids of the official tokenizers


tokenizer_of = functools.cache(load_tokenizer)


def internlm2_ids(folder: Path, pieces: list[str | Control]) -> list[int]:
    """What the official InternLM2 tokenizer does: the sentencepiece model for each run between its added tokens."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids_of = {**{token: model.get_piece_size() + i for i, token in enumerate(TOKENS)}, "</s>": 2}
    runs = [[ids_of[piece.token]] if isinstance(piece, Control) else model.encode(piece) for piece in pieces]
    return [1, *itertools.chain(*runs)]


class SlowLlama(SentencePieceBackend):
    """LLaMA's slow tokenizer: transformers' sentencepiece code, and the `tokenize` that its version 4 had for LLaMA."""

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.legacy or not text:
            return super().tokenize(text, **kwargs)
        tokens: list[str] = super().tokenize("▁" + text.replace("▁", " "), **kwargs)
        return tokens[1:] if len(tokens) > 1 and tokens[0] == "▁" and tokens[1] in self.all_special_tokens else tokens


@functools.cache
def slow_llama(folder: Path, *, legacy: bool, rstrip: bool = False) -> SlowLlama:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    official = SlowLlama(vocab_file=str(folder / "tokenizer.model"), legacy=legacy, **names)
    official.add_tokens([AddedToken(token, special=True, rstrip=rstrip) for token in TOKENS], special_tokens=True)
    return official


def llama_ids(folder: Path, pieces: list[str | Control], *, legacy: bool) -> list[int]:
    official = slow_llama(folder, legacy=legacy)
    return [1, *official.convert_tokens_to_ids(official.tokenize(as_string(pieces)))]


@functools.cache
def fast_llama(folder: Path) -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(folder, legacy=False)


qwen2_official = functools.cache(Qwen2Tokenizer.from_pretrained)


class SlowQwen2:
    """Qwen2's slow tokenizer, written from its description: NFC, the words, byte characters, merges by rank."""

    def __init__(self, folder: Path) -> None:
        self.ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        self.ranks = {tuple(line.split()): rank for rank, line in enumerate(lines) if line and line[0] != "#"}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.characters = {byte: chr(byte) for byte in printable}
        self.characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in regex.findall(QWEN2_WORDS, unicodedata.normalize("NFC", text)):
            parts = [self.characters[byte] for byte in word.encode()]
            while pairs := [pair for pair in itertools.pairwise(parts) if pair in self.ranks]:
                best = min(pairs, key=self.ranks.__getitem__)
                merged: list[str] = []
                joined = False  # whether the last part has just been made, and may not be used again
                for part in parts:
                    if merged and not joined and (merged[-1], part) == best:
                        merged[-1] += part
                        joined = True
                    else:
                        merged.append(part)
                        joined = False
                parts = merged
            ids += [self.ids[part] for part in parts]
        return ids


slow_qwen2 = functools.cache(SlowQwen2)


def check_against_the_official_tokenizers(
    internlm2: Path, llamas: dict[bool, Path], qwen2: Path, pieces: list[str | Control]
) -> None:
    assert tokenizer_of(internlm2).encode(pieces) == internlm2_ids(internlm2, pieces)
    for legacy, folder in llamas.items():
        assert tokenizer_of(folder).encode(pieces) == llama_ids(folder, pieces, legacy=legacy)
    if not isinstance(pieces[0], str) or not pieces[0].startswith((" ", "▁")):
        # to a text that begins with a space the fast one adds none; the slow one does
        fast = fast_llama(llamas[False])(as_string(pieces), add_special_tokens=False)["input_ids"]
        assert tokenizer_of(llamas[False]).encode(pieces, add_bos=False) == fast
    known = [piece for piece in pieces if piece != Control("</s>")]
    assert tokenizer_of(qwen2).encode(known) == qwen2_official(qwen2)(as_string(known))["input_ids"]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    assert tokenizer_of(qwen2).encode(texts) == slow_qwen2(qwen2).encode("".join(texts))


@given(pieces=prompts)
@examples
def test_ids_equal_those_of_the_official_tokenizers(
    internlm2: Path, llamas: dict[bool, Path], qwen2: Path, pieces: list[str | Control]
) -> None:
    check_against_the_official_tokenizers(internlm2, llamas, qwen2, pieces)


@pytest.mark.slow
@given(pieces=prompts)
@settings(examples, max_examples=5000)
def test_ids_equal_those_of_the_official_tokenizers_on_many_prompts(
    internlm2: Path, llamas: dict[bool, Path], qwen2: Path, pieces: list[str | Control]
) -> None:
    check_against_the_official_tokenizers(internlm2, llamas, qwen2, pieces)


def test_internlm2_follows_its_model_where_that_puts_a_space_before_each_run(sentencepiece_folder: Make) -> None:
    folder = sentencepiece_folder(config={"tokenizer_class": "InternLM2Tokenizer", "legacy": False})
    tokenizer = load_tokenizer(folder)
    run = tokenizer.encode("the", add_bos=False)
    assert run == [tokenizer.token_to_id("▁the")]
    end = tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.encode(["the", Control("<|im_end|>"), "the"], add_bos=False) == [*run, end, *run]


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_that_take_up_white_space_to_their_right_do_so_as_in_phi3(
    sentencepiece_folder: Make, legacy: bool
) -> None:
    folder = sentencepiece_folder(rstrip=True, config={"tokenizer_class": "LlamaTokenizer", "legacy": legacy})
    prompt = [Control("<|im_start|>"), "\n  What\n", Control("<|im_end|>"), " \n", Control("<img>"), "x"]
    official = slow_llama(folder, legacy=legacy, rstrip=True)
    expected = official.convert_tokens_to_ids(official.tokenize(as_string(prompt)))
    assert load_tokenizer(folder).encode(prompt, add_bos=False) == expected


def test_words_that_a_checkpoint_adds_are_found_in_text_as_the_official_tokenizer_finds_them(qwen2: Path) -> None:
    text = "Where is <ref>the dog</ref>? <think>\n it's </think><box>[[1, 2, 3, 4]]</box> <tool_call>"
    ids = load_tokenizer(qwen2).encode(text)
    assert ids == Qwen2Tokenizer.from_pretrained(qwen2)(text)["input_ids"]
    assert {load_tokenizer(qwen2).token_to_id(word) for word in ("<ref>", "</box>", "<think>", "<tool_call>")} <= {*ids}


@given(pieces=prompts)
@settings(examples, max_examples=30)
def test_a_lone_tokenizer_json_of_llama_gives_the_ids_of_transformers(
    lone_json: dict[bool, Path], pieces: list[str | Control]
) -> None:
    for folder in lone_json.values():
        expected = fast_tokenizer(folder)(as_string(pieces))["input_ids"]
        assert tokenizer_of(folder).encode(pieces) == expected


@pytest.fixture(scope="module")
def lone_json(llamas: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """What transformers 5 saves: `tokenizer.json` and a config."""
    folders = {legacy: tmp_path_factory.mktemp("lone") for legacy in llamas}
    for legacy, folder in folders.items():
        LlamaTokenizer.from_pretrained(llamas[legacy], legacy=legacy).save_pretrained(folder)
        assert not (folder / "tokenizer.model").exists()
    return folders


fast_tokenizer = functools.cache(PreTrainedTokenizerFast.from_pretrained)


# ---- which file is read, and how a prompt begins


def test_the_slow_files_are_read_where_a_tokenizer_json_stands_beside_them(
    llamas: dict[bool, Path], lone_json: dict[bool, Path], tmp_path: Path
) -> None:
    shutil.copytree(lone_json[True], tmp_path, dirs_exist_ok=True)
    model = (llamas[True] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    slow = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert load_tokenizer(tmp_path).encode("  a", add_bos=False) == slow.encode("  a")


def test_a_tokenizer_json_is_read_where_vocab_json_belongs_to_another_tokenizer(
    lone_json: dict[bool, Path], tmp_path: Path
) -> None:
    shutil.copytree(lone_json[True], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("What is")) == "What is"
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedError, match="GPT2Tokenizer"):
        load_tokenizer(tmp_path)


def test_internlm2_and_llama_prompts_begin_with_bos_and_qwen_prompts_do_not(tokenizers: list[Tokenizer]) -> None:
    internlm2, legacy, llama, qwen2, _ = tokenizers
    for tokenizer in (internlm2, legacy, llama):
        assert tokenizer.bos_token_id == 1
        assert tokenizer.eos_token_id == 2
        assert tokenizer.encode("") == [1]
        assert tokenizer.encode("", add_bos=False) == []
    assert qwen2.bos_token_id is None
    assert qwen2.eos_token_id == qwen2.token_to_id("<|im_end|>")
    assert qwen2.encode("") == []


def test_a_phi3_whose_config_says_so_begins_without_bos(sentencepiece_folder: Make) -> None:
    folder = sentencepiece_folder(config={"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False})
    assert load_tokenizer(folder).encode([Control("<|im_start|>")]) == [
        load_tokenizer(folder).token_to_id("<|im_start|>")
    ]


def test_a_lone_tokenizer_json_begins_prompts_with_what_its_post_processor_puts_first(
    lone_json: dict[bool, Path], tmp_path: Path
) -> None:
    shutil.copytree(lone_json[False], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").unlink()
    fast = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": begin, "pair": begin, "special_tokens": {}}
    for processor, expected in ((None, []), (template, [1]), ({"type": "Sequence", "processors": [template]}, [1])):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**fast, "post_processor": processor}))
        assert load_tokenizer(tmp_path).encode("") == expected


def test_neighbouring_strings_are_tokenised_as_one(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        assert tokenizer.encode(["", "Wh", "at is", "", " the"]) == tokenizer.encode("What is the")
        control = Control("<|im_start|>")
        assert tokenizer.encode([control, "us", "er\n", control]) == tokenizer.encode([control, "user\n", control])


# ---- text stays text


@given(text=hostile)
@examples
def test_what_a_user_types_never_becomes_a_control_token(tokenizers: list[Tokenizer], text: str) -> None:
    for tokenizer in tokenizers:
        controls = tokenizer.special_ids - {tokenizer.token_to_id(token) for token in [*MARKUP, "<unk>"]}
        assert controls >= {tokenizer.token_to_id(token) for token in [*CHATML, *IMAGE_TOKENS]}
        assert controls.isdisjoint(tokenizer.encode(text, add_bos=False))
        inside = tokenizer.encode([Control("<|im_start|>"), text, Control("<|im_end|>")], add_bos=False)
        assert controls.isdisjoint(inside[1:-1])


def test_control_tokens_that_users_type_are_read_back_letter_by_letter(tokenizers: list[Tokenizer]) -> None:
    text = "Say <|im_end|>, <IMG_CONTEXT> and <img>."
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_piece_of_the_model_that_holds_a_control_token_is_spelt_out(sentencepiece_folder: Make) -> None:
    # InternLM2 gives the id of its piece [UNUSED_TOKEN_145] to <|im_start|>; Yi's model holds <|im_end|> itself.
    folder = sentencepiece_folder(
        tokens=[], config={"tokenizer_class": "InternLM2Tokenizer"}, user_defined_symbols=["[UNUSED_1]", "<|im_end|>"]
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    start, end = model.piece_to_id(["[UNUSED_1]", "<|im_end|>"])
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": start}))
    tokenizer = load_tokenizer(folder)
    for text in ("a [UNUSED_1] b", "a <|im_end|> b"):
        assert {start, end} & {*model.encode(text)}
        assert {start, end}.isdisjoint(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode([Control("<|im_start|>"), Control("<|im_end|>")], add_bos=False) == [start, end]


def test_merges_cannot_write_a_control_token(qwen2_folder: Make) -> None:
    folder = qwen2_folder()
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    base = load_tokenizer(folder).vocab_size
    vocab |= {"<|": base, "x|": base + 1, "x|>": base + 2, "<|x|>": base + 3}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with (folder / "merges.txt").open("a", encoding="utf-8") as merges:
        merges.write("\n< |\nx |\nx| >\n<| x|>\n")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|x|>")
    assert base + 3 not in tokenizer.encode("<|x|>")
    assert tokenizer.encode([Control("<|x|>")]) == [base + 3]


def test_a_control_token_that_the_tokenizer_lacks_is_named(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        assert tokenizer.token_to_id("<|end|>") is None
        with pytest.raises(CheckpointError, match=r"no token '<\|end\|>'"):
            tokenizer.encode(["What", Control("<|end|>")])


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", "\udfff" * 3])
def test_text_without_a_utf8_form_is_an_invalid_request(tokenizers: list[Tokenizer], text: str) -> None:
    for tokenizer in tokenizers:
        with pytest.raises(InvalidRequestError, match=r"^prompt: not valid UTF-8: lone surrogate U\+D[0-9A-F]{3}"):
            tokenizer.encode(["What", Control("<|im_end|>"), text])
        assert tokenizer.encode("What")


# ---- decoding


@given(text=texts)
@examples
def test_decoding_gives_back_the_text_that_was_encoded(tokenizers: list[Tokenizer], text: str) -> None:
    for tokenizer in tokenizers[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    assert tokenizers[3].decode(tokenizers[3].encode(text)) == unicodedata.normalize("NFC", text)


@given(text=texts)
@examples
def test_sentencepiece_ids_are_decoded_as_the_model_decodes_them(spacings: list[Path], text: str) -> None:
    for folder in spacings:
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        assert tokenizer_of(folder).decode(model.encode(text)) == model.decode(model.encode(text))


def test_special_tokens_are_left_out_unless_they_are_asked_for(tokenizers: list[Tokenizer]) -> None:
    pieces = [Control("<|im_start|>"), "user\nHi there", Control("<|im_end|>"), "x"]
    for tokenizer in tokenizers:
        ids = tokenizer.encode(pieces, add_bos=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == as_string(pieces)
        assert "<|" not in tokenizer.decode(ids)
        assert "Hi there" in tokenizer.decode(ids)


def test_words_are_shown_and_the_space_before_a_first_word_is_not(tokenizers: list[Tokenizer], qwen2: Path) -> None:
    _, legacy, llama, _, _ = tokenizers
    for tokenizer in (legacy, llama):
        what = tokenizer.token_to_id("▁the")
        assert what is not None
        assert tokenizer.decode([what, what]) == "the the"
        assert tokenizer.decode([1, what, 2, what]) == "the the"
    text = "<think>it's</think> so"
    assert load_tokenizer(qwen2).decode(load_tokenizer(qwen2).encode(text)) == text


def test_ids_that_stand_for_nothing_add_nothing(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.encode("What is")
        assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 1000]) == "What is"


@given(data=st.data())
@examples
def test_texts_pushed_one_after_another_are_the_decoded_whole(tokenizers: list[Tokenizer], data: st.DataObject) -> None:
    for tokenizer in tokenizers:
        # any ids that a model may sample, valid UTF-8 or not
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=30))
        skip = data.draw(st.booleans())
        decoder = tokenizer.stream(skip_special_tokens=skip)
        pushed, rest = [], ids
        while rest:
            size = data.draw(st.integers(1, 3))
            pushed.append(decoder.push(rest[:size]))
            rest = rest[size:]
        assert "".join([*pushed, decoder.flush()]) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_of_several_tokens_is_pushed_when_it_is_complete(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.encode("a😀", add_bos=False)
        decoder = tokenizer.stream()
        texts = [decoder.push([index]) for index in ids]
        assert texts[-4:] == ["", "", "", "😀"]
        assert "".join(texts) == "a😀"
        assert decoder.flush() == ""


def test_a_character_cut_off_at_the_end_is_shown_as_a_replacement(tokenizers: list[Tokenizer]) -> None:
    for tokenizer in tokenizers:
        cut = tokenizer.encode("a😀", add_bos=False)[:-1]
        assert tokenizer.decode(cut) == "a\ufffd"


# ---- files that are missing, broken or at odds


def test_a_folder_without_a_tokenizer_says_what_was_looked_for_and_where(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    for name in (str(tmp_path), "tokenizer.model", "vocab.json", "merges.txt", "tokenizer.json"):
        assert name in str(error.value)
    with pytest.raises(CheckpointError, match="no tokenizer there"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"version https://git-lfs.github.com/spec/v1", b"<html></html>"])
def test_a_broken_sentencepiece_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a readable"):
        load_tokenizer(tmp_path)


def test_a_truncated_sentencepiece_model_is_named(internlm2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((internlm2 / "tokenizer.model").read_bytes()[:-300])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a readable"):
        load_tokenizer(tmp_path)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.json", json.dumps({"model": {"vocab": {}, "merges": 7}, "decoder": BYTE_LEVEL})),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"a": "b"}, "merges": []}, "decoder": BYTE_LEVEL})),
        ("tokenizer.json", json.dumps({"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}, "decoder": BYTE_LEVEL})),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [7]}'),
        ("tokenizer_config.json", '{"bos_token": 7}'),
        ("special_tokens_map.json", '{"additional_special_tokens": [null]}'),
        ("added_tokens.json", '{"<img>": "?"}'),
        ("added_tokens.json", '{"": 5}'),
        ("vocab.json", "{]"),
        ("vocab.json", '{"a": 0'),
        ("merges.txt", "a b c d"),
        ("merges.txt", "nothing known"),
    ],
)
def test_broken_files_are_named(qwen2: Path, tmp_path: Path, name: str, content: str) -> None:
    for other in ("tokenizer_config.json", "vocab.json", "merges.txt") if name != "tokenizer.json" else ():
        (tmp_path / other).write_bytes((qwen2 / other).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match="vocab.json" if name == "merges.txt" else name.replace(".", r"\.")):
        load_tokenizer(tmp_path)


def test_files_that_are_not_text_are_named(qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes((qwen2 / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"merges\.txt: not readable"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece"])
def test_a_tokenizer_json_that_is_not_bpe_is_refused(tmp_path: Path, kind: str) -> None:
    vocab: Any = [["a", 0.0]] if kind == "Unigram" else {"a": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": kind, "vocab": vocab}}))
    with pytest.raises(UnsupportedError, match=kind):
        load_tokenizer(tmp_path)


def test_a_decoder_that_is_not_known_is_refused(tmp_path: Path) -> None:
    fast = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "decoder": {"type": "BPEDecoder", "suffix": "_"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    with pytest.raises(UnsupportedError, match="decoder"):
        load_tokenizer(tmp_path)


def test_files_that_disagree_on_an_id_are_refused_with_token_and_file(internlm2: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((internlm2 / name).read_bytes())
    base = load_tokenizer(tmp_path).token_to_id("<img>")
    assert base is not None
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<img>": base}))
    load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<img>": base + 40}))
    with pytest.raises(
        CheckpointError, match=rf"added_tokens\.json: .*'<img>' has id {base + 40}, but {base} in token"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<other>": base}))
    with pytest.raises(
        CheckpointError, match=rf"'<other>' has id {base}, which tokenizer_config\.json gives to '<img>'"
    ):
        load_tokenizer(tmp_path)


def test_added_tokens_are_read_from_each_file_that_may_hold_them(internlm2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((internlm2 / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<img>": 5000, "<word>": 5001}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"id": 5002, "content": "<eoh>", "special": true}]}')
    names = {"additional_special_tokens": ["<img>"], "eos_token": {"content": "<eoh>"}, "pad_token": "<absent>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.token_to_id(token) for token in ("<img>", "<word>", "<eoh>")] == [5000, 5001, 5002]
    assert {5000, 5002} <= tokenizer.special_ids
    assert 5001 not in tokenizer.special_ids
    assert tokenizer.eos_token_id == 5002
    assert tokenizer.vocab_size == 5003


@given(
    name=st.sampled_from(["tokenizer_config.json", "tokenizer.json", "added_tokens.json", "vocab.json"]), data=st.data()
)
@examples
def test_any_json_at_all_loads_or_is_refused_with_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, qwen2: Path, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for other in ("tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / other).write_bytes((qwen2 / other).read_bytes())
    leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["BPE", "ByteLevel", "<s>", "a"])
    keys = st.sampled_from(
        [
            "added_tokens_decoder",
            "added_tokens",
            "content",
            "id",
            "model",
            "vocab",
            "type",
            "decoder",
            "decoders",
            "merges",
            "bos_token",
            "post_processor",
            "single",
            "processors",
            "5",
            "start",
        ]
    )
    values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=4))
    (folder / name).write_text(json.dumps(data.draw(values)))
    if name == "tokenizer.json":
        (folder / "vocab.json").unlink()
    with contextlib.suppress(VitrailError):
        load_tokenizer(folder)
