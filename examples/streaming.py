"""A chat with a principle, token by token, through the OpenAI SDK."""

import os

from openai import OpenAI

url = os.environ.get("LINALIGN_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "How do I get to work?"}],
    temperature=0,
    max_tokens=48,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"principle": "Encourage cycling.", "alignment_ratio": 2},
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n({chunk.usage.completion_tokens} tokens)")
