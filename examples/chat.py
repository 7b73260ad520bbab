"""A chat with a principle, through the OpenAI SDK."""

import os

from openai import OpenAI

url = os.environ.get("LINALIGN_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

for ratio in (0, 2):
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "How do I get to work?"}],
        temperature=0,
        max_tokens=48,
        extra_body={"principle": "Encourage cycling.", "alignment_ratio": ratio},
    )
    print(f"ratio {ratio}: {completion.choices[0].message.content}\n")
