"""Sending a checkpoint to a repository of the Hugging Face Hub: what would go there, and the sending."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kronpress.checkpoint import METHOD, base_of, check_checksum, model_path
from kronpress.errors import RequestError, WorkError
from kronpress.healing.checkpoints import write_whole
from kronpress.model_card import CARD, STORY, Story, for_repository, model_card, read_story
from kronpress.reporting import run_story
from kronpress.reporting.results import RESULTS, read_results

WEIGHTS = ("*.safetensors", "*.onnx")


@dataclass(frozen=True)
class Upload:
    """What goes where: each file's size in bytes by its path in the folder.

    `texts` are the files that are written into the folder before: its card, with the lines that load the model from
    the repository.
    """

    folder: Path
    repo_id: str
    private: bool
    files: Mapping[str, int]
    texts: Mapping[str, str]

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo_id}"

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "repo_id": self.repo_id,
            "url": self.url,
            "visibility": "private" if self.private else "public",
            "files": [{"path": name, "bytes": size} for name, size in self.files.items()],
            "bytes": sum(self.files.values()),
        }


def check_repo_id(repo_id: str) -> None:
    """RequestError if the Hub has no repositories of such a name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RequestError(f"repository {repo_id!r}: {error}") from error
    if "/" not in repo_id:
        raise RequestError(f"repository {repo_id!r}: it needs its owner as well, as in OWNER/{repo_id}")


def check_token() -> None:
    """RequestError if there is nothing to log in with; whether the Hub accepts it is known when it is asked."""
    if get_token() is None:
        raise RequestError("sending to the Hub needs a token: `hf auth login`, or the environment variable HF_TOKEN")


def plan_upload(directory: str | Path, repo_id: str, private: bool = False) -> Upload:
    """What `push` would send, of a checkpoint or of a run directory; needs neither token nor network.

    Hidden files stay. A checkpoint without a card gets one, from results.json of its run or from its plan.

    Raises:
        RequestError: no such name for a repository, or a folder that is no checkpoint.
        WorkError: its weights are damaged.
    """
    check_repo_id(repo_id)
    directory = Path(directory)
    if not directory.is_dir():
        raise RequestError(f"{str(directory)!r} is no folder: a checkpoint or a run directory is sent")
    folder = Path(model_path(str(directory.resolve())))
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    }
    weights = [path for pattern in WEIGHTS for path in folder.glob(pattern)]
    if not weights:
        raise RequestError(f"{str(directory)!r} is no checkpoint: {str(folder)!r} holds none of {', '.join(WEIGHTS)}")
    for path in weights:
        check_checksum(path)
    texts = {name: for_repository(text, repo_id) for name, text in _card(directory, folder).items()}
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    sizes |= {name: len(text.encode()) for name, text in texts.items()}
    return Upload(folder, repo_id, private, dict(sorted(sizes.items())), texts)


def push(upload: Upload) -> None:
    """Make the repository if it is not there, and send the files.

    Raises:
        RequestError: there is no token, or a private repository is asked for and a public one is there.
        WorkError: the Hub refused, or could not be reached; the folder is as it was.
    """
    check_token()
    api = HfApi()
    try:
        api.create_repo(upload.repo_id, repo_type="model", private=upload.private, exist_ok=True)
        if upload.private and not api.model_info(upload.repo_id).private:
            raise RequestError(
                f"repository {upload.repo_id!r} is there and public, and a private one was asked for: nothing was sent"
            )
        for name, text in upload.texts.items():
            write_whole(upload.folder / name, text)
        api.upload_folder(
            repo_id=upload.repo_id,
            repo_type="model",
            folder_path=upload.folder,
            allow_patterns=[escape(name) for name in upload.files],
            commit_message="Checkpoint compressed by kronpress",
        )
    except RequestError:
        raise
    except Exception as error:  # the Hub's, the network's and the file system's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WorkError(
            f"could not send {str(upload.folder)!r} to {upload.repo_id!r}: {reason}; nothing in the folder is lost, "
            "and `kronpress push` sends it again"
        ) from error


def _card(directory: Path, folder: Path) -> dict[str, str]:
    """The text of the folder's card, or those of a card and a story where it has none and they can be made."""
    if (folder / CARD).is_file():
        return {CARD: (folder / CARD).read_text(encoding="utf-8")}
    story = read_story(folder) or _story(directory, folder)
    if story is None:
        return {}
    return {CARD: str(model_card(story)), STORY: story.model_dump_json(indent=1) + "\n"}


def _story(directory: Path, folder: Path) -> Story | None:
    """What is known of a checkpoint that was written without a card."""
    if (directory / RESULTS).is_file():
        results = read_results(directory)
        return run_story(results, base_of(results["model"]["name"], results["model"].get("revision")))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    return Story(plan=quantization["plan"]) if quantization.get("quant_method") == METHOD else None
