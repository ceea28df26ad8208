"""The whole way on real text, as a person would type it: fetch, prepare, train, evaluate, extract, translate,
report.

    make demo

Each part is skipped when it is done already, so a second run resumes where the first ended. The work
lies in demo/.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from lsmoe_ds.config.file import load_recipe

PROJECT = Path(__file__).resolve().parent.parent
RECIPE = PROJECT / "recipes" / "demo.yaml"
WORK = PROJECT / "demo"
RUN = WORK / "runs" / "demo"
DENSE = WORK / "en-de"
TIMINGS = RUN / "timings.json"
PROCESSES = 2
SAMPLE = "Delete this page\nThe user account has been created.\n\nPlease enter a valid password"


def lsmoe(*arguments: str, text: str | None = None) -> str:
    """Run a command in the demo's folder, show it, and return what it printed."""
    print(f"\n$ lsmoe {' '.join(arguments)}", flush=True)
    command = [str(Path(sys.executable).with_name("lsmoe")), *arguments]
    done = subprocess.run(command, cwd=WORK, input=text, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def timed(part: str, *arguments: str, done: bool = False) -> None:
    """Run a part of the demo unless it is done; add its seconds to those of earlier, interrupted attempts."""
    if done:
        return
    begun = time.perf_counter()
    lsmoe(*arguments)
    known = json.loads(TIMINGS.read_text()) if TIMINGS.exists() else {}
    waiting.update({part: waiting.get(part, 0.0) + time.perf_counter() - begun})
    if RUN.exists():
        TIMINGS.write_text(
            json.dumps({**known, **{k: known.get(k, 0.0) + v for k, v in waiting.items()}}, indent=1)
        )
        waiting.clear()


waiting: dict[str, float] = {}  # parts that ran before there was a run folder


def newer(path: Path, than: Path) -> bool:
    return path.exists() and than.exists() and path.stat().st_mtime >= than.stat().st_mtime


def main() -> None:
    WORK.mkdir(exist_ok=True)
    ready = Path(sys.executable).parent.parent / ".ready"
    if ready.exists() and not TIMINGS.exists():
        waiting["install"] = float(ready.read_text())
    recipe = os.path.relpath(RECIPE, WORK)
    corpora = [str(name) for name in load_recipe(RECIPE).data.corpora]
    fetched = all((WORK / "data" / "corpora" / name / "PROVENANCE.json").exists() for name in corpora)
    timed("fetch", "data", "fetch", *corpora, done=fetched)
    prepared = WORK / "data" / "prepared" / "demo" / "manifest.json"
    timed("prepare", "data", "prepare", recipe, done=newer(prepared, RECIPE))
    lsmoe("data", "show", recipe)
    timed("train", "train", recipe, "--nproc", str(PROCESSES), done=finished())
    last = RUN / "checkpoints" / f"step-{steps()}" / "manifest.json"
    timed("evaluate", "evaluate", "runs/demo", done=newer(RUN / "scores.json", last))
    convert = ["convert", "runs/demo", "--as", "dense", "--direction", "en-de", "--out", "en-de"]
    timed(
        "extract",
        *convert,
        done=newer(RUN / "conversion.json", last) and (DENSE / "model.safetensors").exists(),
    )
    begun = time.perf_counter()
    lsmoe("translate", "en-de", "--from", "en", "--to", "de", text=SAMPLE)
    print(f"({time.perf_counter() - begun:.1f} s with the extracted model, its start included)")
    report = lsmoe("report", "runs/demo").strip()
    summarize(WORK / report)


def steps() -> int:
    return load_recipe(RECIPE).training.steps


def finished() -> bool:
    return (RUN / "checkpoints" / f"step-{steps()}" / "manifest.json").exists()


def summarize(report: Path) -> None:
    averages = json.loads((RUN / "scores.json").read_text())["averages"]
    conversion = json.loads((RUN / "conversion.json").read_text())
    seconds = json.loads(TIMINGS.read_text())
    print("\nThe demo in figures")
    for name, group in (("into English", "into_english"), ("out of English", "out_of_english")):
        model, copy = averages[group], averages[group]["copy"]
        print(
            f"  {name:15} chrF {model['chrf']:.1f}, BLEU {model['bleu']:.1f}   (copying the source: "
            f"{copy['chrf']:.1f}, {copy['bleu']:.1f})"
        )
    sparse, dense = conversion["sparse_parameters"], conversion["dense_parameters"]
    print(
        f"  parameters      {sparse:,} sparse, {dense:,} in the dense sub-network of "
        f"{conversion['direction']}"
    )
    same = f"{conversion['same_translations']} of {conversion['sentences']} translations the same"
    print(f"  extraction      {same}, logits differ by at most {conversion['largest_logit_difference']:.1e}")
    print(f"  minutes         {', '.join(f'{part} {value / 60:.1f}' for part, value in seconds.items())}")
    print(f"  report          {report}")


if __name__ == "__main__":
    main()
