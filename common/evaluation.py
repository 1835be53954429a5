"""The measurements of `common.evaluate`: loss on held-out text and continuations of prompts, one model at a time."""

import gc
import json
import math
import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from common import attention, data, distributed, models
from common.chat import ChatTemplate
from common.deepspeed_config import PRECISIONS
from common.documents import HELD_OUT_EVERY, load_documents
from common.errors import UserError
from common.loss import cross_entropy_sum, next_tokens, token_loss
from common.pretrained import open_weights
from common.rows import Rows, eval_batches
from common.shards import ZERO_FILES, has_layer_shards, resolve_checkpoint
from common.tokens import tokenize_and_pack

PROMPT_WORDS = 12  # words of a held-out document that make a prompt
TOKENS_AT_ONCE = 2048  # tokens whose logits exist at the same time


@dataclass
class Source:
    """A model whose weights have not been read yet.

    Attributes:
        name: as on the command line.
        directory: holds config and tokenizer, and the weights unless there is a `file`.
        file: holds the weights only.
        chat_template: of its tokenizer, if the held-out documents are conversations.
        rows: the held-out documents in its tokens.
    """

    name: str
    directory: Path
    file: Path | None
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    chat_template: ChatTemplate | None = None
    rows: Rows = field(init=False)


@dataclass
class Prompt:
    """A text to continue, and how the held-out document that starts with it continues."""

    text: str
    reference: str | None = None


@dataclass
class Evaluation:
    """The results of one model.

    Attributes:
        loss: nats per target token, the mean over all of them.
        perplexity: exp(loss).
        bits_per_byte: the sum of the losses, in bits, divided by `bytes`.
        tokens: targets: all tokens of a document but the first.
        bytes: UTF-8 length of the text that they stand for. The end-of-text token stands for none.
        continuations: one per prompt.
    """

    model: str
    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    continuations: list[str]


@dataclass
class Comparison:
    """The results of one or two models.

    Attributes:
        loss_on: see --loss_on.
        same_tokenizer: whether all models see the same tokens, so that their losses are comparable.
    """

    loss_on: str
    same_tokenizer: bool
    prompts: list[Prompt]
    models: list[Evaluation]


def compare(args: Namespace) -> Comparison:
    """Evaluates the model of the command line and --base_model."""
    distributed.check_gpu()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, precision = choose_precision(args.precision, device)
    names = [args.model] if args.base_model is None else [args.model, args.base_model]
    sources = [open_source(name, args) for name in names]
    documents = load_held_out(args)
    # If one model cannot pack, neither does, so that a batch holds the same text for both.
    packing = all(attention.choose_packing(source.config, None) for source in sources)
    for source in sources:
        source.chat_template = data.find_template(args, source.tokenizer, documents)
    loss_on = data.choose_loss(args.loss_on, args.dataset_name, documents, sources[0].chat_template)
    for source in sources:
        source.rows = tokenize_and_pack(documents, source.tokenizer, args, packing, loss_on, source.chat_template)
        if not len(source.rows):
            raise UserError(f"--dataset_name {args.dataset_name}: no held-out document has a token to predict")
        models.check_vocabulary(source.tokenizer, source.rows.max_token_id, source.config.vocab_size)
    same_tokens = all(equal_tokens(sources[0].rows, source.rows) for source in sources[1:])
    if args.max_eval_steps and not same_tokens:
        raise UserError(
            f"--max_eval_steps {args.max_eval_steps}: the tokenizers of {' and '.join(names)} differ, so their batches "
            "hold different text; without the flag both are measured on all of it"
        )
    prompts, evaluations = choose_prompts(args, documents, sources), []
    for source in sources:
        print(data.describe(f"{source.name}: {precision} on {device.type}, held out", source.rows), flush=True)
        evaluations.append(evaluate(source, prompts, args, device, dtype))
        gc.collect()  # the next model needs the memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Comparison(loss_on, same_tokens, prompts, evaluations)


# ---------------------------------------------------------------------------------------- models and documents


def open_source(name: str, args: Namespace) -> Source:
    """Finds a model of the command line and checks that its weights fit its config.

    Raises:
        UserError: they do not, there is no such model, or it is a checkpoint that has to be converted first.
    """
    path, file = Path(name).expanduser(), None
    if path.suffix == ".pt" or path.is_file():
        if args.base_model in (None, name):
            raise UserError(
                f"{name}: holds weights only; --base_model must name a model with their config and tokenizer"
            )
        file, directory = path, models.model_directory(args.base_model, "llama")
    else:
        refuse_checkpoint(path)
        directory = models.model_directory(name, "llama")
    config, tokenizer = models.load_config_and_tokenizer(directory, args.max_length)
    models.map_pretrained(models.meta_model(config), open_weights(directory, file))
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
    """Returns the documents to evaluate on; raises UserError if the dataset cannot be read or holds nothing out."""
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
    """Returns whether two tokenizers made the same of the text, so that a token's loss means the same for both."""
    return len(rows) == len(others) and all(
        torch.equal(left, right)
        for row in range(len(rows))
        for left, right in zip(rows.collate([row]).values(), others.collate([row]).values(), strict=True)
    )


def choose_precision(flag: str | None, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns (dtype, its name): --precision, or bf16 on a GPU that supports it, else fp32."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if flag == "bf16" and not has_bf16:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} supports only fp16 and fp32")
    name = flag or ("bf16" if device.type == "cuda" and has_bf16 else "fp32")
    return PRECISIONS[name], name


# --------------------------------------------------------------------------------------------------- prompts


def choose_prompts(args: Namespace, documents: datasets.Dataset, sources: list[Source]) -> list[Prompt]:
    """Returns the prompts of --prompt, or the beginnings of the first held-out documents that are long enough.

    A question is cut before its answer, a conversation after the user's first turn. Documents whose beginning is too
    long for one of the models are skipped.

    Raises:
        UserError: a --prompt is too long or has no tokens.
    """

    def check(text: str) -> None:
        for each in sources:
            models.check_prompt("--prompt", text, args.max_new_tokens, each.config, each.tokenizer, each.chat_template)

    if args.prompt is not None:
        for text in args.prompt:
            check(text)
        return [Prompt(text) for text in args.prompt]
    prompts: list[Prompt] = []
    tokenizer = sources[0].tokenizer
    for document in documents:
        if len(prompts) == args.num_prompts:
            break
        text, rest = split_document(document)
        if not text:
            continue
        try:
            check(text)
        except UserError:
            continue
        ids = tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"][: args.max_new_tokens]
        prompts.append(Prompt(text, tokenizer.decode(ids, skip_special_tokens=True).strip()))
    return prompts


def split_document(document: dict) -> tuple[str, str]:
    """Returns (prompt, the rest); the prompt is empty if the document is too short or has no answer."""
    if "messages" in document:
        turns = [turn for turn in json.loads(document["messages"]) if turn["role"] != "system"][:2]
        contents = [turn.get("content") for turn in turns]
        is_question = [turn["role"] for turn in turns] == ["user", "assistant"]
        return tuple(contents) if is_question and all(isinstance(text, str) for text in contents) else ("", "")
    text = document["text"]
    beginning = re.match(rf"\s*(\S+\s+){{{PROMPT_WORDS - 1}}}\S+(?=\s+\S)", text)
    end = document.get("answer_start") or (beginning.end() if beginning else 0)
    return text[:end].strip(), text[end:]


# --------------------------------------------------------------------------------------------------- measure


def evaluate(
    source: Source, prompts: list[Prompt], args: Namespace, device: torch.device, dtype: torch.dtype
) -> Evaluation:
    """Loads one model, measures it on its rows and lets it continue the prompts."""
    model, rows = load(source, device, dtype), source.rows
    batches = eval_batches(rows, args.batch_size, 1)[: args.max_eval_steps]
    numbers = np.concatenate(batches)
    loss_sum = sum_of_losses(model, rows, batches, device)
    if not math.isfinite(loss_sum):
        raise UserError(f"{source.name}: its loss on this text is {loss_sum}, so its weights are broken")
    tokens, text_bytes = rows.count(numbers).targets, count_bytes(source.tokenizer, rows, numbers)
    continuations = []
    for prompt in prompts:
        distributed.set_seed(args.seed)  # the same for every model and prompt
        continuations.append(
            models.continue_prompt(
                model, source.tokenizer, prompt.text, args.max_new_tokens, temperature=args.temperature,
                top_k=args.top_k, top_p=args.top_p, chat_template=source.chat_template, include_prompt=False,
            )
        )  # fmt: skip
    return Evaluation(
        model=source.name,
        loss=loss_sum / tokens,
        perplexity=torch.tensor(loss_sum / tokens, dtype=torch.float64).exp().item(),
        bits_per_byte=loss_sum / math.log(2) / text_bytes if text_bytes else math.inf,
        tokens=tokens,
        bytes=text_bytes,
        continuations=continuations,
    )


def load(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    source.config._attn_implementation = attention.choose_attention(source.config, device, dtype)
    with device:
        model = models.empty_model(source.config, dtype)
    with torch.no_grad():
        for parameter, read in models.map_pretrained(model, open_weights(source.directory, source.file)):
            parameter.copy_(read())
    return model.eval()


@torch.inference_mode()
def sum_of_losses(model: PreTrainedModel, rows: Rows, batches: list[np.ndarray], device: torch.device) -> float:
    """Returns the sum over all targets of those batches of row numbers, in nats, accumulated in float64."""
    limits, total = data.attention_limits(rows), 0.0
    for numbers in batches:
        width = rows.width(numbers)  # without common padding
        batch = {key: tensor[:, :width].to(device) for key, tensor in rows.collate(numbers).items()}
        inputs = attention.model_inputs(model.config, batch["input_ids"], batch["position_ids"], *limits)
        total += batch_loss(model, inputs, batch["labels"]).item()
    return total


def batch_loss(model: PreTrainedModel, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a batch's losses, a float32 scalar. A plain head runs on a slice of the tokens at a time.

    Args:
        labels: [B, T].
    """
    if not models.has_plain_head(model):
        return token_loss(model(**inputs).logits, labels)
    hidden = model.base_model(**inputs)[0].flatten(0, 1)
    head, total = model.get_output_embeddings(), torch.zeros((), dtype=torch.float32, device=hidden.device)
    targets = next_tokens(labels).flatten()
    for part, its_targets in zip(hidden.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True):
        total += cross_entropy_sum(head(part), its_targets)
    return total


def count_bytes(tokenizer: PreTrainedTokenizerBase, rows: Rows, numbers: np.ndarray) -> int:
    """Returns the number of UTF-8 bytes of the text that the targets of those rows stand for.

    A character of several tokens belongs to the last of them; special tokens do not count.
    """

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    chunks = sorted((chunk for row in numbers if row >= 0 for chunk in rows.chunks(row)), key=lambda chunk: chunk[0])
    # (token ids, whether each is a target); chunks of a document overlap by a token.
    stretches: list[tuple[list[int], list[bool]]] = []
    end = None
    for begin, ids, loss_mask in chunks:
        mask = np.ones(len(ids), dtype=bool) if loss_mask is None else loss_mask.astype(bool)
        if begin + 1 == end:
            stretches[-1][0].extend(ids[1:])
            stretches[-1][1].extend(mask[1:])
        else:
            stretches.append((ids.tolist(), [False, *mask[1:]]))
        end = begin + len(ids)
    total = 0
    for token_ids, is_target in stretches:
        for first, last in np.flatnonzero(np.diff(is_target, prepend=False, append=False)).reshape(-1, 2):
            # Decoded with what precedes the targets: without it, some tokenizers would drop the first space.
            before = text(token_ids[:first]).rstrip("\ufffd")
            total += len(text(token_ids[:last]).encode()) - len(before.encode())
    return total
