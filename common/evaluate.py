"""Compares a fine-tuned model with the one it came from: loss on held-out text, continuations of prompts.

    python -m common.evaluate runs/zero/hf --base_model sample-gpt2 --dataset_name sample-paragraphs
    python -m common.evaluate runs/offload/llama3.2-1B_0-4000-epoch-1.pt \\
        --base_model meta-llama/Llama-3.2-1B-Instruct --dataset_name ash001/arxiv-abstract --output evaluation.md

Both models are measured on the same held-out documents, which no script trains on: the validation split, or every
fiftieth document. The loss is the mean over all target tokens, as the scripts log it, and the perplexity its
exponential. They are comparable if both models have the same tokenizer. Bits per byte are always comparable: the same
sum of losses, in bits, divided by the UTF-8 length of the text that the target tokens stand for.
"""

import argparse
import json
import shutil
import sys
import textwrap
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli
from common.errors import UserError, command
from common.files import atomic_path
from common.tables import escaped, printable, side_by_side, table

if TYPE_CHECKING:
    from common.evaluation import Comparison

PRECISIONS = ("fp32", "bf16", "fp16")  # the keys of deepspeed_config.PRECISIONS, which would import torch


def numbers(found: "Comparison", markdown: bool = False) -> list[str]:
    """Returns the table, and a line on the difference if there are two models."""
    heads = ["model", "loss", "perplexity", "bits/byte", "tokens", "bytes"]
    rows = [
        [
            escaped(each.model) if markdown else each.model,
            f"{each.loss:.4f}", f"{each.perplexity:,.2f}", f"{each.bits_per_byte:.4f}", f"{each.tokens:,}",
            f"{each.bytes:,}",
        ]
        for each in found.models
    ]  # fmt: skip
    if len(found.models) < 2:
        return [table(heads, rows, left=["model"])]
    one, base = found.models
    difference = f"difference: loss {one.loss - base.loss:+.4f}, " if found.same_tokenizer else "difference: "
    difference += f"bits per byte {one.bits_per_byte - base.bits_per_byte:+.4f}"
    if not found.same_tokenizer:
        difference += "; the tokenizers differ, so losses and perplexities are not comparable"
    return [table(heads, rows, left=["model"]), difference]


def as_text(found: "Comparison", width: int) -> str:
    """Returns the comparison for a terminal of `width` columns."""
    parts = numbers(found)
    for number, prompt in enumerate(found.prompts):
        parts.append(textwrap.fill(f"prompt {number + 1}: {printable(prompt.text)}", width))
        if prompt.reference is not None:
            parts.append(textwrap.fill(f"held out: {printable(prompt.reference)}", width))
        continuations = [each.continuations[number] for each in found.models]
        parts.append(side_by_side([each.model for each in found.models], continuations, width))
    return "\n\n".join(parts)


def as_markdown(found: "Comparison", args: Namespace) -> str:
    text = escaped(" ".join(filter(None, [args.dataset_name, args.dataset_config])))
    parts = [f"Held-out text: {text} ({args.split} split, rows of {args.max_length} tokens).", *numbers(found, True)]
    for number, prompt in enumerate(found.prompts):
        parts.append(f"**Prompt {number + 1}:** {escaped(prompt.text)}")
        if prompt.reference is not None:
            parts.append(f"**Held out:** {escaped(prompt.reference)}")
        continuations = [escaped(each.continuations[number]) for each in found.models]
        parts.append(table([escaped(each.model) for each in found.models], [continuations]))
    return "\n\n".join(parts) + "\n"


def as_json(found: "Comparison", args: Namespace) -> str:
    flags = {name: getattr(args, name) for name in ("dataset_config", "split", "max_length")}
    return json.dumps({"dataset": args.dataset_name, **flags, **asdict(found)}, indent=2, ensure_ascii=False)


FORMATS = {".md": as_markdown, ".json": as_json}


def output_file(text: str) -> Path:
    path = Path(text).expanduser()
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"'{text}' does not end in {' or '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is not a file in an existing directory")
    return path


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        prog="python -m common.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        help="Hub name or Hugging Face directory (what baseline/ trained, or what common.convert made of the others' "
        "checkpoints), sample-llama, sample-gpt2 or sample-bloom, or a .pt file of weights as offload/ writes it",
    )
    parser.add_argument(
        "--base_model", metavar="NAME",
        help="the model to compare with, which also provides config and tokenizer for a .pt file; default: none",
    )  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on a GPU that supports it, else fp32")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write everything, as .md or .json")

    text = parser.add_argument_group("held-out text")
    text.add_argument(
        "--dataset_name", default="sample", metavar="NAME",
        help="Hub name, local file or directory, or sample-abstracts (the default of pipeline/ and offload/), "
        "sample-questions (of baseline/), sample-paragraphs (of zero/); default: %(default)s, the abstracts",
    )  # fmt: skip
    cli.add_column_arguments(text)
    text.add_argument(
        "--split", choices=("held_out", "test"), default="held_out",
        help="held_out is the validation split, or every fiftieth document if there is none; default: %(default)s",
    )  # fmt: skip
    text.add_argument(
        "--max_length", type=cli.row_length, default=256, metavar="N", help="tokens per row; default: %(default)s"
    )
    text.add_argument("--batch_size", type=cli.positive_int, default=8, metavar="N", help="rows; default: %(default)s")
    text.add_argument("--max_eval_steps", type=cli.positive_int, metavar="N", help="evaluate on at most N batches")

    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="text to continue; may be repeated; default: the beginnings of held-out documents",
    )  # fmt: skip
    prompts.add_argument(
        "--num_prompts", type=cli.non_negative_int, default=3, metavar="N",
        help="number of held-out documents to start, without --prompt; default: %(default)s",
    )  # fmt: skip
    cli.add_sampling_arguments(prompts, temperature_default=0.0)
    prompts.add_argument("--seed", type=cli.seed, default=42, metavar="N", help="default: %(default)s")
    return parser


@command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    # Imported here so that --help does not wait for them.
    import datasets
    import torch
    import transformers

    from common.evaluation import PROMPT_WORDS, compare

    transformers.utils.logging.set_verbosity_error()  # it warns of rows without a mask, which need none here
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    try:
        found = compare(args)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{str(error).split(' Including')[0]} A smaller --batch_size takes less") from error
    print("\n" + as_text(found, shutil.get_terminal_size((120, 24)).columns))
    if not found.prompts and args.num_prompts:
        print(f"\nno prompts: no held-out document is longer than {PROMPT_WORDS} words; use --prompt")
    if args.output:
        with atomic_path(args.output) as path:
            path.write_text(FORMATS[args.output.suffix](found, args), encoding="utf-8")
        print(f"\nwrote {args.output}")


if __name__ == "__main__":
    sys.exit(main())
