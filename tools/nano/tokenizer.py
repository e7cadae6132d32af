"""The tokenizer files of `nano`, in the manner of InternLM2's.

Byte fallback, split digits, no normalisation, no dummy prefix. Printed text is upper case and every capital is a piece
of its own, so that one character read is one token written; the words of questions and of spoken answers are lower
case and become whole pieces.

    python tools/nano/tokenizer.py --out DIR
"""

import argparse
import io
import json
import re
from pathlib import Path

import sentencepiece

from vitrail.bench.nano.tasks import KINDS, draw_picture
from vitrail.bench.nano.vocabulary import CHARACTERS, COLOURS, DAYS, HEADINGS, ITEMS, SHAPES

VOCABULARY = 625
# InternLM2-chat's own added tokens, then V1.5's.
ADDED = (
    "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
WORDS = (*(item.lower() for item in ITEMS), *DAYS.values(), *(h.lower() for h in HEADINGS), *COLOURS, *SHAPES)


def corpus() -> list[str]:
    """What is asked and said, without the strings that pictures print."""
    lines = ["system\nYou read small pictures.", "user\n", "assistant\n"] * 50
    for kind in KINDS:
        for number in range(400):
            for question in draw_picture(kind, "train", number).questions:
                lines.append(re.sub(r"\b[A-Z]{2,}\b", "", question.text))
                if question.answer.islower():
                    lines.append(question.answer)
    lines += [f"the {word} a {word} {word}" for word in WORDS for _ in range(30)]
    return lines


def train_pieces() -> bytes:
    """A serialized SentencePiece BPE model of `VOCABULARY` pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        required_chars=CHARACTERS + "abcdefghijklmnopqrstuvwxyz",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path) -> None:
    """Writes tokenizer.model and the JSON files that official InternLM2 checkpoints carry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_pieces())
    added = {token: VOCABULARY + place for place, token in enumerate(ADDED)}
    special = {"<unk>": 0, "<s>": 1, "</s>": 2} | added
    described = {
        str(number): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for token, number in special.items()
    }  # fmt: skip
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    files = {
        "added_tokens.json": added,
        "special_tokens_map.json": names | {"additional_special_tokens": list(ADDED)},
        "tokenizer_config.json": {
            "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": described,
            "additional_special_tokens": list(ADDED), "clean_up_tokenization_spaces": False, **names,
            "model_max_length": 2048, "tokenizer_class": "InternLM2Tokenizer",
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    write_tokenizer(parser.parse_args().out)
