"""Sending a checkpoint to the Hub: what would go there, and that nothing goes where it should not; no network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kronpress as kp
from kronpress import cli, hub
from kronpress.hub import check_repo_id, plan_upload, push


class Hub:
    """In place of HfApi: repositories by their names, with whether they are private and what was sent to them."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.sent: dict[str, dict[str, bytes]] = {}
        self.error: Exception | None = None

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert (repo_type, exist_ok) == ("model", True)
        self.private.setdefault(repo_id, private)

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(
        self, *, repo_id: str, repo_type: str, folder_path: Path, allow_patterns: list[str], commit_message: str
    ) -> None:
        if self.error is not None:
            raise self.error
        assert (repo_type, bool(commit_message)) == ("model", True)
        self.sent[repo_id] = {name: (folder_path / name).read_bytes() for name in allow_patterns}


@pytest.fixture
def fake(monkeypatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    monkeypatch.setattr(hub, "get_token", lambda: "a token")
    return made


@pytest.fixture
def no_hub(monkeypatch) -> None:
    """Whoever asks for a token or the network fails."""

    def fail() -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "HfApi", fail)
    monkeypatch.setattr(hub, "get_token", fail)


@pytest.fixture
def checkpoint(tiny_compressed, tiny_tokenizer, tmp_path) -> Path:
    folder = tmp_path / "model"
    kp.save_checkpoint(tiny_compressed("gpt2", "kronecker"), tiny_tokenizer, folder)
    (folder / ".hidden").write_text("mine")
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dry_run_lists_what_would_be_sent_and_asks_nobody(no_hub, checkpoint, capsys):
    before = bytes_of(checkpoint)
    assert cli.main(["push", str(checkpoint), "me/small", "--private", "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["repo_id"], document["visibility"], document["dry_run"]) == ("me/small", "private", True)
    listed = {each["path"]: each["bytes"] for each in document["files"]}
    assert set(listed) == set(before) - {".hidden"}
    assert listed["model.safetensors"] == len(before["model.safetensors"])
    assert document["bytes"] == sum(listed.values())
    assert bytes_of(checkpoint) == before
    assert cli.main(["push", str(checkpoint), "me/small", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in listed)
    assert "https://huggingface.co/me/small, made public if it is not there; nothing was sent" in shown


def test_what_is_sent_is_what_the_dry_run_lists(fake, checkpoint, capsys):
    planned = plan_upload(checkpoint, "me/small")
    assert cli.main(["push", str(checkpoint), "me/small"]) == 0
    assert {name: len(content) for name, content in fake.sent["me/small"].items()} == dict(planned.files)
    assert fake.private == {"me/small": False}
    card = fake.sent["me/small"]["README.md"].decode()
    assert 'where = "me/small"\n' in card
    kp.load_model(str(checkpoint))
    push(plan_upload(checkpoint, "me/other"))  # the name in the card goes with the repository
    assert b'where = "me/other"' in fake.sent["me/other"]["README.md"]


def test_a_card_that_somebody_has_edited_stays_as_it_is_but_for_where_the_model_is(fake, checkpoint):
    card = checkpoint / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    expected = card.read_text().replace('where = "."  # this folder', 'where = "me/small"')
    push(plan_upload(checkpoint, "me/small"))
    assert fake.sent["me/small"]["README.md"].decode() == expected
    card.write_text("mine alone\n")
    push(plan_upload(checkpoint, "me/small"))
    assert fake.sent["me/small"]["README.md"] == b"mine alone\n"


def test_a_checkpoint_without_a_card_gets_one(fake, checkpoint):
    weights = (checkpoint / "model.safetensors").read_bytes()
    for name in ("README.md", "kronpress.json"):
        (checkpoint / name).unlink()
    upload = plan_upload(checkpoint, "me/small")
    assert set(upload.texts) == {"README.md", "kronpress.json"}
    assert not (checkpoint / "README.md").exists()
    push(upload)
    assert b"How it was made is not recorded" in fake.sent["me/small"]["README.md"]
    assert (checkpoint / "model.safetensors").read_bytes() == weights


def test_a_run_directory_is_sent_as_its_checkpoint(no_hub, checkpoint):
    upload = plan_upload(checkpoint.parent, "me/small")
    assert upload.folder == checkpoint
    assert upload.files == plan_upload(checkpoint, "me/small").files


@pytest.mark.parametrize("repo_id", ["", "small", "a/b/c", "me/sm all", "me/-x", "me/a--b", "me/x.git", "me/"])
def test_a_wrong_repository_is_refused_before_anything_is_done(no_hub, checkpoint, tmp_path, capsys, repo_id):
    with pytest.raises(kp.RequestError, match="repository"):
        check_repo_id(repo_id)
    out = tmp_path / "out"
    for command in (
        ["push", str(checkpoint), repo_id, "--dry-run"],
        ["run", "low-rank", "--out", str(out), "--push-to-hub", repo_id],
        ["compress", "pocket", "--recipe", "krony-96m", "--out", str(out), "--push-to-hub", repo_id],
        [
            "heal",
            str(checkpoint),
            "--teacher",
            "pocket",
            "--data",
            "bundled",
            "--out",
            str(out),
            "--push-to-hub",
            repo_id,
        ],
        ["export", str(checkpoint), "--out", str(out), "--push-to-hub", repo_id],
    ):
        assert cli.main(command) == 2
        assert f"repository {repo_id!r}" in capsys.readouterr().err
    assert not out.exists()


def test_without_a_token_a_run_is_refused_before_its_work_and_a_dry_run_is_not(
    monkeypatch, checkpoint, tmp_path, capsys
):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    for command in (
        ["run", "low-rank", "--out", str(tmp_path / "out"), "--push-to-hub", "me/small"],
        ["push", str(checkpoint), "me/small"],
    ):
        assert cli.main(command) == 2
        assert "needs a token: `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["push", str(checkpoint), "me/small", "--dry-run"]) == 0


def test_private_without_a_repository_is_refused(tmp_path, capsys):
    assert cli.main(["run", "low-rank", "--out", str(tmp_path / "out"), "--private"]) == 2
    assert "--private" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused(no_hub, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for folder, message in (("none", "is no folder"), ("empty", "no checkpoint"), ("bare", "holds none of")):
        with pytest.raises(kp.RequestError, match=message):
            plan_upload(tmp_path / folder, "me/small")


def test_damaged_weights_are_not_sent(no_hub, checkpoint):
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(kp.WorkError, match="damaged"):
        plan_upload(checkpoint, "me/small")


def test_a_public_repository_gets_nothing_that_was_to_be_private(fake, checkpoint):
    fake.private["me/small"] = False
    before = bytes_of(checkpoint)
    with pytest.raises(kp.RequestError, match="is there and public, and a private one was asked for: nothing was sent"):
        push(plan_upload(checkpoint, "me/small", private=True))
    assert fake.sent == {}
    assert bytes_of(checkpoint) == before
    push(plan_upload(checkpoint, "me/new", private=True))
    assert fake.private["me/new"]


def test_what_the_hub_or_the_network_refuses_is_one_sentence_and_nothing_is_lost(fake, checkpoint, capsys):
    fake.error = ConnectionError("offline\nwith a long story")
    assert cli.main(["push", str(checkpoint), "me/small"]) == 1
    message = capsys.readouterr().err
    assert "could not send" in message
    assert "'me/small': offline; nothing in the folder is lost" in message
    assert "long story" not in message
    kp.load_model(str(checkpoint))
    fake.error = None
    assert cli.main(["push", str(checkpoint), "me/small"]) == 0


def test_a_run_sends_its_checkpoint_when_it_is_whole(fake, tiny_model, save_tiny_checkpoint, tmp_path, capsys):
    dense = save_tiny_checkpoint(tiny_model("gpt2"), tmp_path / "dense")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The old man sat by its window and nobody asked. " * 20)
    changes = [f"model={dense}", f"evaluation.data={text}", "budget.kept_of_targets=0.5", "healing.max_steps=0"]
    changes += ["healing.sequence_length=32", "evaluation.speed=false"]
    command = ["run", "low-rank", "--out", str(out), *(word for each in changes for word in ("--set", each))]
    fake.error = ConnectionError("offline")
    assert cli.main([*command, "--push-to-hub", "me/small"]) == 1
    assert "nothing in the folder is lost" in capsys.readouterr().err
    results = (out / "results.json").read_bytes()
    fake.error = None
    # The run is finished: the same command only sends it.
    assert cli.main([*command, "--resume", "--push-to-hub", "me/small"]) == 0
    assert (out / "results.json").read_bytes() == results
    assert fake.sent["me/small"] == bytes_of(out / "model")
    assert b"model-index" in fake.sent["me/small"]["README.md"]


def test_compress_sends_what_it_has_written(fake, tiny_model, save_tiny_checkpoint, tmp_path, capsys):
    dense = save_tiny_checkpoint(tiny_model("gpt2"), tmp_path / "dense")
    out = tmp_path / "out"
    arguments = ["--recipe", "low-rank", "--set", "budget.kept_of_targets=0.5", "--out", str(out), "--json"]
    assert cli.main(["compress", str(dense), *arguments, "--push-to-hub", "me/small", "--private"]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
    assert fake.private == {"me/small": True}
    assert fake.sent["me/small"] == bytes_of(out)
