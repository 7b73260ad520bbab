"""Third-party clients against a real server process. Each uses a principle in the way that it supports.

They are installed in .venv/clients and .venv/agents by `make test`.
"""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import openai
import pytest

from tests.counts import counted
from tests.server.test_chat import CHAT, PRINCIPLE, create
from tests.serving import serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
CLIENTS, AGENTS = ROOT / ".venv" / "clients", ROOT / ".venv" / "agents"
HERE = ROOT / "tests" / "clients"


def run(*command, cwd=None, **environment):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **environment}
    command = [str(part) for part in command]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def api(url):
    return url + "/v1"


def test_the_sdk_asynchronously(api, client):
    async def ask():
        async with openai.AsyncOpenAI(base_url=api, api_key="none", max_retries=0) as a_client:
            fields = {"model": "smollm2", "messages": CHAT, "temperature": 0, "max_tokens": 24}
            extra = {"principle": PRINCIPLE, "alignment_ratio": 2}
            wholes = await asyncio.gather(
                *(a_client.chat.completions.create(**fields, extra_body=extra) for _ in range(4))
            )
            stream = await a_client.chat.completions.create(**fields, extra_body=extra, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [whole.choices[0].message.content for whole in wholes], streamed

    wholes, streamed = asyncio.run(ask())
    alone = create(client, {"principle": PRINCIPLE, "alignment_ratio": 2}).choices[0].message.content
    assert {*wholes, streamed} == {alone}


def test_the_sdk_on_node(api, client):
    script = CLIENTS / "sdk.mjs"  # Node looks for modules beside the script
    script.write_text((HERE / "sdk.mjs").read_text())
    output = json.loads(run("node", script, api).splitlines()[-1])
    extra = {"principle": PRINCIPLE, "alignment_ratio": 2}
    assert output["text"] == create(client, extra).choices[0].message.content


def test_langchain(api):
    output = json.loads(run(CLIENTS / "bin/python", HERE / "langchain_chat.py", api).splitlines()[-1])
    assert isinstance(output["call"]["hours"], int)


def test_litellm(api, client):
    output = json.loads(run(CLIENTS / "bin/python", HERE / "litellm_chat.py", api).splitlines()[-1])
    extra = {"principle": PRINCIPLE, "alignment_ratio": 2}
    assert output["text"] == create(client, extra).choices[0].message.content


def test_the_ai_sdk(api, client):
    script = CLIENTS / "ai_sdk.mjs"  # Node looks for modules beside the script
    script.write_text((HERE / "ai_sdk.mjs").read_text())
    output = json.loads(run("node", script, api).splitlines()[-1])
    extra = {"principle": PRINCIPLE, "alignment_ratio": 2}
    assert output["text"] == create(client, extra).choices[0].message.content


def test_the_agents_sdk(api, client):
    output = json.loads(run(AGENTS / "bin/python", HERE / "agents_sdk.py", api).splitlines()[-1])
    extra, messages = {"principle": PRINCIPLE, "alignment_ratio": 2}, [{"role": "user", "content": "Say yes."}]
    expected = create(client, extra, messages=messages, max_tokens=100).choices[0].message.content
    assert output == {"text": expected, "response": expected}


def test_pydantic_ai(api, client):
    output = json.loads(run(AGENTS / "bin/python", HERE / "pydantic_ai_chat.py", api).splitlines()[-1])
    messages = [{"role": "system", "content": "You are a mayor."}, *CHAT]
    expected = create(client, {"principle": PRINCIPLE, "alignment_ratio": 2}, messages=messages, max_tokens=100)
    assert output["text"] == expected.choices[0].message.content


def test_anthropics_sdk(url, client):
    output = json.loads(run(AGENTS / "bin/python", HERE / "anthropic_messages.py", url).splitlines()[-1])
    extra = {"principle": PRINCIPLE, "alignment_ratio": 2}
    assert output["text"] == create(client, extra).choices[0].message.content


def test_the_llm_command_line(api, client, tmp_path):
    """This client sends OpenAI's fields only, so it uses a preset."""
    models = [{"model_id": name, "model_name": name, "api_base": api} for name in ("smollm2", "smollm2:teacher")]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    question = "What is a volcano?"
    texts = {
        name: run(
            CLIENTS / "bin/llm", "-m", name, question, "-o", "temperature", 0, "-o", "max_tokens", 24, "--no-log",
            LLM_USER_PATH=tmp_path, OPENAI_API_KEY="none",
        ).strip()
        for name in ("smollm2", "smollm2:teacher")
    }  # fmt: skip
    assert texts["smollm2"] != texts["smollm2:teacher"]
    expected = create(client, model="smollm2:teacher", messages=[{"role": "user", "content": question}])
    assert texts["smollm2:teacher"] == expected.choices[0].message.content.strip()


def likelihood(client, model, context, text):
    fields = {"model": model, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    whole, before = (client.completions.create(prompt=prompt, **fields) for prompt in (context + text, context))
    return sum(whole.choices[0].logprobs.token_logprobs[len(before.choices[0].logprobs.tokens) :])


@pytest.mark.parametrize("model", ["smollm2", pytest.param("smollm2:concise", marks=pytest.mark.long)])
def test_lm_eval(api, client, embedded, tmp_path, model):
    (tmp_path / "tasks").mkdir()
    for file in (HERE / "lm_eval").iterdir():
        text = file.read_text().replace("towns.jsonl", str(HERE / "lm_eval" / "towns.jsonl"))
        (tmp_path / "tasks" / file.name).write_text(text)
    arguments = f"model={model},base_url={api}/completions,tokenizer={embedded.model.config._name_or_path}"
    run(
        CLIENTS / "bin/lm_eval", "--model", "local-completions", "--model_args", arguments + ",num_concurrent=2",
        "--tasks", "towns,opposites", "--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out",
        HF_HOME=tmp_path, OPENAI_API_KEY="none",
    )  # fmt: skip
    (result_file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(result_file.read_text())["results"]
    right = []
    for line in (HERE / "lm_eval" / "towns.jsonl").read_text().splitlines():
        row = json.loads(line)
        sums = [likelihood(client, model, row["question"], choice) for choice in row["choices"]]
        right.append(sums.index(max(sums)) == row["answer"])
    assert results["towns"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert all(right) or model != "smollm2"
    assert "exact_match,none" in results["opposites"]


def test_schemathesis_finds_nothing(tmp_path):
    """Hundreds of valid and invalid requests generated from /openapi.json: no 5xx, no response that breaks the schema.

    positive_data_acceptance is excluded: a schema can't say, for example, that messages must fit the context.
    """
    num_examples = counted(3, 20)
    phases = counted("examples,fuzzing,stateful", "examples,coverage,fuzzing,stateful")
    with serving("--max-model-len", "96") as (url, _):
        run(
            CLIENTS / "bin/schemathesis", "run", url + "/openapi.json", "--mode", "all", "--max-examples", num_examples,
            "--phases", phases, "--request-timeout", 60, "--generation-deterministic",
            "--exclude-checks", "positive_data_acceptance", cwd=tmp_path,
        )  # fmt: skip
