"""Checkpoints to the Hugging Face Hub."""

from huggingface_hub import HfApi

from common.errors import UserError


class Uploads:
    """Checkpoint directories and files of weights on their way to one repository, created where it is not there.

    Raises:
        UserError: no token, no right to write, or no Hub in reach; found out before the first step.
    """

    def __init__(self, repo):
        self.repo = repo
        self.failed = []
        try:
            HfApi().create_repo(repo, exist_ok=True)
        except Exception as error:  # the HTTP library's errors and the Hub's have no common base
            raise UserError(
                f"--hf_repo {repo} cannot be written ({_first_line(error)}); is HF_TOKEN set to a token with "
                "write access?"
            ) from error

    def upload(self, path):
        """Uploads a directory or file under its own name; returns a line that says how it went.

        A failure costs neither the local files nor the training; `finish` brings it up again.
        """
        try:
            if path.is_dir():
                HfApi().upload_folder(repo_id=self.repo, folder_path=path, path_in_repo=path.name)
            else:
                HfApi().upload_file(repo_id=self.repo, path_or_fileobj=path, path_in_repo=path.name)
        except Exception as error:  # as above
            self.failed.append(f"hf upload {self.repo} {path} {path.name}")
            return f"{path} is not on the Hub: {_first_line(error)}"
        return f"uploaded {path} to https://huggingface.co/{self.repo}"

    def finish(self):
        """Raises UserError with the commands that try again, if an upload failed."""
        if self.failed:
            raise UserError(f"training is done, but {len(self.failed)} uploads failed: {'; '.join(self.failed)}")


def _first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__
