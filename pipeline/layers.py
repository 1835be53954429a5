"""A Llama-family model as a sequence of pipeline layers.

DeepSpeed runs a pipeline as a plain sequence: the output of one layer is the input of the next, on the same stage
or, sent there, on the next one. So every layer takes a tuple and, except for the head, returns one:

    EmbeddingPipe      (input_ids [B, T], position_ids [B, T])  ->  (hidden [B, T, H], position_ids)
    DecoderLayerPipe   (hidden, position_ids)                   ->  (hidden, position_ids)      x num_hidden_layers
    FinalNormPipe      (hidden, position_ids)                   ->  (hidden, position_ids)
    LMHeadPipe         (hidden, position_ids)                   ->  logits [B, T, V]

`position_ids` (int64) is passed along because it tells where each packed document begins: it restarts at 0.
"""

import importlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from deepspeed import PipelineEngine
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.schedule import BackwardPass
from deepspeed.runtime.zero import stage_1_and_2
from torch import nn
from transformers import PreTrainedConfig

from common.attention import attention_arguments
from common.errors import UserError
from common.loss import token_loss
from common.memory import balance
from common.models import ModelInfo
from common.pretrained import PretrainedWeights
from common.rows import Batch
from common.shards import LLAMA_FAMILY, check_tensors, find_layer_shards, layer_keys, load_layer


def family_class(config: PreTrainedConfig, suffix: str) -> type[nn.Module]:
    """Returns a class of the config's architecture, for the suffix "DecoderLayer" and Llama `LlamaDecoderLayer`.

    It is looked up only when a layer is built, because a kernel library may replace it before.
    """
    name = config.model_type
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return getattr(module, name.capitalize() + suffix)


def check_architecture(config: PreTrainedConfig) -> None:
    """Raises UserError for a config that this file has no layers for."""
    if config.model_type not in LLAMA_FAMILY:
        raise UserError(
            f"the pipeline has layers for {', '.join(LLAMA_FAMILY)}; this model's config says "
            f"model_type '{config.model_type}'"
        )
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    # Mistral has no `layer_types`: a window that is set is in use.
    windowed |= config.model_type == "mistral" and config.sliding_window is not None
    if windowed:
        raise UserError(
            f"the pipeline attends to whole documents, but this config uses sliding_window={config.sliding_window}, "
            "which needs a second mask (set it to null to train without the window)"
        )


class StageContext:
    """What all decoder layers of a stage need for the current micro-batch: rotary angles and attention arguments.

    The first decoder layer of a stage computes it, and the others reuse it until the next micro-batch. It is not an
    `nn.Module`, because DeepSpeed calls `module.bfloat16()`, which would round the rotary frequencies, float32 in plain
    Hugging Face too.

    Args:
        max_docs, max_seqlen: see `common.attention`.
    """

    def __init__(self, config: PreTrainedConfig, max_docs: int | None = None, max_seqlen: int | None = None):
        self.config, self.max_docs, self.max_seqlen = config, max_docs, max_seqlen
        self.rotary = family_class(config, "RotaryEmbedding")(config)
        self.position_ids: torch.Tensor | None = None
        self.arguments: dict[str, Any] = {}

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
        if self.position_ids is not position_ids:
            self.rotary.to(hidden.device)
            self.arguments = {
                "position_embeddings": self.rotary(hidden, position_ids),
                **attention_arguments(self.config._attn_implementation, position_ids, self.max_docs, self.max_seqlen),
            }
            self.position_ids = position_ids
        return self.arguments


class EmbeddingPipe(nn.Module):
    """Token embedding. Shard keys: `embed_tokens.weight` [V, H]."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)

    @property
    def weight(self) -> torch.Tensor:
        """The tied weight, under the one name that `TiedLayerSpec` looks for in both classes."""
        return self.embed_tokens.weight

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        input_ids, position_ids = inputs
        return self.embed_tokens(input_ids), position_ids


class DecoderLayerPipe(nn.Module):
    """One transformer block. Shard keys: `layer.*`, as in HF's decoder layer."""

    def __init__(self, config: PreTrainedConfig, layer_index: int, context: StageContext, compiled: bool = False):
        super().__init__()
        self.layer = family_class(config, "DecoderLayer")(config, layer_index)
        if compiled:
            # Only the block, not the context, which is computed once per stage. All blocks share one compiled graph.
            self.layer.compile(dynamic=False)
        self.context = context

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, position_ids = inputs
        hidden = self.layer(hidden, position_ids=position_ids, **self.context(hidden, position_ids))
        return hidden, position_ids


class FinalNormPipe(nn.Module):
    """The norm before the head. Shard keys: `norm.weight` [H]."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.norm = family_class(config, "RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, position_ids = inputs
        return self.norm(hidden), position_ids


class LMHeadPipe(nn.Module):
    """Logits over the vocabulary. Shard keys: `lm_head.weight` [V, H]."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def weight(self) -> torch.Tensor:
        """The tied weight, under the one name that `TiedLayerSpec` looks for in both classes."""
        return self.lm_head.weight

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        hidden, _ = inputs
        return self.lm_head(hidden)


def causal_lm_loss(logits: torch.Tensor, labels_and_targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A micro-batch's part of the loss of the global batch, in which every target token has the same weight.

    The engine averages this over micro-batches and replicas. So it is the sum over the micro-batch's targets, divided
    by the mean number of targets per micro-batch.

    Args:
        logits: [B, T, V].
        labels_and_targets: (labels [B, T], -100 for tokens without a loss; mean number of targets per micro-batch, a
            float tensor [1] because the engine takes only tensors).
    """
    labels, targets_per_micro_batch = labels_and_targets
    return token_loss(logits, labels) / targets_per_micro_batch[0]


def micro_batches(batch: Batch) -> Iterator[tuple[tuple, tuple]]:
    """Yields (inputs of the first layer, labels of `causal_lm_loss`), for `train_batch` and `eval_batch`.

    The first stage uses the inputs and the last one the labels, so both iterate over the same micro-batches. All have
    the same shape, because stages exchange tensors of a fixed size.
    """
    targets = torch.tensor([batch.targets_per_micro_batch], device=batch.loader.device)
    for tensors in batch.micro_batches(one_width=True):
        yield (tensors["input_ids"], tensors["position_ids"]), (tensors["labels"], targets)


def layer_specs(
    config: PreTrainedConfig,
    num_stages: int,
    max_docs: int | None = None,
    max_seqlen: int | None = None,
    compiled: bool = False,
) -> list[LayerSpec | nn.Module]:
    """Returns the whole model as specs, of which DeepSpeed builds only those of this rank's stage.

    If the config ties embedding and head, they stay one weight. On different stages each holds a copy; with
    `TiedLayerSpec` both start from the same values, and DeepSpeed sums their gradients. On a single stage DeepSpeed
    would build only the first of the two classes and call it twice, so there both modules are built here and share one
    `Parameter`, as in plain Hugging Face.

    Args:
        max_docs, max_seqlen: see `common.attention`.
        compiled: whether to use torch.compile on each decoder layer.
    """
    context = StageContext(config, max_docs, max_seqlen)
    embedding, head = LayerSpec(EmbeddingPipe, config), LayerSpec(LMHeadPipe, config)
    if config.tie_word_embeddings and num_stages > 1:
        embedding = TiedLayerSpec("embedding", EmbeddingPipe, config, tied_weight_attr="weight")
        head = TiedLayerSpec("embedding", LMHeadPipe, config, tied_weight_attr="weight")
    elif config.tie_word_embeddings:
        embedding, head = EmbeddingPipe(config), LMHeadPipe(config)
        head.lm_head.weight = embedding.embed_tokens.weight
    decoder = [
        LayerSpec(DecoderLayerPipe, config, index, context, compiled) for index in range(config.num_hidden_layers)
    ]
    return [embedding, *decoder, LayerSpec(FinalNormPipe, config), head]


def optimizer_groups(pipeline: PipelineModule) -> list[dict[str, Any]]:
    """Returns optimizer groups for this rank's stage: one per layer, or per few layers.

    At each step DeepSpeed copies the gradients of one group at a time to float32; a single group would take 4 bytes per
    parameter of the stage. All stages need the same number of groups, because DeepSpeed adds up the gradient norm over
    the stages group by group. So it is the number of layers of the stage with the fewest.
    """
    seen, layers = set(), []
    for layer in pipeline.forward_funcs:
        layers.append([p for p in layer.parameters() if p not in seen])  # a tied weight appears twice
        seen.update(layers[-1])
    sizes = [sum(parameter.numel() for parameter in layer) for layer in layers]
    count = min(sum(size > 0 for size in sizes), *(end - start for start, end in pairwise(pipeline.parts)))
    groups = pairwise(balance(sizes, count))
    return [{"params": [parameter for layer in layers[start:end] for parameter in layer]} for start, end in groups]


def reduce_memory(engine: PipelineEngine, dtype: torch.dtype) -> None:
    """Lowers the memory of a stage at its two peaks, without changing results.

    - On the last stage DeepSpeed keeps a micro-batch's logits, often the largest tensor of a step, until the next ones
      replace them, so that both exist. Here they are freed after their backward pass.
    - It computes the norm of 16-bit gradients in float64, copying one gradient at a time: 2 GiB for the embedding of
      Llama-3.2-1B. Float32 is precise enough for them.
    """
    backward_pass = engine._INSTRUCTION_MAP[BackwardPass]

    def backward_and_release(engine: PipelineEngine, buffer_id: int) -> None:
        backward_pass(engine, buffer_id)
        engine.pipe_buffers["outputs"][buffer_id] = None

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, BackwardPass: backward_and_release}
    if dtype != torch.float32:
        stage_1_and_2.get_norm_dtype = lambda: torch.float32


class PartitionedPipeline(PipelineModule):
    """A `PipelineModule` with given stage boundaries instead of one of DeepSpeed's three partition methods.

    Args:
        bounds: num_stages + 1 indices into the layer sequence; stage s builds layers bounds[s] .. bounds[s + 1] - 1.
        checkpoint_interval: `activation_checkpoint_interval` of the JSON, by which the engine recomputes activations.
    """

    def __init__(self, layers: list, bounds: list[int], checkpoint_interval: int = 0, **kwargs: Any):
        self.parts = bounds
        # Recomputing the head would save almost nothing. In chunks of several layers, though, DeepSpeed would then skip
        # every chunk that includes a layer of another class.
        recomputed = ["DecoderLayerPipe"] if checkpoint_interval <= 1 else None
        super().__init__(layers, num_stages=len(bounds) - 1, checkpointable_layers=recomputed, **kwargs)

    def _partition_layers(self, method: str) -> None:
        # PipelineModule.__init__ calls this, so `parts` is set before.
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


@torch.no_grad()
def load_weights(pipeline: PipelineModule, info: ModelInfo, resume: Any = None) -> None:
    """Reads the weights of this rank's layers: when resuming from layer shards, otherwise from the pretrained model.

    Args:
        resume: `common.checkpoint.Resume` or None. Its shards may come from any number of stages.

    Raises:
        UserError: see `load_pretrained` and `common.shards.find_layer_shards`.
    """
    if not resume:
        load_pretrained(pipeline, PretrainedWeights(info.directory), info.config)
        return
    shards = find_layer_shards(resume.directory, info.config.num_hidden_layers)
    for index, layer in enumerate(pipeline.forward_funcs, start=pipeline.parts[pipeline.stage_id]):
        load_layer(shards[index], layer)


@torch.no_grad()
def load_pretrained(pipeline: PipelineModule, weights: PretrainedWeights, config: PreTrainedConfig) -> None:
    """Copies the weights of this rank's layers from a pretrained model; others are not read.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or not of a floating-point type.
    """
    indices = range(config.num_hidden_layers + 3)
    known = {name for i in indices for name in layer_keys(i, weights.names, config.num_hidden_layers).values()}
    for name in weights.names:
        if name not in known:
            raise UserError(
                f"{weights.path}: '{name}' has no place in a {config.model_type} of {config.num_hidden_layers} "
                "decoder layers, which the config describes"
            )
    for index, layer in enumerate(pipeline.forward_funcs, start=pipeline.parts[pipeline.stage_id]):
        names = layer_keys(index, weights.names, config.num_hidden_layers)
        if isinstance(layer, LMHeadPipe) and config.tie_word_embeddings:
            embedding = "model.embed_tokens.weight"
            names = {"lm_head.weight": embedding} if embedding in weights.names else {}
        for name in names.values():
            weights.dtype(name)  # raises for the integers of a quantized model
        targets = layer.state_dict()
        check_tensors(
            f"{weights.path} (layer {index})",
            {key: weights.shape(name) for key, name in names.items()},
            {key: tuple(target.shape) for key, target in targets.items()},
        )
        for key, target in targets.items():
            target.copy_(weights.read(names[key]))
