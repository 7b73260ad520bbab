"""The engine as a library: several chats in one batch."""

import threading
from collections.abc import Callable

from linalign import Engine, Output, Principle, SamplingParams

QUESTIONS = ("How do I get to work?", "What should I eat today?", "How do I spend a free day?")
PRINCIPLE = Principle("Favour whatever is good for the environment.", ratio=2.0)
PARAMS = SamplingParams(temperature=0.7, seed=1, max_tokens=48)


def collector(question: str, ended: threading.Event, texts: dict[str, str]) -> Callable[[Output], None]:
    """A callback for all outputs of one request. The engine calls it from its own thread."""

    def on_output(output: Output) -> None:
        texts[question] = texts.get(question, "") + output.text
        if output.finish_reason:
            ended.set()

    return on_output


with Engine.load() as engine:  # the embedded model; load also takes a directory, a hub id or a .gguf file
    texts: dict[str, str] = {}
    pending = []
    for question in QUESTIONS:
        prompt = engine.prompts.build([{"role": "user", "content": question}], [PRINCIPLE])
        ended = threading.Event()
        engine.submit(prompt, PARAMS, collector(question, ended, texts))
        pending.append(ended)
    for ended in pending:
        ended.wait()

for question in QUESTIONS:
    print(f"{question}\n  {texts[question]}\n")
