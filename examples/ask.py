"""Ask the bundled model about the pictures of this folder, as one batch.

python examples/ask.py
"""

from pathlib import Path

from vitrail import runtime

HERE = Path(__file__).parent
QUESTIONS = [
    ("receipt.png", "What is the total?"),
    ("sign.png", "What is the number?"),
    ("chart.png", "Which bar has the highest value?"),
    ("object.png", "What colour is the object?"),
]


def main() -> None:
    with runtime.Runtime.from_pretrained("nano") as rt:
        answers = rt.generate([question for _, question in QUESTIONS], images=[HERE / name for name, _ in QUESTIONS])
    for (name, question), answer in zip(QUESTIONS, answers, strict=True):
        print(f"{name:12} {question:34} {answer.text}  ({sum(answer.num_tiles)} tiles)")


if __name__ == "__main__":
    main()
