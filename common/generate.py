"""Sample text from a model that has just been trained."""

import torch


def prepare(model, tokenizer, args, device):
    """Arguments of HF's `generate` for the prompt and the sampling that the flags ask for.

    Also readies the model: without dropout, and with an attention that reads a cache of earlier keys and values. What
    --compile made is left aside: each token more would be another shape to compile for.
    """
    torch.compiler.set_stance("force_eager")
    model.eval()
    if model.config._attn_implementation == "varlen":
        model.set_attn_implementation("sdpa")
    inputs = tokenizer(args.generation_prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    sampling = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    return {**inputs, **sampling, "max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.eos_token_id}
