"""A Llama-family model cut into pipeline layers.

DeepSpeed runs a pipeline as a plain sequence: the output of one layer is the input of the next, on this stage
or, through a send, on the next one. So every layer here takes one tuple and returns one:

    EmbeddingPipe      (input_ids [B, T], position_ids [B, T])  ->  (hidden [B, T, H], position_ids)
    DecoderLayerPipe   (hidden, position_ids)                   ->  (hidden, position_ids)      x num_hidden_layers
    FinalNormPipe      (hidden, position_ids)                   ->  (hidden, position_ids)
    LMHeadPipe         (hidden, position_ids)                   ->  logits [B, T, V]

`position_ids` (int64) travels along because it says where each packed document begins: it restarts at 0.
"""

import math
from itertools import pairwise

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.chunked_cross_entropy import chunked_cross_entropy
from deepspeed.runtime.pipe.schedule import BackwardPass
from deepspeed.runtime.zero import stage_1_and_2
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from common import memory
from common.attention import attention_arguments
from common.errors import UserError
from common.shards import check_tensors, layer_keys, load_layer

# These four share the names (`model.embed_tokens`, `model.layers.N`, `model.norm`, `lm_head`) and the calling
# convention of their decoder layers. Classes are looked up when a layer is built, after a kernel library may
# have replaced them.
FAMILIES = {
    "llama": (modeling_llama, "Llama"),
    "mistral": (modeling_mistral, "Mistral"),
    "qwen2": (modeling_qwen2, "Qwen2"),
    "qwen3": (modeling_qwen3, "Qwen3"),
}


# Bytes that libraries such as cuBLAS hold through PyTorch's allocator.
CUDA_LIBRARIES = 0.065 * memory.GIB
# Share of a GPU that stages are planned to fill; the rest is for fragments and for what `stage_peak` does not see.
MAX_FILL = 0.98


def family_class(config, suffix):
    """The class of this architecture with that suffix, e.g. `LlamaDecoderLayer` for ("llama", "DecoderLayer")."""
    module, prefix = FAMILIES[config.model_type]
    return getattr(module, prefix + suffix)


def check_architecture(config):
    """Raises UserError for a config whose layers this file cannot cut."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"the pipeline has layers for {', '.join(FAMILIES)}; this model's config says "
            f"model_type '{config.model_type}'"
        )
    try:
        count_parameters(config)
    except Exception as error:  # whatever transformers raises over a value in the config
        raise UserError(f"no {config.model_type} can be built from this config: {error!r}"[:300]) from error
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    # Mistral has no switch: there a window that is set is a window in use.
    windowed |= config.model_type == "mistral" and config.sliding_window is not None
    if windowed:
        raise UserError(
            f"the pipeline attends to whole documents; this config has sliding_window={config.sliding_window} in "
            "use, which needs a second mask (set it to null to train without the window)"
        )


class StageContext:
    """What all decoder layers of a stage need of the micro-batch at hand: rotary angles and attention limits.

    Computed by the first layer that asks and kept until another micro-batch comes along, so once per stage and
    micro-batch rather than once per layer. Not an `nn.Module`: DeepSpeed calls `module.bfloat16()`, which would round
    the rotary frequencies that plain HF keeps in float32.

    Args:
        config: the model's HF config.
        limits: the most documents in a row and the longest (see `common.attention`).
    """

    def __init__(self, config, limits=None):
        self.config = config
        self.limits = limits
        self.rotary = family_class(config, "RotaryEmbedding")(config)
        self.position_ids = None
        self.arguments = None

    @torch.no_grad()
    def __call__(self, hidden, position_ids):
        if self.position_ids is not position_ids:
            self.rotary.to(hidden.device)
            self.arguments = {
                "position_embeddings": self.rotary(hidden, position_ids),
                **attention_arguments(self.config._attn_implementation, position_ids, self.limits),
            }
            self.position_ids = position_ids
        return self.arguments


class EmbeddingPipe(nn.Module):
    """Token embedding. Shard keys: `embed_tokens.weight` [V, H]."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)

    @property
    def weight(self):
        """The tied weight, under the one name that `TiedLayerSpec` looks for in both classes."""
        return self.embed_tokens.weight

    def forward(self, inputs):
        input_ids, position_ids = inputs
        return self.embed_tokens(input_ids), position_ids


class DecoderLayerPipe(nn.Module):
    """One transformer block. Shard keys: `layer.*`, as in HF's decoder layer."""

    def __init__(self, config, layer_index, context=None, compiled=False):
        super().__init__()
        self.layer = family_class(config, "DecoderLayer")(config, layer_index)
        if compiled:
            # The block alone, not the context, which works once a stage. All blocks share one compiled graph.
            self.layer.compile(dynamic=False)
        self.context = context or StageContext(config)

    def forward(self, inputs):
        hidden, position_ids = inputs
        hidden = self.layer(hidden, position_ids=position_ids, **self.context(hidden, position_ids))
        return hidden, position_ids


class FinalNormPipe(nn.Module):
    """The norm before the head. Shard keys: `norm.weight` [H]."""

    def __init__(self, config):
        super().__init__()
        self.norm = family_class(config, "RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, inputs):
        hidden, position_ids = inputs
        return self.norm(hidden), position_ids


class LMHeadPipe(nn.Module):
    """Logits over the vocabulary. Shard keys: `lm_head.weight` [V, H]."""

    def __init__(self, config):
        super().__init__()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def weight(self):
        """The tied weight, under the one name that `TiedLayerSpec` looks for in both classes."""
        return self.lm_head.weight

    def forward(self, inputs):
        hidden, _ = inputs
        return self.lm_head(hidden)


def causal_lm_loss(logits, labels):
    """The micro-batch's part of the token-weighted loss of the whole global batch.

    The engine averages what this returns over `accumulation x data-parallel` micro-batches. Averaging their means
    would give a token of a short micro-batch more weight than one of a long micro-batch; so each is its *sum*
    over `targets_per_micro_batch`, the global batch's targets divided by the number of its micro-batches, and the
    average comes out as sum over all / targets of all.

    Args:
        logits: [B, T, V].
        labels: (token labels [B, T] in HF's convention, -100 where there is no target; `targets_per_micro_batch` as
            a float tensor [1], since the engine passes on nothing but tensors).
    """
    labels, targets_per_micro_batch = labels
    # Position t predicts token t + 1. Shifting the labels instead of the logits spares a copy of the latter.
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    loss_sum = chunked_cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return loss_sum / targets_per_micro_batch[0]


def build_layer(config, index, context=None):
    """Layer `index` of the sequence as a plain module: 0 embedding, 1..L decoder, L+1 final norm, L+2 head."""
    last = config.num_hidden_layers + 2
    if index == 0:
        return EmbeddingPipe(config)
    if index == last - 1:
        return FinalNormPipe(config)
    if index == last:
        return LMHeadPipe(config)
    return DecoderLayerPipe(config, index - 1, context)


def layer_specs(config, num_stages, limits=None, compiled=False):
    """The whole model as specs, of which DeepSpeed builds only those of this rank's stage.

    Where the config ties embedding and head, they stay one weight. On different stages each holds a copy:
    `TiedLayerSpec` sums the two gradients and starts both from the same values. On one stage DeepSpeed would
    build the first of the two classes only and call it twice, so there both modules are built here around one
    `Parameter`, as plain HF does.
    """
    context = StageContext(config, limits)
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


def optimizer_groups(pipeline):
    """Optimizer groups for this rank's stage: one per layer, or per few layers.

    At each step DeepSpeed copies the gradients of one group at a time to float32; a single group would take 4 bytes for
    every parameter of the stage. All stages need the same number of groups, because DeepSpeed adds up the gradient norm
    over the stages group by group, so it is the number of layers of the stage with the fewest.
    """
    seen, layers = set(), []
    for layer in pipeline.forward_funcs:
        layers.append([p for p in layer.parameters() if p not in seen])  # a tied weight comes up twice
        seen.update(layers[-1])
    sizes = [sum(parameter.numel() for parameter in layer) for layer in layers]
    count = min(sum(size > 0 for size in sizes), *(end - start for start, end in pairwise(pipeline.parts)))
    groups = pairwise(balance(sizes, count))
    return [{"params": [parameter for layer in layers[start:end] for parameter in layer]} for start, end in groups]


def save_memory_in_norm(dtype):
    """Makes DeepSpeed compute the norm of 16-bit gradients in float32 instead of float64.

    It copies one gradient at a time, so float64 takes 8 bytes per parameter of the embedding: 2 GiB for Llama-3.2-1B
    exactly when memory use peaks. 16-bit gradients do not need that precision.
    """
    if dtype != torch.float32:
        stage_1_and_2.get_norm_dtype = lambda: torch.float32


def release_logits(engine):
    """Lets the last stage free a micro-batch's logits after their backward pass.

    DeepSpeed keeps them for one more micro-batch: a second copy of what is often the largest tensor of a step.
    """
    backward_pass = engine._INSTRUCTION_MAP[BackwardPass]

    def backward_and_release(engine, buffer_id):
        backward_pass(engine, buffer_id)
        engine.pipe_buffers["outputs"][buffer_id] = None

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, BackwardPass: backward_and_release}


class PartitionedPipeline(PipelineModule):
    """A `PipelineModule` with the stage boundaries given instead of one of DeepSpeed's three methods.

    Args:
        bounds: num_stages + 1 indices into the layer sequence; stage s builds layers bounds[s] .. bounds[s+1]-1.
    """

    def __init__(self, layers, bounds, **kwargs):
        self.parts = bounds
        super().__init__(layers, num_stages=len(bounds) - 1, **kwargs)

    def _partition_layers(self, method):
        # PipelineModule calls this from its __init__, which is why the bounds are set before that.
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


@torch.no_grad()
def load_pretrained(pipeline, weights, config):
    """Copies a pretrained model's weights into the layers that this rank holds, and reads no others.

    Args:
        weights: `common.pretrained.PretrainedWeights`; of the files only the tensors asked for are read.

    Raises:
        UserError: a tensor is missing, foreign, of another shape or not of a floating-point type.
    """
    indices = range(config.num_hidden_layers + 3)
    known = {name for i in indices for name in layer_keys(i, weights.names, config.num_hidden_layers).values()}
    for name in weights.names:
        if name not in known:
            raise UserError(
                f"{weights.directory}: '{name}' has no place in a {config.model_type} of {config.num_hidden_layers} "
                "decoder layers, which the config describes"
            )
    for index, layer in enumerate(pipeline.forward_funcs, start=pipeline.parts[pipeline.stage_id]):
        names = layer_keys(index, weights.names, config.num_hidden_layers)
        if isinstance(layer, LMHeadPipe) and config.tie_word_embeddings:
            embedding = "model.embed_tokens.weight"
            names = {"lm_head.weight": embedding} if embedding in weights.names else {}
        for name in names.values():
            weights.dtype(name)  # refuses the integers of a quantized model
        targets = layer.state_dict()
        check_tensors(
            f"{weights.directory} (layer {index})",
            {key: weights.shape(name) for key, name in names.items()},
            {key: tuple(target.shape) for key, target in targets.items()},
        )
        for key, target in targets.items():
            target.copy_(weights.read(names[key]))


@torch.no_grad()
def load_shards(pipeline, shards):
    """The same from layer shards (`common.shards.find_layer_shards`), whatever the stages that wrote them."""
    for index, layer in enumerate(pipeline.forward_funcs, start=pipeline.parts[pipeline.stage_id]):
        load_layer(shards[index], layer)


# ---------------------------------------------------------------------------------------------------- stages


def layer_sizes(config):
    """Parameters of every layer of the sequence."""
    with torch.device("meta"):
        return [
            sum(p.numel() for p in build_layer(config, index).parameters())
            for index in range(config.num_hidden_layers + 3)
        ]


def count_parameters(config):
    """(all parameters, all but the embedding that is looked up) of the model; a tied one counts once, as the head."""
    sizes = layer_sizes(config)
    matmul = sum(sizes[1:])
    return matmul + (0 if config.tie_word_embeddings else sizes[0]), matmul


def layer_costs(config, mean_attended, checkpointing=False):
    """Work of every layer of the sequence, forward and backward, in floating-point operations per token.

    A matrix product costs 2 operations per weight forward and 4 backward. Attention costs 12 x head dim x heads
    for each earlier token that a token attends to (PaLM, appendix B). Embedding and final norm count as nothing.

    Args:
        mean_attended: tokens that a token attends to on average (`common.data.Rows.mean_attended`).
        checkpointing: whether decoder layers run forward twice.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.device("meta"):
        decoder = sum(p.numel() for p in family_class(config, "DecoderLayer")(config, 0).parameters())
    attention = 12 * head_dim * config.num_attention_heads * mean_attended
    head = 6 * config.vocab_size * config.hidden_size
    passes = 4 / 3 if checkpointing else 1
    return [0, *[passes * (6 * decoder + attention)] * config.num_hidden_layers, 0, head]


def balance(costs, num_stages, fits=lambda stage, start, end: True):
    """Splits the sequence so that the slowest stage is as fast as can be; every stage gets a layer that costs anything.

    Of equally good splits it takes the one with fewer layers on early stages, which keep more activations. (DeepSpeed's
    own `partition_balanced` may leave a stage empty.)

    Args:
        fits: whether a stage can hold layers start .. end - 1.

    Returns:
        num_stages + 1 bounds, see `PartitionedPipeline`; None if no split fits.
    """
    ends = [index + 1 for index, cost in enumerate(costs) if cost]
    ends[-1] = len(costs)
    # best[e] = (cost of the slowest stage, bounds) for the layers up to ends[e] on the stages so far.
    best = {e: (sum(costs[:end]), [0, end]) for e, end in enumerate(ends) if fits(0, 0, end)}
    for stage in range(1, num_stages):
        splits = {
            e: [
                (max(slowest, sum(costs[bounds[-1] : end])), [*bounds, end])
                for b, (slowest, bounds) in best.items()
                if b < e and fits(stage, bounds[-1], end)
            ]
            for e, end in enumerate(ends)
        }
        best = {e: min(found) for e, found in splits.items() if found}
    return best[len(ends) - 1][1] if len(ends) - 1 in best else None


def partition(config, num_stages, method, mean_attended):
    """Stage bounds for `--partition`: "balanced", "uniform" or decoder layers per stage as in "11,5".

    Raises:
        UserError: more stages than decoder layers, or a list that does not fit stages or layers.
    """
    layers = config.num_hidden_layers
    if num_stages > layers:
        raise UserError(f"--num_stages {num_stages}: the model has {layers} decoder layers, fewer than stages")
    if method == "balanced":
        return balance(layer_costs(config, mean_attended), num_stages)
    if method == "uniform":
        counts = [layers // num_stages + (stage < layers % num_stages) for stage in range(num_stages)]
    else:
        try:
            counts = [int(count) for count in method.split(",")]
        except ValueError:
            raise UserError(
                f"--partition '{method}': expected balanced, uniform or decoder layers per stage such as 11,5"
            ) from None
        if min(counts) < 0:
            raise UserError(f"--partition {method}: a stage cannot have fewer than 0 decoder layers")
        if len(counts) != num_stages or sum(counts) != layers:
            raise UserError(
                f"--partition {method} gives {sum(counts)} decoder layers to {len(counts)} stages; the model has "
                f"{layers} and --num_stages is {num_stages}"
            )
    # Stage 0 also gets the embedding, the last one the final norm and the head.
    bounds = [0, *[1 + sum(counts[: stage + 1]) for stage in range(num_stages)]]
    bounds[-1] = layers + 3
    return bounds


def stage_peak(
    config, sizes, num_stages, stage, start, end, checkpointing, *, dtype, dp_world_size, micro_batches, rows, length
):
    """Peak GPU memory of a pipeline stage under ZeRO-1, in bytes, to a few percent. A pure function of its arguments.

    Weights and gradients in `dtype`, and 12 bytes per parameter for master weights and Adam's moments (split among the
    replicas), stay allocated. Two peaks on top of that occur at different times, so only the larger counts:

    - forward and backward passes: the activations of the S - s micro-batches in flight on stage s of S (1F1B); on the
      last stage logits and their gradient; and the gradient of embedding or head before it is accumulated;
    - the optimizer: the gradients of one parameter group, about a layer, flattened and then in float32.

    Args:
        sizes: `layer_sizes`.
        start, end: the stage holds layers start .. end - 1.
        checkpointing: whether decoder layers keep only their input.
        dtype: of weights and gradients.
        rows, length: of a micro-batch.
    """
    held, head = sizes[start:end], len(sizes) - 1
    tokens, bytes_ = rows * length, dtype.itemsize
    hidden = bytes_ * tokens * config.hidden_size
    activations = memory.layer_activations(config, rows, length) * bytes_ // 2
    micro_batch = (min(end, head - 1) - max(start, 1)) * (hidden if checkpointing else activations)
    passes = min(num_stages - stage, micro_batches) * micro_batch + activations * checkpointing
    if end > head:
        passes += bytes_ * (2 * tokens * config.vocab_size + sizes[head])
    elif start == 0:  # by then the activations of the micro-batch are gone
        passes = max(passes, passes - micro_batch + bytes_ * sizes[0])
    update = (bytes_ + 4) * max(held) / dp_world_size
    permanent = sum(held) * (2 * bytes_ + 12 / dp_world_size)
    return permanent + max(passes, update) + 7 * hidden + CUDA_LIBRARIES


def plan_stages(config, num_stages, method, mean_attended, peak, usable, bounds=None, checkpointing=None):
    """Decides what `--partition` and `--activation_checkpointing` leave open, so that every stage fits its GPU.

    Of the balanced splits that fit, with and without activation checkpointing, it takes the one whose slowest stage is
    fastest. If none fits, it leaves less room for fragments, and in the end takes the split that ignores memory.

    Args:
        method: see `partition`; only "balanced" leaves the split open.
        peak: function of (stage, start, end, checkpointing), in bytes.
        usable: bytes of GPU memory per rank.
        bounds: of the run that is resumed; None to decide.
        checkpointing: True or False if a flag or the JSON says so; None to decide.

    Returns:
        (bounds, whether to use activation checkpointing).
    """
    choices = [False, True] if checkpointing is None else [checkpointing]
    if bounds is None and method == "balanced":
        for limit in (MAX_FILL * usable, usable, 1.1 * usable):
            plans = []
            for choice in choices:
                costs = layer_costs(config, mean_attended, choice)
                split = balance(costs, num_stages, lambda *part, c=choice, limit=limit: peak(*part, c) <= limit)
                if split:
                    plans.append((max(sum(costs[start:end]) for start, end in pairwise(split)), choice, split))
            if plans:
                _, choice, bounds = min(plans)
                return bounds, choice
    bounds = bounds or partition(config, num_stages, method, mean_attended)
    for choice in choices:
        if all(peak(stage, *part, choice) <= MAX_FILL * usable for stage, part in enumerate(pairwise(bounds))):
            return bounds, choice
    return bounds, choices[-1]


def describe_memory(bounds, peak, usable, checkpointing):
    """One line: estimated memory per stage, and whether activation checkpointing is on."""
    line = f"activation checkpointing: {'on' if checkpointing else 'off'}"
    if usable == math.inf:
        return line
    peaks = [peak(stage, *part, checkpointing) / memory.GIB for stage, part in enumerate(pairwise(bounds))]
    needed = ", ".join(f"{gib:.1f}" for gib in peaks)
    return f"{line}; the stages need about {needed} GiB, each GPU has {usable / memory.GIB:.1f}"


def describe_partition(config, bounds, micro_batches, mean_attended):
    """A line for each stage with its share of the work, and one with the idle time to expect.

    With M micro-batches and S stages of equal work, a stage waits (S - 1) / (M + S - 1) of a step (GPipe,
    section 2.3); stages of unequal work wait for the slowest besides.
    """
    costs = layer_costs(config, mean_attended)
    stages = [sum(costs[start:stop]) for start, stop in pairwise(bounds)]
    num_stages = len(stages)
    lines = []
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        first, last = max(start, 1), min(stop, config.num_hidden_layers + 1)
        parts = ["embedding"] if start == 0 else []
        parts += (
            [f"{last - first} decoder layer{'s' * (last - first > 1)} ({first - 1}-{last - 2})"] if last > first else []
        )
        parts += ["norm and head"] if stop == len(costs) else []
        lines.append(f"stage {stage}: {' + '.join(parts)} | {stages[stage] / sum(stages):.1%} of the work")
    if num_stages == 1:
        return lines
    bubble = (num_stages - 1) / (micro_batches + num_stages - 1)
    idle = 1 - (1 - bubble) * sum(stages) / (num_stages * max(stages))
    lines.append(
        f"bubble: {num_stages - 1} / ({micro_batches} micro-batches + {num_stages - 1}) = {bubble:.1%}; "
        f"with the slowest stage's extra work {idle:.1%} idle on average"
    )
    return lines
