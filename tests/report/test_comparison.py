"""The page of a comparison, from records made by hand."""

from __future__ import annotations

import copy
import re
from xml.etree import ElementTree

import pytest

from tests.report.test_report import Page
from trimtab.report.comparison import write_comparison
from trimtab.report.folder import RunFolder
from trimtab.report.paired import compared, measured
from trimtab.report.style import DARK, LIGHT

ARMS = ["grpo", "bnpo", "grpo(clip_high=0.28, note='<b>')"]


def fill(path, arm, seed):
    """A run of 12 turns whose end depends on the arm and the seed."""
    gain = 0.05 * ARMS.index(arm) + 0.01 * seed * ARMS.index(arm)
    with RunFolder(path).create({"seed": seed}) as folder:
        for t in range(1, 13):
            folder.write_metrics(
                {"turn": t, "updates": t, "decisions": (100 + seed) * t, "rows": 8 * t, "seconds": t / 2,
                 "reward": t / 20 + gain, "entropy": 2 - t / 10, "grad_norm": 1.0 + seed, "clip_low": 0.01,
                 "clip_high": 0.02, "dead_groups": 0.25, "length": 5.0}
            )  # fmt: skip
        for t in (0, 4, 8, 12):
            folder.write_eval(
                {"turn": t, "decisions": (100 + seed) * t, "seconds": t / 2, "mean": t / 20 + gain, "sampled": t / 40,
                 "low": 0.0, "high": 1.0, "n": 50, "measure": "greedy accuracy"}
            )  # fmt: skip
    return RunFolder(path)


def comparison(out, arms=ARMS, seeds=(0, 1, 2), missing=()):
    runs, records = [], []
    for i, arm in enumerate(arms):
        for seed in seeds:
            path = out / f"arm{i}" / f"seed{seed}"
            if (arm, seed) in missing:
                continue
            folder = fill(path, arm, seed)
            run = measured(arm, seed, folder.metrics(), folder.evaluations())
            runs.append(run)
            records.append({**vars(run), "run": str(path), "threads": 1, "command": "trimtab train"})
    for arm, seed in missing:
        records.append({"arm": arm, "seed": seed, "state": "unfinished", "values": {}, "decisions": 0, "seconds": 0.0,
                        "run": "nowhere"})  # fmt: skip
    return {
        "command": "trimtab compare grpo 'bnpo<'",
        "task": {"policy": "nano", "environment": "toy:sum(limit=5)"},
        "budget": {"turns of the first": 12},
        "seeds": list(seeds),
        **compared(arms, seeds, runs),
        "runs": records,
        "differences": {a: [{"address": "credit", "base": "group_mean", "arm": ""}] for a in arms[1:]},
        "versions": {"torch": "2"},
        "machine": "m, 2 cores",
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return out, comparison(out)


def test_the_whole_page(made):
    out, found = made
    source = write_comparison(out, found).read_text()
    page = Page(source)
    for part in (
        "2 methods against grpo, 3 seeds each",
        "bnpo is better than grpo on this task: +6.0 points [3.5, 8.5] over 3 seeds.",
        "the intervals are not corrected for several comparisons",
        "3 seeds say little about chance",
        "trimtab compare grpo 'bnpo<'",
        "Held-out problems",
        "Reward while training",
        "that of 12 turns of grpo",
        "held-out, all training",
        "group_mean",
        "How to read this",
        "torch 2. m, 2 cores",
        "40.0% (1,200 decisions, 6 s)",
    ):
        assert part in page.text, part
    for title in ("Entropy", "Clip rate", "Gradient norm", "Dead groups", "Response length"):
        assert title in page.text
    assert page.tags.count("figure") == 7
    assert "note='<b>'" not in source


def test_it_needs_nothing_but_itself_and_ids_are_unique(made):
    out, found = made
    source = write_comparison(out, found).read_text()
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)
    ids = re.findall(r' id="([^"]+)"', source)
    assert len(ids) == len(set(ids))
    assert "var(--plot-c0" in source
    assert "prefers-color-scheme:dark" in source


def test_pictures_for_a_readme(made):
    out, found = made
    write_comparison(out, found)
    for theme, colours in (("light", LIGHT), ("dark", DARK)):
        svg = (out / f"held-out-{theme}.svg").read_text()
        ElementTree.fromstring(svg)
        assert colours["c1"] in svg


def test_one_arm_is_the_headline_and_missing_runs_are_said(tmp_path):
    found = comparison(tmp_path, ARMS[:2], missing=[("bnpo", 1)])
    page = Page(write_comparison(tmp_path, found).read_text())
    assert page.text.count("over 2 seeds of 3") == 1
    assert "1 run of 6 is not finished." in page.text
    assert "unfinished" in page.text


def test_an_arm_without_a_run_is_left_out_of_the_pictures(tmp_path):
    found = comparison(tmp_path, ARMS[:2], seeds=(0,), missing=[("bnpo", 0)])
    page = Page(write_comparison(tmp_path, copy.deepcopy(found)).read_text())
    assert "no seed finished under both" in page.text
    assert "not measured" in page.text
