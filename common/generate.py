"""Sample text from a model that has just been trained."""

import torch

from common.errors import UserError
from common.models import check_positions


def check(args, config, tokenizer):
    """Raises UserError for a prompt that the model cannot continue, which would only show after training."""
    if not args.generation_prompt:
        return
    tokens, more = len(tokenizer(args.generation_prompt)["input_ids"]), args.max_new_tokens
    if not tokens:
        raise UserError(f"--generation_prompt {args.generation_prompt!r} is no token to continue from")
    check_positions(config, tokens + more, f"--generation_prompt is {tokens} tokens, with --max_new_tokens {more}")


def prepare(model, tokenizer, args, device):
    """Arguments of HF's `generate` for the prompt and the sampling that the flags ask for.

    Also readies the model: without dropout, and with an attention that reads a cache of earlier keys and values. What
    --compile made is left aside: each token more would be another shape to compile for.
    """
    torch.compiler.set_stance("force_eager")
    model.eval()
    if model.config._attn_implementation in ("varlen", "sdpa_no_gqa"):
        model.set_attn_implementation("sdpa")
    inputs = tokenizer(args.generation_prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    sampling = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    return {**inputs, **sampling, "max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.eos_token_id}
