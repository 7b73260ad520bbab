"""The engine in your own process: several chats at once, in one batch."""

import threading
from collections.abc import Callable

from linalign import Engine, Output, Principle, SamplingParams

QUESTIONS = ("How do I get to work?", "What should I eat today?", "How do I spend a free day?")
PRINCIPLE = Principle("Favour whatever is good for the environment.", ratio=2.0)
PARAMS = SamplingParams(temperature=0.7, seed=1, max_tokens=48)


def collector(question: str, ended: threading.Event, texts: dict[str, str]) -> Callable[[Output], None]:
    """A listener, which the engine calls from its own thread with every output of one request."""

    def on_output(output: Output) -> None:
        texts[question] = texts.get(question, "") + output.text
        if output.finish_reason:
            ended.set()

    return on_output


with Engine.load() as engine:  # the embedded model; or a directory, a hub id, a .gguf file
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
