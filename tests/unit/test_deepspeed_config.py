"""The DeepSpeed JSON: what is refused and in which words, and what the flags make of it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import deepspeed_config
from common.errors import UserError

SHIPPED = Path(__file__).parents[2] / "pipeline" / "ds_pipeline.json"
CPU = torch.device("cpu")


def written(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ load


def test_shipped_config_loads_and_passes():
    config = deepspeed_config.load(SHIPPED)
    deepspeed_config.check_pipeline(config)
    assert config == json.loads(SHIPPED.read_text())
    assert deepspeed_config.resolve_batch_size(config, 2) == (2, 16, 64)


def test_files_that_are_no_config(tmp_path):
    message = refusal(deepspeed_config.load, tmp_path / "nothing.json")
    assert str(tmp_path / "nothing.json") in message and "No such file" in message
    message = refusal(deepspeed_config.load, written(tmp_path, '{"bf16": {"enabled": true},}'))
    assert "ds.json is not JSON" in message and "line 1" in message
    assert "holds a list, not an object" in refusal(deepspeed_config.load, written(tmp_path, "[1]"))
    assert "'bf16' holds True, not an object" in refusal(deepspeed_config.load, written(tmp_path, {"bf16": True}))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    assert "is not JSON" in refusal(deepspeed_config.load, tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("content", "key", "suggestion"),
    [
        ({"gradient_clippin": 1.0}, "gradient_clippin", "gradient_clipping"),
        ({"zero_optimisation": {"stage": 1}}, "zero_optimisation", "zero_optimization"),
        ({"zero_optimization": {"offload_optimiser": {}}}, "zero_optimization.offload_optimiser", "offload_optimizer"),
        ({"fp16": {"enable": True}}, "fp16.enable", "enabled"),
        ({"bf16": {"enabeld": True}}, "bf16.enabeld", "enabled"),
        ({"pipeline": {"stagess": 2}}, "pipeline.stagess", "stages"),
    ],
)
def test_unknown_keys(tmp_path, content, key, suggestion):
    message = refusal(deepspeed_config.load, written(tmp_path, content))
    assert f"no key '{key}'" in message
    assert f"did you mean '{suggestion}'?" in message


def test_unknown_key_unlike_any_other(tmp_path):
    message = refusal(deepspeed_config.load, written(tmp_path, {"qqq": 1}))
    assert message.endswith("no key 'qqq'")


def nested(dotted, value):
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize("key", deepspeed_config.REFUSED)
def test_load_refused_key_says_what_to_use_instead(tmp_path, key):
    for value in (True, {"enabled": False}):
        path = written(tmp_path, nested(key, value))
        assert refusal(deepspeed_config.load, path) == f"{path}: '{key}' {deepspeed_config.REFUSED[key]}"


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
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 0},
    }  # fmt: skip
    assert deepspeed_config.load(written(tmp_path, content)) == content


def test_both_precisions(tmp_path):
    message = refusal(deepspeed_config.load, written(tmp_path, {"fp16": {"enabled": True}, "bf16": {"enabled": True}}))
    assert "both fp16 and bf16" in message
    deepspeed_config.load(written(tmp_path, {"fp16": {"enabled": False}, "bf16": {"enabled": True}}))


# ------------------------------------------------------------------------------------------------------ batch


def test_batch_sizes_from_json_and_flags():
    assert deepspeed_config.resolve_batch_size({}, 4) == (1, 1, 4)
    assert deepspeed_config.resolve_batch_size({"train_batch_size": 24}, 2, 3, 4) == (3, 4, 24)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 16}
    assert deepspeed_config.resolve_batch_size(config, 2, accumulation_steps=3) == (2, 3, 12)
    assert config == {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "train_batch_size": 12,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"checkpoint": None}, "'checkpoint' holds None, not an object"),
        ({"flops_profiler": True}, "'flops_profiler' holds True, not an object"),
        ({"bf16": {"enabled": "false"}}, "'bf16.enabled' is 'false', not true or false"),
    ],
)
def test_load_wrong_type_is_refused(tmp_path, config, says):
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert says in refusal(deepspeed_config.load, tmp_path / "ds.json")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"zero_optimization": {"stage": True}}, "stage is True, the pipeline runs with 1"),
        (
            {"zero_optimization": {"stage": 1}, "pipeline": {"activation_checkpoint_interval": 0.5}},
            "is 0.5, not a whole",
        ),
    ],
)
def test_check_pipeline_wrong_type_is_refused(config, says):
    assert says in refusal(deepspeed_config.check_pipeline, config)


@pytest.mark.parametrize("error", [AttributeError("no attribute"), ImportError("No module named 'tensorboard'")])
def test_refusals_turns_errors_of_deepspeed_into_one_line(error):
    with pytest.raises(UserError, match=r"DeepSpeed refuses ds\.json: "), deepspeed_config.config_errors("ds.json"):
        raise error


def test_batch_equation():
    message = refusal(
        deepspeed_config.resolve_batch_size, {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2}, 3, None, 5
    )
    assert "train_batch_size is 64" in message
    assert "2 rows x 5 accumulation steps x 3 data-parallel ranks = 30" in message


MICRO, ACCUMULATION, TOTAL = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({TOTAL: 24, MICRO: 3}, (), (3, 4, 24)),
        ({TOTAL: 24, ACCUMULATION: 3}, (), (4, 3, 24)),
        ({TOTAL: 24}, (), (12, 1, 24)),
        ({TOTAL: 24, MICRO: 3, ACCUMULATION: 4}, (), (3, 4, 24)),
        ({MICRO: 3}, (), (3, 1, 6)),
        ({ACCUMULATION: 3}, (), (1, 3, 6)),
        ({TOTAL: 24, MICRO: 3}, (6, None), (6, 2, 24)),
        ({TOTAL: 24, MICRO: 3}, (None, 4), (3, 4, 24)),
        ({TOTAL: 24, ACCUMULATION: 3}, (None, 6), (2, 6, 24)),
        ({TOTAL: 24}, (3, None), (3, 4, 24)),
        ({TOTAL: 24, MICRO: 5, ACCUMULATION: "auto"}, (3, 4), (3, 4, 24)),
    ],
)
def test_set_batch_train_batch_size_determines_missing_keys(config, flags, expected):
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
    ],
)  # fmt: skip
def test_set_batch_sizes_that_disagree_are_one_error(config, flags, message):
    assert refusal(deepspeed_config.resolve_batch_size, config, 2, *flags) == message


@pytest.mark.parametrize("name", ["zero/ds_zero1", "zero/ds_zero3", "offload/ds_zero2_offload", "pipeline/ds_pipeline"])
def test_set_batch_shipped_config_gives_its_own_sizes(name):
    config = json.loads((SHIPPED.parents[1] / f"{name}.json").read_text())
    micro, accumulation = config[MICRO], config[ACCUMULATION]
    assert deepspeed_config.resolve_batch_size(config, 2) == (micro, accumulation, 2 * micro * accumulation)


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
def test_set_batch_resume_keeps_the_global_batch(config, ranks, flags, expected):
    resume = SimpleNamespace(state={"data": {"global_batch_size": 24}})
    assert deepspeed_config.resolve_batch_size(config, ranks, *(flags or (None, None)), resume) == expected


@pytest.mark.parametrize("value", [0, -2, 2.0, "auto", True, None])
@pytest.mark.parametrize("key", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"])
def test_batch_sizes_that_are_none(key, value):
    message = refusal(deepspeed_config.resolve_batch_size, {key: value}, 1)
    assert message == f"{key} is {value!r}, not a positive integer"


# --------------------------------------------------------------------------------------------------- pipeline


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_pipeline_shards_optimizer_states_only(stage):
    message = refusal(deepspeed_config.check_pipeline, {"zero_optimization": {"stage": stage}})
    assert f"stage is {stage}" in message and "runs with 1" in message


def test_pipeline_has_no_breakdown():
    breakdown = {"zero_optimization": {"stage": 1}, "wall_clock_breakdown": True}
    assert "wall_clock_breakdown" in refusal(deepspeed_config.check_pipeline, breakdown)


def test_pipeline_config_that_runs():
    deepspeed_config.check_pipeline({"zero_optimization": {"stage": 1}, "wall_clock_breakdown": False})


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_pipeline_offloads_nothing(key):
    config = {"zero_optimization": {"stage": 1, key: {"device": "cpu"}}}
    assert f"zero_optimization.{key}" in refusal(deepspeed_config.check_pipeline, config)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"gradient_clipping": "one"}, "gradient_clipping"),
        ({"gradient_clipping": -1}, "gradient_clipping"),
        ({"steps_per_print": 0}, "steps_per_print"),
        ({"pipeline": {"activation_checkpoint_interval": "x"}}, "activation_checkpoint_interval"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}, "zero_optimization"),
    ],
)
def test_values_that_deepspeed_would_fall_over_later(tmp_path, content, key):
    assert f"'{key}'" in refusal(deepspeed_config.load, written(tmp_path, content))


# ----------------------------------------------------------------------------------------------- zero, offload

TO_CPU = {"device": "cpu"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_configs_of_zero_and_offload(stage):
    zero, offload = (
        deepspeed_config.load(SHIPPED.parents[1] / name)
        for name in (f"zero/ds_zero{stage}.json", f"offload/ds_zero{stage}_offload.json")
    )
    assert deepspeed_config.check_zero(zero, offload=False) == stage
    assert deepspeed_config.check_zero(offload, offload=True) == stage
    with pytest.raises(UserError, match=r"offload/train\.py"):
        deepspeed_config.check_zero(offload, offload=False)
    with pytest.raises(UserError, match=r"zero/train\.py"):
        deepspeed_config.check_zero(zero, offload=True)


@pytest.mark.parametrize(
    ("zero", "offload", "says"),
    [
        ({"stage": 2, "offload_optimizer": TO_CPU, "offload_param": TO_CPU}, True, ["offload_param", "stage 2"]),
        ({"stage": 3, "offload_param": TO_CPU}, True, ["offload_optimizer.device is not 'cpu'", "zero/train.py"]),
        ({"stage": 3, "offload_param": TO_CPU}, False, ["offload/train.py", "zero/train.py"]),
        ({"stage": 0, "offload_optimizer": TO_CPU}, True, ["offload_optimizer", "stage 0"]),
        ({"offload_optimizer": TO_CPU}, True, ["offload_optimizer", "stage 0"]),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, True, ["offload_optimizer.device is 'nvme'", "'cpu'"]),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, False, ["offload_param.device is 'nvme'"]),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, True, ["is not 'cpu'"]),
        ({"stage": 2, "cpu_offload": True}, False, ["cpu_offload", "offload_optimizer"]),
        ({"stage": 3, "cpu_offload_param": True}, True, ["cpu_offload_param", "old name for offload_param"]),
        ({"stage": 4}, False, ["stage is 4", "0, 1, 2 or 3"]),
        ({"stage": "2"}, False, ["stage is '2'"]),
        ({"stage": True}, False, ["stage is True"]),
    ],
)
def test_zero_configs_that_contradict(zero, offload, says):
    with pytest.raises(UserError) as caught:
        deepspeed_config.check_zero({"zero_optimization": zero}, offload=offload)
    assert "\n" not in str(caught.value) and all(words in str(caught.value) for words in says)


def test_zero_configs_that_run():
    assert deepspeed_config.check_zero({}, offload=False) == 0
    assert deepspeed_config.check_zero({"zero_optimization": {"stage": 3, "offload_param": None}}, offload=False) == 3
    nothing = {"stage": 2, "offload_optimizer": {"device": "none"}}
    assert deepspeed_config.check_zero({"zero_optimization": nothing}, offload=False) == 2
    alone = {"stage": 3, "offload_optimizer": TO_CPU}
    assert deepspeed_config.check_zero({"zero_optimization": alone}, offload=True) == 3


def test_a_pipeline_section_is_for_the_pipeline():
    with pytest.raises(UserError, match=r"'pipeline'.*pipeline/train\.py"):
        deepspeed_config.check_zero({"zero_optimization": {"stage": 2}, "pipeline": {}}, offload=False)


# -------------------------------------------------------------------------------------------------- precision


def test_without_a_gpu_the_jsons_bf16_becomes_fp32():
    config = deepspeed_config.load(SHIPPED)
    dtype, line = deepspeed_config.set_precision(config, CPU)
    assert dtype is torch.float32
    assert line == "precision: fp32 (the JSON says bf16, but there is no GPU)"
    assert config["bf16"]["enabled"] is config["fp16"]["enabled"] is False
    assert config["fp16"]["initial_scale_power"] == 16


def test_without_a_gpu_the_flag_still_decides():
    config = deepspeed_config.load(SHIPPED) | {"data_types": {"grad_accum_dtype": "fp32"}}
    dtype, line = deepspeed_config.set_precision(config, CPU, "bf16")
    assert dtype is torch.bfloat16
    assert line == "precision: bf16 (--precision)"
    assert config["bf16"]["enabled"] is True and config["fp16"]["enabled"] is False
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    dtype, line = deepspeed_config.set_precision(config, CPU, "fp32")
    assert dtype is torch.float32 and line == "precision: fp32 (--precision)"
    assert config["bf16"]["enabled"] is False
    assert "data_types" not in config


def test_without_a_gpu_fp16_is_refused():
    message = refusal(deepspeed_config.set_precision, {}, CPU, "fp16")
    assert "--precision fp16" in message and "GPU" in message
    dtype, line = deepspeed_config.set_precision({"fp16": {"enabled": True}}, CPU)
    assert dtype is torch.float32 and "the JSON says fp16" in line


def test_a_json_without_precision_is_fp32():
    assert deepspeed_config.set_precision({}, CPU) == (torch.float32, "precision: fp32 (the JSON says so)")


def test_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device = torch.device("cuda", 0)
    config = {"bf16": {"enabled": True}}
    dtype, line = deepspeed_config.set_precision(config, device)
    assert dtype is torch.float16
    assert line == "precision: fp16 (the JSON says bf16, but Tesla T4 has none)"
    assert config["fp16"]["enabled"] is True and config["bf16"]["enabled"] is False
    assert "Tesla T4 has no bf16" in refusal(deepspeed_config.set_precision, {}, device, "bf16")
