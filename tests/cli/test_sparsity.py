"""`trimtab sparsity`: a run, two runs, models; a mask, and training with it, from the command line alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.cli import main
from trimtab.core.state import checkpoints
from trimtab.report.folder import RunFolder
from trimtab.runs.experiment import train
from trimtab.runs.request import Request
from trimtab.runs.sparsity import compare, read_checkpoint
from trimtab.stages.sparsity import SparsityError, changes, overlap, sparsity
from trimtab.stages.subnetwork import MaskError, read_header, read_mask

ENV = "toy:sum(limit=5)"
SMALL = ("collect.prompts=8", "update.lr=1e-5", "update.weight_decay=0.1")


def made(out: Path, method: str = "sft", **more: Any) -> Path:
    usual: dict[str, Any] = {"steps": 4, "set": SMALL, "eval_every": 4, "eval_problems": 3, "save_every": 2}
    train(Request(method, "nano", ENV, str(out), threads=1, **{**usual, **more}), mode="silent")
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparsity")
    made(folder / "a")
    made(folder / "b", set=("collect.prompts=4", *SMALL[1:]))
    made(folder / "other", seed=1)
    made(folder / "adapter", lora=2)
    return folder


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("control") / "run"
    options = {"steps": 2, "set": ("collect.horizon=32",), "eval_problems": 1, "threads": 1}
    train(Request("ppo", "", "CartPole-v1", str(out), **options), mode="silent")
    return out


def asked(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main(["sparsity", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_is_its_start_against_its_checkpoints(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = asked(capsys, place / "a", "--rank", "--out", tmp_path, "--json")
    assert code == 0
    found = json.loads(out)
    (update,) = found["updates"]
    start, end = (read_checkpoint(c) for c in checkpoints(place / "a" / "checkpoints"))
    assert [c["turn"] for c in update["course"]] == [2, 4]
    assert update["total"]["sparsity"] == update["course"][-1]["sparsity"]
    assert 0.5 < update["total"]["sparsity"] < update["course"][0]["sparsity"] < 1
    assert update["total"]["unchanged_float32"] < 0.01
    assert update["total"]["weights"] == sum(t["weights"] for t in update["tensors"].values()) == 12864
    assert update["without_embeddings"]["weights"] == 12864 - 99 * 24
    assert 0.5 < update["rank"] <= 1
    between = compare(place / "a" / "checkpoints" / "turn-00000002", place / "a" / "checkpoints" / "turn-00000004")
    assert between["updates"][0]["total"] == sparsity(start, end).total.numbers()
    assert json.loads((tmp_path / "sparsity.json").read_text())["updates"] == found["updates"]
    for name in ("sparsity-light.svg", "sparsity-dark.svg", "sparsity-light.png", "sparsity-dark.png"):
        assert (tmp_path / name).stat().st_size > 5000
        assert str(tmp_path / name) in found["files"]
    assert (tmp_path / "sparsity-light.svg").read_bytes() != (tmp_path / "sparsity-dark.svg").read_bytes()


def test_two_runs_are_two_updates_and_their_overlap(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = asked(capsys, place / "a", place / "b", "--out", tmp_path)
    assert code == 0
    assert "changed by both" in out
    assert "The two ends agree on" in out
    found = compare(place / "a", place / "b")
    assert found["one_start"] is True
    (first, base), (second, _) = (_states(place / name) for name in "ab")
    expected = overlap(changes(base, first, tol=1e-5), changes(base, second, tol=1e-5))
    assert found["overlap"] == expected.numbers()
    assert found["overlap"]["o1"] > found["overlap"]["chance_o1"]
    assert found["overlap"]["chance_o1"] == pytest.approx(1 - found["updates"][1]["total"]["sparsity"])
    assert found["ends"]["sparsity"] == sparsity(first, second).total.sparsity


def _states(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    from trimtab.policies.builtin import load_policy
    from trimtab.stages.sparsity import parameters

    return read_checkpoint(checkpoints(run / "checkpoints")[-1]), parameters({"policy": load_policy("nano")})


def test_runs_that_began_apart_are_compared_and_it_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = asked(capsys, place / "a", place / "other", "--out", tmp_path)
    assert code == 0
    assert "The two began from different parameters" in " ".join(out.split())


def test_model_folders_files_builtins_and_a_common_start(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = asked(capsys, "nano", place / "a" / "model", "--out", tmp_path / "p")
    assert code == 0
    assert "nano -> " in out
    assert (tmp_path / "p" / "sparsity-dark.svg").stat().st_size > 5000
    run = compare(place / "a")["updates"][0]
    by_model = compare("nano", place / "a" / "model")["updates"][0]
    assert by_model["total"] == run["total"]
    assert by_model["tensors"].keys() == run["tensors"].keys()
    assert by_model["base"] == run["base"]
    save_file(load_file(place / "a" / "model" / "model.safetensors"), tmp_path / "one.safetensors")
    by_file = compare(tmp_path / "one.safetensors", place / "b" / "model" / "model.safetensors")["updates"][0]
    assert by_file["total"]["sparsity"] == compare(place / "a", place / "b")["ends"]["sparsity"]
    both = compare(place / "a" / "model", place / "b", start="nano")
    assert both["overlap"] == compare(place / "a", place / "b")["overlap"]


def test_a_control_run_is_measured_network_by_network(control: Path, tmp_path: Path) -> None:
    found = compare(control, mask=tmp_path / "m")
    (update,) = found["updates"]
    assert set(update["base"]) == {"policy"}
    assert update["total"]["unchanged_float32"] < 0.2
    exported = compare(control / "model", control / "checkpoints" / f"turn-{update['turn']:08d}")
    assert exported["updates"][0]["total"]["unchanged_float32"] == 1.0
    again = control.parent / "masked"
    method = f"subnetwork(mask='{tmp_path / 'm'}', every=1)+ppo"
    train(Request(method, "", "CartPole-v1", str(again), steps=2, set=("collect.horizon=32",), eval_problems=1,
                  threads=1), mode="silent")  # fmt: skip
    mask, (start, end) = read_mask(tmp_path / "m", "policy"), (_start(control), read_checkpoint(_last(again)))
    for name, chosen in mask.items():
        assert torch.equal(end[f"policy/{name}"][~chosen], start[f"policy/{name}"][~chosen])
    assert "sparsity" in RunFolder(again).metrics()[-1]


def _start(run: Path) -> Any:
    from trimtab.runs.sparsity import states

    return states(run).start


def _last(run: Path) -> Path:
    return checkpoints(run / "checkpoints")[-1]


def test_a_mask_from_the_command_line_and_training_with_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.mask"
    code, out, _ = asked(capsys, place / "a", "--mask", file, "--out", tmp_path / "p")
    assert code == 0
    assert f"mask: {file} chooses" in out
    end, start = _states(place / "a")
    mask = {f"policy/{name}": m for name, m in read_mask(file, "policy").items()}
    expected = changes(start, end)
    assert all(torch.equal(mask[name], expected[name]) for name in expected)
    header = read_header(file)
    assert (header["seed"], header["turn"], header["tol"], header["random"]) == (0, 4, 0.0, None)
    assert len(header["config"]) == 16
    run = tmp_path / "run"
    words = ["train", f'subnetwork(mask="{file}", every=2)+sft', "--policy", "nano", "--env", ENV, "--steps", "4",
             "--eval-problems", "3", "--save-every", "2", "--threads", "1", "--out", str(run), "--json",
             *(f"--set={s}" for s in SMALL)]  # fmt: skip
    assert main(words) == 0
    capsys.readouterr()
    config = RunFolder(run).config()
    assert config["resolved"]["masked(update).mask"] == f"MaskFile('{file}', sha256 {_digest(out)})"
    after = read_checkpoint(_last(run))
    for name, chosen in mask.items():
        assert torch.equal(after[name][~chosen], start[name][~chosen]), name
        assert int((after[name] != start[name]).sum()) >= 0.9 * int(chosen.sum())
    whole = compare(place / "a", run)
    assert whole["one_start"] is True
    assert whole["ends"]["sparsity"] > whole["updates"][0]["total"]["sparsity"]
    straight = {p.name: p.read_bytes() for p in _last(run).iterdir() if p.name != "manifest.json"}
    shutil.rmtree(_last(run))
    assert main(["resume", str(run), "--json"]) == 0
    capsys.readouterr()
    assert {p.name: p.read_bytes() for p in _last(run).iterdir() if p.name != "manifest.json"} == straight
    shutil.move(file, tmp_path / "elsewhere")
    assert main(["resume", str(run)]) == 1
    assert "cannot be read" in capsys.readouterr().err


def _digest(out: str) -> str:
    return "".join(out.split()).rpartition("sha256")[2][:16]


def test_a_random_mask_has_as_many_weights_of_each_matrix(place: Path, tmp_path: Path) -> None:
    changed, lot = (
        compare(place / "a", mask=tmp_path / name, random=seed)["mask"] for name, seed in (("c", None), ("r", 5))
    )
    assert lot["digest"] != changed["digest"]
    a, b = (read_mask(tmp_path / name, "policy") for name in ("c", "r"))
    assert all(int(a[name].sum()) == int(b[name].sum()) for name in a)
    assert read_header(tmp_path / "r")["random"] == 5


def test_checkpoints_of_different_shapes_are_refused_naming_the_matrix(
    place: Path, control: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = load_file(place / "a" / "model" / "model.safetensors")
    name = next(n for n, t in wide.items() if t.dim() == 2)
    wide[name] = torch.cat([wide[name], wide[name]])
    save_file(wide, tmp_path / "wide.safetensors")
    code, _, err = asked(capsys, place / "a" / "model" / "model.safetensors", tmp_path / "wide.safetensors")
    assert code == 1
    assert f"'policy/{name}' has shape" in err
    del wide[name]
    save_file(wide, tmp_path / "less.safetensors")
    code, _, err = asked(capsys, place / "a" / "model" / "model.safetensors", tmp_path / "less.safetensors")
    assert code == 1
    assert f"'policy/{name}' is not among the new parameters" in err
    for other in (place / "adapter", control):
        code, _, err = asked(capsys, place / "a", other)
        assert code == 1
        assert "is not among the new parameters" in err
        assert f"The reference is {place / 'a'}, and the new parameters are those of {other}." in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none",), "none is nothing that holds parameters; give a run folder"),
        (("a", "--checkpoint", "3"), "has no checkpoint of turn 3"),
        (("a/model",), "is one state; give a run, or a second state"),
        (("a", "a/model"), "which is compared with which"),
        (("a", "b", "--mask", "m"), "a mask is of one update, and here are two"),
        (("a", "--random", "1"), "no mask is written; add --mask FILE"),
        (("a/model", "b/model", "--start", "a"), "is a run, which has a start and an end"),
        (
            ("a/checkpoints/turn-00000002", "a/checkpoints/turn-00000004", "--mask", "m"),
            "belongs to the base that",
        ),
        (("a", "--tol", "-1"), "must be a number of at least 0"),
    ],
)
def test_what_cannot_be_measured_is_said(
    place: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    code, _, err = asked(capsys, *words)
    assert code == 1
    assert said in err
    assert not (place / "runs").exists()
    assert not (place / "m").exists()


def test_damaged_files_are_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "a" / "checkpoints" / "turn-00000004", tmp_path / "c")
    with (tmp_path / "c" / "tensors.safetensors").open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"x")
    with pytest.raises(Exception, match="is damaged: its sha256"):
        compare(tmp_path / "c", place / "a" / "checkpoints" / "turn-00000004")
    (tmp_path / "c" / "manifest.json").write_text("{")
    with pytest.raises(Exception, match="is damaged: JSONDecodeError"):
        compare(tmp_path / "c", place / "a" / "checkpoints" / "turn-00000004")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(SparsityError, match=r"bad.safetensors cannot be read"):
        compare(tmp_path / "bad.safetensors", place / "a" / "model")


def test_a_mask_on_another_base_is_refused_before_a_folder_is_made(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(place / "a", mask=tmp_path / "m")
    method = f"subnetwork(mask='{tmp_path / 'm'}')+sft"
    with pytest.raises(MaskError, match="A mask belongs to its base"):
        made(tmp_path / "run", method, seed=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(MaskError, match="cannot be read"):
        made(tmp_path / "run", f"subnetwork(mask='{tmp_path / 'none'}')+sft")
