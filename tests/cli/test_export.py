"""`trimtab export`: what it writes answers, loaded with transformers, as the policy of the run does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.cli import main
from trimtab.core.loop import begin
from trimtab.core.state import load
from trimtab.policies.sampler import Sampling
from trimtab.report.folder import RunFolder, RunFolderError
from trimtab.runs.experiment import Request, build, request_of, train
from trimtab.runs.export import ExportError, choose, export

SMALL = ("collect.prompts=8", "update.lr=3e-2")  # a method that is sure to change the policy
NEW = 8


def made(out: Path, **more: Any) -> Path:
    usual: dict[str, Any] = {"steps": 4, "set": SMALL, "eval_every": 2, "save_every": 2, "threads": 1}
    train(Request("sft", "nano", "toy:sum(limit=5)", str(out), **{**usual, **more}), mode="silent")
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("lora") / "run", lora=2)


def answers(path: Path, checkpoint: str = "newest") -> list[str]:
    """Greedy answers of the run's policy at a checkpoint, made by the project's own sampler."""
    folder = RunFolder(path)
    request = request_of(folder)
    experiment = build(request)
    state = begin(experiment.method, experiment.environment, {"policy": experiment.policy}, seed=request.seed)
    load(state, choose(folder, checkpoint))
    prompts = [experiment.policy.encode(p.prompt) for p in experiment.environment.held_out(6)]
    drawn = experiment.policy.sampler.sample(
        prompts, 1, torch.arange(len(prompts)), Sampling(new_tokens=NEW, temperature=0.0)
    )
    return [experiment.policy.decode(t[m].tolist()) for t, m in zip(drawn.tokens, drawn.mask)]


def loaded_answers(path: Path, run: Path) -> list[str]:
    """The same by nothing but transformers."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    out = []
    for problem in build(request_of(RunFolder(run))).environment.held_out(6):
        ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        out.append(tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))
    return out


def test_a_finished_run_gives_the_same_greedy_answers(run: Path) -> None:
    got = export(run)
    assert got == {
        "run": str(run), "model": str(run / "export" / "turn-00000004"), "turn": 4, "kind": "model",
    }  # fmt: skip
    assert loaded_answers(Path(got["model"]), run) == answers(run)
    assert (run / "model" / "model.safetensors").read_bytes() == (
        run / "export" / "turn-00000004" / "model.safetensors"
    ).read_bytes()


def test_an_earlier_checkpoint_of_an_interrupted_run(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(run, half, ignore=shutil.ignore_patterns("turn-00000004", "model", "export", "report.html"))
    got = export(half, out=tmp_path / "out")
    assert (got["turn"], got["kind"]) == (2, "model")
    assert loaded_answers(tmp_path / "out", run) == answers(run, "2")
    assert answers(run, "2") != answers(run), "the two checkpoints must differ, or this tests nothing"


def test_an_adapter_and_its_merge_answer_alike(adapted: Path, tmp_path: Path) -> None:
    expected = answers(adapted)
    plain, merged = export(adapted, out=tmp_path / "adapter"), export(adapted, out=tmp_path / "merged", merge=True)
    assert (plain["kind"], merged["kind"]) == ("adapter", "model")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert loaded_answers(tmp_path / "adapter", adapted) == expected
    assert loaded_answers(tmp_path / "merged", adapted) == expected
    assert export(adapted, merge=True)["model"].endswith("turn-00000004-merged")


def test_best_is_the_highest_held_out_mean_among_those_kept(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for means, turn in (((0.5, 0.75, 0.25), 2), ((0.9, 0.5, 0.5), 4)):
        records = [{"turn": t, "mean": m} for t, m in zip((0, 2, 4), means)]
        (copy / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        assert choose(RunFolder(copy), "best").name == f"turn-{turn:08d}"
    (copy / "eval.jsonl").write_text('{"turn": 3, "mean": 1.0}\n')
    with pytest.raises(ExportError, match="Kept are the checkpoints of turns 2, 4"):
        choose(RunFolder(copy), "best")


@pytest.mark.parametrize("which", ["3", "latest", "-1", "2.0"])
def test_an_unknown_checkpoint_names_those_there_are(run: Path, tmp_path: Path, which: str) -> None:
    with pytest.raises(ExportError, match="turns 2, 4"):
        export(run, out=tmp_path / "out", checkpoint=which)
    assert not (tmp_path / "out").exists()


def test_refusals(run: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").write_text("mine")
    with pytest.raises(ExportError, match="is there already"):
        export(run, out=tmp_path / "used")
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["note"]
    with pytest.raises(ExportError, match="leave --merge out"):
        export(run, out=tmp_path / "out", merge=True)
    with pytest.raises(RunFolderError, match=r"config\.json"):
        export(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(run / "config.json", empty)
    with pytest.raises(ExportError, match=r"no checkpoint yet.*trimtab resume"):
        export(empty)


def test_an_export_that_fails_half_way_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, folder: Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.policies.language.LanguagePolicy.save", full)
    with pytest.raises(OSError, match="No space"):
        export(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "a")
    assert main(["export", str(run), "--out", str(tmp_path / "b"), "--checkpoint", "2"]) == 0
    assert "model of turn 2" in capsys.readouterr().out
    assert main(["export", str(run), "--out", str(tmp_path / "b")]) == 1
    assert "--out" in capsys.readouterr().err
