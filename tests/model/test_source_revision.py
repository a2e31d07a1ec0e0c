"""The revision of a source is read from wherever the tool that fetched it left it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_serve.model.source_revision import find_revision

PACKED_REFS = "# pack-refs\n{other} refs/x\n{commit} refs/heads/main\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


def test_a_snapshot_in_the_hubs_cache_names_repository_and_commit(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--mistralai--Mixtral-8x7B-v0.1" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert find_revision(snapshot) == f"mistralai/Mixtral-8x7B-v0.1@{COMMIT}"


def test_notes_of_a_download_name_the_commit_if_they_agree(tmp_path: Path) -> None:
    notes = tmp_path / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        (notes / f"{name}.metadata").write_text(f"{COMMIT}\netag\n1700000000.0\n")
    assert find_revision(tmp_path) == COMMIT
    (notes / "tokenizer.json.metadata").write_text(f"{OTHER}\netag\n1700000000.0\n")
    assert find_revision(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "revision"),
    [
        ({"HEAD": COMMIT}, COMMIT),
        ({"HEAD": "ref: refs/heads/main\n", "refs/heads/main": COMMIT + "\n"}, COMMIT),
        (
            {"HEAD": "ref: refs/heads/main\n", "packed-refs": PACKED_REFS.format(other=OTHER, commit=COMMIT)},
            COMMIT,
        ),
        ({"HEAD": "ref: refs/heads/main\n"}, None),
        ({"HEAD": "ref: refs/../../../secret\n"}, None),
        ({"HEAD": "no commit"}, None),
    ],
)
def test_a_work_tree_names_what_head_points_at(tmp_path: Path, files: dict[str, str], revision: str | None) -> None:
    for name, text in files.items():
        path = tmp_path / ".git" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert find_revision(tmp_path) == revision


def test_a_plain_directory_names_nothing(tmp_path: Path) -> None:
    assert find_revision(tmp_path) is None
