"""The pipeline's layers against plain Hugging Face in float32, and what a stage makes of them."""

import itertools
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.schedule import BackwardPass
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

from common import memory, sample
from common.errors import UserError
from common.pretrained import PretrainedWeights
from helpers.token_rows import ids_in_row, rows_of_documents
from pipeline import layers, partition

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
MODELS = [(model_type, tied) for model_type in CONFIGS for tied in (True, False)]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny: a second thread would only wait."""
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
    """All layers of the sequence, as if on one stage."""
    layers.check_architecture(config)
    modules = [spec.build() for spec in layers.layer_specs(config, num_stages=2)]
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, torch.nan)  # every value has to be loaded
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
    """Yields (token ids of a document, its first place) for each document of a row."""
    place = 0
    for ids in ids_in_row(rows, row):
        yield torch.tensor(ids).long(), place
        place += len(ids)


LENGTHS = [5, 9, 3, 16, 7, 2, 11, 4, 8]

# --------------------------------------------------------------------------------------------------- logits


@torch.no_grad()
def test_layers_one_document_has_the_logits_of_hugging_face_bit_for_bit(models):
    model, pipe = models
    batch = one_document(24)
    expected = model(batch["input_ids"], use_cache=False).logits
    assert torch.equal(pipe_logits(pipe, batch), expected)
    assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("packing", [True, False])
def test_layers_packed_rows_have_the_logits_of_each_document(models, packing):
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
def test_layers_changed_token_changes_no_earlier_logit(models, packed):
    _, pipe = models
    rows = rows_of_documents(random_documents([8, 6, 10] if packed else [24]), 24)
    batch = rows.collate([0], 0)
    before = pipe_logits(pipe, batch)
    for place in range(24):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, place] = (batch["input_ids"][0, place] + 50) % 101
        differs = (pipe_logits(pipe, changed) != before).any(-1)[0].nonzero().flatten()
        # The token itself and those after it in its document.
        end = next((end for end in (8, 14, 24) if place < end), None) if packed else 24
        assert differs.min() == place
        assert differs.max() == end - 1


def test_layers_next_micro_batch_has_its_own_document_boundaries(models):
    """The stage must not reuse what it computed for the previous micro-batch."""
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
    """(the loss of each micro-batch, which the engine would average; the number of targets of each)."""
    numbers = list(range(len(rows))) + [-1] * (-len(rows) % micro_batch_size)
    micro_batches = [numbers[i : i + micro_batch_size] for i in range(0, len(numbers), micro_batch_size)]
    targets = [rows.count(micro_batch)[1] for micro_batch in micro_batches]
    share = torch.tensor([sum(targets) / len(targets)])
    batches = [rows.collate(micro_batch, 0) for micro_batch in micro_batches]
    return [layers.causal_lm_loss(pipe_logits(pipe, batch), (batch["labels"], share)) for batch in batches], targets


@pytest.mark.parametrize("packing", [True, False])
def test_causal_lm_loss_uneven_micro_batches_has_loss_and_gradients_of_hugging_face(models, packing):
    model, pipe = models
    documents = random_documents([24, 23, 24, 24, 4, 3, 2])
    rows = rows_of_documents(documents, 24, packing)
    losses, targets = pipe_losses(pipe, rows, 2)
    assert max(targets) >= 3 * min(targets)
    expected = hf_loss(model, documents)
    loss = sum(losses) / len(losses)
    torch.testing.assert_close(loss, expected, **CLOSE)
    # Divided by its own targets, a token of a short micro-batch would weigh more.
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
    if model.config.tie_word_embeddings:  # the engine sums the gradients of tied weights
        ours["model.embed_tokens.weight"] = ours["model.embed_tokens.weight"] + gradients[id(pipe[-1].weight)]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_causal_lm_loss_without_targets_is_zero():
    logits = torch.randn(2, 8, 11, requires_grad=True)
    loss = layers.causal_lm_loss(logits, (torch.full((2, 8), -100), torch.tensor([5.0])))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


# ------------------------------------------------------------------------------------------------ attention


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
def test_check_architecture_unsupported_config_raises(config, says):
    with pytest.raises(UserError) as caught:
        layers.check_architecture(config)
    message = str(caught.value)
    assert says in message
    assert "llama, mistral, qwen2, qwen3" in message if "gpt2" in says else "whole documents" in message


def test_check_architecture_unused_window_passes():
    layers.check_architecture(MistralConfig(sliding_window=None))
    layers.check_architecture(Qwen2Config(use_sliding_window=False, sliding_window=1024))
    layers.check_architecture(LlamaConfig())


# ------------------------------------------------------------------------------------- DeepSpeed's pipeline


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


def test_partitioned_pipeline_on_one_stage_is_the_same_model(models, one_rank, tmp_path):
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


def test_load_pretrained_another_shape_raises(models, tmp_path):
    model, _ = models
    model.save_pretrained(tmp_path)
    wider = type(model.config).from_dict({**model.config.to_dict(), "vocab_size": 102})
    wider.sliding_window = None
    with pytest.raises(UserError, match=r"embed_tokens.weight.*10[12]"):
        load_pipe(wider, tmp_path)


@pytest.mark.parametrize("bounds", [[0, 4, 7], [0, 2, 7], [0, 1, 5, 7]])
def test_optimizer_groups_have_the_same_number_on_all_stages(bounds):
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


def test_reduce_memory_frees_logits_after_their_backward_pass():
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


def test_layer_sizes_equal_those_of_the_built_layers(models):
    model, _ = models
    built = [spec.build() for spec in layers.layer_specs(model.config, num_stages=2)]
    assert memory.layer_sizes(model.config) == [sum(p.numel() for p in layer.parameters()) for layer in built]
