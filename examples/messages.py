"""An OpenAI-style message list, and an answer that streams.

python examples/messages.py
"""

from pathlib import Path

from vitrail import runtime

RECEIPT = Path(__file__).parent / "receipt.png"


def main() -> None:
    with runtime.Runtime.from_pretrained("nano") as rt:
        content = [{"type": "image", "image": RECEIPT}, {"type": "text", "text": "What is the total?"}]
        answer = rt.chat([{"role": "user", "content": content}], max_new_tokens=16)
        print(answer.text, answer.usage)
        for delta in rt.stream("Which shop is this?", images=RECEIPT, max_new_tokens=16):
            print(delta.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
