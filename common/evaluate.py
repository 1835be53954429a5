"""Compares a fine-tuned model with the one it came from: their loss on held-out text, their continuations of prompts.

    python -m common.evaluate runs/zero/hf --base_model sample-gpt2 --dataset_name sample-paragraphs
    python -m common.evaluate runs/offload/llama3.2-1B_0-4000-epoch-1.pt \\
        --base_model meta-llama/Llama-3.2-1B-Instruct --dataset_name ash001/arxiv-abstract --output evaluation.md

Both models are measured on the same held-out documents, which no script trains on: the validation split, or every
fiftieth document. The loss is the mean over all target tokens, as the scripts log it, and the perplexity its
exponential. They compare models of one tokenizer. Bits per byte compare any two: the same sum of losses, in bits, over
the UTF-8 bytes of the text that the target tokens stand for.
"""

import argparse
import gc
import html
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from common import attention, cli, data, distributed, models
from common.chat import ChatTemplate
from common.deepspeed_config import PRECISIONS
from common.documents import HELD_OUT_EVERY, load_documents
from common.errors import UserError, one_line
from common.loss import cross_entropy_sum, next_tokens, token_loss
from common.pretrained import open_weights
from common.rows import Rows, eval_batches
from common.shards import ZERO_FILES, has_layer_shards, resolve_checkpoint
from common.tokens import tokenize_and_pack

# Words of a held-out document that make a prompt.
PROMPT_WORDS = 12
# Tokens whose logits exist at the same time.
TOKENS_AT_ONCE = 2048


@dataclass
class Source:
    """Where a model comes from; its weights are not read yet.

    Attributes:
        name: as on the command line.
        directory: with config and tokenizer, and the weights if there is no `file`.
        file: of the weights alone, or None.
        chat_template: of its tokenizer, if the held-out documents are conversations.
    """

    name: str
    directory: Path
    file: Path | None
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate | None = None


@dataclass
class Prompt:
    """A text to continue, and how the held-out document that it begins goes on, or None."""

    text: str
    reference: str | None = None


@dataclass
class Evaluation:
    """What one model makes of the held-out text.

    Attributes:
        loss: nats a target token, the mean over all of them.
        perplexity: exp(loss).
        bits_per_byte: the sum of the losses, in bits, over `bytes`.
        tokens: targets, all tokens of a document but the first.
        bytes: of the text that they stand for, in UTF-8. The end-of-text token stands for none.
        continuations: one for each prompt.
    """

    model: str
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    continuations: list


def evaluate(args: Namespace) -> None:
    """All that the command does; prints the comparison and writes it to --output."""
    distributed.check_gpu()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, precision = choose_precision(args.precision, device)
    names = [args.model, *([args.base_model] if args.base_model is not None else [])]
    sources = [open_source(name, args) for name in names]
    documents = load_held_out(args)
    # A model that cannot pack decides for both, so that a batch holds the same text for both.
    packing = all(attention.choose_packing(source.config, None) for source in sources)
    for source in sources:
        source.chat_template = data.find_template(args, source.tokenizer, documents)
    args.loss_on = data.choose_loss(args.loss_on, args.dataset_name, documents, sources[0].chat_template)
    rows = [
        tokenize_and_pack(documents, source.tokenizer, args, packing, args.loss_on, source.chat_template)
        for source in sources
    ]
    same_tokens = all(equal_tokens(rows[0], other) for other in rows[1:])
    if args.max_eval_steps and not same_tokens:
        raise UserError(
            f"--max_eval_steps {args.max_eval_steps}: the tokenizers of {' and '.join(names)} differ, so that their "
            "batches hold other text; without it both are measured on all of it"
        )
    prompts = choose_prompts(args, documents, sources)
    for source, its_rows in zip(sources, rows, strict=True):
        if not len(its_rows):
            raise UserError(f"--dataset_name {args.dataset_name}: no held-out document has a token to predict")
        models.check_vocabulary(source.tokenizer, its_rows.max_token_id, source.config.vocab_size)
        for prompt in prompts:
            check_prompt(source, prompt.text, args.max_new_tokens)

    evaluations = []
    for source, its_rows in zip(sources, rows, strict=True):
        print(data.describe(f"{source.name}: {precision} on {device.type}, held out", its_rows), flush=True)
        evaluations.append(evaluate_model(source, its_rows, prompts, args, device, dtype))
        gc.collect()  # the next model needs the memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(as_text(evaluations, prompts, same_tokens, shutil.get_terminal_size((120, 24)).columns))
    if not prompts and args.num_prompts:
        print(f"no prompts: no held-out document is longer than {PROMPT_WORDS} words; --prompt names one")
    if args.output:
        write(args, evaluations, prompts, same_tokens)


# ---------------------------------------------------------------------------------------------- what is there


def open_source(name: str, args: Namespace) -> Source:
    """The `Source` of a name on the command line.

    Raises:
        UserError: there is no such model, it is a checkpoint that has to be converted first, or its weights do not
            fit its config.
    """
    path, file = Path(os.path.expanduser(name)), None
    if path.suffix == ".pt" or path.is_file():
        if args.base_model in (None, name):
            raise UserError(f"{name}: weights alone; --base_model has to name a model with their config and tokenizer")
        file, directory = path, models.model_directory(args.base_model, "llama")
    else:
        refuse_checkpoint(path)
        directory = models.model_directory(name, "llama")
    config, tokenizer = models.load_config_and_tokenizer(directory, args.max_length)
    try:
        model = models.meta_model(config)
    except Exception as error:  # whatever a model's constructor trips over
        raise UserError(f"{directory}: no causal language model of transformers: {one_line(error, 200)}") from error
    models.map_pretrained(model, open_weights(directory, file))
    return Source(name, directory, file, config, tokenizer)


def refuse_checkpoint(directory: Path) -> None:
    """Raises UserError for a checkpoint of the scripts: transformers would find no weights in it."""
    if not directory.is_dir() or any(directory.glob("model*.safetensors")):
        return
    if (directory / "latest").is_file() or has_layer_shards(directory) or any(directory.glob(ZERO_FILES)):
        checkpoint = resolve_checkpoint(directory)
        raise UserError(
            f"{directory}: a DeepSpeed checkpoint, convert it first: python -m common.convert to-hf {checkpoint} "
            f"--output_dir {checkpoint.parent / 'hf'}"
        )


def load_held_out(args: Namespace) -> datasets.Dataset:
    """The documents to evaluate on, see `load_documents`.

    Raises:
        UserError: the dataset cannot be read or holds nothing out.
    """
    loaded = load_documents(args.dataset_name, args.dataset_config, args.text_column)
    documents = loaded.test if args.split == "test" else loaded.held_out
    if not len(documents) and args.split == "test":
        raise UserError(f"--split test: --dataset_name {args.dataset_name} has no document in a test split")
    if not len(documents):
        raise UserError(
            f"--dataset_name {args.dataset_name}: nothing is held out; it has no validation split and fewer than "
            f"{HELD_OUT_EVERY} documents"
        )
    return documents


def equal_tokens(rows: Rows, others: Rows) -> bool:
    """Whether two tokenizers made the same of the text, so that a token's loss means the same for both models."""
    return len(rows) == len(others) and all(
        torch.equal(left, right)
        for row in range(len(rows))
        for left, right in zip(rows.collate([row]).values(), others.collate([row]).values(), strict=True)
    )


def choose_precision(flag: str | None, device: torch.device) -> tuple[torch.dtype, str]:
    """(torch dtype, its name): --precision, or bf16 on a GPU that has it, else fp32."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if flag == "bf16" and not has_bf16:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16, only fp16 and fp32")
    name = flag or ("bf16" if device.type == "cuda" and has_bf16 else "fp32")
    return PRECISIONS[name], name


# --------------------------------------------------------------------------------------------------- prompts


def choose_prompts(args: Namespace, documents: datasets.Dataset, sources: list[Source]) -> list[Prompt]:
    """The prompts of --prompt, or the beginnings of the first held-out documents that are long enough to go on.

    Of a question the beginning is all up to its answer, of a conversation what the user says first.
    """
    if args.prompt is not None:
        return [Prompt(text) for text in args.prompt]
    prompts = []
    tokenizer = sources[0].tokenizer
    for document in documents if args.num_prompts else ():
        prompt, rest = split_conversation(document) if "messages" in document else split_text(document)
        if not prompt or not all(fits(source, prompt, args.max_new_tokens) for source in sources):
            continue
        ids = tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"][: args.max_new_tokens]
        prompts.append(Prompt(prompt, tokenizer.decode(ids, skip_special_tokens=True).strip()))
        if len(prompts) == args.num_prompts:
            break
    return prompts


def split_text(document: dict) -> tuple[str, str]:
    """(beginning of the document, the rest); the beginning is empty if the document is too short."""
    text = document["text"]
    begin = re.match(rf"\s*(\S+\s+){{{PROMPT_WORDS - 1}}}\S+(?=\s+\S)", text)
    end = document.get("answer_start") or (begin.end() if begin else 0)
    return text[:end].strip(), text[end:]


def split_conversation(document: dict) -> tuple[str, str]:
    """(first user turn, the answer); both are empty if a conversation does not begin with these."""
    turns = [turn for turn in json.loads(document["messages"]) if turn["role"] != "system"]
    if len(turns) < 2:
        return "", ""
    roles, contents = zip(*((turn["role"], turn.get("content")) for turn in turns[:2]), strict=True)
    if roles != ("user", "assistant") or not all(isinstance(content, str) for content in contents):
        return "", ""
    return contents


def fits(source: Source, prompt: str, max_new_tokens: int) -> bool:
    """Whether a model has positions for the prompt and its continuation."""
    positions = getattr(source.config, "max_position_embeddings", None)
    return not positions or len(prompt_ids(source, prompt)) + max_new_tokens <= positions


def check_prompt(source: Source, prompt: str, max_new_tokens: int) -> None:
    """Raises UserError for a prompt that the model cannot continue."""
    ids = prompt_ids(source, prompt)
    if not ids:
        raise UserError(f"--prompt {prompt!r} is no token to continue from")
    if not fits(source, prompt, max_new_tokens):
        raise UserError(
            f"--prompt {prompt[:40]!r} is {len(ids)} tokens, with --max_new_tokens {max_new_tokens} more than the "
            f"{source.config.max_position_embeddings} positions of {source.name}"
        )
    models.check_vocabulary(source.tokenizer, max(ids), source.config.vocab_size)


def prompt_ids(source: Source, prompt: str) -> list[int]:
    return models.prompt_ids(source.tokenizer, prompt, source.chat_template)


# --------------------------------------------------------------------------------------------------- measure


def evaluate_model(
    source: Source, rows: Rows, prompts: list[Prompt], args: Namespace, device: torch.device, dtype: torch.dtype
) -> Evaluation:
    """Loads one model, measures it on `rows` and lets it continue the prompts: its `Evaluation`."""
    model = load(source, device, dtype)
    numbers = eval_batches(rows, args.batch_size, 1)[: args.max_eval_steps]
    loss_sum = sum_of_losses(model, rows, numbers, device)
    tokens = rows.count(np.concatenate(numbers)).targets
    if not math.isfinite(loss_sum):
        raise UserError(f"{source.name}: its loss on this text is {loss_sum}, so its weights are no good")
    text_bytes = count_bytes(source.tokenizer, rows, np.concatenate(numbers))
    return Evaluation(
        model=source.name,
        loss=loss_sum / tokens,
        perplexity=torch.tensor(loss_sum / tokens, dtype=torch.float64).exp().item(),
        bits_per_byte=loss_sum / math.log(2) / text_bytes if text_bytes else math.inf,
        tokens=tokens,
        bytes=text_bytes,
        continuations=[continue_prompt(model, source, prompt.text, args) for prompt in prompts],
    )


def load(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a `Source`, ready to evaluate."""
    source.config._attn_implementation = attention.choose_attention(source.config, device, dtype)
    with device:
        model = models.empty_model(source.config, dtype)
    with torch.no_grad():
        for parameter, read in models.map_pretrained(model, open_weights(source.directory, source.file)):
            parameter.copy_(read())
    return model.eval()


@torch.inference_mode()
def sum_of_losses(model: PreTrainedModel, rows: Rows, batches: list[np.ndarray], device: torch.device) -> float:
    """Sum over all targets of those batches of row numbers, in nats, added up in float64."""
    limits, total = data.attention_limits(rows), 0.0
    for numbers in batches:
        width = rows.width(numbers)  # without common padding
        batch = {key: tensor[:, :width].to(device) for key, tensor in rows.collate(numbers).items()}
        inputs = attention.model_inputs(model.config, batch["input_ids"], batch["position_ids"], *limits)
        total += batch_loss(model, inputs, batch["labels"]).item()
    return total


def batch_loss(model: PreTrainedModel, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the losses of a batch's targets, a float32 scalar. A plain head runs on a slice of tokens at a time.

    Args:
        labels: [B, T].
    """
    if not models.has_plain_head(model):
        return token_loss(model(**inputs).logits, labels)
    hidden = model.base_model(**inputs)[0].flatten(0, 1)
    labels = next_tokens(labels).flatten()
    head, total = model.get_output_embeddings(), torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        total += cross_entropy_sum(head(hidden[part]), labels[part])
    return total


def count_bytes(tokenizer: PreTrainedTokenizerBase, rows: Rows, numbers: np.ndarray) -> int:
    """UTF-8 bytes of the text that the targets of those rows stand for, special tokens left out.

    A character of several tokens belongs to the last of them.
    """

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    chunks = sorted((chunk for row in numbers if row >= 0 for chunk in rows.chunks(row)), key=lambda chunk: chunk[0])
    stretches, end = [], None  # [token ids, whether each is a target]; chunks of a document overlap by a token
    for begin, ids, loss_mask in chunks:
        mask = np.ones(len(ids), dtype=bool) if loss_mask is None else loss_mask.astype(bool)
        if begin + 1 == end:
            stretches[-1][0].extend(ids[1:])
            stretches[-1][1].extend(mask[1:])
        else:
            stretches.append([ids.tolist(), [False, *mask[1:]]])
        end = begin + len(ids)
    total = 0
    for ids, mask in stretches:
        for first, last in np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2):
            # With what stands before the targets: without it, some tokenizers would drop the first space.
            before = text(ids[:first]).rstrip("\ufffd")
            total += len(text(ids[:last]).encode()) - len(before.encode())
    return total


@torch.inference_mode()
def continue_prompt(model: PreTrainedModel, source: Source, prompt: str, args: Namespace) -> str:
    """Only the continuation, as text; every model and prompt starts from the same random seed."""
    distributed.set_seed(args.seed)
    args = Namespace(generation_prompt=prompt, **vars(args))
    sampling = models.generation_inputs(model, source.tokenizer, args, source.chat_template)
    tokens = model.generate(**sampling)[0, sampling["input_ids"].shape[1] :]
    return source.tokenizer.decode(tokens, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------- report

HEADS = ("model", "loss", "perplexity", "bits/byte", "tokens", "bytes")


def table(evaluations: list[Evaluation]) -> list[tuple[str, ...]]:
    """Rows of text: the heads, then the numbers of each model."""
    return [HEADS] + [
        (
            each.model, f"{each.loss:.4f}", f"{each.perplexity:,.2f}", f"{each.bits_per_byte:.4f}", f"{each.tokens:,}",
            f"{each.bytes:,}",
        )
        for each in evaluations
    ]  # fmt: skip


def remark(evaluations: list[Evaluation], same_tokens: bool) -> str:
    """What the numbers say about the first model against the second, in one line; empty without a second."""
    if len(evaluations) < 2:
        return ""
    one, base = evaluations
    bits = f"bits per byte {one.bits_per_byte - base.bits_per_byte:+.4f}"
    if not same_tokens:
        return f"difference: {bits}; the tokenizers differ, so that losses and perplexities do not compare"
    return f"difference: loss {one.loss - base.loss:+.4f}, {bits}"


def as_text(evaluations: list[Evaluation], prompts: list[Prompt], same_tokens: bool, width: int) -> str:
    """The comparison for a terminal of `width` columns."""
    cells = table(evaluations)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [""]
    for name, *numbers in cells:
        lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]))
    lines += filter(None, [remark(evaluations, same_tokens)])
    heads = [each.model for each in evaluations]
    for number, prompt in enumerate(prompts):
        lines += ["", *wrapped(f"prompt {number + 1}: {prompt.text}", width)]
        if prompt.reference is not None:
            lines += wrapped(f"held out: {prompt.reference}", width)
        lines += ["", *side_by_side(heads, [each.continuations[number] for each in evaluations], width)]
    return "\n".join(lines)


def side_by_side(heads: list[str], texts: list[str], width: int) -> list[str]:
    """Lines with the texts in columns below their heads."""
    each = max(10, (width - 3 * (len(texts) - 1)) // len(texts))
    columns = [
        [*wrapped(head, each), "-" * each, *wrapped(text, each)] for head, text in zip(heads, texts, strict=True)
    ]
    return [
        " | ".join(cell.ljust(each) for cell in line).rstrip() for line in itertools.zip_longest(*columns, fillvalue="")
    ]


def wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(printable(text), width) or [""]


def printable(text: str) -> str:
    """Without the control characters that a model may say and a terminal would obey, and without space around it."""
    return "".join(each if each.isprintable() or each.isspace() else "\ufffd" for each in text).strip()


def as_markdown(evaluations: list[Evaluation], prompts: list[Prompt], same_tokens: bool, args: Namespace) -> str:
    def row(cells):
        return "| " + " | ".join(map(escaped, cells)) + " |"

    text = " ".join(filter(None, [args.dataset_name, args.dataset_config]))
    lines = [f"Held-out text: {escaped(text)} ({args.split} split, rows of {args.max_length} tokens).", ""]
    head, *numbers = table(evaluations)
    lines += [row(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(row, numbers)]
    lines += ["", escaped(remark(evaluations, same_tokens))]
    for number, prompt in enumerate(prompts):
        lines += ["", f"**Prompt {number + 1}:** {escaped(prompt.text)}"]
        if prompt.reference is not None:
            lines += ["", f"**Held out:** {escaped(prompt.reference)}"]
        lines += ["", row(each.model for each in evaluations), "|---" * len(evaluations) + "|"]
        lines.append(row(each.continuations[number] for each in evaluations))
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """As Markdown, in one line of a table."""
    return re.sub(r"([\\`*_|\[\]#~$])", r"\\\1", html.escape(text.strip(), quote=False)).replace("\n", "<br>")


def as_json(evaluations: list[Evaluation], prompts: list[Prompt], same_tokens: bool, args: Namespace) -> str:
    return json.dumps(
        {
            "dataset": args.dataset_name,
            "dataset_config": args.dataset_config,
            "split": args.split,
            "loss_on": args.loss_on,
            "max_length": args.max_length,
            "same_tokenizer": same_tokens,
            "prompts": [asdict(prompt) for prompt in prompts],
            "models": [asdict(each) for each in evaluations],
        },
        indent=2,
        ensure_ascii=False,
    )  # fmt: skip


FORMATS = {".md": as_markdown, ".json": as_json}


def write(args: Namespace, evaluations: list[Evaluation], prompts: list[Prompt], same_tokens: bool) -> None:
    """Writes --output; its name appears once the file is complete."""
    content = FORMATS[args.output.suffix](evaluations, prompts, same_tokens, args)
    partial = args.output.with_name(f".{args.output.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(args.output)
    print(f"\nwrote {args.output}")


# ---------------------------------------------------------------------------------------------- command line


def output_file(text: str) -> Path:
    path = Path(os.path.expanduser(text))
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"'{text}' should end in {' or '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is no file in a directory that exists")
    return path


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(
        prog="python -m common.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        help="Hub name or Hugging Face directory (what baseline/ trained, or what common.convert made of the others' "
        "checkpoints), sample-llama, sample-gpt2 or sample-bloom, or a .pt file of weights as offload/ writes it",
    )
    parser.add_argument(
        "--base_model", metavar="NAME",
        help="the model to compare with; it also gives a .pt file its config and tokenizer. Without it MODEL alone is "
        "evaluated",
    )  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS, help="default: bf16 on a GPU that has it, else fp32")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="also write all of it, as .md or .json")

    text = parser.add_argument_group("held-out text")
    text.add_argument(
        "--dataset_name", default="sample", metavar="NAME",
        help="Hub name, local file or directory, or sample-abstracts (learnt by pipeline/ and offload/ by default), "
        "sample-questions (baseline/), sample-paragraphs (zero/); default: %(default)s, the abstracts",
    )  # fmt: skip
    cli.add_column_arguments(text)
    text.add_argument(
        "--split", choices=("held_out", "test"), default="held_out",
        help="held_out is the validation split, or where there is none every fiftieth document; default: %(default)s",
    )  # fmt: skip
    text.add_argument(
        "--max_length", type=cli.row_length, default=256, metavar="N", help="tokens a row; default: %(default)s"
    )
    text.add_argument("--batch_size", type=cli.positive_int, default=8, metavar="N", help="rows; default: %(default)s")
    text.add_argument(
        "--max_eval_steps", type=cli.positive_int, metavar="N", help="evaluate on so many batches at most"
    )

    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="to continue; may be given several times; default: the beginnings of held-out documents",
    )  # fmt: skip
    prompts.add_argument(
        "--num_prompts", type=cli.non_negative_int, default=3, metavar="N",
        help="how many documents to begin, without --prompt; default: %(default)s",
    )  # fmt: skip
    prompts.add_argument(
        "--max_new_tokens", type=cli.positive_int, default=40, metavar="N", help="default: %(default)s"
    )
    prompts.add_argument(
        "--temperature", type=cli.temperature, default=0.0, metavar="T",
        help="0 takes the likeliest token each time; default: %(default)g",
    )  # fmt: skip
    prompts.add_argument(
        "--top_k", type=cli.non_negative_int, default=50, metavar="K",
        help="of the K likeliest; 0 is of all; default: %(default)s",
    )  # fmt: skip
    prompts.add_argument(
        "--top_p", type=cli.probability, default=0.95, metavar="P",
        help="of the likeliest that make up P together; default: %(default)s",
    )  # fmt: skip
    prompts.add_argument("--seed", type=cli.seed, default=42, metavar="N", help="default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; a mistake in the input is one line on standard error."""
    args = build_parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()  # it warns of rows without a mask, which need none here
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    try:
        evaluate(args)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).split(' Including')[0]} A smaller --batch_size takes less", file=sys.stderr)
        return 1
    except (UserError, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
