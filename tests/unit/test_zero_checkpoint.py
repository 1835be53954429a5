"""Converting the checkpoints of zero/ and offload/: the trained weights, for any layout, and every mistake.

The checkpoints are made here by hand, as DeepSpeed writes them; tests/runs has those of launched runs.
"""

import json
import os
import shutil

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

from common import pretrained, zero_checkpoint
from common.convert import main
from helpers.hf_models import assert_equal, load, save_tokenizer, stored


def convert_to(output, checkpoint, *options):
    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), *map(str, options)]) == 0
    return output


# ------------------------------------------------------------------------------------------------- cut by hand

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


def change(path, edit):
    """Lets `edit` change the content of a file."""
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(make_model(), tmp_path / "global_step5", 2)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_architecture(tmp_path, kind, tied, stage, capsys):
    model = make_model(kind, tied)
    output = convert_to(tmp_path / "out", make_checkpoint(model, tmp_path / "c", stage, ranks=3), "--verify")
    assert "verify: weights identical" in capsys.readouterr().out
    assert_equal(load(output).state_dict(), model.state_dict())
    if kind != "gpt_neox":  # its head is `embed_out` in HF's own files and `lm_head` in memory; HF reads both
        model.save_pretrained(tmp_path / "expected")
        assert_equal(stored(output), stored(tmp_path / "expected"))
    assert AutoModelForCausalLM.from_pretrained(output).config.tie_word_embeddings is tied


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("target", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_dtype(tmp_path, stage, target, precision):
    """The masters, rounded once, whatever the run computed in."""
    model = make_model()
    checkpoint = make_checkpoint(model, tmp_path / "c", stage, precision=precision)
    output = convert_to(tmp_path / "out", checkpoint, "--verify", *(["--dtype", target] if target else []))
    wanted = target or {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    expected = model.to(getattr(torch, wanted)).state_dict()
    assert_equal(stored(output), {name: tensor for name, tensor in expected.items() if name != "lm_head.weight"})
    assert load(output).dtype == getattr(torch, wanted)


def test_float_buffers_are_kept_and_others_refused(tmp_path, checkpoint, monkeypatch, fails):
    path = checkpoint / "mp_rank_00_model_states.pt"
    change(path, lambda state: (state["module"].update(scale=torch.ones(3)), state["buffer_names"].append("scale")))
    masters, _ = zero_checkpoint.read_masters(checkpoint)
    assert torch.equal(masters["scale"], torch.ones(3))
    change(path, lambda state: state["module"].update(scale=torch.ones(3).long()))
    fails("to-hf", checkpoint, said=[str(checkpoint), "'scale' is torch.int64"])


def test_options(tmp_path, checkpoint, fails):
    """Parent directory, base model, several files, an output in use."""
    (tmp_path / "latest").write_text("global_step5")
    base, output = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            path.rename(base / path.name)
    fails("to-hf", checkpoint, said=[str(checkpoint), "config.json", "--base_model"])
    convert_to(output, tmp_path, "--base_model", base, "--max_shard_size", "20KB", "--verify")
    assert len(list(output.glob("*.safetensors"))) > 2
    assert_equal(load(output).state_dict(), make_model().state_dict())
    assert len(AutoTokenizer.from_pretrained(output)) == 3
    assert main(["to-hf", str(tmp_path), "--base_model", str(base), "--output_dir", str(output)]) == 1
    convert_to(output, tmp_path, "--base_model", base, "--overwrite")
    assert len(list(output.glob("*.safetensors"))) == 1


def test_pipeline_options_are_refused(checkpoint, fails):
    fails("to-hf", checkpoint, "--head", "keep", said=["--head", "layer_*", str(checkpoint)])
    fails("to-hf", checkpoint, "--allow_identical_layers", said=["--allow_identical_layers", str(checkpoint)])


# ------------------------------------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize("stage", [2, 3])
def test_file_missing(tmp_path, stage, fails):
    checkpoint = make_checkpoint(make_model(), tmp_path / "c", stage)
    for path in sorted(checkpoint.glob("*.pt")):
        path.rename(tmp_path / "away")
        message = fails("to-hf", checkpoint, said=[str(checkpoint)])
        only_states = "model_states" in path.name and "zero_pp_rank_1" not in path.name
        assert ("but neither mp_rank_00_model_states.pt" if only_states else f"{path}: missing;") in message
        assert only_states or (f"2 ranks at ZeRO stage {stage} in fp32" in message and "found" in message)
        (tmp_path / "away").rename(path)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_file_truncated(tmp_path, stage, fails):
    checkpoint = make_checkpoint(make_model(), tmp_path / "c", stage)
    for path in checkpoint.glob("*.pt"):
        whole = path.read_bytes()
        for size in (0, 100, len(whole) // 2, len(whole) - 10):
            path.write_bytes(whole[:size])
            fails("to-hf", checkpoint, said=[str(path), "truncated"])
        path.write_bytes(whole)


@pytest.mark.parametrize("stage", [1, 3])
def test_files_of_runs_of_different_size(tmp_path, stage, fails):
    of_two = make_checkpoint(make_model(), tmp_path / "two", stage)
    of_four = make_checkpoint(make_model(), tmp_path / "four", stage, ranks=4)
    mixed = shutil.copytree(of_four, tmp_path / "mixed")
    for path in of_two.glob("*.pt"):
        shutil.copyfile(path, mixed / path.name)
    fails("to-hf", mixed, said=[str(mixed), "from another run", f"is from 2 ranks at ZeRO stage {stage}", "found"])
    shutil.rmtree(mixed)
    shutil.copytree(of_four, mixed)
    shutil.copyfile(optim_file(of_two, 1), optim_file(mixed, 1))
    fails("to-hf", mixed, said=[str(optim_file(mixed, 1)), f"sharded for stage {stage} and 2 ranks", "and 4 ranks"])


def test_files_of_different_stages(tmp_path, checkpoint, fails):
    other = make_checkpoint(make_model(), tmp_path / "other", 3)
    shutil.copyfile(optim_file(other, 1), optim_file(checkpoint, 1))
    fails("to-hf", checkpoint, said=[str(optim_file(checkpoint, 1)), "sharded for stage 3", "are from stage 2"])
    shutil.copyfile(checkpoint / "mp_rank_00_model_states.pt", other / "mp_rank_00_model_states.pt")
    fails("to-hf", other, said=["zero_pp_rank_0_mp_rank_00_model_states.pt: from another run", "stage 2"])


def test_model_states_of_another_run(tmp_path, fails):
    checkpoint = make_checkpoint(make_model(), tmp_path / "c", 3)
    path = checkpoint / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    change(path, lambda state: state["run"]["layout"].update(replicas=4))
    fails("to-hf", checkpoint, said=[f"{path}: from another run", "2 ranks"])


@pytest.mark.parametrize("stage", [1, 3])
def test_parts_of_another_model(tmp_path, stage, fails):
    checkpoint = make_checkpoint(make_model(), tmp_path / "c", stage)
    for path in checkpoint.glob("*optim_states.pt"):
        change(path, lambda state: [part.resize_(len(part) - 50) for part in parts_of(state)])
    fails("to-hf", checkpoint, said=[str(checkpoint), "do not make up a checkpoint"])


def parts_of(state):
    return next(value for key, value in state["optimizer_state_dict"].items() if "fp32" in key)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"n_embd": 32}, ["'transformer.wte.weight' has shape [64, 30], expected [64, 32]"]),
        ({"n_layer": 1}, ["'transformer.h.1.ln_1.weight'", "expected no such key"]),
        ({"n_layer": 3}, ["'transformer.h.2.ln_1.weight'", "missing"]),
        ({"model_type": "no-such"}, ["no-such"]),
    ],
)
def test_config_does_not_fit(checkpoint, fails, edit, said):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    fails("to-hf", checkpoint, said=[str(checkpoint), str(path), *said])


def test_config_ties_what_differs(tmp_path, fails):
    checkpoint = make_checkpoint(make_model(tied=False), tmp_path / "c", 1)
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    fails("to-hf", checkpoint, said=["'lm_head.weight' and 'transformer.wte.weight' differ", str(path)])


def test_no_checkpoint_at_all(tmp_path, checkpoint, fails):
    (tmp_path / "empty").mkdir()
    fails("to-hf", tmp_path / "empty", said=[str(tmp_path / "empty"), "layer_*", "ZeRO", "latest"])
    (tmp_path / "empty" / "latest").write_text("global_step7")
    fails("to-hf", tmp_path / "empty", said=["global_step7", "layer_*", "ZeRO"])
    state = checkpoint / "mp_rank_00_model_states.pt"
    change(state, lambda content: content.update(module=None))
    fails("to-hf", checkpoint, said=[str(state), "from a pipeline", "layer_*", "missing"])
    for content in ({"module": {}}, {"run": {}}, [1, 2], None, {"run": {"layout": None}}):
        torch.save(content, state)
        fails("to-hf", checkpoint, said=[str(state), "not written by zero/train.py or offload/train.py"])


def swap(items, i, j):
    items[i], items[j] = items[j], items[i]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda optimizer: optimizer["fp32_groups"][0].pop(), "zip() argument 2 is shorter"),
        (lambda optimizer: swap(optimizer["fp32_groups"][0], 2, 3), "'transformer.h.0.ln_1.weight' does not equal"),
        (lambda optimizer: optimizer.clear(), "KeyError: 'fp32_groups'"),
    ],
)  # fmt: skip
def test_masters_that_are_not_those_of_the_weights(tmp_path, fails, edit, said):
    checkpoint = make_checkpoint(make_model(), tmp_path / "c", 0, precision="bf16")
    change(checkpoint / "mp_rank_00_model_states.pt", lambda state: edit(state["optimizer"]))
    fails("to-hf", checkpoint, said=[str(checkpoint), said])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_nothing_is_executed(tmp_path, stage, fails):
    checkpoint, proof = make_checkpoint(make_model(), tmp_path / "c", stage), tmp_path / "executed"
    for path in checkpoint.glob("*.pt"):
        whole = path.read_bytes()
        change(path, lambda state: state.update(more=Malicious(proof)))
        fails("to-hf", checkpoint, said=[str(path), "asks for posix.mkdir", "nothing but tensors"])
        path.write_bytes(whole)
    assert not proof.exists()


# ---------------------------------------------------------------------------------------------- what is left


def test_verify_finds_a_wrong_value(checkpoint, monkeypatch, fails):
    """The converted file differs from the checkpoint in one bit of one weight."""
    save, name = pretrained.save_file, "transformer.h.0.mlp.c_fc.weight"

    def altered(content, path, metadata):
        content[name] = content[name].clone()
        content[name].view(torch.uint8)[0, 0] ^= 1
        save(content, path, metadata)

    monkeypatch.setattr(pretrained, "save_file", altered)
    fails("to-hf", checkpoint, "--verify", said=[f"verify: '{name}' differs", "expected 0.0"])


def test_fault_in_the_middle_leaves_nothing(tmp_path, checkpoint, monkeypatch, fails):
    def failing(directory, *_):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("No more")

    monkeypatch.setattr(pretrained, "write_weights", failing)
    fails("to-hf", checkpoint, said=["No more"])


def test_a_weight_is_read_where_it_lies(tmp_path):
    """Under stage 3 the parts stay in their files until a weight is asked for."""
    checkpoint = make_checkpoint(make_model(), tmp_path / "c", 3)
    masters, _ = zero_checkpoint.read_masters(checkpoint)
    assert all(isinstance(master, zero_checkpoint.zero_to_fp32.GatheredTensor) for master in masters.values())
    assert masters["lm_head.weight"] is masters["transformer.wte.weight"]
