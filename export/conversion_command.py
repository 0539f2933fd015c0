"""The command ``reward-convert``: its arguments are checked before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from service.arguments import CommandParser, not_empty
from service.checkpoints.adapter_base import check_base
from service.checkpoints.files import CONVERSION_FILE
from service.checkpoints.hub import check_source, local_folder
from service.commands import run_command
from service.errors import OutputError, SettingsError
from service.outputs import check_output_folder
from service.records import Activation

if TYPE_CHECKING:
    from export.conversion import Conversion
    from export.token_logits import TokenLogits
    from service.checkpoints.reward_description import Combination


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``reward-convert``; returns the exit status: 0, or 1 after one sentence on standard error."""
    return run_command("reward-convert", "serve", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = command_parser().parse(arguments)
    check_output_folder(options.out, overwrite=options.overwrite, marker=CONVERSION_FILE)
    check_source(options.source)
    if Path(options.source).expanduser().resolve().is_relative_to(options.out.expanduser().resolve()):
        raise OutputError(f"{options.out} holds the checkpoint itself: choose another folder.")
    if options.base is not None:
        check_source(options.base)
    if options.chat_template is not None and not options.chat_template.is_file():
        raise SettingsError(f"{options.chat_template} is not a file: pass the chat template of the result.")
    for member in options.members:
        if not Path(member).expanduser().is_file():
            check_source(member)
    source = local_folder(options.source)
    base = None if options.base is None else local_folder(options.base)
    note = None if base is None else check_base(source, base)

    from rich.console import Console

    from export.convert import convert

    console = Console(stderr=True, soft_wrap=True)
    with console.status(f"Converting {options.source}"):
        conversion = convert(
            source,
            options.out,
            overwrite=options.overwrite,
            base=base,
            drop_bias=options.drop_bias,
            allow_pickle=options.allow_pickle,
            activation=options.activation,
            outputs=tuple(options.outputs),
            gate_pattern=options.gate_pattern,
            token_logits=_token_logits(options),
            process=options.process,
            members=tuple(map(_member, options.members)),
            combine=_combine(options) if options.members else None,
            chat_template=options.chat_template,
        )
    for line in [*_report(conversion, options.out), *([note] if note else [])]:
        console.print(line, markup=False, highlight=False)
    return 0


def _token_logits(options: argparse.Namespace) -> TokenLogits | None:
    from export.token_logits import TokenLogits

    if options.log_odds is not None:
        return TokenLogits("log_odds", tuple(options.log_odds))
    if options.probability is not None:
        return TokenLogits("probability", tuple(options.probability))
    return None if options.logit is None else TokenLogits("logit", (options.logit,))


def _member(source: str) -> Path:
    file = Path(source).expanduser()
    return file if file.is_file() else local_folder(source)


def _combine(options: argparse.Namespace) -> Combination:
    from service.checkpoints.reward_description import LowerBound, MeanOfOutputs, MinOfOutputs

    if options.aggregate == "lower_bound":
        return LowerBound(options.num_std)
    return MinOfOutputs() if options.aggregate == "min" else MeanOfOutputs()


def _report(conversion: Conversion, out: Path) -> list[str]:
    from service.checkpoints.validation import describe_names

    head = f"; its head was {describe_names(conversion.head)}" if conversion.head else ""
    lines = [f"{out} is a checkpoint for the service, converted from the layout {conversion.origin}{head}."]
    if conversion.dropped_bias:
        lines.append(
            f"A bias of {conversion.dropped_bias:.6g} was left out: add it to compare with training's rewards."
        )
    return [*lines, *conversion.notes, f"Serve it with: reward-serve --model {out}"]


class _ListLayouts(argparse.Action):
    """Prints the known layouts and exits, as ``--version`` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from export.layouts import listed

        print("\n".join(listed()))
        parser.exit()


def command_parser() -> CommandParser:
    """Return the parser of ``reward-convert``."""
    parser = CommandParser(
        prog="reward-convert",
        description="Convert a reward model as training libraries and model cards store it (a value head, a deeper "
        "head, prefixed names), or a PEFT adapter, into a checkpoint for reward-serve.",
    )
    add = parser.add_argument
    add("source", type=not_empty, metavar="DIR", help="the checkpoint or adapter: a folder or hub id")
    add("out", type=Path, metavar="OUT", help="the folder to write; must not exist or be empty")
    _add_result_options(parser.add_argument_group("the result"))
    _add_layout_options(parser.add_argument_group("the layout of the checkpoint"))
    _add_token_options(parser.add_argument_group("a reward from the logits of tokens"))
    _add_ensemble_options(parser.add_argument_group("an ensemble"))
    return parser


def _add_result_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--overwrite", action="store_true", help="replace an earlier conversion in OUT")
    add("--chat-template", type=Path, metavar="FILE", help="the chat template of the result, instead of the source's")
    add(
        "--outputs",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names of the numbers of a head that gives several; of a gated head its objectives",
    )
    add(
        "--drop-bias",
        action="store_true",
        help="leave out a linear head's bias, which shifts all rewards by one constant: for a plain classifier",
    )


def _add_layout_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--list", action=_ListLayouts, nargs=0, help="print the layouts that are recognised, and exit")
    add(
        "--base",
        type=not_empty,
        metavar="DIR",
        help="the adapter's base model (default: the one that the adapter names)",
    )
    activations = [name for name in get_args(Activation) if name != "none"]
    add("--activation", choices=activations, help="between the layers of a deeper head whose layout is not known")
    add(
        "--gate-pattern",
        metavar="TEXT",
        help="the text between prompt and completion, where the gate of ArmoRM and QRM reads (default: that of the "
        "model's type)",
    )
    add(
        "--process",
        metavar="LAYOUT",
        help="the layout of a process reward model whose class does not show it: Skywork-o1-PRM or Math-Shepherd",
    )
    add(
        "--allow-pickle",
        action="store_true",
        help="also read pickled weights (.bin), with torch's restricted unpickler; only for files that you trust",
    )


def _add_token_options(group: argparse._ArgumentGroup) -> None:
    tokens = group.add_mutually_exclusive_group()
    tokens.add_argument(
        "--log-odds",
        nargs=2,
        metavar=("YES", "NO"),
        help="the reward is the difference of the logits of two tokens of a language model after the text; a token is "
        "its text, or id:NUMBER",
    )
    tokens.add_argument("--probability", nargs=2, metavar=("YES", "NO"), help="the probability of YES among the two")
    tokens.add_argument("--logit", metavar="TOKEN", help="the logit of one token")


def _add_ensemble_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--members",
        nargs="+",
        default=[],
        type=not_empty,
        metavar="DIR",
        help="further members of an ensemble with DIR: checkpoints on the same body, or safetensors files of heads",
    )
    add(
        "--aggregate",
        choices=("mean", "min", "lower_bound"),
        default="mean",
        help="the reward of an ensemble; lower_bound: the mean less --num-std standard deviations (default: mean)",
    )
    add("--num-std", type=float, default=1.0, metavar="K", help="standard deviations of lower_bound (default: 1)")


if __name__ == "__main__":
    raise SystemExit(main())
