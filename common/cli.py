"""The flags that the scripts share, their types, and a parser that accepts them with dashes or underscores."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from common.errors import UserError, directory_name

if TYPE_CHECKING:
    from common.checkpoint import Resume

# A model with random weights learns well at a rate that would ruin a pretrained one.
PRETRAINED_LEARNING_RATE = 2e-5
SAMPLE_LEARNING_RATE = 5e-3


class ArgumentParser(argparse.ArgumentParser):
    """An argparse.ArgumentParser that accepts dashes and underscores interchangeably in the names of flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False} | kwargs)

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        args = list(sys.argv[1:] if args is None else args)
        spellings = {option.replace("-", "_"): option for option in self._option_string_actions}
        for index, token in enumerate(args):
            if token == "--":  # only positional arguments follow
                break
            name, equals, value = token.partition("=")
            if name.startswith("--"):
                args[index] = spellings.get(name.replace("-", "_"), name) + equals + value
        return super().parse_known_args(args, namespace)


class Parser(ArgumentParser):
    """The ArgumentParser of a training script: only rank 0 reports an invalid flag."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        # The `deepspeed` launcher passes this flag to every script; the rank comes from the environment.
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        if os.environ["RANK"] != "0":
            # Imported here because it imports torch.
            from common.distributed import LAST_WORD_S

            # The launcher stops all ranks as soon as the first one exits, so give rank 0 time to print.
            time.sleep(LAST_WORD_S)
            sys.exit(2)
        super().error(message)


Number = TypeVar("Number", int, float)


def number(kind: Callable[[str], Number], valid: Callable[[Number], bool], expected: str) -> Callable[[str], Number]:
    """Returns the type of an argument that is an int or a float for which `valid` is true."""

    def parse(text: str) -> Number:
        with suppress(ValueError):  # not a number
            value = kind(text)
            if valid(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


positive_int = number(int, lambda value: value >= 1, "an integer >= 1")
non_negative_int = number(int, lambda value: value >= 0, "an integer >= 0")
row_length = number(int, lambda value: value >= 2, "an integer >= 2, as one token has nothing to predict")
seed = number(int, lambda value: 0 <= value < 2**63, "an integer from 0 to 2^63 - 1")
positive_float = number(float, lambda value: 0 < value < math.inf, "a number > 0")
non_negative_float = number(float, lambda value: 0 <= value < math.inf, "a number >= 0")
temperature = number(float, lambda value: value == 0 or 0.001 <= value < math.inf, "0 (greedy) or a number >= 0.001")
probability = number(float, lambda value: 0 < value <= 1, "a number > 0 and <= 1")


def repository(text: str) -> str:
    """Type of an argument `NAME` or `USER/NAME`. An error does not quote it, because a URL may contain a token."""
    # Imported here because only scripts that use the Hub need it.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        raise argparse.ArgumentTypeError("expected USER/NAME, the name of a repository on the Hub") from None
    return text


def add_column_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds the flags that choose what is read from a dataset and which tokens contribute to the loss."""
    group.add_argument("--dataset_config", metavar="NAME", help="the Hub dataset's configuration")
    group.add_argument(
        "--text_column", metavar="NAME",
        help="column to read; default: text or the only string column; SQuAD's question, context and answers, as one "
        "text; or conversations in messages, conversations, or prompt and completion",
    )  # fmt: skip
    group.add_argument(
        "--loss_on", choices=("text", "answer", "assistant"),
        help="tokens that contribute to the loss: all (text), only answers to questions (answer), only the assistant's "
        "turns (assistant); default: assistant for conversations, else text",
    )  # fmt: skip
    group.add_argument(
        "--chat_template", metavar="FILE", help="Jinja template that renders conversations; default: the tokenizer's"
    )


def add_run_arguments(
    parser: argparse.ArgumentParser,
    technique: str,
    deepspeed_config: str | Path | None = None,
    learning_rate: float = PRETRAINED_LEARNING_RATE,
) -> None:
    """Adds the flags that all training scripts share.

    Args:
        technique: the name of the script's directory, used for the default of --output_dir.
        deepspeed_config: path of the default DeepSpeed JSON; None leaves out the flags that only the scripts with a
            DeepSpeed engine have.
        learning_rate: the default for a pretrained model, as passed to `peak_learning_rate`.
    """
    model = parser.add_argument_group("model and text")
    model.add_argument(
        "--model_name", metavar="NAME",
        help="Hub name or local Hugging Face directory; default: sample, a small model made on first use",
    )  # fmt: skip
    model.add_argument(
        "--dataset_name", default="sample", metavar="NAME",
        help="Hub name, or a local file or directory (.jsonl .json .csv .parquet .txt), or sample-abstracts, "
        "sample-questions or sample-paragraphs; default: %(default)s, the script's own one of these",
    )  # fmt: skip
    add_column_arguments(model)
    model.add_argument(
        "--start_idx", type=int, default=0, metavar="N", help="first non-blank document; default: %(default)s"
    )
    model.add_argument("--end_idx", type=int, metavar="N", help="document to stop before; default: all documents")
    model.add_argument(
        "--max_length", type=row_length, default=256, metavar="N", help="tokens per row; default: %(default)s"
    )
    model.add_argument(
        "--packing", action=argparse.BooleanOptionalAction,
        help="put several documents into a row, each attending only to itself; --no-packing pads one document per row; "
        "default: on, except for BLOOM, which does not support it",
    )  # fmt: skip

    batch_default, precision = ("the JSON's", "the JSON's") if deepspeed_config else ("%(default)s", "fp16")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--num_epochs", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    steps.add_argument(
        "--batch_size", type=positive_int, metavar="N", help=f"rows per micro-batch and GPU; default: {batch_default}"
    )
    steps.add_argument(
        "--accum_steps", type=positive_int, metavar="N",
        help=f"micro-batches per optimizer step; default: {batch_default}",
    )  # fmt: skip
    steps.add_argument(
        "--learning_rate", type=positive_float, metavar="LR",
        help=f"peak; default: {learning_rate:g}, for the sample model {SAMPLE_LEARNING_RATE:g}"
        + (", for a resumed run its own" if deepspeed_config else ""),
    )  # fmt: skip
    steps.add_argument(
        "--warmup_steps", type=non_negative_int, default=10, metavar="N",
        help="optimizer steps from 0 to the peak, followed by a cosine down to 0; default: %(default)s",
    )  # fmt: skip
    steps.add_argument(
        "--weight_decay", type=non_negative_float, default=0.01, metavar="W",
        help="AdamW's weight decay; default: %(default)s",
    )  # fmt: skip
    steps.add_argument(
        "--max_train_steps", "--steps", type=positive_int, metavar="N",
        help="stop after N optimizer steps; the cosine schedule ends there too",
    )  # fmt: skip
    steps.add_argument("--max_eval_steps", type=positive_int, metavar="N", help="evaluate on at most N batches")
    steps.add_argument("--seed", type=seed, default=42, metavar="N", help="default: %(default)s")
    steps.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"),
        help=f"default: {precision} if the hardware supports it, fp32 on a CPU",
    )  # fmt: skip

    if deepspeed_config:
        engine = parser.add_argument_group("engine")
        engine.add_argument(
            "--deepspeed_config", default=str(deepspeed_config), metavar="FILE",
            help="DeepSpeed's JSON, which also sets the ZeRO stage; default: %(default)s",
        )  # fmt: skip
        engine.add_argument(
            "--liger", action=argparse.BooleanOptionalAction,
            help="use liger-kernel's RMSNorm, SwiGLU and rotary kernels; default: on CUDA if it is installed",
        )  # fmt: skip
        engine.add_argument(
            "--compile", action=argparse.BooleanOptionalAction, default=False,
            help="use torch.compile instead of --liger: up to 8 %% faster on packed rows, more on short padded rows "
            "under ZeRO-1 and 2, but takes half a minute to three minutes longer to start; slower under ZeRO-3",
        )  # fmt: skip

    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", type=directory_name, default=f"runs/{technique}", metavar="DIR", help="default: %(default)s"
    )
    output.add_argument(
        "--save_checkpoint", action=argparse.BooleanOptionalAction, default=True,
        help="save at the end of each epoch; default: on. If off, nothing is saved, not even by --save_every or on a "
        "signal",
    )  # fmt: skip
    output.add_argument(
        "--save_every", type=positive_int, metavar="N", help="also save every N optimizer steps; default: never"
    )
    output.add_argument(
        "--keep_last", type=positive_int, metavar="K", help="keep the K newest checkpoints; default: all"
    )
    output.add_argument(
        "--resume_from_checkpoint", metavar="latest|hub|DIR|USER/NAME" if deepspeed_config else "latest|DIR",
        help="resume from the newest checkpoint in --output_dir (latest) or from a checkpoint directory"
        + (
            ", or from the Hub: the newest complete checkpoint in --hf_repo (hub) or in another repository, or "
            "USER/NAME/global_stepN" if deepspeed_config else ""
        ),
    )  # fmt: skip
    output.add_argument(
        "--wandb_project", default=os.environ.get("WANDB_PROJECT"), metavar="NAME",
        help="log to Weights & Biases, offline if no API key is found; default: $WANDB_PROJECT, else off",
    )  # fmt: skip
    if deepspeed_config:
        output.add_argument(
            "--hf_repo", type=repository, metavar="USER/NAME",
            help="upload each checkpoint to this repository on the Hub, created as a private one if it does not exist",
        )  # fmt: skip


def add_generation_arguments(parser: argparse.ArgumentParser, prompt: str = "The history of") -> None:
    """Adds the flags of the text that a script generates after training; `prompt` is the default to continue."""
    text = parser.add_argument_group("sample text")
    text.add_argument(
        "--generation_prompt", default=prompt, metavar="TEXT",
        help="text to continue after training; an empty string turns it off; default: %(default)s",
    )  # fmt: skip
    add_sampling_arguments(text, temperature_default=0.8)


def add_sampling_arguments(group: argparse._ArgumentGroup, temperature_default: float) -> None:
    """Adds the flags that control how text is generated."""
    group.add_argument(
        "--max_new_tokens", type=positive_int, default=40, metavar="N",
        help="tokens to generate at most; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=temperature, default=temperature_default, metavar="T",
        help="0 takes the most likely token each time; default: %(default)g",
    )  # fmt: skip
    group.add_argument(
        "--top_k", type=non_negative_int, default=50, metavar="K",
        help="sample from the K most likely tokens, or from all if 0; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--top_p", type=probability, default=0.95, metavar="P",
        help="sample from the most likely tokens whose probabilities add up to P; default: %(default)s",
    )  # fmt: skip


def add_weights_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for starting from the weights file of an earlier run."""
    start = parser.add_argument_group("starting from a weights file")
    start.add_argument(
        "--resume_file", metavar="FILE",
        help="start from the weights in an earlier run's .pt file; if there is no such local file, it is downloaded "
        "from --hf_repo, or for USER/NAME/FILE from that repository; ignored with --resume_from_checkpoint, which "
        "loads weights too",
    )  # fmt: skip
    start.add_argument(
        "--initial_epoch", type=non_negative_int, metavar="N",
        help="number of epochs trained before this run, whose first epoch is number N+1; default: the number in the "
        "name of --resume_file, or 0; a resumed run keeps its own",
    )  # fmt: skip


def peak_learning_rate(
    args: argparse.Namespace, resume: "Resume | None" = None, pretrained: float = PRETRAINED_LEARNING_RATE
) -> float:
    """Returns --learning_rate, or else the resumed run's, or else the default for the model.

    Args:
        pretrained: the default for a pretrained model.

    Raises:
        UserError: a flag contradicts the optimizer state that the run resumes with.
    """
    from common.sample import is_sample

    if resume and resume.state and resume.has_optimizer:
        for flag in ("learning_rate", "weight_decay"):
            now, was = getattr(args, flag), resume.state.get(flag)
            if None not in (now, was) and now != was:
                raise UserError(
                    f"--{flag} {now:g}: the resumed run has {was:g}; use that, or convert its weights "
                    "(common.convert to-hf) and start over"
                )
    if args.learning_rate is not None:
        return args.learning_rate
    if resume:
        return resume.state["learning_rate"] if resume.state else pretrained
    return SAMPLE_LEARNING_RATE if args.model_name is None or is_sample(args.model_name) else pretrained
