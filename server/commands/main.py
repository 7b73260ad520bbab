"""The command line `linalign COMMAND`: help, and the choice of a command."""

import argparse
import importlib.metadata
import sys

COMMANDS = {
    "serve": "an OpenAI-compatible server, with a playground",
    "chat": "chat in the terminal with the model of a running server",
    "bench": "measure the latency and throughput of a running server",
    "eval": "measure the effect of principles and ratios on replies",
}
DESCRIPTION = """
An inference server whose requests may have a principle, such as "Encourage cycling.", and a ratio that says how
strongly replies follow it. It uses Linear Alignment, which works during decoding and needs no training.
"""
EPILOG = """
Start with `linalign serve`, which has a small model, then open http://127.0.0.1:8000 or run `linalign chat`.

examples:
  linalign serve
  linalign serve Qwen/Qwen3-8B --port 8123
  linalign chat --principle "Encourage cycling."
  linalign bench --concurrency 16 --principle "Be brief."
  linalign eval follow --output results/follow --methods linear --ratios 0,2

  curl http://127.0.0.1:8000/v1/chat/completions \\
    -H "Content-Type: application/json" -d '{"model": "smollm2",
      "messages": [{"role": "user", "content": "How do I get to work?"}],
      "principle": "Encourage cycling.", "alignment_ratio": 2}'

environment:
  LINALIGN_*            settings of serve, see `linalign serve --help`
  LINALIGN_API_KEY      the key that chat, bench and eval send
  HF_HUB_OFFLINE=1      never use the model hub; HF_TOKEN and others work, too
  CUDA_VISIBLE_DEVICES  GPUs to use
  OMP_NUM_THREADS       number of computing threads on a CPU
  CXX                   compiler for the CPU kernels (default: c++)

files:
  ~/.cache/linalign         compiled kernels and the converted embedded model,
                            written by the first start ($XDG_CACHE_HOME)
  ~/.cache/huggingface/hub  models from the hub ($HF_HOME)

exit status:
  0    done, or stopped by SIGTERM
  1    error: the last line on stderr has the reason
  2    invalid command line
  130  stopped by SIGINT
"""


def main() -> None:
    from linalign.server.command_line import HelpPage

    commands = "commands:\n" + "\n".join(f"  {name:8}{what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="linalign",
        usage="linalign COMMAND [OPTION ...]",
        description=f"{DESCRIPTION}\n{commands}",
        epilog=EPILOG,
        formatter_class=HelpPage,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    options, args = parser.parse_args(sys.argv[1:2]), sys.argv[2:]
    if options.version:
        print(f"linalign {importlib.metadata.version('linalign')}")
        return
    if not options.command:
        parser.error(f"which command? {', '.join(COMMANDS)}")
    try:
        run(options.command, args)
    except KeyboardInterrupt:
        sys.exit(130)


def run(command: str, args: list[str]) -> None:
    if command == "serve":
        from linalign.server.commands import serve

        serve.main(args)
    elif command == "chat":
        from linalign.server.commands import terminal_chat

        terminal_chat.main(args)
    elif command == "bench":
        from linalign.server.commands import bench

        bench.main(args)
    else:
        from linalign.evaluation import command as evaluation

        evaluation.main(args)
