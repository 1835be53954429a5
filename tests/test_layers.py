"""The pipeline's layers against plain Hugging Face in float32, and how they are dealt out to stages."""

import functools
import itertools
import json
import math
import random
import re
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import BackwardPass
from runs import ROOT
from token_rows import ids_in_row, rows_of_documents
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from common import memory, sample
from common.attention import attention_arguments, choose_attention
from common.errors import UserError
from common.pretrained import PretrainedWeights
from pipeline import layers, partition

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
MODELS = [(model_type, tied) for model_type in CONFIGS for tied in (True, False)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny: a second thread has nothing to do but wait for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: f"{model[0]}-{'tied' if model[1] else 'untied'}")
def models(request, tmp_path_factory):
    """(HF model, the pipeline's layers with its weights, read back from the model's files)."""
    model_type, tied = request.param
    config = CONFIGS[model_type](
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0}, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    if model_type == "mistral":
        config.sliding_window = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases included; large enough that attention is uneven
            parameter.add_(torch.randn_like(parameter) * 0.3)
    directory = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return model, load_pipe(model.config, directory)


def load_pipe(config, directory):
    """All layers of the sequence on one would-be stage."""
    layers.check_architecture(config)
    modules = [spec.build() for spec in layers.layer_specs(config, num_stages=2)]
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, torch.nan)  # nothing may stay as it was made
    stage = SimpleNamespace(forward_funcs=modules, parts=[0, len(modules)], stage_id=0)
    layers.load_pretrained(stage, PretrainedWeights(directory), config)
    return modules


def pipe_logits(pipe, batch):
    hidden = batch["input_ids"], batch["position_ids"]
    for layer in pipe:
        hidden = layer(hidden)
    return hidden


def random_documents(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 101, (length,), generator=generator, dtype=torch.int32).numpy() for length in lengths]


def one_document(length):
    (document,) = random_documents([length])
    return rows_of_documents([document], length).collate([0], 0)


def tokens_in_row(rows, row):
    """(token ids of a document, its first place) for the documents of a row; none is cut."""
    place = 0
    for ids in ids_in_row(rows, row):
        yield torch.tensor(ids).long(), place
        place += len(ids)


LENGTHS = [5, 9, 3, 16, 7, 2, 11, 4, 8]

# --------------------------------------------------------------------------------------------------- logits


@torch.no_grad()
def test_one_document_has_hfs_logits_to_the_bit(models):
    model, pipe = models
    batch = one_document(24)
    expected = model(batch["input_ids"], use_cache=False).logits
    assert torch.equal(pipe_logits(pipe, batch), expected)
    assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("packing", [True, False])
def test_documents_in_rows_have_the_logits_of_each_alone(models, packing):
    model, pipe = models
    rows = rows_of_documents(random_documents(LENGTHS), 24, packing)
    assert not packing or max(len(ids_in_row(rows, row)) for row in range(len(rows))) >= 3
    logits = pipe_logits(pipe, rows.collate(range(len(rows)), 0))
    for row in range(len(rows)):
        for ids, place in tokens_in_row(rows, row):
            alone = model(ids[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits[row, place : place + len(ids)], alone, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_a_later_token_changes_no_earlier_logit(models, packed):
    _, pipe = models
    rows = rows_of_documents(random_documents([8, 6, 10] if packed else [24]), 24)
    batch = rows.collate([0], 0)
    before = pipe_logits(pipe, batch)
    for place in range(24):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, place] = (batch["input_ids"][0, place] + 50) % 101
        differs = (pipe_logits(pipe, changed) != before).any(-1)[0].nonzero().flatten()
        # The token itself and those behind it in its document, no other.
        end = next((end for end in (8, 14, 24) if place < end), None) if packed else 24
        assert differs.min() == place
        assert differs.max() == end - 1


def test_a_row_with_other_documents_is_seen_after_one_with_its_own(models):
    """What the stage keeps of a micro-batch goes as soon as the next one comes."""
    model, pipe = models
    for lengths in ([24], [10, 14], [5, 19], [24]):
        rows = rows_of_documents(random_documents(lengths), 24)
        with torch.no_grad():
            logits = pipe_logits(pipe, rows.collate([0], 0))[0]
            expected = torch.cat([
                model(torch.tensor(ids).long()[None], use_cache=False).logits[0] for ids in ids_in_row(rows, 0)
            ])  # fmt: skip
        torch.testing.assert_close(logits, expected, **CLOSE)


# ----------------------------------------------------------------------------------------------------- loss


def hf_loss(model, documents):
    """Cross entropy over all targets of all documents, each run alone."""
    total, targets = 0.0, 0
    for ids in documents:
        ids = torch.from_numpy(ids).long()[None]
        logits = model(ids, use_cache=False).logits[0, :-1]
        total = total + cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
        targets += ids.numel() - 1
    return total / targets


def pipe_losses(pipe, rows, micro_batch_size):
    """What the engine would average: one loss a micro-batch; and the targets of each."""
    numbers = list(range(len(rows))) + [-1] * (-len(rows) % micro_batch_size)
    micro_batches = [numbers[i : i + micro_batch_size] for i in range(0, len(numbers), micro_batch_size)]
    targets = [rows.count(micro_batch)[1] for micro_batch in micro_batches]
    share = torch.tensor([sum(targets) / len(targets)])
    batches = [rows.collate(micro_batch, 0) for micro_batch in micro_batches]
    return [layers.causal_lm_loss(pipe_logits(pipe, batch), (batch["labels"], share)) for batch in batches], targets


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_over_uneven_micro_batches_are_hfs(models, packing):
    model, pipe = models
    documents = random_documents([24, 23, 24, 24, 4, 3, 2])
    rows = rows_of_documents(documents, 24, packing)
    losses, targets = pipe_losses(pipe, rows, 2)
    assert max(targets) >= 3 * min(targets)
    expected = hf_loss(model, documents)
    loss = sum(losses) / len(losses)
    torch.testing.assert_close(loss, expected, **CLOSE)
    # Without the weights a token of a short micro-batch would count for more.
    means = [loss * sum(targets) / len(targets) / own for loss, own in zip(losses, targets, strict=True)]
    assert abs(sum(means) / len(means) - expected) > 1e-2

    model.zero_grad()
    expected.backward()
    parameters = [p for layer in pipe for p in layer.parameters()]
    gradients = dict(zip(map(id, parameters), torch.autograd.grad(loss, parameters), strict=True))
    ours = {}
    for index, layer in enumerate(pipe):
        for key, name in layers.layer_keys(index, dict(model.named_parameters()), len(pipe) - 3).items():
            ours[name] = gradients[id(layer.get_parameter(key))]
    if model.config.tie_word_embeddings:  # the sum that the engine makes over the tied pair
        ours["model.embed_tokens.weight"] = ours["model.embed_tokens.weight"] + gradients[id(pipe[-1].weight)]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_loss_of_padded_and_packed_rows_is_the_same(models):
    model, pipe = models
    documents = random_documents(LENGTHS)
    both = []
    for packing in (True, False):
        losses, _ = pipe_losses(pipe, rows_of_documents(documents, 16, packing), 3)
        both.append(sum(losses) / len(losses))
    torch.testing.assert_close(both[0], both[1], **CLOSE)
    torch.testing.assert_close(both[0], hf_loss(model, documents), **CLOSE)


def test_a_micro_batch_without_targets_adds_nothing():
    logits = torch.randn(2, 8, 11, requires_grad=True)
    loss = layers.causal_lm_loss(logits, (torch.full((2, 8), -100), torch.tensor([5.0])))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("limits", [(), (9, 16)])
def test_varlen_is_told_where_documents_begin(limits):
    rows = rows_of_documents(random_documents([16, 5, 5, 2, 3, 9, 2, 2, 2, 2, 16, 12]), 16)
    positions = rows.collate([*range(len(rows)), -1], 0)["position_ids"]
    arguments = attention_arguments("varlen", positions, *limits)
    begins = []
    for row in range(len(positions)):
        for t in range(16):
            if positions[row, t] == 0:
                begins.append(row * 16 + t)
    total = 16 * len(positions)
    places = len(positions) * (limits[0] if limits else 16) + 1
    cu_seqlens = arguments["cu_seqlens"]
    assert cu_seqlens.dtype == torch.int32
    # Behind the last document come empty ones, and the last number of all is the end.
    assert cu_seqlens.tolist() == begins + [total] * (places - len(begins))
    assert len(begins) < places - 1
    assert arguments["max_seqlen"] == 16
    assert arguments["attention_mask"] is None


def test_varlen_with_every_place_taken():
    arguments = attention_arguments("varlen", torch.zeros(2, 3, dtype=torch.int64), 3, 1)
    assert arguments["cu_seqlens"].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_sdpa_mask():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]])
    mask = attention_arguments("sdpa", positions)["attention_mask"]
    documents = [[0, 0, 0, 1, 1], [0, 0, 1, 2, 2]]
    for row, query, key in itertools.product(range(2), range(5), range(5)):
        may = key <= query and documents[row][query] == documents[row][key]
        assert bool(mask[row, 0, query, key]) is may
    assert attention_arguments("sdpa", torch.arange(5)[None])["attention_mask"] is None


@pytest.mark.parametrize(
    ("capability", "dtype", "dropout", "expected"),
    [
        ((8, 0), torch.bfloat16, 0.0, "varlen"),
        ((9, 0), torch.float16, 0.0, "varlen"),
        ((7, 5), torch.float16, 0.0, "sdpa_no_gqa"),
        ((9, 0), torch.float32, 0.0, "sdpa_no_gqa"),
        ((9, 0), torch.float16, 0.1, "sdpa_no_gqa"),
    ],
)
def test_choose_attention_by_capability(monkeypatch, capability, dtype, dropout, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    config = LlamaConfig(attention_dropout=dropout)
    assert choose_attention(config, torch.device("cuda", 0), dtype) == expected
    assert choose_attention(config, torch.device("cpu"), dtype) == "sdpa"


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_no_gqa_equals_hf_without_asking_for_grouped_heads(monkeypatch, masked):
    """`enable_gqa` is what makes PyTorch fall back to the math kernel below compute capability 8.0."""
    query, (key, value) = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 2, 5, 8)
    mask = attention_arguments("sdpa", torch.tensor([[0, 1, 2, 0, 1]] * 2))["attention_mask"] if masked else None
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.25)
    asked = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        asked.append((key.shape[1], kwargs.get("enable_gqa", False)))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa_no_gqa"](module, query, key, value, mask, scaling=0.25)
    assert asked == [(6, False)]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MistralConfig(sliding_window=4096), "sliding_window=4096"),
        (Qwen2Config(use_sliding_window=True, sliding_window=1024, max_window_layers=2), "sliding_window=1024"),
        (Qwen3Config(use_sliding_window=True, sliding_window=512, max_window_layers=2), "sliding_window=512"),
        (GPT2Config(), "'gpt2'"),
    ],
    ids=["mistral", "qwen2", "qwen3", "gpt2"],
)
def test_architectures_that_are_refused(config, says):
    with pytest.raises(UserError) as caught:
        layers.check_architecture(config)
    message = str(caught.value)
    assert says in message
    assert "llama, mistral, qwen2, qwen3" in message if "gpt2" in says else "whole documents" in message


def test_a_window_that_is_off_is_no_window():
    layers.check_architecture(MistralConfig(sliding_window=None))
    layers.check_architecture(Qwen2Config(use_sliding_window=False, sliding_window=1024))
    layers.check_architecture(LlamaConfig())


# -------------------------------------------------------------------------------------------- DeepSpeed's list


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        yield
        dist.destroy_process_group()


def test_deepspeeds_module_on_one_stage_is_the_same_model(models, one_rank, tmp_path):
    model, _ = models
    model.save_pretrained(tmp_path)
    config = model.config
    bounds = partition.partition(config, 1, "balanced", 10)
    pipeline = layers.PartitionedPipeline(layers.layer_specs(config, 1), bounds, loss_fn=layers.causal_lm_loss)
    layers.load_pretrained(pipeline, PretrainedWeights(tmp_path), config)
    batch = one_document(24)
    with torch.no_grad():
        logits = pipeline((batch["input_ids"], batch["position_ids"]))
        assert torch.equal(logits.cpu(), model(batch["input_ids"], use_cache=False).logits)
    embedding, head = pipeline.forward_funcs[0], pipeline.forward_funcs[-1]
    assert (embedding.weight is head.weight) is config.tie_word_embeddings
    assert sum(p.numel() for p in pipeline.parameters()) == sum(p.numel() for p in model.parameters())


def test_weights_of_another_shape_are_refused(models, tmp_path):
    model, _ = models
    model.save_pretrained(tmp_path)
    wider = type(model.config).from_dict({**model.config.to_dict(), "vocab_size": 102})
    wider.sliding_window = None
    with pytest.raises(UserError, match=r"embed_tokens.weight.*10[12]"):
        load_pipe(wider, tmp_path)


# --------------------------------------------------------------------------------------------------- stages

LLAMA_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


def brute_force(costs, num_stages):
    """The slowest stage of the best cut in which every stage has something to do."""
    results = []
    for cut in itertools.combinations(range(1, len(costs)), num_stages - 1):
        stages = [costs[a:b] for a, b in itertools.pairwise((0, *cut, len(costs)))]
        if all(any(stage) for stage in stages):
            results.append(max(map(sum, stages)))
    return min(results)


@pytest.mark.parametrize("seed", range(40))
def test_balance_finds_the_best_cut(seed):
    draw = random.Random(seed)
    count = draw.randint(2, 7)
    costs = [0, *[draw.choice((5, draw.randint(1, 20))) for _ in range(count)], 0, draw.randint(1, 40)]
    for num_stages in range(1, count + 2):
        bounds = memory.balance(costs, num_stages)
        assert bounds[0] == 0 and bounds[-1] == len(costs) and len(bounds) == num_stages + 1
        stages = [costs[a:b] for a, b in itertools.pairwise(bounds)]
        assert all(any(stage) for stage in stages)
        assert max(map(sum, stages)) == brute_force(costs, num_stages)


def decoder_layers(bounds, count):
    """Decoder layers per stage, from the bounds."""
    return [sum(1 <= layer <= count for layer in range(a, b)) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("mean_context_len", [1, 60, 128, 512])
def test_llama_1b_on_two_stages_is_cut_10_to_6(mean_context_len):
    bounds = partition.partition(LLAMA_1B, 2, "balanced", mean_context_len)
    assert bounds == [0, 11, 19]
    assert decoder_layers(bounds, 16) == [10, 6]


def peak_of_llama_1b(dtype=torch.float16, micro_batches=16, rows=2, length=1024, num_stages=2):
    return functools.partial(
        memory.stage_peak, LLAMA_1B, memory.layer_sizes(LLAMA_1B), num_stages, dtype=dtype, dp_world_size=1,
        micro_batches=micro_batches, rows=rows, length=length,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gib", "length", "counts", "checkpointing"),
    [
        (78, 1024, [10, 6], False),
        (22.5, 1024, [10, 6], False),
        (13.5, 1024, [8, 8], True),  # two T4s: the README's command
        (13.5, 512, [8, 8], False),  # and the seed's
    ],
)
def test_plan_stages_fits_llama_1b_into_small_gpus(gib, length, counts, checkpointing):
    peak = peak_of_llama_1b(length=length)
    bounds, recompute = partition.plan_stages(LLAMA_1B, 2, "balanced", 60, peak, gib * memory.GIB)
    assert (decoder_layers(bounds, 16), recompute) == (counts, checkpointing)
    assert all(peak(s, *part, recompute) < gib * memory.GIB for s, part in enumerate(itertools.pairwise(bounds)))


def test_plan_stages_keeps_what_is_given():
    plan = functools.partial(partition.plan_stages, LLAMA_1B, 2)
    peak, small = peak_of_llama_1b(), 13.5 * memory.GIB
    assert plan("balanced", 60, peak, math.inf) == ([0, 11, 19], False)
    assert plan("balanced", 60, peak, math.inf, checkpointing=True)[1] is True
    assert plan("balanced", 60, peak, small, checkpointing=False) == ([0, 9, 19], False)  # none fits, this one nearly
    assert plan("balanced", 60, peak, 5 * memory.GIB) == ([0, 11, 19], True)
    assert plan("10,6", 60, peak, small) == ([0, 11, 19], True)
    assert plan("balanced", 60, peak, small, bounds=[0, 10, 19]) == ([0, 10, 19], True)
    assert plan("balanced", 60, peak, math.inf, bounds=[0, 10, 19]) == ([0, 10, 19], False)


@pytest.mark.parametrize("seed", range(20))
def test_balance_with_limits_finds_the_best_split_that_fits(seed):
    draw = random.Random(seed)
    costs = [0, *[draw.randint(1, 20) for _ in range(6)], 0, draw.randint(1, 40)]
    limits = [draw.randint(1, 4) for _ in range(3)]  # layers per stage

    def fits(stage, start, end):
        return end - start <= limits[stage] + 2 * (start == 0 or end == len(costs))

    splits = [(0, *cut, len(costs)) for cut in itertools.combinations(range(2, 8), 2)]  # the norm stays with the head
    splits = [split for split in splits if all(fits(s, *part) for s, part in enumerate(itertools.pairwise(split)))]
    best = min((max(sum(costs[a:b]) for a, b in itertools.pairwise(split)) for split in splits), default=None)
    bounds = memory.balance(costs, 3, fits)
    assert (bounds and max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))) == best


MEASURED = json.loads((ROOT / "tests" / "benchmarks" / "results" / "pipeline.json").read_text())


@pytest.mark.parametrize("name", [name for name in MEASURED if name.startswith("as on two T4s")])
def test_stage_peak_is_what_was_measured(name):
    """Where PyTorch's own kernels ran, whose activations `layer_activations` counts."""
    said = "".join(MEASURED[name]["split"])
    first = int(re.search(r"(\d+) decoder layers", said)[1])
    length = int(re.search(r"(\d+) tokens", name)[1])
    peak = peak_of_llama_1b(length=length)
    checkpointing = "activation checkpointing: on" in said
    for stage, part in enumerate(itertools.pairwise([0, 1 + first, 19])):
        measured = MEASURED[name]["stages"][stage]["gpu_peak_gib"]
        assert peak(stage, *part, checkpointing) / memory.GIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("bounds", [[0, 4, 7], [0, 2, 7], [0, 1, 5, 7]])
def test_optimizer_groups_are_equally_many_on_all_stages(bounds):
    """DeepSpeed adds up the gradient norm over the stages group by group: with different counts it would hang."""
    config = AutoConfig.from_pretrained(sample.sample_model_directory("llama"))
    counts = set()
    for start, end in itertools.pairwise(bounds):
        built = [spec.build() for spec in layers.layer_specs(config, num_stages=2)[start:end]]
        groups = layers.optimizer_groups(SimpleNamespace(parts=bounds, forward_funcs=built))
        counts.add(len(groups))
        grouped = [parameter for group in groups for parameter in group["params"]]
        own = [parameter for layer in built for parameter in layer.parameters()]
        assert len(grouped) == len(own) and set(grouped) == set(own)
    assert counts == {min(end - start for start, end in itertools.pairwise(bounds))}


def test_reduce_memory_empties_the_buffer_after_the_backward_pass():
    seen = []
    engine = SimpleNamespace(
        _INSTRUCTION_MAP={
            BackwardPass: lambda engine, buffer_id: seen.append(engine.pipe_buffers["outputs"][buffer_id])
        },
        pipe_buffers={"outputs": ["logits 0", "logits 1"]},
    )
    layers.reduce_memory(engine, torch.float32)
    engine._INSTRUCTION_MAP[BackwardPass](engine, buffer_id=1)
    assert seen == ["logits 1"] and engine.pipe_buffers["outputs"] == ["logits 0", None]


def test_costs_and_parameters_of_llama_1b():
    untied = LlamaConfig(**{**LLAMA_1B.to_dict(), "tie_word_embeddings": False})
    for config in (LLAMA_1B, untied):
        sizes = memory.layer_sizes(config)
        assert len(sizes) == 19 and sizes[0] == sizes[18] == 128256 * 2048
        assert sum(sizes) == 1_235_814_400 + 128256 * 2048
    costs = memory.layer_costs(LLAMA_1B, 60)
    assert len(costs) == 19
    assert costs[0] == costs[17] == 0
    assert costs[18] / costs[1] == pytest.approx(4.3, abs=0.05)
    # A block: query and output 2048 x 2048, key and value 2048 x 512, three of 2048 x 8192, two norms.
    block = 2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048
    assert costs[1] == 6 * block + 12 * 64 * 32 * 60


def test_layer_sizes_are_those_of_the_layers(models):
    model, _ = models
    built = [spec.build() for spec in layers.layer_specs(model.config, num_stages=2)]
    assert memory.layer_sizes(model.config) == [sum(p.numel() for p in layer.parameters()) for layer in built]


@pytest.mark.parametrize(
    ("stages", "method", "expected"),
    [
        (1, "uniform", [16]),
        (2, "uniform", [8, 8]),
        (3, "uniform", [6, 5, 5]),
        (16, "uniform", [1] * 16),
        (2, "11,5", [11, 5]),
        (3, "9, 7, 0", [9, 7, 0]),
        (1, "balanced", [16]),
        (16, "balanced", None),
    ],
)
def test_partition(stages, method, expected):
    bounds = partition.partition(LLAMA_1B, stages, method, 60)
    assert bounds[0] == 0 and bounds[-1] == 19 and len(bounds) == stages + 1
    assert bounds == sorted(set(bounds))
    if expected:
        assert decoder_layers(bounds, 16) == expected


@pytest.mark.parametrize(
    ("stages", "method", "says"),
    [
        (17, "balanced", ["--num_stages 17", "16 decoder layers"]),
        (17, "uniform", ["--num_stages 17", "16 decoder layers"]),
        (2, "11,6", ["11,6", "17 decoder layers", "16"]),
        (3, "11,5", ["2 stages", "--num_stages is 3"]),
        (2, "17,-1", ["17,-1"]),
        (2, "evenly", ["'evenly'", "balanced, uniform"]),
        (2, "", ["''", "balanced, uniform"]),
        (2, "8,8.0", ["'8,8.0'", "balanced, uniform"]),
    ],
)
def test_partition_mistakes(stages, method, says):
    with pytest.raises(UserError) as caught:
        partition.partition(LLAMA_1B, stages, method, 60)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in says)


def test_partition_is_described():
    lines = partition.describe_partition(LLAMA_1B, [0, 11, 19], 16, 60)
    assert "embedding + 10 decoder layers (0-9)" in lines[0]
    assert "6 decoder layers (10-15) + norm and head" in lines[1]
    shares = [float(line.split("| ")[1].split("%")[0]) for line in lines[:2]]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    assert shares[0] == pytest.approx(100 * 10 / (16 + 4.3), abs=0.2)
    assert "1 / (16 micro-batches + 1) = 5.9%" in lines[2]
