"""linalign eval: measures the effect of principles and ratios, with a server or a model in this process."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg, NoDecode, SettingsConfigDict

from linalign.alignment_core.methods import Method
from linalign.server.command_line import parse
from linalign.server.commands.terminal import printable
from linalign.server.protocol.generation import Ratio
from linalign.server.settings import API_KEY, FIRST_MODEL, Arguments, client_key

Task = Literal["personal-preference", "follow", "hh"]


class EvalSettings(Arguments):
    """Measure the effect of principles and ratios on a model's replies, with a server or a model in this process.

    tasks:
      personal-preference  does the model choose the answer that fits a preference?
      follow               do replies follow principles that a program can check,
                           and how does the quality of the text change?
      hh                   does a judge prefer aligned replies to prompted ones?
    """

    EPILOG: ClassVar[str] = """
An interrupted run continues if it is started again with the same --output. All combinations of methods, ratios,
masses and temperatures are run. The defaults take hours on a CPU; --limit reduces them to a sample.

examples:
  linalign eval personal-preference --output results/preference
  linalign eval follow --output results/follow --methods linear --ratios 0,2,8
  linalign eval follow --output results/smoke --limit 1
  linalign eval follow --output results/large --url http://127.0.0.1:8000
  linalign eval hh --output results/hh --judge-url http://127.0.0.1:9000

files:
  records.jsonl  all replies
  results.json   settings and summary
  report.md      tables and figures (*.png)

exit status:
  0  done
  1  the server or model can't be used, or an option has an invalid value
  2  unknown option
"""

    model_config = SettingsConfigDict(cli_prog_name="linalign eval")

    task: CliPositionalArg[Task] = Field(description="personal-preference, follow or hh")
    output: Path = Field(title="FOLDER", description="folder for results, report and figures; created if missing")
    url: str | None = Field(
        None,
        title="URL",
        description="a linalign server, without /v1 (default: a model in this process)",
    )
    model: str | None = Field(
        None,
        title="NAME",
        description="model name at the server, or the model to load, as for linalign serve (default: the first that "
        "the server lists, or the embedded model)",
    )
    api_key: str = Field(default_factory=client_key, title="KEY", description=API_KEY)
    dtype: str = Field("auto", title="DTYPE", description="data type of a model in this process, as for linalign serve")
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = Field(
        "auto", description="weight format of a model in this process, as for linalign serve"
    )
    methods: Annotated[tuple[Method, ...], NoDecode] = Field(
        ("linear", "cfg", "opad", "amulet", "adaptive"), title="NAMES", description="comma-separated"
    )
    ratios: Annotated[tuple[Ratio, ...], NoDecode] = Field(
        (0, 0.5, 1, 2, 3, 5, 8), title="RATIOS", description="comma-separated; 0 is prompting without extrapolation"
    )
    alignment_top_ps: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...] | None, NoDecode] = Field(
        None, title="MASSES", description="comma-separated masses of the plausible set (default: each method's own)"
    )
    temperatures: Annotated[tuple[Annotated[float, Field(ge=0, le=2)], ...], NoDecode] = Field(
        (0.5,), title="TS", description="comma-separated; 0 is greedy"
    )
    concurrency: int = Field(16, ge=1, title="N", description="number of simultaneous requests")
    seed: int = Field(0, title="N", description="seed of the order of answers")
    dataset: str | None = Field(
        None,
        title="DATA",
        description="personal-preference: a file, or kkuusou/personal_preference_eval; hh: a file in HH-RLHF's format "
        "(default: included data)",
    )
    limit: int | None = Field(None, ge=1, title="N", description="most questions, prompts or dialogues (default: all)")
    judge_url: str | None = Field(
        None, title="URL", description="hh: any OpenAI-compatible server, without /v1 (default: none)"
    )
    judge_model: str | None = Field(None, title="NAME", description=f"hh: {FIRST_MODEL}")
    judge_api_key: str = Field("none", title="KEY", description="hh: API key of the judge's server")

    @field_validator("methods", "ratios", "alignment_top_ps", "temperatures", mode="before")
    @classmethod
    def _split(cls, given: Any) -> Any:
        """Split "a,b"."""
        return given.split(",") if isinstance(given, str) else given


def main(args: list[str]) -> None:
    settings = parse(EvalSettings, args)
    if settings.task == "hh" and not settings.judge_url:
        sys.exit("linalign eval: hh needs --judge-url URL")
    try:  # imported here, because it takes seconds that --help does not need
        from linalign.evaluation.run import FAILURES, evaluate
    except ModuleNotFoundError as error:
        sys.exit(f"linalign eval needs the extra linalign[eval] ({error})")
    settings.output.mkdir(parents=True, exist_ok=True)
    try:
        asyncio.run(evaluate(settings))
    except FAILURES as error:
        sys.exit(f"linalign eval: {printable(str(error) or repr(error))}")
