"""Converting between pipeline shards and Hugging Face directories: every tensor and every mistake."""

import errno
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from common import convert, hub_client, manifest, pretrained, shards
from common.convert import main
from common.errors import UserError
from helpers.hf_models import assert_equal, load, save_tokenizer, stored

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_model(model_type="llama", *, tied=False, layers=2, dtype=torch.float32, vocab_size=64):
    config = CONFIGS[model_type](
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    )  # fmt: skip
    if model_type == "mistral":
        config.sliding_window = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # no two tensors alike, norms and biases included
            parameter.uniform_(-1, 1)
    return model


def shard_dicts(model):
    """The layer shards as the pipeline writes them, made here by hand."""
    state, layers = model.state_dict(), model.config.num_hidden_layers
    result = [{"embed_tokens.weight": state[EMBEDDING]}]
    for i in range(layers):
        prefix = f"model.layers.{i}."
        result.append({"layer." + k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    return [*result, {"norm.weight": state["model.norm.weight"]}, {"lm_head.weight": state[HEAD].clone()}]


def save_shards(dicts, directory):
    directory.mkdir(parents=True, exist_ok=True)
    for index, content in enumerate(dicts):
        torch.save(content, directory / f"layer_{index:02d}-model_states.pt")


def make_checkpoint(model, directory):
    """A checkpoint as this repository's pipeline leaves it."""
    save_shards(shard_dicts(model), directory)
    torch.save({"not": "read"}, directory / "mp_rank_00_model_states.pt")
    model.config.save_pretrained(directory)
    GenerationConfig(max_new_tokens=7).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def shard(directory, index):
    return directory / f"layer_{index:02d}-model_states.pt"


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(make_model(), tmp_path / "global_step5")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_to_hf_gives_every_tensor(tmp_path, model_type, tied, capsys):
    model = make_model(model_type, tied=tied, layers=3)
    checkpoint, output = make_checkpoint(model, tmp_path / "global_step5"), tmp_path / "out"

    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), "--verify"]) == 0

    printed = capsys.readouterr().out
    expected = model.state_dict()
    assert f"verify: weights identical ({len(expected)} tensors" in printed
    loaded = load(output)
    assert_equal(loaded.state_dict(), expected)
    written = stored(output)
    assert (HEAD in written) is not tied
    assert_equal(written, {name: t for name, t in expected.items() if name in written})
    assert len(written) == len(expected) - tied
    assert loaded.config.rope_parameters["rope_theta"] == 12345.0
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is tied
    assert loaded.generation_config.max_new_tokens == 7
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not list(output.glob("*.pt"))
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (output / "model.safetensors").stat().st_mode == (output / "config.json").stat().st_mode


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [None, "float32", "float16", "bfloat16"])
def test_dtype(tmp_path, source, target):
    model = make_model(dtype=getattr(torch, source))
    checkpoint, output = make_checkpoint(model, tmp_path / "c"), tmp_path / "out"
    options = ["--dtype", target] if target else []
    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), *options, "--verify"]) == 0
    dtype = getattr(torch, target or source)
    assert_equal(stored(output), {name: t.to(dtype) for name, t in model.state_dict().items()})
    assert json.loads((output / "config.json").read_text())["dtype"] == (target or source)
    assert load(output).dtype == dtype


def test_mixed_dtypes_need_a_choice(tmp_path, fails):
    dicts = shard_dicts(make_model())
    dicts[0]["embed_tokens.weight"] = dicts[0]["embed_tokens.weight"].bfloat16()
    checkpoint = make_checkpoint(make_model(), tmp_path / "c")
    save_shards(dicts, checkpoint)
    fails("to-hf", checkpoint, said=["bfloat16, float32", "--dtype"])
    assert main(["to-hf", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--dtype", "float32"]) == 0


def test_several_files_and_their_index(tmp_path, checkpoint):
    output = tmp_path / "out"
    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), "--max_shard_size", "20KB"]) == 0
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 2
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    expected = make_model().state_dict()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert set(index["weight_map"]) == set(expected)
    for path in files:
        content = load_file(path)
        assert sum(t.nbytes for t in content.values()) <= 20_000
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(content)
    assert_equal(load(output).state_dict(), expected)


@pytest.mark.parametrize("text", ["0", "2XB", "-1GB", ""])
def test_size_that_is_none(text, checkpoint, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main(["to-hf", str(checkpoint), "--output_dir", str(tmp_path / "out"), f"--max_shard_size={text}"])
    assert exit_info.value.code == 2


def test_byte_size():
    assert [convert.byte_size(text) for text in ("7", "2GB", "1.5kb", "1MiB")] == [7, 2 * 10**9, 1500, 2**20]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_to_pipeline_and_back(tmp_path, model_type, tied):
    model = make_model(model_type, tied=tied, dtype=torch.bfloat16)
    source, there, back = tmp_path / "hf", tmp_path / "there", tmp_path / "back"
    model.save_pretrained(source, max_shard_size="20KB")
    save_tokenizer(source)

    assert main(["to-pipeline", str(source), "--output_dir", str(there)]) == 0

    for index, expected in enumerate(shard_dicts(model)):
        assert_equal(torch.load(shard(there, index)), expected)
        # A tensor that was saved with the whole file behind it would show here.
        assert shard(there, index).stat().st_size < sum(t.nbytes for t in expected.values()) + 10_000
    assert len(list(there.glob("layer_*"))) == 5
    assert AutoConfig.from_pretrained(there).model_type == model_type

    assert main(["to-hf", str(there), "--output_dir", str(back)]) == 0
    assert_equal(stored(back), stored(source))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_to_pipeline_converts(tmp_path):
    model, hf = make_model(), save_hf(tmp_path)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(stored(hf) | frequencies, hf / "model.safetensors")
    arguments = ["to-pipeline", str(hf), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    assert torch.equal(
        torch.load(shard(tmp_path / "out", 0))["embed_tokens.weight"],
        model.state_dict()[EMBEDDING].bfloat16(),
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("head", ["keep", "embedding", "head"])
def test_drifted_apart(tmp_path, head, capsys):
    model = make_model(tied=True)
    checkpoint, output = make_checkpoint(model, tmp_path / "c"), tmp_path / "out"
    drifted = model.state_dict()[HEAD].clone()
    drifted[3, 4] += 0.5
    drifted[5, 6] -= 0.25
    torch.save({"lm_head.weight": drifted}, shard(checkpoint, 4))

    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), "--head", head, "--verify"]) == 0

    line = capsys.readouterr().out.split("\n")[0]
    assert "2 of 2048 elements differ" in line
    assert "largest difference 0.5," in line
    assert f"mean {0.75 / 2048:.3g};" in line
    loaded, expected = load(output), model.state_dict()
    assert loaded.config.tie_word_embeddings is (head != "keep")
    assert (HEAD in stored(output)) is (head == "keep")
    original = expected[EMBEDDING]
    assert torch.equal(loaded.lm_head.weight, original if head == "embedding" else drifted)
    assert torch.equal(loaded.model.embed_tokens.weight, drifted if head == "head" else original)


def test_checkpoint_of_others_with_base_model(tmp_path, fails, capsys):
    """Shards alone, with frequencies that older models saved, in a layout with a tensor-parallel axis."""
    model = make_model(layers=3)
    dicts = shard_dicts(model)
    for content in dicts[1:4]:
        content["layer.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    checkpoint, base, output = tmp_path / "global_step9", tmp_path / "base", tmp_path / "out"
    save_shards(dicts, checkpoint)
    for path in list(checkpoint.iterdir()):
        path.rename(path.with_name(path.name.replace("-model_states", "-model_00-model_states")))
    model.config.save_pretrained(base)
    save_tokenizer(base)

    fails("to-hf", checkpoint, said=[str(checkpoint), "config.json", "--base_model"])
    arguments = ["to-hf", str(checkpoint), "--base_model", str(base), "--output_dir", str(output)]
    assert main([*arguments, "--prompt", "hello", "--max_new_tokens", "3"]) == 0
    assert "hello" in capsys.readouterr().out
    assert_equal(load(output).state_dict(), model.state_dict())
    assert len(AutoTokenizer.from_pretrained(output)) == 3


def test_what_lies_beside_the_shards_goes_first(tmp_path, checkpoint):
    base = tmp_path / "base"
    make_model("qwen2").config.save_pretrained(base)
    save_tokenizer(base, words=("another", "larger", "vocabulary"))
    (base / "special_tokens_map.json").write_text("{}")
    arguments = ["to-hf", str(checkpoint), "--base_model", str(base), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert load(tmp_path / "out").config.model_type == "llama"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 3
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()


def test_latest_names_the_checkpoint(tmp_path, fails):
    run = tmp_path / "run"
    make_checkpoint(make_model(), run / "global_step5")
    newest = make_model(dtype=torch.bfloat16)
    make_checkpoint(newest, run / "global_step10")
    fails("to-hf", run, said=[str(run), "latest"])
    (run / "latest").write_text("global_step15")
    fails("to-hf", run, said=["latest", "global_step15"])
    (run / "latest").write_text("global_step10\n")
    assert main(["to-hf", str(run), "--output_dir", str(tmp_path / "out")]) == 0
    assert_equal(stored(tmp_path / "out"), newest.state_dict())
    fails("to-hf", tmp_path / "nowhere", said=["nowhere: no such checkpoint directory"])


# ------------------------------------------------------------------------------------------------ bad shards


def test_missing_shard(checkpoint, fails):
    shard(checkpoint, 2).unlink()
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 2)), "found 4", "num_hidden_layers=2 makes 5"])


@pytest.mark.parametrize(
    "twin",
    [
        "layer_2-model_states.pt",
        "layer_002-model_states.pt",
        "layer_02-model_00-model_states.pt",
    ],
)
def test_doubled_shard(checkpoint, fails, twin):
    shutil.copyfile(shard(checkpoint, 1), checkpoint / twin)
    fails("to-hf", checkpoint, said=[twin, "layer_02-model_states.pt", "layer 2 is there twice"])


@pytest.mark.parametrize(
    "name",
    [
        "layer_-model_states.pt",
        "layer_two-model_states.pt",
        "layer_norm.pt",
        "layer_02-model_01-model_states.pt",
        "layer_02-model_states (1).pt",
        "layer_02-model_states copy.pt",
        "layer_02-model_states.pt.bak",
    ],
)
def test_foreign_shard(checkpoint, fails, name):
    (checkpoint / name).write_bytes(b"")
    fails("to-hf", checkpoint, said=[str(checkpoint / name), "layer_00-model_states.pt"])


def test_shard_past_the_last(checkpoint, fails):
    shutil.copyfile(shard(checkpoint, 4), shard(checkpoint, 5))
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 5)), "found 6", "num_hidden_layers=2 makes 5"])


@pytest.mark.parametrize("layers", [1, 3])
def test_layer_count_against_config(checkpoint, fails, layers):
    config = json.loads((checkpoint / "config.json").read_text()) | {"num_hidden_layers": layers}
    (checkpoint / "config.json").write_text(json.dumps(config))
    said = [str(shard(checkpoint, 4 if layers == 1 else 5)), "found 5", f"num_hidden_layers={layers}"]
    fails("to-hf", checkpoint, said=said)


def test_copied_layer(tmp_path, fails):
    checkpoint = make_checkpoint(make_model(layers=3), tmp_path / "c")
    shutil.copyfile(shard(checkpoint, 1), shard(checkpoint, 3))
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 3)), "layer_01-model_states.pt", "identical_layers"])
    arguments = ["to-hf", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--allow_identical_layers"]
    assert main(arguments) == 0


@pytest.mark.parametrize("value", [torch.nan, -0.0])
def test_layers_are_compared_bit_for_bit(tmp_path, checkpoint, fails, value):
    layer = torch.load(shard(checkpoint, 1))
    layer["layer.post_attention_layernorm.weight"][-1] = value
    torch.save(layer, shard(checkpoint, 1))
    layer["layer.post_attention_layernorm.weight"][-1] = 0.0
    torch.save(layer, shard(checkpoint, 2))
    assert main(["to-hf", str(checkpoint), "--output_dir", str(tmp_path / "out")]) == 0
    shutil.rmtree(tmp_path / "out")
    shutil.copyfile(shard(checkpoint, 1), shard(checkpoint, 2))
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 2)), "the same tensors"])


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_truncated_shard(checkpoint, fails, keep):
    path = shard(checkpoint, 2)
    os.truncate(path, int(path.stat().st_size * keep))
    fails("to-hf", checkpoint, said=[str(path), "truncated"])


def test_what_its_manifest_does_not_know_is_not_converted(tmp_path, checkpoint, fails):
    files = {name: manifest.entry(checkpoint / name) for name in manifest.files_of(checkpoint)}
    files["zero_pp_rank_0_mp_rank_00_optim_states.pt"] = {"size": 1, "sha256": ""}  # is not read, and may be gone
    (checkpoint / manifest.MANIFEST).write_text(manifest.dumps(files))
    assert main(["to-hf", str(checkpoint), "--output_dir", str(tmp_path / "whole")]) == 0
    content = bytearray(shard(checkpoint, 2).read_bytes())
    content[len(content) // 2] ^= 1
    shard(checkpoint, 2).write_bytes(content)
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 2)), "differs from what was saved"])


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), {"layer.x": "text"}, {7: torch.ones(2)}])
def test_shard_that_is_no_dict_of_tensors(checkpoint, fails, content):
    torch.save(content, shard(checkpoint, 1))
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 1)), "expected"])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_runs_nothing(tmp_path, checkpoint, fails, zipped):
    content = {"embed_tokens.weight": Malicious(tmp_path / "harm")}
    torch.save(content, shard(checkpoint, 0), _use_new_zipfile_serialization=zipped)
    said = ["refused", "mkdir"] if zipped else ["not a plain zip file of torch.save"]
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 0)), *said])
    assert not (tmp_path / "harm").exists()


def change(checkpoint, index, function):
    content = torch.load(shard(checkpoint, index))
    function(content)
    torch.save(content, shard(checkpoint, index))


def test_unknown_key(checkpoint, fails):
    change(checkpoint, 2, lambda content: content.update({"layer.self_attn.q_proj.lora": torch.ones(3, 2)}))
    said = [str(shard(checkpoint, 2)), "'layer.self_attn.q_proj.lora' of shape [3, 2]", "no such key"]
    fails("to-hf", checkpoint, said=said)


def test_missing_key(checkpoint, fails):
    change(checkpoint, 2, lambda content: content.pop("layer.mlp.up_proj.weight"))
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 2)), "'layer.mlp.up_proj.weight' of shape [48, 32]"])


def test_wrong_shape(checkpoint, fails):
    change(checkpoint, 4, lambda content: content.update({"lm_head.weight": torch.ones(65, 32)}))
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 4)), "'lm_head.weight'", "[65, 32]", "[64, 32]"])


def test_swapped_shards(checkpoint, fails):
    shutil.copyfile(shard(checkpoint, 3), shard(checkpoint, 4))
    said = [str(shard(checkpoint, 4)), "'lm_head.weight' of shape [64, 32]", "'norm.weight' of shape [32]"]
    fails("to-hf", checkpoint, said=said)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"model_type": "gpt2"}', '{"model_type": "llama", "vocab_size": "x"}']
)
def test_config_that_is_none(tmp_path, checkpoint, fails, text):
    hf = tmp_path / "hf"
    make_model().save_pretrained(hf)
    for directory in (checkpoint, hf):
        (directory / "config.json").unlink()
        if text is not None:
            (directory / "config.json").write_text(text)
    fails("to-hf", checkpoint, said=["config.json"])
    message = fails("to-pipeline", hf, said=["config.json"])
    assert text is None or "gpt2" not in text or "llama, mistral, qwen2, qwen3" in message


# ------------------------------------------------------------------------------------------- reading shards


@pytest.mark.parametrize("kind", ["plain", "views", "transposed", "cuda", "shifted"])
def test_read_shard_gives_what_torch_gives(tmp_path, kind, monkeypatch):
    path = tmp_path / "layer_00-model_states.pt"
    base = torch.randn(3000)
    content = {"a": base.clone(), "b": base.clone().bfloat16().view(30, 100), "c": torch.tensor(1.5)}
    if kind == "views":
        content["d"] = base[100:400].view(3, 100)
        content["e"] = base[400:500]
    if kind == "transposed":
        content["d"] = base.view(30, 100).t()
    if kind == "cuda":
        monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    torch.save(content, path)
    if kind == "shifted":
        zip_again(path, zipfile.ZIP_STORED)

    found = shards.read_shard(path)

    assert_equal(found, content)
    (tmp_path / "config.json").touch()
    pretrained.write_weights(tmp_path, found, torch.float16, 10**9)
    assert_equal(load_file(tmp_path / "model.safetensors"), {key: tensor.half() for key, tensor in content.items()})


def zip_again(path, compression):
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("new"), "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    path.with_name("new").replace(path)


def test_compressed_shard(checkpoint, fails):
    zip_again(shard(checkpoint, 2), zipfile.ZIP_DEFLATED)
    fails("to-hf", checkpoint, said=[str(shard(checkpoint, 2)), "compressed"])


def test_to_hf_does_not_hold_the_model_in_memory(tmp_path, monkeypatch):
    """Nor does a conversion, except for the tensors of one output file."""
    model = make_model(vocab_size=1 << 20, dtype=torch.bfloat16)  # 64 MiB for the embedding and for the head
    checkpoint, save, used = make_checkpoint(model, tmp_path / "c"), pretrained.save_file, []

    def measured(content, path, metadata):
        save(content, path, metadata)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        used.append(int(status["RssAnon"].split()[0]) / 1024)

    monkeypatch.setattr(pretrained, "save_file", measured)
    for dtype in ("bfloat16", "float16"):
        arguments = ["to-hf", str(checkpoint), "--dtype", dtype, "--output_dir", str(tmp_path / dtype)]
        assert main([*arguments, "--max_shard_size", "65MiB"]) == 0
    kept, converted = used[:2], used[2:]
    assert len(kept) == len(converted) == 2
    assert max(kept) < min(kept) + 30
    assert max(converted) < min(kept) + 65 + 30


def test_load_layer(checkpoint):
    layer = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(32, bias=False)}).bfloat16()
    shards.load_layer(shard(checkpoint, 3), layer)
    assert torch.equal(layer["norm"].weight, make_model().state_dict()["model.norm.weight"].bfloat16())
    with pytest.raises(UserError, match=r"layer_00-model_states.pt: expected 'norm.weight' of shape \[32\]"):
        shards.load_layer(shard(checkpoint, 0), layer)
    wide = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(33, bias=False)})
    with pytest.raises(UserError, match=r"layer_03.*'norm.weight' has shape \[32\], expected \[33\]"):
        shards.load_layer(shard(checkpoint, 3), wide)
    with pytest.raises(UserError, match=r"layer_09-model_states.pt"):
        shards.load_layer(shard(checkpoint, 9), layer)


# -------------------------------------------------------------------------------------------- what is left


def test_output_in_use_is_refused_and_kept(tmp_path, checkpoint, fails):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    for arguments in (["to-hf", checkpoint], ["to-pipeline", save_hf(tmp_path)]):
        fails(*arguments, said=[str(output), "--overwrite"])
        assert [path.name for path in output.iterdir()] == ["precious"]
    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), "--overwrite"]) == 0
    assert not (output / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step5", "hf", "out"]
    load(output)
    shutil.rmtree(output)
    output.write_text("a file")
    fails("to-hf", checkpoint, "--overwrite", said=[str(output), "a file"])


def save_hf(tmp_path):
    make_model().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_overwriting_the_input_is_refused(checkpoint, capsys):
    for output in (checkpoint, checkpoint.parent):
        assert main(["to-hf", str(checkpoint), "--output_dir", str(output), "--overwrite"]) == 1
        assert "holds the input" in capsys.readouterr().err
    assert shard(checkpoint, 0).is_file()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("fault", "code"),
    [(OSError(errno.ENOSPC, "No space left"), 1), (KeyboardInterrupt(), 130), (UserError("bad"), 1)],
)
def test_fault_in_the_middle_leaves_nothing(tmp_path, checkpoint, monkeypatch, capsys, fault, code, overwrite):
    output = tmp_path / "out"
    if overwrite:
        output.mkdir()
        (output / "precious").write_text("kept")
    save = pretrained.save_file

    def failing(content, path, metadata):
        if list(tmp_path.glob(".out.*/*.safetensors")):
            raise fault
        save(content, path, metadata)

    monkeypatch.setattr(pretrained, "save_file", failing)
    arguments = ["to-hf", str(checkpoint), "--output_dir", str(output), "--max_shard_size", "20KB"]
    assert main([*arguments, *(["--overwrite"] if overwrite else [])]) == code
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert ("disk is full" in message) is (getattr(fault, "errno", None) == errno.ENOSPC)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step5", "out"][: 1 + overwrite]
    assert not overwrite or (output / "precious").read_text() == "kept"


def test_fault_in_to_pipeline_leaves_nothing(tmp_path, monkeypatch, fails):
    save, calls = torch.save, []

    def failing(content, path):
        calls.append(path)
        if len(calls) == 3:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch's writer does on a full disk
        save(content, path)

    hf = save_hf(tmp_path)
    monkeypatch.setattr(torch, "save", failing)
    fails("to-pipeline", hf, said=["disk full?", str(tmp_path / "out")])


def test_fault_in_the_last_rename_brings_the_old_back(tmp_path, checkpoint, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    rename = type(output).rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "no")
        return rename(self, target)

    monkeypatch.setattr(type(output), "rename", failing)
    assert main(["to-hf", str(checkpoint), "--output_dir", str(output), "--overwrite"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step5", "out"]
    assert (output / "precious").read_text() == "kept"


def test_ctrl_c(tmp_path, checkpoint, monkeypatch):
    # A process that was started in the background ignores it.
    monkeypatch.setattr(signal, "raise_signal", lambda number: signal.default_int_handler(number, None))
    monkeypatch.setattr(pretrained, "write_weights", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(["to-hf", str(checkpoint), "--output_dir", str(tmp_path / "out")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["global_step5"]


def test_verify_finds_a_wrong_weight(checkpoint, monkeypatch, fails):
    """The converted file differs from the shards in one bit."""
    save, name = pretrained.save_file, "model.layers.1.mlp.up_proj.weight"

    def altered(content, path, metadata):
        content = {key: tensor.clone() for key, tensor in content.items()}
        content[name].view(torch.uint8)[-1, -4] ^= 1
        save(content, path, metadata)

    monkeypatch.setattr(pretrained, "save_file", altered)
    fails("to-hf", checkpoint, "--verify", said=[f"verify: '{name}' differs", "expected 0.0"])


def test_verify_finds_a_missing_weight(checkpoint, monkeypatch, fails):
    write = pretrained.write_weights

    def without_norm(directory, sources, *rest):
        return write(directory, {k: v for k, v in sources.items() if k != "model.norm.weight"}, *rest)

    monkeypatch.setattr(pretrained, "write_weights", without_norm)
    fails("to-hf", checkpoint, "--verify", said=["verify", "missing_keys", "model.norm.weight"])


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "has no tokens"), ("hello", "--prompt is 1 tokens, with --max_new_tokens 200 more than")]
)
def test_prompt_that_cannot_be_continued(checkpoint, fails, prompt, said):
    fails("to-hf", checkpoint, "--prompt", prompt, "--max_new_tokens", 200, said=["--prompt", said])


def test_prompt_needs_a_tokenizer(checkpoint, fails):
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    fails("to-hf", checkpoint, "--prompt", "hello", said=["--prompt", "tokenizer"])


# ------------------------------------------------------------------------------------- pretrained directories


def test_pretrained_weights(tmp_path):
    model = make_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    weights = pretrained.PretrainedWeights(tmp_path / "hf")
    assert sorted(weights.names) == sorted(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert (weights.shape(name), weights.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(weights.read(name), tensor)


def test_bad_pretrained_directories(tmp_path, fails):
    hf = save_hf(tmp_path)
    whole = (hf / "model.safetensors").read_bytes()
    for size in (4, 100, len(whole) - 1):
        (hf / "model.safetensors").write_bytes(whole[:size])
        fails("to-pipeline", hf, said=[str(hf / "model.safetensors"), "truncated"])
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    fails("to-pipeline", hf, said=[str(hf), "expected model.safetensors", "found pytorch_model.bin"])

    make_model().save_pretrained(hf, max_shard_size="20KB")
    index = hf / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    second = good["weight_map"]["model.norm.weight"]
    bad = good["weight_map"] | {"model.norm.weight": good["weight_map"][EMBEDDING]}
    assert bad["model.norm.weight"] != second
    index.write_text(json.dumps({"weight_map": bad}))
    fails("to-pipeline", hf, said=[bad["model.norm.weight"], "'model.norm.weight' is missing"])
    index.write_text("[]")
    fails("to-pipeline", hf, said=[str(index)])
    index.write_text(json.dumps(good))
    (hf / second).unlink()
    fails("to-pipeline", hf, said=[str(hf / second), "missing"])


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("model.extra", torch.ones(2), ["'model.extra'", "[2]"]),
        ("model.norm.weight", torch.ones(33), ["'model.norm.weight'", "[33]", "[32]"]),
        ("model.norm.weight", torch.ones(32, dtype=torch.int8), ["'model.norm.weight'", "int8"]),
        ("model.norm.weight", None, ["'model.norm.weight'", "[32]"]),
    ],
)
def test_pretrained_tensors_against_config(tmp_path, fails, name, tensor, said):
    hf = save_hf(tmp_path)
    state = {**stored(hf), name: tensor}
    save_file({key: t for key, t in state.items() if t is not None}, hf / "model.safetensors")
    fails("to-pipeline", hf, said=[str(hf), *said])


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../model", "~/no-such-model", "a/b/c", ""])
def test_missing_path_is_no_hub_name(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match="no such model directory"):
        hub_client.resolve_model_directory(name)


def test_hub(tmp_path, monkeypatch, fails):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        if name == "some/gated":
            raise GatedRepoError.__new__(GatedRepoError)
        if name == "some/unreachable":
            raise ConnectionError("cannot reach\nthe Hub")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fails("to-pipeline", "some/gated", said=["https://huggingface.co/some/gated"])
    fails("to-pipeline", "some/unreachable", said=["some/unreachable", "cannot reach"])
    assert hub_client.resolve_model_directory("some/model", weights=False) == tmp_path
    assert "config.json" in asked["some/model"]
    assert not any("safetensors" in pattern for pattern in asked["some/model"])
    assert "model*.safetensors" in asked["some/gated"]
    assert not any(pattern.endswith((".bin", ".pt", "pth")) for pattern in asked["some/gated"])
