"""How long a run on a large text takes to start, and how much memory the text takes in each rank.

    python tests/benchmarks/large_text.py --gigabytes 1 4 --output tests/benchmarks/results/large_text.json

writes generated abstracts to a file and launches zero/train.py on two ranks for two steps: on the embedded sample, on
the file with an empty cache, and on the file again. A start is the time from the command to the end of the first step;
the text costs what a start on it takes longer than one on the sample. The first start is compared with the bare
tokenizer: as many processes as there are cores, which only tokenize text that is in memory already.

Memory is each rank's largest RssAnon (anonymous resident memory) beyond what the rank on the sample has. Pages of files
mapped into memory are shared by the ranks and can be dropped at any time; they do not count.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
import psutil
import transformers
from transformers import AutoTokenizer

from common import sample

POLL_S = 1.0
UNIT_DOCUMENTS = 100_000  # the file repeats so many different ones
FLAGS = shlex.split("--max_train_steps 2 --max_eval_steps 1 --no-save_checkpoint --generation_prompt '' --batch_size 8")


def write_large_text(path, gigabytes):
    """Writes at least that many gigabytes as .jsonl; returns how many bytes of it are text."""
    with tempfile.TemporaryDirectory() as scratch:
        sample.write_documents(Path(scratch, "unit.jsonl"), "abstracts", UNIT_DOCUMENTS, seed=1)
        unit = Path(scratch, "unit.jsonl").read_bytes()
    repeats = -(-int(gigabytes * 1e9) // len(unit))
    with open(path, "wb") as file:
        file.writelines(unit for _ in range(repeats))
    return repeats * sum(len(json.loads(line)["text"].encode()) for line in unit.splitlines())


def tokenize_bare(model, texts, started):
    tokenizer = AutoTokenizer.from_pretrained(model)
    started.wait()
    for start in range(0, len(texts), 100):
        tokenizer(texts[start : start + 100], verbose=False, return_attention_mask=False)


def bare_throughput(model, path):
    """Bytes of text per second that the tokenizer processes on all cores."""
    with open(path) as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(UNIT_DOCUMENTS), file, strict=False)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cores = len(os.sched_getaffinity(0))
    started = multiprocessing.Barrier(cores + 1)
    parts = [(model, texts[core::cores], started) for core in range(cores)]
    processes = [multiprocessing.Process(target=tokenize_bare, args=part) for part in parts]
    for process in processes:
        process.start()
    started.wait()
    begun = time.time()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return sum(len(text.encode()) for text in texts) / (time.time() - begun)


def start(dataset, cache):
    """Launches the script; returns (seconds to the end of the first step, largest RssAnon of each rank in bytes)."""
    with tempfile.TemporaryDirectory() as output:
        command = [*bench.deepspeed(2), bench.ROOT / "zero" / "train.py", "--dataset_name", dataset, *FLAGS]
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
        begun, largest = time.time(), {}
        with open(f"{output}/log", "w") as log:
            launcher = subprocess.Popen(
                [*map(str, command), "--output_dir", output], stdout=log, stderr=log, env=environment
            )
            while launcher.poll() is None:
                for rank, size in anonymous_memory(launcher.pid).items():
                    largest[rank] = max(size, largest.get(rank, 0))
                time.sleep(POLL_S)
        if launcher.returncode:
            sys.exit(Path(output, "log").read_text()[-4000:])
        first_step = bench.read_events(output, "step")[0]
        return first_step["time"] - begun, [largest[rank] for rank in sorted(largest)]


def anonymous_memory(launcher):
    """{rank: bytes} of the ranks that a launcher has started, without the processes that tokenize for them."""
    sizes = {}
    try:
        for child in psutil.Process(launcher).children(recursive=True):
            if (rank := child.environ().get("RANK")) is not None and child.parent().environ().get("RANK") is None:
                status = Path(f"/proc/{child.pid}/status").read_text()
                sizes[int(rank)] = int(status.split("RssAnon:")[1].split()[0]) * 1024
    except (psutil.Error, OSError, IndexError):
        pass  # a process ended meanwhile
    return sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4])
    parser.add_argument("--directory", type=Path, help="for text and cache; default: a temporary one")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = sample.sample_model_directory("gpt2")
    results = {"cores": len(os.sched_getaffinity(0)), "transformers": transformers.__version__, "text": []}
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        start("sample", f"{scratch}/sample")
        seconds, memory = start("sample", f"{scratch}/sample")
        results["sample"] = {"start_s": round(seconds, 1), "anonymous_mib": [round(size / 2**20) for size in memory]}
        for gigabytes in args.gigabytes:
            path, cache = Path(scratch, f"{gigabytes:g}gb.jsonl"), f"{scratch}/{gigabytes:g}gb"
            size = write_large_text(path, gigabytes)
            bare = bare_throughput(model, path)
            result = {"gigabytes": gigabytes, "text_bytes": size, "bare_mb_per_s": round(bare / 1e6, 2)}
            for name in ("first", "second"):
                took, peaks = start(path, cache)
                result[f"{name}_start_beyond_sample_s"] = round(took - seconds, 1)
                result[f"{name}_start_beyond_sample_mib"] = [
                    round((peak - base) / 2**20) for peak, base in zip(peaks, memory, strict=True)
                ]
            rate = size / result["first_start_beyond_sample_s"]
            result |= {"first_start_mb_per_s": round(rate / 1e6, 2), "of_bare": round(rate / bare, 3)}
            results["text"].append(result)
            bench.keep(args.output, results)
            print(json.dumps(result), flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
