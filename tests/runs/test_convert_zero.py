"""Models converted from runs of zero/ have the losses that the runs logged."""

import json
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from common import sample, zero_checkpoint
from common.convert import main
from helpers.hf_models import assert_equal, load, save_tokenizer, stored
from helpers.launch import events, launch
from helpers.token_rows import ids_in_row, load_rows

STEPS = 3


def convert_to(output, checkpoint, *options):
    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), *map(str, options)]) == 0
    return output


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Two model directories, `gpt2` with a tied head and `llama` without, and a file of uneven documents."""
    directory = tmp_path_factory.mktemp("case")
    words = random.Random(0)
    texts = [" ".join(words.choices(["we", "show", "that", "a", "model"], k=words.randrange(3, 40))) for _ in range(80)]
    (directory / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for kind in ("gpt2", "llama"):
        tokenizer = AutoTokenizer.from_pretrained(sample.sample_model_directory(kind))
        config = {
            "gpt2": GPT2Config(
                vocab_size=len(tokenizer), n_embd=36, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0,
                attn_pdrop=0, initializer_range=0.2,
            ),
            "llama": LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=36, intermediate_size=50, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
            ),
        }[kind]  # fmt: skip
        config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory / kind)
        tokenizer.save_pretrained(directory / kind)
    return directory


@pytest.fixture(scope="module")
def train(case, tmp_path_factory):
    """Trains the model of that kind at one ZeRO stage on two ranks, once: its output directory."""
    done = {}

    def run(kind, stage, precision="fp32", **ds_config):
        key = (kind, stage, precision, str(ds_config))
        if key not in done:
            directory = tmp_path_factory.mktemp("run")
            (directory / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, **ds_config}))
            finished = launch(
                "zero/train.py", "--model_name", case / kind, "--dataset_name", case / "text.jsonl",
                "--deepspeed_config", directory / "ds.json", "--precision", precision, "--max_length", 64,
                "--no-packing", "--batch_size", 2, "--learning_rate", 1e-2, "--warmup_steps", 0,
                "--max_train_steps", STEPS, "--output_dir", directory / "run", ranks=2,
            )  # fmt: skip
            assert finished.returncode == 0, finished.stdout + finished.stderr
            done[key] = directory / "run"
        return done[key]

    return run


def held_out_loss(case, model_directory):
    """Mean loss of a token of the held-out documents, by Hugging Face's model alone, one document at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = load(model_directory).eval()
    _, rows = load_rows(str(case / "text.jsonl"), tokenizer, max_length=64, packing=False)
    total = targets = 0
    for (piece,) in (ids_in_row(rows, row) for row in range(len(rows))):
        ids = torch.tensor(piece).long()[None]
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        targets += ids.shape[1] - 1
    return total / targets


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_converted_model_has_the_loss_of_the_run(case, train, stage, tmp_path, capsys):
    run = train("gpt2", stage)
    output = convert_to(tmp_path / "out", run, "--verify", "--prompt", "we show", "--max_new_tokens", 3)
    printed = capsys.readouterr().out
    assert "verify: weights identical (29 tensors" in printed
    assert "we show" in printed
    losses = {event["phase"]: event["loss"] for event in events(run, "eval")}
    assert abs(losses["before"] / losses["after"] - 1) > 1e-2  # so that the weights before training would fail
    assert held_out_loss(case, output) == pytest.approx(losses["after"], rel=1e-5)
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    assert len(stored(output)) == 28  # without the tied head


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_stages_give_the_same_weights(train, stage, tmp_path):
    expected = stored(convert_to(tmp_path / "expected", train("gpt2", 0)))
    found = stored(convert_to(tmp_path / "found", train("gpt2", stage)))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("c_attn.bias"):  # the loss does not depend on the keys' bias, so Adam steps by rounding errors
            found[name][36:72] = tensor[36:72]
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


SUMMED_IN_FLOAT32 = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("stage", "ds_config"),
    [
        pytest.param(2, {}, id="2"),
        pytest.param(0, {}, id="0", marks=pytest.mark.slow),
        pytest.param(1, {}, id="1", marks=pytest.mark.slow),
        pytest.param(1, SUMMED_IN_FLOAT32, id="1-summed-in-float32", marks=pytest.mark.slow),
    ],
)
def test_16_bit_run(train, stage, ds_config, tmp_path):
    """Rounded, the masters are the weights that the run computed with, which the checkpoint has as well."""
    run = train("llama", stage, "bf16", **ds_config)
    output = convert_to(tmp_path / "out", run, "--verify")
    state = torch.load(run / f"global_step{STEPS}" / "mp_rank_00_model_states.pt", weights_only=True)
    assert_equal(stored(output), dict(state["module"]))
    assert load(output).dtype == torch.bfloat16
    masters = stored(convert_to(tmp_path / "masters", run, "--dtype", "float32", "--verify"))
    for name, master in masters.items():
        assert torch.equal(master.bfloat16(), state["module"][name])
    assert any(not torch.equal(master.bfloat16().float(), master) for master in masters.values())


@pytest.mark.slow
def test_16_bit_run_of_stage_3(case, train, tmp_path):
    run = train("llama", 3, "bf16")
    masters = stored(convert_to(tmp_path / "masters", run, "--dtype", "float32", "--verify"))
    assert_equal(stored(convert_to(tmp_path / "out", run)), {name: m.bfloat16() for name, m in masters.items()})
    losses = {event["phase"]: event["loss"] for event in events(run, "eval")}
    assert held_out_loss(case, tmp_path / "out") == pytest.approx(losses["after"], rel=1e-2)


CONFIGS = {
    "gpt2": lambda tied: GPT2Config(
        vocab_size=64, n_embd=30, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=tied
    ),
    "bloom": lambda tied: BloomConfig(vocab_size=64, hidden_size=30, n_layer=2, n_head=2, tie_word_embeddings=tied),
    "llama": lambda tied: LlamaConfig(
        vocab_size=64, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied,
    ),
    "opt": lambda tied: OPTConfig(
        vocab_size=64, hidden_size=30, ffn_dim=50, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=30, tie_word_embeddings=tied,
    ),
    "gpt_neox": lambda tied: GPTNeoXConfig(
        vocab_size=64, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=tied,
    ),
}  # fmt: skip


def make_model(kind="gpt2", tied=True):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](tied))
    with torch.no_grad():
        for parameter in model.parameters():  # no two tensors alike, norms and biases included
            parameter.uniform_(-1, 1)
    return model


def make_checkpoint(model, directory, stage, ranks=2, precision="fp32"):
    """A checkpoint as DeepSpeed 0.19.8 writes it, of all that the converter may look at."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    directory.mkdir()
    masters, first, shared = {}, {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) == name:
            masters[name] = parameter.detach()
        else:
            shared[name] = first[parameter]
    module = {name: tensor.to(dtype) for name, tensor in masters.items()}
    module |= {name: module[owner] for name, owner in shared.items()}
    layout = {"stages": 1, "replicas": ranks, "zero_stage": stage, "precision": precision, "offload": False}
    state = {
        "module": {name: torch.empty(0, dtype=dtype) for name in module} if stage == 3 else module,
        "buffer_names": [],
        "optimizer": {"fp32_groups": [list(masters.values())]} if stage == 0 and precision != "fp32" else None,
        "param_shapes": [{name: tensor.shape for name, tensor in masters.items()}] if stage else None,
        "shared_params": shared if stage else None,
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "ds_version": "0.19.8",
        "run": {"global_step": 5, "layout": layout},
    }
    for rank in range(ranks if stage == 3 else 1):
        torch.save(state, directory / f"{f'zero_pp_rank_{rank}_' * (stage == 3)}mp_rank_00_model_states.pt")
    if stage == 3:
        flat = [cut(tensor.flatten(), ranks, ranks) for tensor in masters.values()]
        parts = [torch.cat([pieces[rank] for pieces in flat]) for rank in range(ranks)]
    else:
        parts = cut(torch.cat([tensor.flatten() for tensor in masters.values()]), ranks, 2 * ranks)
    loss_scaler = zero_checkpoint.LossScaler(1)
    if precision == "fp16":
        loss_scaler = zero_checkpoint.DynamicLossScaler(2**16, 1000, 1, 2, False, True, dtype)
    key, count = ("fp32_flat_groups", ranks) if stage == 3 else ("single_partition_of_fp32_groups", [ranks])
    for rank, part in enumerate(parts if stage else ()):
        optimizer = {
            "zero_stage": zero_checkpoint.ZeroStageEnum(stage),
            "loss_scaler": loss_scaler,
            "partition_count": count,
            key: [part.clone()],
        }
        torch.save({"optimizer_state_dict": optimizer}, optim_file(directory, rank, precision))
    model.config.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def cut(flat, ranks, multiple):
    """`ranks` equal parts of a vector that is padded to a multiple."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % multiple), value=9.0).chunk(ranks)


def optim_file(directory, rank, precision="fp32"):
    return directory / f"{'bf16_' * (precision == 'bf16')}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(make_model(), tmp_path / "global_step5", 2)
