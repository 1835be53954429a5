"""Shared by all tests: no network, no progress bars, signal handlers restored, and the `fails` fixture."""

import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")


@pytest.fixture(autouse=True)
def no_progress_bars():
    """They share standard error with the messages that the tests read."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restores the handlers after each test: a pool worker that inherits one that only sets a flag never terminates."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs a conversion that must fail with one error line that contains all of `said`, and leave no files."""
    from common.convert import main

    def run(*argv, said):
        before = sorted(path.name for path in tmp_path.iterdir())
        output = tmp_path / "out"
        assert main([*map(str, argv), "--output_dir", str(output)]) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: "), message
        assert message.count("\n") == 1, message
        for part in said:
            assert part in message, (part, message)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        return message

    return run
