"""What every technique shares and a reader would skip: text, file names, state, conversion, the log line.

Training scripts import modules of `LIBRARY`, and those only each other. `COMMANDS` are the programs, such as
`python -m common.convert`, and the modules that only programs use.
"""

LIBRARY = (
    "attention", "chat", "checkpoint", "cli", "data", "deepspeed_config", "distributed", "documents", "errors", "files",
    "hub", "hub_client", "kernels", "loss", "manifest", "memory", "models", "pretrained", "rows", "sample", "shards",
    "tokens", "tracking",
)  # fmt: skip
COMMANDS = ("convert", "evaluate", "evaluation", "metrics", "plots", "report", "run_all", "tables", "zero_checkpoint")
