"""Two principles for one reply. Weights are relative; each principle has its own ratio."""

import os

from openai import OpenAI

url = os.environ.get("LINALIGN_URL", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

completion = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "How do I get to work?"}],
    temperature=0,
    max_tokens=48,
    extra_body={
        "principle": [
            {"text": "Encourage cycling.", "weight": 2, "ratio": 2},
            {"text": "Write for children.", "weight": 1, "ratio": 1},
        ],
    },
)
print(completion.choices[0].message.content)
details = completion.usage.alignment_details
print(f"({details['branches']} branches, {details['branch_tokens_computed']} tokens computed)")
