"""The truth that runs are compared with: plain Hugging Face and PyTorch in float32, one document at a time."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    get_cosine_schedule_with_warmup,
)

from common import sample
from common.rows import epoch_order, steps_in_epoch
from helpers.token_rows import ids_in_row, load_rows

STEPS = 10
RATE, WARMUP, DECAY, CLIP = 2e-3, 2, 0.01, 1.0
WORDS = ["we", "show", "that", "a", "model", "learns"]


def save_llama(directory, tied):
    """A Llama of 4 decoder layers, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory("llama"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_with_hf(model_directory, text, rows_a_step, max_length=64, packing=False):
    """Plain training on the same documents, in the order that seed and epoch give.

    Packed documents are trained one by one too: what shares a row must not change their loss.

    Returns:
        losses and norms, one a step; first_moments, Adam's after one step, and weights, both by name; targets, for
        each step and row of it how many tokens are predicted there; documents, as many numbers of documents.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32, use_cache=False)
    rows, _ = load_rows(str(text), tokenizer, max_length, packing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    epochs = -(-STEPS // steps_in_epoch(rows, rows_a_step))
    order = [step for epoch in range(epochs) for step in epoch_order(rows, rows_a_step, seed=42, epoch=epoch)]
    truth = {"losses": [], "norms": [], "targets": [], "documents": []}
    for step_rows in order[:STEPS]:
        by_row = [ids_in_row(rows, row) for row in step_rows]
        truth["targets"].append([sum(len(piece) - 1 for piece in pieces) for pieces in by_row])
        truth["documents"].append([len(pieces) for pieces in by_row])
        loss = 0
        for document in (torch.tensor(piece).long()[None] for pieces in by_row for piece in pieces):
            logits = model(document).logits[0, :-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, document[0, 1:], reduction="sum")
        loss = loss / sum(truth["targets"][-1])
        loss.backward()
        truth["losses"].append(loss.item())
        truth["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if "first_moments" not in truth:
            truth["first_moments"] = {
                name: optimizer.state[parameter]["exp_avg"].clone() for name, parameter in model.named_parameters()
            }
    return truth | {"weights": model.state_dict()}


def hf_name(layer, key):
    """Hugging Face's name for a key of layer shard `layer`; the model has 4 decoder layers."""
    if key.startswith("layer."):
        return f"model.layers.{layer - 1}.{key.removeprefix('layer.')}"
    return key if key.startswith("lm_head") else f"model.{key}"


def read_layer_shards(checkpoint):
    """[(name in the HF model, tensor)] of every weight of a pipeline's checkpoint."""
    shards = sorted(checkpoint.glob("layer_*"))
    assert len(shards) == 7
    return [
        (hf_name(layer, key), tensor)
        for layer, shard in enumerate(shards)
        for key, tensor in torch.load(shard, weights_only=True).items()
    ]
