"""zero/train.py with a rank 0 that takes SECONDS to load its data: slow_preparation.py SECONDS flags..."""

import os
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from common import data

    # The launcher may put --local_rank first.
    seconds = next(argument for argument in sys.argv[1:] if argument.isdecimal())
    sys.argv.remove(seconds)
    load_documents = data.load_documents

    def load_documents_slowly(*args, **kwargs):
        if os.environ["RANK"] == "0":
            time.sleep(int(seconds))
        return load_documents(*args, **kwargs)

    data.load_documents = load_documents_slowly
    runpy.run_path(str(ROOT / "zero" / "train.py"), run_name="__main__")
