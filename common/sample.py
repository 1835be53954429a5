"""The sample: small models and texts that every script can run on with nothing downloaded.

`--model_name sample --dataset_name sample` stands for files made on first use, the same bytes every time:
an ordinary Hugging Face directory with a randomly initialised model of about a million parameters, and .jsonl
files of generated text. Everything after that is the code that real models and datasets go through.

They lie under `$XDG_CACHE_HOME/deepspeed-by-hand/sample-<version>` (`~/.cache` by default). The version
is a hash of this file: an edited generator never meets files that an older one made.
"""

import hashlib
import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError

VOCABULARY = 2048  # tokens
END_OF_TEXT = "<|endoftext|>"
DEVIATION = 0.088  # of the initial weights, 1 / sqrt(hidden size): with 0.02 so small a model learns slowly

# The class in transformers, the longest document in tokens, and the fields of the config.
MODELS = {
    "llama": (
        "LlamaForCausalLM",
        2048,
        {
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", 1024, {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 1024}),
    "bloom": ("BloomForCausalLM", 2048, {"hidden_size": 128, "n_layer": 4, "n_head": 4, "seq_length": 2048}),
}


# --------------------------------------------------------------------------------------------------- names


def is_sample(name: str) -> bool:
    """Whether a model or dataset name means the sample: `sample`, or anything that begins with `sample-`."""
    return name == "sample" or name.startswith("sample-")


def resolve_sample_model(name: str, default_architecture: str) -> Path:
    """The directory that `sample`, `sample-llama`, `sample-gpt2` or `sample-bloom` stands for.

    Args:
        name: a name that `is_sample` accepts.
        default_architecture: what plain `sample` means, a key of `MODELS`.

    Raises:
        UserError: no such sample model, or the cache cannot be written.
    """
    architecture = default_architecture if name == "sample" else name.removeprefix("sample-")
    if architecture not in MODELS:
        known = ", ".join(f"sample-{each}" for each in MODELS)
        raise UserError(f"--model_name {name}: no such sample model; there are {known}")
    return sample_model_directory(architecture)


def sample_model_directory(architecture: str) -> Path:
    """The directory of the sample model, for `from_pretrained`: float32 weights, config and tokenizer.

    Args:
        architecture: "llama", "gpt2" or "bloom".

    Raises:
        UserError: the cache cannot be written.
    """
    return _made_once(architecture, lambda path: _save_model(path, architecture))


def full_name(dataset_name: str, default_kind: str) -> str:
    """`dataset_name`, and for plain `sample` which of the sample texts that is, as `sample-abstracts`."""
    return f"sample-{default_kind}" if dataset_name == "sample" else dataset_name


def resolve_sample_dataset(name: str, default_kind: str) -> Path:
    """The file or directory that `sample`, `sample-abstracts`, `sample-questions` or `sample-paragraphs` stands for.

    Args:
        name: a name that `is_sample` accepts.
        default_kind: what plain `sample` means, a key of `KINDS`.

    Raises:
        UserError: no such sample text, or the cache cannot be written.
    """
    kind = full_name(name, default_kind).removeprefix("sample-")
    if kind not in KINDS:
        known = ", ".join(f"sample-{each}" for each in KINDS)
        raise UserError(f"--dataset_name {name}: no such sample text; there are {known}")
    return sample_dataset_file(kind)


def sample_dataset_file(kind: str) -> Path:
    """The sample text of a kind.

    Args:
        kind: "abstracts" (1,000 documents, column `text`), "questions" (600 rows, SQuAD's columns) or
            "paragraphs" (column `text`, rows as WikiText has them: headings, blank lines and paragraphs).

    Returns:
        A .jsonl file; for paragraphs a directory with train.jsonl, validation.jsonl and test.jsonl.

    Raises:
        UserError: the cache cannot be written.
    """
    if kind == "paragraphs":
        return _made_once(kind, _save_splits)
    count = {"abstracts": 1000, "questions": 600}[kind]
    return _made_once(f"{kind}.jsonl", lambda path: write_documents(path, kind, count, seed=0))


def write_documents(path: Path, kind: str, count: int, seed: int) -> None:
    """Writes generated text as one .jsonl file.

    No abstract, paragraph or question comes twice within a file; headings and blank lines do.

    Args:
        kind: as for `sample_dataset_file`.
        count: rows in the file; for paragraphs headings and blank lines count too.
        seed: the same seed gives the same bytes.
    """
    # One stream of random numbers a kind; `random()` is all of `random` whose stream Python promises to keep.
    rows = KINDS[kind](random.Random(seed).random)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(next(rows), ensure_ascii=False) + "\n" for _ in range(count))


# --------------------------------------------------------------------------------------------------- cache


def _made_once(name, make):
    """The file or directory `name` of the cache, which `make(path)` makes if it is not there yet.

    It is made out of sight and renamed when complete, so that whatever has the name is whole. Processes that
    start together each make their own with the same bytes, and one of them stays.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    path = Path(home, "deepspeed-by-hand", f"sample-{version}", name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=path.parent) as scratch:
                made = Path(scratch, name)
                make(made)
                try:
                    made.rename(path)
                except OSError:
                    # A directory does not replace one that another process has put there.
                    if not path.exists():
                        raise
    except OSError as error:
        raise UserError(
            f"cannot make the sample in {path.parent} ({error}); set XDG_CACHE_HOME to a directory that can be written"
        ) from error
    return path


def _save_splits(path):
    path.mkdir()
    for seed, (split, count) in enumerate({"train": 6000, "validation": 600, "test": 600}.items()):
        write_documents(path / f"{split}.jsonl", "paragraphs", count, seed)


# -------------------------------------------------------------------------------------------------- models


def _save_model(path, architecture):
    import torch
    import transformers

    class_name, longest, settings = MODELS[architecture]
    model_class = getattr(transformers, class_name)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(_made_once("tokenizer.json", _save_tokenizer)),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
    ids = {f"{token}_token_id": tokenizer.eos_token_id for token in ("bos", "eos", "pad")}
    config = model_class.config_class(vocab_size=VOCABULARY, **ids, **settings)
    # Making a model draws its weights; the caller's random numbers must not tell a first run from a second.
    with torch.random.fork_rng(devices=[]):
        model = model_class(config).float()
    # Our own weights in our own order: transformers changes its initialisation from version to version.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):  # a tied weight comes once
            if parameter.ndim > 1:
                # Rounded from float64, which hides the last bits, where one CPU's logarithm is not another's.
                weight = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(weight * DEVIATION)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)


def _save_tokenizer(path):
    """Byte-level BPE over the sample text of all kinds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts():
        files = [sample_dataset_file("abstracts"), sample_dataset_file("questions")]
        for file in [*files, sample_dataset_file("paragraphs") / "train.jsonl"]:
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                yield row["text"] if "text" in row else f"{row['question']} {row['context']}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(path))


# ------------------------------------------------------------------------------------------------ documents


class Slots(dict):
    """Fills the slots of a template: `template.format_map(slots)`.

    `{study}` draws a word each time. `{place_1}` draws one, unlike the others that are kept, and keeps it, so
    that a document stays with what it is about.
    """

    def __init__(self, words: Mapping[str, Sequence], uniform: Callable[[], float]):
        super().__init__()
        self.words, self.uniform = words, uniform

    def __missing__(self, slot: str) -> Any:
        kind, kept, _ = slot.partition("_")
        word = choose(self.words[kind], self.uniform)
        if kept:
            while word in self.values():
                word = choose(self.words[kind], self.uniform)
            self[slot] = word
        return word

    def sentence(self, template: str) -> str:
        text = AN.sub(r"\1n", template.format_map(self))
        return text[0].upper() + text[1:]


AN = re.compile(r"\b([Aa])(?= (?!uni)[aeiou])")


def choose(options: Sequence, uniform: Callable[[], float]) -> Any:
    return options[int(uniform() * len(options))]


def choose_some(options: Sequence, count: int, uniform: Callable[[], float]) -> list:
    """`count` of the options, or all of them, in their order."""
    chosen = []
    for left, option in zip(range(len(options), 0, -1), options, strict=True):
        if uniform() * left < count - len(chosen):
            chosen.append(option)
    return chosen


def new(text: str, seen: set[int]) -> bool:
    """Whether the text has not been seen before; remembers its hash, for a file may be larger than memory."""
    before = len(seen)
    seen.add(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()))
    return len(seen) > before


def abstracts(uniform: Callable[[], float]) -> Iterator[dict[str, str]]:
    """Yields {"text"}: abstracts of 1 to 14 sentences on one topic."""
    seen = set()
    while True:
        slots = Slots(choose(FIELDS, uniform), uniform)
        some = choose_some(range(len(ABSTRACT)), int(len(ABSTRACT) * uniform()), uniform)
        positions = sorted({PROPOSAL, *some})
        text = " ".join([slots.sentence(choose(ABSTRACT[position], uniform)) for position in positions])
        if new(text, seen):
            yield {"text": text}


def paragraphs(uniform: Callable[[], float]) -> Iterator[dict[str, str]]:
    """Yields {"text"}: encyclopedia articles line by line, blank lines and headings as in WikiText."""
    seen = set()
    while True:
        title, sections = choose(ARTICLES, uniform)
        slots = Slots(WORDS, uniform)
        slots["title"] = title.format_map(slots)
        for heading, facts in sections.items():
            line = f" = = {heading} = = \n" if heading else f" = {slots.sentence('{title}')} = \n"
            yield from ({"text": text} for text in ("", line, ""))
            while True:
                some = choose_some(facts, 3 + int(uniform() * (len(facts) - 2)), uniform)
                text = " ".join(re.sub(r"[\[\]]", "", slots.sentence(sentence)) for sentence, _ in some)
                if new(text, seen):
                    break
            yield {"text": f" {text} \n"}


def questions(uniform: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields SQuAD's rows: up to four questions about one context, each with the one answer."""
    seen = set()
    while True:
        title, sections = choose(ARTICLES, uniform)
        slots = Slots(WORDS, uniform)
        slots["title"] = title.format_map(slots)
        facts = [fact for section in sections.values() for fact in section]
        context, asked = "", []
        for sentence, question in choose_some(facts, 3 + int(uniform() * 6), uniform):
            # The square brackets of a sentence hold the answer to its question.
            before, answer, after = re.split(r"[\[\]]", slots.sentence(sentence))
            context += " " * bool(context) + before
            asked.append((slots.sentence(question), answer, len(context)))
            context += answer + after
        for question, answer, start in choose_some(asked, 4, uniform):
            if new(question + context, seen):
                yield {
                    "id": hashlib.sha256((question + context).encode()).hexdigest()[:24],
                    "title": slots.sentence("{title}").replace(" ", "_"),
                    "context": context,
                    "question": question,
                    "answers": {"text": [answer], "answer_start": [start]},
                }


KINDS = {"abstracts": abstracts, "questions": questions, "paragraphs": paragraphs}


# ----------------------------------------------------------------------------------- words and templates


def _words(text):
    """`kind: word, word`, continued on indented lines, to {kind: words}."""
    lines = text.replace("\n    ", " ").strip().splitlines()
    return {kind: words.split(", ") for kind, words in (line.split(": ", 1) for line in lines)}


def _names(beginnings, endings):
    return [begin + end for begin in beginnings.split() for end in endings.split()]


def _blocks(text):
    return text.strip().split("\n\n")


def _articles(text):
    """[(title, {heading: [(sentence, question)]})]; the introduction has no heading."""
    articles = []
    for article in _blocks(text):
        title, *lines = article.splitlines()
        sections = {"": []}
        for line, question in zip(lines, [*lines[1:], ""], strict=True):
            if line.startswith("=="):
                sections[line.strip("= ")] = []
            elif not line.startswith(" "):
                list(sections.values())[-1].append((line, question.strip()))
        articles.append((title.strip("= "), sections))
    return articles


# What a slot can hold. Numbers are ranges.
WORDS = {
    "few": range(2, 9),
    "dozen": range(10, 60),
    "percent": range(3, 48),
    "hundred": range(100, 1000, 10),
    "thousand": range(1200, 90000, 100),
    "year": range(1780, 1990),
    "digit": range(1, 10),
    "place": _names(
        "Var Ost Hel Brun Kal Mer Thor Lin Esk Dun Ash Fal Gren Hol Sel Tarn Ul Vel Yar Bro",
        "holt mere burgh wick ford dale stad ness vale combe ley mouth",
    ),
    "last": _names("Al Ber Cor Dan Ed Far Gil Han Ir Jor Kel Lam Mor Nor", "well son ridge croft man berg strøm ard"),
} | _words("""
adjective: simple, robust, general, efficient, unified
hard: difficult, costly, unreliable, slow, poorly understood
adverb: substantially, consistently, slightly, markedly, steadily
often: often, usually, typically, in many cases, almost always
propose: propose, introduce, present, develop, describe
study: study, examine, investigate, revisit, analyse
show: show, find, demonstrate, observe, report
suggest: suggest, indicate, imply, support the view, strengthen the case
improve: improves, raises, stabilises, sharpens
drives: drives, limits, shapes, controls, predicts
part: step, stage, component, layer, module
reason: theory, practice, the laboratory, recent experiments, large simulations
group: two independent groups, several laboratories, an international team, a small consortium, students
however: however, yet, in practice, even so, at the same time
moreover: moreover, in addition, furthermore, at the same time, perhaps surprisingly
resource: code, data, the software, all measurements, the full pipeline
tool: Lumen, Argo, Kestrel, Tessera, Nimbus, Orbit, Cobalt, Prism, Delta, Harbor
first: Anna, Bertil, Clara, David, Elena, Felix, Greta, Hugo, Ida, Jonas, Karin, Lukas, Marta, Nils, Olga,
    Peter, Rosa, Stefan, Tove, Viktor, Renée, Zoë
direction: north, south, east, west, north-east, north-west, south-east, south-west
industry: timber, wool, slate, copper, fishing, glass, paper, salt, brewing, shipbuilding, linen, pottery,
    tin, grain
building: town hall, parish church, corn exchange, library, lighthouse, castle, market hall, grammar school,
    theatre, customs house, museum
material: red brick, grey granite, limestone, oak, sandstone, cast iron, marble, steel
disaster: a great fire, a flood, an outbreak of cholera, a long drought, a landslide, a winter storm
fish: brown trout, salmon, pike, perch, eels, grayling, roach
tree: oak, birch, beech, alder, pine, willow, hazel, elm
animal: otters, beavers, red deer, kingfishers, bats, foxes, voles, herons
office: mayor, bishop, governor, harbour master, engineer, merchant, judge, surveyor
art: landscapes, portraits, still lifes, murals, etchings, woodcuts, stained glass, altarpieces
quality: use of light, muted colours, bold outlines, careful detail, unusual viewpoints, dry humour,
    restless brushwork, quiet melancholy
illness: pneumonia, tuberculosis, a heart attack, typhoid fever, a riding accident, influenza
cargo: coal, grain, cotton, iron ore, mail, sugar, tea, livestock, passengers
accident: collided with a barge, ran aground, lost a propeller, caught fire, broke her anchor chain, struck
    an uncharted rock
colour: grey, brown, white, black, yellow, blue, green, rufous, olive, golden
feature: winged, throated, crowned, tailed, breasted, backed, browed, necked
bird: warbler, finch, thrush, plover, owl, tern, lark, bunting, flycatcher, sparrow, heron, wren
habitat: reed beds, pine forest, open grassland, salt marshes, rocky coasts, upland moors, river valleys,
    old orchards
food: beetles, seeds, berries, small fish, caterpillars, snails, spiders, ants, worms, voles
nest: grass and moss, twigs, mud, reeds, spider silk and lichen, roots and feathers
threat: the draining of wetlands, trapping, pesticides, the loss of old trees, introduced rats, illegal
    hunting, road building
month: January, February, March, April, May, June, July, August, September, October, November, December
""")

# An abstract belongs to one field.
FIELDS = [
    WORDS | _words(field)
    for field in _blocks("""
topic: star formation, stellar rotation, dust scattering, gas accretion
object: spiral galaxies, young clusters, binary stars, molecular clouds
method: hydrodynamic simulation, Bayesian forward model, spectral decomposition, particle code
data: archival spectra, radio maps, infrared images, light curves
metric: signal-to-noise ratio, detection rate, distance estimate, angular resolution
cause: metallicity, gas pressure, stellar age, orbital eccentricity
use: survey planning, telescope scheduling, planet hunting, distance measurements

topic: language modelling, machine translation, question answering, image segmentation
object: neural networks, transformers, recurrent models, sparse experts
method: gradient estimator, contrastive objective, curriculum schedule, distillation scheme
data: web documents, annotated dialogues, parallel corpora, captions
metric: test accuracy, validation loss, recall, calibration error
cause: label noise, batch size, model depth, learning rate
use: search engines, voice assistants, automatic grading, document retrieval

topic: protein folding, gene regulation, cell division, enzyme catalysis
object: signalling proteins, stem cells, bacterial colonies, ion channels
method: fluorescence assay, molecular dynamics protocol, single-cell pipeline, knockout screen
data: time-lapse images, expression profiles, genome sequences, binding curves
metric: binding affinity, survival rate, reproducibility, mutation rate
cause: temperature, oxygen level, nutrient supply, cell density
use: drug discovery, vaccine design, clinical screening, crop breeding

topic: superconductivity, spin transport, charge ordering, phonon scattering
object: thin films, topological insulators, quantum dots, layered crystals
method: variational wave function, mean-field theory, Monte Carlo algorithm, tensor network
data: conductivity measurements, diffraction patterns, transport curves, tunnelling spectra
metric: critical temperature, energy gap, coherence time, carrier mobility
cause: strain, disorder, doping, magnetic field
use: quantum memories, low-power electronics, magnetic sensors, precision clocks

topic: ocean circulation, cloud formation, carbon uptake, sea-ice melting
object: coastal regions, tropical storms, boreal forests, mountain basins
method: regional climate model, data assimilation scheme, statistical downscaling, tracer experiment
data: satellite images, weather records, ice cores, buoy measurements
metric: forecast skill, mean bias, seasonal correlation, warning time
cause: wind stress, surface temperature, soil moisture, aerosol load
use: flood warning, water management, coastal planning, crop insurance

topic: graph colouring, matrix factorisation, prime factorisation, convex optimisation
object: sparse graphs, random matrices, elliptic curves, finite groups
method: spectral method, branch-and-bound search, fixed-point iteration, probabilistic argument
data: synthetic instances, benchmark problems, random ensembles, exact solutions
metric: convergence rate, approximation ratio, running time, error bound
cause: dimension, sparsity, curvature, connectivity
use: circuit design, cryptography, route planning, structural engineering

topic: packet routing, memory management, load balancing, failure recovery
object: storage clusters, mobile devices, graphics processors, database servers
method: consensus protocol, lock-free queue, prefetching policy, garbage collector
data: production traces, server logs, synthetic workloads, network captures
metric: throughput, tail latency, energy use, memory footprint
cause: network delay, queue length, memory bandwidth, clock skew
use: video streaming, online payments, cloud hosting, remote sensing

topic: opinion formation, labour mobility, price discovery, voting behaviour
object: rural households, online communities, small firms, public schools
method: agent-based model, randomised trial, panel regression, matching estimator
data: census records, household surveys, interview transcripts, mobile-phone traces
metric: response rate, employment rate, public trust, predictive power
cause: income, education, social norms, housing costs
use: urban planning, education policy, public health, tax reform
""")
]

# The positions of an abstract in their order, and the sentences that can stand there.
ABSTRACT = [
    position.splitlines()
    for position in _blocks("""
{topic_1} plays a central role in {object_1}.
Understanding {topic_1} in {object_1} is a long-standing problem.
Over the past {dozen} years, {topic_1} has been observed in {object_1} of many kinds.

Measuring the {metric_1} of {object_1} remains {hard}.
The influence of {cause_1} on {topic_1} is {hard}.
Existing work relies on a {method_2}, which is {hard} when {object_1} are involved.

We {study} {topic_1} in {object_1} and ask how it depends on {cause_1}.
In this paper we {study} the relation between {topic_1} and {cause_1} in {hundred} {object_1}.
Here we {study} {topic_1} with {data_1} of {thousand:,} {object_1}.

We {propose} {tool_1}, a {adjective} {method_1} for {topic_1} in {object_1}.
We {propose} {tool_1}, a {adjective_1} and {adjective_2} {method_1} that accounts for {cause_1} in {object_1}.
We {propose} {tool_1}, which combines a {method_1} with {data_1} of {object_1}.

The {method_1} has {few} parts, and each {part} is fitted to {data_1} on its own.
Its main {part} is a {adjective} {part_1} that separates {cause_1} from {cause_2}.
The central idea is to treat {cause_1} as a {part} of the {method_1} and not as a correction.

Unlike a {method_2}, it needs no prior knowledge of {cause_2}.
Only {few} free parameters have to be chosen, and the {metric_1} hardly depends on them.
A single {part} takes {dozen} seconds for {thousand:,} {object_1}.

We prove that the error falls as the number of {object_1} grows, whatever the {cause_1}.
A short calculation shows why {cause_1} enters at order {few} and {cause_2} does not enter at all.
In the limit of small {cause_2}, the {method_1} agrees with a {method_2}.

We test it on {data_1} of {thousand:,} {object_1} and on {data_2} of {hundred} more.
The analysis rests on {data_1} collected by {group} over {few} years.
For validation we use {data_2} that {group} gathered in the {few} years before.

The {method_1} {improve} the {metric_1} by {percent}.{digit} % over a {method_2}.
We {show} that the {metric_1} changes from {dozen}.{digit} % to {dozen}.{digit} % once {cause_1} is included.
On {data_1}, {tool_1} {improve} the {metric_1} by a factor of {few}.{digit}.

{moreover}, the {metric_1} varies {adverb} with {cause_2}, by up to {percent} %.
{moreover}, the {metric_2} improves {adverb} although nothing was tuned for it.
{moreover}, we {show} that the effect of {cause_1} vanishes for {object_2}.

An ablation shows that the {part} matters most: without it the {metric_1} drops by {percent} %.
The outcome does not change when {cause_2} is held fixed or when {data_2} are left out.
Repeating the analysis with a {method_2} gives the same answer within {few} %.

{however}, the {method_1} fails for {object_2}, where {cause_2} dominates.
{however}, the main limitation is that {data_1} are scarce for {object_2}.
It remains open whether {topic_1} in {object_2} follows the same rule.

These findings {suggest} that {topic_1} in {object_1} is governed by {cause_1}.
Our results have consequences for {use_1} and for {use_2}.
We discuss what this means for {use_1}, where {cause_1} is {often} ignored.

{resource_1} and {resource_2} are publicly available.
We release {tool_1} together with {data_1} of {hundred} {object_1}.
{tool_1} is already in use by {group}.
""")
]
PROPOSAL = 3  # the one position that no abstract lacks: the others lean on it

# Articles: a title, then facts and sections of facts. A fact is a sentence and, indented, the question whose
# answer the sentence has in square brackets.
ARTICLES = _articles("""
= {place_1} =
{place_1} is a market town in the {direction} of [{place_2} county].
    In which county is {title}?
It lies {dozen} kilometres {direction} of [{place_3}].
    Which larger place is {title} close to?
At the last census it had [{thousand_1:,}] inhabitants.
    How many people live in {title}?
The town is known for its [{industry_1}] trade.
    What trade is {title} known for?
A {building} of {material} stands on [{last_1} Square].
    On which square of {title} is there an old building?
== History ==
{place_1} was founded in [{year_1}] by the {office} {first} {last}.
    When was {title} founded?
After [{disaster_1}] in {year}, much of {place_1} had to be rebuilt.
    What destroyed much of {title}?
The {industry} works of [{last_2} and Sons] employed {hundred} people.
    Which firm was a large employer in {title}?
In {year} a line of the railway reached {place_1} from [{place_4}].
    From where did the railway reach {title}?
The trade in {industry_1} declined after [{year_2}].
    After which year did the main trade of {title} decline?
== Landmarks ==
The {building_1} was built of [{material_1}] in {year}.
    What is the {building_1} of {title} built of?
Its architect was [{first_1} {last_3}], who also designed the {building_2}.
    Who was the architect of the {building_1} of {title}?
The {building_2} holds a collection of [{art_1}].
    What is collected in the {building_2} of {title}?
About {thousand:,} visitors come each year, most of them in [{month_1}].
    In which month do most visitors come to {title}?

= River {place_1} =
The River {place_1} is a river in the {direction} of [{place_2} county].
    Through which county does the {title} flow?
It is [{hundred_1} kilometres] long.
    How long is the {title}?
It rises in the hills above [{place_3}] and flows {direction}.
    Where does the {title} rise?
It reaches the sea at [{place_4}].
    Where does the {title} reach the sea?
Its largest tributary is the [{place_5}].
    What is the largest tributary of the {title}?
== Wildlife ==
The upper {place_1} is known for its [{fish_1}].
    Which fish is the upper {title} known for?
The banks are lined with {tree_2} and [{tree_1}].
    Which trees grow beside the {title}?
Since {year}, [{animal_1}] have returned to the lower valley.
    Which animals have returned to the {title}?
A reserve of {hundred} hectares was set up in [{year_1}].
    When was a reserve set up on the {title}?
== Crossings ==
The oldest bridge, at {place_3}, was built of [{material_1}] in {year}.
    What is the oldest bridge over the {title} built of?
It replaced a ferry that was run by the family of [{first_1} {last_1}].
    Whose family ran the ferry over the {title}?
A second bridge of {material} was paid for by the [{industry_1}] trade.
    Which trade paid for the second bridge over the {title}?
In {year} [{disaster_1}] destroyed {few} of the bridges.
    What destroyed bridges over the {title}?
The bridge at {place_4} carries {thousand:,} vehicles on a day in [{month_1}].
    For which month is traffic over the {title} given?

= {first_1} {last_1} =
{first_1} {last_1} was a painter from [{place_1}].
    Where did {title} come from?
{last_1} is best known for [{art_1}].
    What is {title} best known for?
The paintings are admired for their [{quality_1}].
    For what are the paintings of {title} admired?
The largest collection is in the museum of [{place_2}].
    Where is the largest collection of paintings by {title}?
== Life ==
{last_1} was born in [{year_1}], the child of a {office} and a teacher.
    When was {title} born?
At the age of {dozen}, {last_1} became a pupil of [{first_2} {last_2}].
    Whose pupil was {title}?
A journey to [{place_3}] in the spring of {year} left a deep impression.
    Which journey impressed {title}?
{last_1} married the {office} [{first_3} {last_3}], and they had {few} children.
    Whom did {title} marry?
{last_1} died of [{illness_1}] in {place_2}.
    Of what did {title} die?
== Work ==
The early work consists of [{art_2}] and shows {quality}.
    What does the early work of {title} consist of?
In {year} {last_1} was asked to paint the {building} of [{place_4}].
    Which place asked {title} to paint a building?
The critic [{first_4} {last_4}] praised the {quality} of the later {art_1}.
    Which critic praised {title}?
A catalogue of [{hundred_1}] works was printed in {year}.
    How many works are in the catalogue of {title}?

= SS {place_1} =
SS {place_1} was a cargo ship built by [{last_1} and Sons] in {place_2}.
    Who built {title}?
She was launched in [{year_1}].
    When was {title} launched?
She was [{hundred_1} feet] long and had a crew of {dozen}.
    How long was {title}?
Her home port was [{place_3}].
    What was the home port of {title}?
== Service ==
She carried [{cargo_1}] between {place_3} and {place_4}.
    What did {title} carry?
Her first captain was [{first_1} {last_2}].
    Who was the first captain of {title}?
In {month} {year} she [{accident_1}] off {place_5}.
    What happened to {title} off {place_5}?
Repairs took {few} months and cost [{thousand_1:,} crowns].
    How much did the repairs of {title} cost?
Later she also carried {cargo_2} for the [{place_6} Line].
    For which line did {title} sail later?
== Loss ==
She was lost in a storm near [{place_7}] with {thousand} tons of {cargo} on board.
    Where was {title} lost?
The {dozen} survivors were saved by a boat from [{place_8}].
    Where did the boat that saved the survivors of {title} come from?
The inquiry, led by the judge [{first_2} {last_3}], blamed the weather.
    Who led the inquiry into the loss of {title}?
The wreck was found in [{year_2}] at a depth of {dozen} metres.
    When was the wreck of {title} found?

= {colour_1} {feature_1} {bird_1} =
The {colour_1} {feature_1} {bird_1} is a bird of [{habitat_1}].
    Where does the {title} live?
It was first described by [{first_1} {last_1}] in {year}.
    Who first described the {title}?
It is about [{dozen_1} centimetres] long.
    How long is the {title}?
The male has a {colour_3} head and [{colour_2}] legs.
    What colour are the legs of the male {title}?
== Behaviour ==
The {bird_1} feeds on [{food_1}], and in winter on {food_2}.
    What does the {title} feed on?
The nest, made of [{nest_1}], is built {few} metres above the ground.
    What is the nest of the {title} made of?
The female lays [{few_1}] {colour} eggs in {month}.
    How many eggs does the {title} lay?
Flocks leave {habitat_1} for [{habitat_2}] in {month}.
    For which habitat does the {title} leave?
== Conservation ==
There are about [{thousand_1:,}] pairs, most of them near {place_1}.
    How many pairs of the {title} are there?
Its numbers have fallen by {percent} % because of [{threat_1}].
    What made the numbers of the {title} fall?
It has been protected by law since [{year_1}].
    Since when has the {title} been protected?
A reserve of {hundred} hectares at [{place_2}] shelters the largest colony.
    Where is the largest colony of the {title}?
""")
