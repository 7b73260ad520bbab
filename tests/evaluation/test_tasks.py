"""The tasks on a real server with the embedded model, with a few questions each, and their results."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic_settings import CliApp

from linalign.evaluation import follow, hh, personal_preference
from linalign.evaluation.checkers import CHECKABLE
from linalign.evaluation.command import EvalSettings, main
from linalign.evaluation.records import Cell, cells
from linalign.server.commands import main as command_line
from linalign.server.commands.bench import BenchSettings
from tests.counts import counted

pytestmark = pytest.mark.slow

ANSWERS = [f"answer_{x}" for x in "abcd"] + [f"preference_{x}" for x in "abcd"]


@pytest.fixture(autouse=True)
def short_replies(monkeypatch):
    monkeypatch.setattr(follow, "MAX_TOKENS", 20)
    monkeypatch.setattr(hh, "MAX_TOKENS", 20)


def run(task, folder, *args):
    main([task, "--output", str(folder), *map(str, args)])
    summary = json.loads((folder / "results.json").read_text())["summary"]
    report = (folder / "report.md").read_text()
    for line in report.splitlines():
        if line.startswith("!["):
            picture = folder / line.split("(")[1].rstrip(")")
            assert picture.read_bytes().startswith(b"\x89PNG")
            assert "<svg" in picture.with_suffix(".svg").read_text()
    return summary, report


def test_the_questions_are_of_the_published_format():
    rows = personal_preference.load(None)
    assert len(rows) >= 80
    assert all(set(row) == {"question", "domain", *ANSWERS} for row in rows)
    assert len({row["question"] for row in rows}) == len(rows)
    assert len({row["domain"] for row in rows}) >= 8
    items = personal_preference.make_items(rows, 0)
    letters = Counter(item.target for item in items)
    assert min(letters.values()) > len(items) / 4 * 0.75  # correct answers are spread evenly over the letters
    assert items == personal_preference.make_items(rows, 0) != personal_preference.make_items(rows, 1)
    for item, row in zip(items[::4], rows, strict=True):
        assert item.answers["ABCD".index(item.target)] == row["answer_a"]
        assert item.preference == row["preference_a"]


def test_a_json_list_is_also_read(tmp_path):
    rows = personal_preference.load(None)[:3]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert personal_preference.load(str(tmp_path / "rows.json")) == rows


class Hub(BaseHTTPRequestHandler):
    """The parts of a model hub's API that are needed to download one file."""

    PATH = f"/datasets/{personal_preference.PUBLISHED}/resolve/main/data.json"
    CONTENT = json.dumps(personal_preference.load(None)[:2]).encode()

    def do_HEAD(self):
        content = self.CONTENT
        if self.path.startswith(f"/api/datasets/{personal_preference.PUBLISHED}/tree/main"):
            files = [("README.md", 5), ("data.json", len(content))]
            content = json.dumps([{"type": "file", "oid": "0", "path": path, "size": n} for path, n in files]).encode()
        elif self.path != self.PATH:
            return self.send_error(404)
        self.send_response(200)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": len(content),
            "ETag": '"1"',
            "X-Repo-Commit": "a" * 40,
        }
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        return content

    def do_GET(self):
        if content := self.do_HEAD():
            self.wfile.write(content)


def test_the_published_dataset_is_read_from_a_hub(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever).start()
        address = f"http://127.0.0.1:{hub.server_port}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        code = "import json; from linalign.evaluation.personal_preference import PUBLISHED, load; "
        code += "print(json.dumps(load(PUBLISHED)))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == personal_preference.load(None)[:2]


def test_cells():
    result = cells(["linear", "cfg"], [0.0, 2.0], [0.5])
    assert [(cell.method, cell.ratio) for cell in result] == [
        ("plain", 0), ("prompting", 0), ("linear", 2), ("cfg", 2),
    ]  # fmt: skip
    wider = cells(["linear"], [2.0], [0.5], [0.9, 1.0])[2:]
    assert [cell.label for cell in wider] == ["linear 0.9", "linear 1"]
    assert [cell.fields("P.")["alignment_top_p"] for cell in wider] == [0.9, 1.0]


def test_prompting_is_ratio_zero(client):
    """Ratio 0 has no trace, so the task uses a ratio that is too small to change the reply."""
    principle = "Speak of the sea."
    request = {"model": "smollm2", "messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 16}
    fields = Cell("prompting", 0, 0.0).fields(principle)
    temperature = fields.pop("temperature")
    texts = [
        client.chat.completions.create(**request, temperature=temperature, extra_body=extra).choices[0].message.content
        for extra in (fields, {"principle": principle, "alignment_ratio": 0})
    ]
    assert texts[0] == texts[1]


def test_personal_preference(url, tmp_path):
    limit = counted(1, 2)
    args = ("--url", url, "--limit", limit, "--methods", "linear", "--ratios", "0,2", "--temperatures", "0,0.5")
    rows, report = run("personal-preference", tmp_path, *args)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == limit * 4 * 3 * 2  # questions, preferences, cells, temperatures
    whole = [row for row in rows if row["domain"] == "all"]
    assert [(row["method"], row["ratio"]) for row in whole] == [("plain", 0), ("prompting", 0), ("linear", 2)] * 2
    greedy = [json.loads(line) for line in lines if "/2/0/" in line]
    for record in greedy:  # at temperature 0 the drawn letter is the most probable one
        assert record["drawn"] is None or record["drawn"] == max(
            record["probabilities"], key=record["probabilities"].get
        )
    assert "| linear | 2 |" in report

    # The file ends in the middle of a line: only missing records are requested again.
    (tmp_path / "records.jsonl").write_text("\n".join(lines[:10]) + "\n" + lines[10][:20])
    again, _ = run("personal-preference", tmp_path, *args)
    assert again == rows
    keys = [
        json.loads(line)["key"] for line in (tmp_path / "records.jsonl").read_text().splitlines() if line.endswith("}")
    ]
    assert len(keys) == len(set(keys)) == len(lines)


def test_follow(url, tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "CHECKABLE", CHECKABLE[: counted(4, None)])
    args = ("--url", url, "--limit", 1, "--methods", "linear,cfg", "--ratios", "0,8", "--temperatures", "0.5")
    rows, report = run("follow", tmp_path, *args)
    plain, prompting, linear, cfg = rows
    assert (plain["kl"], plain["method"]) == (0.0, "plain")
    assert 0 < prompting["kl"] < linear["kl"] < cfg["kl"]  # "cfg" has no plausible set that limits it
    assert plain["perplexity"] < linear["perplexity"] < cfg["perplexity"]
    for row in rows:
        assert 0 <= row["adherence"][1] <= row["adherence"][0] <= row["adherence"][2] <= 1
    assert "| linear | none of these | none of these |" in report
    assert "| cfg | none of these | 8 |" in report  # its text is nonsense, but it neither loops nor ends at once


HH = [
    {"chosen": "\n\nHuman: How do I cook rice?\n\nAssistant: In water.\n\nHuman: How long?\n\nAssistant: Ten minutes.",
     "rejected": ""},
    {"chosen": "\n\nHuman: What is\n\na noun?\n\nAssistant: A word.", "rejected": ""},
]  # fmt: skip


def test_hh(url, tmp_path):
    """The model judges itself: a poor judge, but enough for the test."""
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in HH))
    first, second = hh.load(file)
    assert [message["role"] for message in first] == ["user", "assistant", "user"]
    assert second == [{"role": "user", "content": "What is\n\na noun?"}]
    args = ("--url", url, "--judge-url", url, "--dataset", file, "--methods", "linear", "--ratios", "2")
    (row,), report = run("hh", tmp_path, *args)
    assert row["method"] == "linear"
    assert 0 <= row["score"][0] <= 1
    assert "preferred to prompting" in report
    judged = [line for line in (tmp_path / "records.jsonl").read_text().splitlines() if "judged" in line]
    assert len(judged) == 2


def test_included_dialogues_end_with_a_question():
    dialogues = hh.load(hh.SHIPPED)
    assert len(dialogues) >= 20
    for messages in dialogues:
        assert [message["role"] for message in messages] == ["user", "assistant", "user"][-len(messages) :]
        assert all(message["content"] for message in messages)


def test_hh_needs_a_judge(tmp_path):
    with pytest.raises(SystemExit, match="--judge-url"):
        run("hh", tmp_path / "out", "--url", "http://127.0.0.1:9")


def test_a_server_that_refuses_ends_the_run(url, tmp_path):
    args = ["follow", "--output", str(tmp_path), "--url", url, "--limit", "1", "--methods", "linear", "--ratios", "2"]
    with pytest.raises(SystemExit, match=r"linalign eval: 404: .*model_not_found"):
        main([*args, "--model", "nonsense"])


def test_in_this_process(tmp_path):
    rows, _ = run("personal-preference", tmp_path, "--limit", 1, "--methods", "linear", "--ratios", "2")
    assert [row["method"] for row in rows if row["domain"] == "all"] == ["plain", "prompting", "linear"]
    assert Path(personal_preference.SHIPPED).exists()


def test_without_its_extra_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["linalign", "eval", "follow", "--output", str(tmp_path / "out")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("linalign.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"needs the extra linalign\[eval\]"):
        command_line.main()
    assert not (tmp_path / "out").exists()


def test_commands_ignore_environment_variables(monkeypatch):
    monkeypatch.setenv("CONCURRENCY", "7")
    monkeypatch.setenv("MODEL", "another")
    for settings, args in ((EvalSettings, ["follow", "--output", "x"]), (BenchSettings, [])):
        values = CliApp.run(settings, cli_args=args)
        assert (values.concurrency, values.model) == (settings.model_fields["concurrency"].default, None)
