"""The DeepSpeed JSON: what is refused and in which words, and what the flags make of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import constants

from common import deepspeed_config
from common.errors import UserError

ROOT = Path(__file__).parents[2]
SHIPPED = {path: path.parent.name for name in ("zero", "offload", "pipeline") for path in (ROOT / name).glob("*.json")}
PIPELINE = ROOT / "pipeline" / "ds_pipeline.json"
CPU = torch.device("cpu")
TO_CPU, NVME = {"device": "cpu"}, {"device": "nvme"}


def written(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nested(dotted, value):
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


# ------------------------------------------------------------------------------------------------------ load


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_passes_in_its_own_script_with_its_own_sizes(path):
    config = deepspeed_config.load(path)
    assert len(SHIPPED) == 7 and config == json.loads(path.read_text())
    deepspeed_config.check_technique(config, SHIPPED[path])
    micro, accumulation = config[MICRO], config[ACCUMULATION]
    assert deepspeed_config.resolve_batch_size(config, 2) == (micro, accumulation, 2 * micro * accumulation)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b'{"bf16": {"enabled": true},}', "ds.json is not JSON: Expecting property name enclosed in double quotes"),
        (b"\xff\xfe", "ds.json is not JSON"),
        (b"[1]", "contains a list, expected an object"),
    ],
)
def test_load_file_that_is_not_a_config_is_refused(tmp_path, content, says):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content)
    message = refusal(deepspeed_config.load, path)
    assert message.startswith(f"--deepspeed_config {tmp_path}") and says in message


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("gradient_clippin", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("zero_optimization.offload_optimiser", "offload_optimizer"),
        ("zero_optimization.stage3_max_live_params", "stage3_max_live_parameters"),  # DeepSpeed knows it as an alias
        ("fp16.enable", "enabled"),
        ("bf16.enabeld", "enabled"),
        ("pipeline.use_reentrants", "use_reentrant"),
        ("data_types.grad_accum_type", "grad_accum_dtype"),
        ("checkpoint.tag_validations", "tag_validation"),
        ("flops_profiler.profil_step", "profile_step"),
        ("torch_autocast.enable", "enabled"),
        ("timers.throughputs", "throughput"),
        ("wandb.projekt", "project"),
        ("qqq", None),
        ("hybrid_engine", None),  # exists in DeepSpeed, but not in these scripts
    ],
)
def test_load_unsupported_key_is_refused_with_a_suggestion(tmp_path, key, suggestion):
    hint = f"; did you mean '{suggestion}'?" if suggestion else ""
    path = written(tmp_path, nested(key, {"enabled": False}))
    assert refusal(deepspeed_config.load, path) == f"{path}: unsupported key '{key}'{hint}"


def test_load_unknown_key_deeper_than_a_section_is_refused_by_deepspeeds_model(tmp_path):
    path = written(tmp_path, nested("zero_optimization.offload_optimizer.devise", "cpu"))
    assert "offload_optimizer.devise Extra inputs are not permitted" in refusal(deepspeed_config.load, path)


def test_keys_at_the_top_level_are_keys_of_deepspeed():
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    scalars = deepspeed_config.KEYS[""] - set(deepspeed_config.KEYS)
    assert len(scalars) == 15 and scalars <= known


@pytest.mark.parametrize("key", deepspeed_config.REFUSED)
def test_load_refused_key_says_what_to_use_instead(tmp_path, key):
    for value in (True, {"enabled": False}):
        path = written(tmp_path, nested(key, value))
        says = f"{path}: '{key}' is not supported: {deepspeed_config.REFUSED[key]}"
        assert refusal(deepspeed_config.load, path) == says


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("optimizer", "--learning_rate"),
        ("scheduler", "--warmup_steps"),
        ("activation_checkpointing", "pipeline.activation_checkpoint_interval"),
        ("dataloader_drop_last", "common/rows.py"),
        ("compile", "--compile"),
        ("tensor_parallel", "pipeline/"),
        ("elasticity", "--resume_from_checkpoint"),
        ("pipeline.stages", "--num_stages"),
        ("zero_optimization.cpu_offload", "zero_optimization.offload_optimizer"),
        ("zero_optimization.zenflow", "overrides gradient_accumulation_steps"),
        ("zero_optimization.offload_optimizer.super_offload", "Adam's moments"),
    ],
)
def test_refused_key_names_its_replacement(key, instead):
    assert instead in deepspeed_config.REFUSED[key]


def test_load_keys_with_an_effect_pass(tmp_path):
    content = {
        "tensorboard": {"enabled": True}, "wandb": {"enabled": False}, "csv_monitor": {"enabled": True},
        "comet": {"enabled": False}, "flops_profiler": {"enabled": True}, "comms_logger": {"enabled": True},
        "timers": {"throughput": {"synchronized": False}}, "memory_breakdown": True, "dump_state": True,
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "communication_data_type": "fp32",
        "prescale_gradients": True, "gradient_predivide_factor": 2.0, "wall_clock_breakdown": True,
        "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "fp32"}, "checkpoint": {"tag_validation": "FAIL"},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0}, "fp16": {"enabled": False},
        "bf16": {"enabled": True}, "steps_per_print": 1e6,
    }  # fmt: skip
    assert deepspeed_config.load(written(tmp_path, content)) == content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"bf16": True}, "'bf16' is True, expected an object"),
        ({"checkpoint": None}, "'checkpoint' is None, expected an object"),
        ({"flops_profiler": True}, "'flops_profiler' is True, expected an object"),
        ({"bf16": {"enabled": "false"}}, "'bf16.enabled' is 'false', expected true or false"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "enables both fp16 and bf16"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "'fp16': 1 validation error"),
        ({"gradient_clipping": "one"}, "'gradient_clipping' is 'one', expected a number >= 0"),
        ({"gradient_clipping": -1}, "'gradient_clipping' is -1"),
        ('{"gradient_clipping": NaN}', "'gradient_clipping' is nan"),
        ({"steps_per_print": 0}, "'steps_per_print' is 0, expected a number >= 1"),
        ({"pipeline": {"activation_checkpoint_interval": "x"}}, "activation_checkpoint_interval' is 'x'"),
        ({"pipeline": {"activation_checkpoint_interval": 0.5}}, "is 0.5, expected an integer >= 0"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, "DeepSpeed rejects 'zero_optimization'"),
        ({"zero_optimization": {"leaf_module": True}}, "DeepSpeed rejects 'zero_optimization': leaf_module"),
    ],
)
def test_load_invalid_value_is_refused(tmp_path, content, says):
    assert says in refusal(deepspeed_config.load, written(tmp_path, content))


@pytest.mark.parametrize("error", [AttributeError("no attribute"), ImportError("No module named 'tensorboard'")])
def test_config_errors_turns_errors_of_deepspeed_into_one_line(error):
    with pytest.raises(UserError, match=r"DeepSpeed rejects ds\.json: no"), deepspeed_config.config_errors("ds.json"):
        raise type(error)(str(error).lower())


# ------------------------------------------------------------------------------------------------ techniques


@pytest.mark.parametrize(
    ("technique", "zero", "says"),
    [
        ("offload", {"stage": 2, "offload_optimizer": TO_CPU, "offload_param": TO_CPU}, ["offload_param", "stage 2"]),
        ("offload", {"stage": 3, "offload_param": TO_CPU}, ["offload_optimizer.device is not 'cpu'", "zero/train.py"]),
        ("offload", {"stage": 2}, ["offload_optimizer.device is not 'cpu'", "zero/train.py"]),
        ("offload", {"stage": 2, "offload_optimizer": {"device": "none"}}, ["is not 'cpu'"]),
        ("offload", {"stage": 0, "offload_optimizer": TO_CPU}, ["offload_optimizer", "stage 0"]),
        ("offload", {"offload_optimizer": TO_CPU}, ["offload_optimizer", "stage 0"]),
        ("offload", {"stage": 3, "offload_optimizer": NVME}, ["offload_optimizer.device is 'nvme'", "'cpu'"]),
        ("zero", {"stage": 3, "offload_param": NVME}, ["offload_param.device is 'nvme'"]),
        ("zero", {"stage": 3, "offload_param": TO_CPU}, ["offload/train.py", "zero/train.py"]),
        ("zero", {"stage": 2, "offload_optimizer": TO_CPU}, ["offload/train.py", "zero/train.py"]),
        ("zero", {"stage": 4}, ["stage is 4", "0, 1, 2 or 3"]),
        ("zero", {"stage": "2"}, ["stage is '2'"]),
        ("zero", {"stage": True}, ["stage is True"]),
        ("pipeline", {"stage": 0}, ["stage is 0", "needs stage 1"]),
        ("pipeline", {"stage": 2}, ["stage is 2", "needs stage 1"]),
        ("pipeline", {"stage": 3}, ["stage is 3", "needs stage 1"]),
        ("pipeline", {"stage": True}, ["stage is True"]),
        ("pipeline", {"stage": 1, "offload_optimizer": TO_CPU}, ["offload_optimizer", "pipeline/train.py"]),
        ("pipeline", {"stage": 1, "offload_param": TO_CPU}, ["offload_param", "pipeline/train.py"]),
    ],
)
def test_check_technique_contradiction_is_refused(technique, zero, says):
    message = refusal(deepspeed_config.check_technique, {"zero_optimization": zero}, technique)
    assert all(words in message for words in says)


@pytest.mark.parametrize(
    ("technique", "config"),
    [
        ("zero", {}),
        ("zero", {"zero_optimization": {"stage": 3, "offload_param": None}}),
        ("zero", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}),
        ("offload", {"zero_optimization": {"stage": 3, "offload_optimizer": TO_CPU}}),
        ("pipeline", {"zero_optimization": {"stage": 1}, "wall_clock_breakdown": False, "pipeline": {}}),
    ],
)
def test_check_technique_config_that_runs_passes(technique, config):
    deepspeed_config.check_technique(config, technique)


def test_check_technique_section_and_key_of_another_technique_are_refused():
    zero = {"zero_optimization": {"stage": 1}}
    message = refusal(deepspeed_config.check_technique, zero | {"pipeline": {}}, "zero")
    assert "'pipeline'" in message and "pipeline/train.py" in message
    message = refusal(deepspeed_config.check_technique, zero | {"wall_clock_breakdown": True}, "pipeline")
    assert "wall_clock_breakdown" in message


# ------------------------------------------------------------------------------------------------ batch size

MICRO, ACCUMULATION, TOTAL = deepspeed_config.BATCH_KEYS


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({}, (), (1, 1, 2)),
        ({}, (3, 4), (3, 4, 24)),
        ({TOTAL: 24, MICRO: 3}, (), (3, 4, 24)),
        ({TOTAL: 24, ACCUMULATION: 3}, (), (4, 3, 24)),
        ({TOTAL: 24}, (), (12, 1, 24)),
        ({TOTAL: 24, MICRO: 3, ACCUMULATION: 4}, (), (3, 4, 24)),
        ({MICRO: 3}, (), (3, 1, 6)),
        ({ACCUMULATION: 3}, (), (1, 3, 6)),
        ({MICRO: 2, ACCUMULATION: 16}, (None, 3), (2, 3, 12)),
        ({TOTAL: 24, MICRO: 3}, (6, None), (6, 2, 24)),
        ({TOTAL: 24, MICRO: 3}, (None, 4), (3, 4, 24)),
        ({TOTAL: 24, ACCUMULATION: 3}, (None, 6), (2, 6, 24)),
        ({TOTAL: 24}, (3, None), (3, 4, 24)),
        ({TOTAL: 24, MICRO: 5, ACCUMULATION: "auto"}, (3, 4), (3, 4, 24)),
    ],
)
def test_resolve_batch_size_determines_what_is_missing(config, flags, expected):
    assert deepspeed_config.resolve_batch_size(config, 2, *flags) == expected
    assert [config[key] for key in (MICRO, ACCUMULATION, TOTAL)] == list(expected)


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ({TOTAL: 25}, (), "train_batch_size is 25, not a multiple of 1 accumulation steps x 2 data-parallel ranks = 2"),
        ({TOTAL: 24, MICRO: 5}, (), "train_batch_size is 24, not a multiple of 5 rows x 2 data-parallel ranks = 10"),
        (
            {TOTAL: 24, ACCUMULATION: 16}, (),
            "train_batch_size is 24, not a multiple of 16 accumulation steps x 2 data-parallel ranks = 32",
        ),
        (
            {TOTAL: 24, MICRO: 3, ACCUMULATION: 4}, (6, None),
            "train_batch_size is 24, but 6 rows x 4 accumulation steps x 2 data-parallel ranks = 48",
        ),
        (
            {}, (10**6, None),
            "1000000 rows x 1 accumulation steps x 2 data-parallel ranks = 2000000 rows per step, expected at most "
            "1000000",
        ),
    ],
)  # fmt: skip
def test_resolve_batch_size_sizes_that_disagree_or_are_too_large_are_refused(config, flags, message):
    assert refusal(deepspeed_config.resolve_batch_size, config, 2, *flags) == message


@pytest.mark.parametrize(
    ("config", "ranks", "flags", "expected"),
    [
        ({MICRO: 8, ACCUMULATION: 1}, 4, (), (6, 1, 24)),
        ({MICRO: 4, ACCUMULATION: 7}, 2, (), (4, 3, 24)),
        ({MICRO: 4, ACCUMULATION: 7}, 2, (2, None), (2, 6, 24)),
        ({}, 2, (), (1, 12, 24)),
        ({TOTAL: 24}, 4, (), (6, 1, 24)),
        ({TOTAL: 24, MICRO: 8}, 4, (), (6, 1, 24)),
        ({TOTAL: 24, ACCUMULATION: 8}, 4, (), (1, 6, 24)),
        ({TOTAL: 24, ACCUMULATION: 2}, 2, (), (6, 2, 24)),
        # Not possible with 5 ranks, or 5 rows per micro-batch: the caller compares the result with the resumed run.
        ({MICRO: 8, ACCUMULATION: 3}, 5, (), (8, 3, 120)),
        ({MICRO: 4, ACCUMULATION: 7}, 2, (5, None), (5, 7, 70)),
    ],
)
def test_resolve_batch_size_resumed_run_keeps_its_global_batch(config, ranks, flags, expected):
    resume = SimpleNamespace(state={"data": {"global_batch_size": 24}})
    assert deepspeed_config.resolve_batch_size(config, ranks, *(flags or (None, None)), resume) == expected


@pytest.mark.parametrize("value", [0, -2, 2.0, "auto", True, None])
@pytest.mark.parametrize("key", deepspeed_config.BATCH_KEYS)
def test_resolve_batch_size_other_than_a_positive_integer_is_refused(key, value):
    message = refusal(deepspeed_config.resolve_batch_size, {key: value}, 1)
    assert message == f"{key} is {value!r}, expected a positive integer"


# -------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("config", "flag", "dtype", "line"),
    [
        ({}, None, torch.float32, "precision: fp32 (the JSON says so)"),
        ({"bf16": True}, None, torch.float32, "precision: fp32 (the JSON says bf16, but there is no GPU)"),
        ({"fp16": True}, None, torch.float32, "precision: fp32 (the JSON says fp16, but there is no GPU)"),
        ({"bf16": True}, "bf16", torch.bfloat16, "precision: bf16 (--precision)"),
        ({"bf16": True}, "fp32", torch.float32, "precision: fp32 (--precision)"),
    ],
)
def test_set_precision_without_a_gpu(config, flag, dtype, line):
    config = {name: {"enabled": enabled} for name, enabled in config.items()}
    config |= {"data_types": {"grad_accum_dtype": "fp32"}}
    config["fp16"] = {"initial_scale_power": 16} | config.get("fp16", {})
    assert deepspeed_config.set_precision(config, CPU, flag) == (dtype, line)
    assert config["bf16"]["enabled"] is (dtype == torch.bfloat16) and config["fp16"]["enabled"] is False
    assert config["fp16"]["initial_scale_power"] == 16
    assert ("data_types" in config) is (dtype == torch.bfloat16)


def test_set_precision_fp16_without_a_gpu_is_refused():
    message = refusal(deepspeed_config.set_precision, {}, CPU, "fp16")
    assert "--precision fp16" in message and "GPU" in message


def test_set_precision_on_a_gpu_without_bf16_is_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device = torch.device("cuda", 0)
    config = {"bf16": {"enabled": True}}
    dtype, line = deepspeed_config.set_precision(config, device)
    assert dtype is torch.float16
    assert line == "precision: fp16 (the JSON says bf16, but Tesla T4 does not support it)"
    assert config["fp16"]["enabled"] is True and config["bf16"]["enabled"] is False
    assert "Tesla T4 does not support bf16" in refusal(deepspeed_config.set_precision, {}, device, "bf16")
