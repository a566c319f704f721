"""The dispatcher of `python -m lora_kernels COMMAND`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from lora_kernels.cli.errors import UserError

# A command's module holds HELP, add_arguments(parser) and run(args) -> exit status. Importing it must be
# cheap, because each is imported to build the parser: what is heavy is imported by run.
COMMANDS = {
    "doctor": "lora_kernels.cli.doctor",
    "build": "lora_kernels.cli.build",
    "finetune": "lora_kernels.cli.finetune.command",
    "bench": "lora_kernels.cli.bench.command",
    "tune": "lora_kernels.cli.tune.command",
}

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line and not preceded by the usage of thirty options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the chosen command's function is left in `args.run`."""
    parser = Parser(prog="python -m lora_kernels", description="Fused LoRA linear layers for PyTorch.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        args = build_parser().parse_args(argv)
        status: int = args.run(args)
    except UserError as error:
        print(f"lora_kernels: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("lora_kernels: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return status
