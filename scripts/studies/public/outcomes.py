"""Do learned decays help six of the public scripts? Test losses with and without hoptim, paired over seeds.

    python scripts/studies/public/outcomes.py --data data                     # run what runs/public lacks, then the table
    python scripts/studies/public/outcomes.py --scripts vae gcn --seeds 0
    python scripts/studies/public/outcomes.py --saved                         # the table of the page; nothing runs

In the data folder are the clones that README.md names, as originals/REPOSITORY, text/moby_dick.txt, text/sotu.txt (an
address on each line) and MNIST. Each training is a process of run.py. `gcn` needs torch_geometric, `fine_tuning`, which is
Accelerate's nlp_example on small data, needs accelerate and transformers.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.study import Row, Study, by_seed, differences
from common.tables import markdown
from studies.public.count import SCRIPTS, apply

HERE = Path(__file__).resolve().parent
NEVER = 10**6  # steps between hypersteps: more than any of these trainings has


@dataclass(frozen=True)
class Outcome:
    """How a script is run, and where its test loss is found.

    Attributes:
        arguments: of every run. SEED is filled in, and PIECE, the seed's piece of a text, and FOLDER, a temporary folder.
        every: how many steps are between hypersteps, for each row of the table.
        test: the test loss, from what the run printed, and the folders of the original and of the run.
        warmup: in place of the script's own.
        learned: further arguments with hoptim.
        alone: the training without hoptim; "" is the original script, or else arguments of run.py and the changed script.
        joined: the same on the validation data too, or none.
    """

    arguments: str
    every: tuple[int, ...]
    test: Callable[[str, Path, Path], float]
    warmup: int | None = None
    learned: str = ""
    alone: tuple[str, str] = ("", "")
    joined: tuple[str, str] | None = ("", "")


def printed(pattern: str, change: Callable[[float], float] = float) -> Callable[[str, Path, Path], float]:
    """Reads the last figure that the script prints after these words."""
    return lambda text, *_: change(float(re.findall(pattern, text)[-1]))


def of_checkpoint(text: str, original: Path, folder: Path) -> float:
    """nanoGPT prints no test loss: that of its last checkpoint on all of test.bin, in windows of its block size."""
    sys.path.insert(0, str(original))
    from model import GPT, GPTConfig

    kept = torch.load(folder / "ckpt.pt", weights_only=False)
    model = GPT(GPTConfig(**kept["model_args"]))
    model.load_state_dict(kept["model"])
    model.eval()
    block, file = kept["model_args"]["block_size"], original / f"data/{kept['config']['dataset']}/test.bin"
    tokens = torch.from_numpy(np.fromfile(file, dtype=np.uint16).astype(np.int64))
    count = (len(tokens) - 1) // block
    x, y = (tokens[first : first + count * block].view(count, block) for first in (0, 1))
    with torch.no_grad():
        return sum(model(a, b)[1].item() * len(a) for a, b in zip(x.split(250), y.split(250), strict=True)) / count


OUTCOMES = {
    "word_language_model": Outcome(
        "--data ./data/PIECE --seed SEED --save FOLDER/model.pt --model LSTM --emsize 32 --nhid 32 --nlayers 2"
        " --use-optimizer --lr 0.005 --epochs 10", (10, 27), printed(r"test ppl\s+(\S+)", math.log), warmup=135,
    ),
    "nanogpt": Outcome(
        "--dataset=PIECE --out_dir=FOLDER --device=cpu --compile=False --dtype=float32 --block_size=32 --batch_size=32"
        " --n_layer=2 --n_head=2 --n_embd=32 --max_iters=1000 --lr_decay_iters=1000 --learning_rate=0.003 --min_lr=0.0003"
        " --warmup_iters=50 --gradient_accumulation_steps=1 --eval_interval=1000 --eval_iters=20"
        " --always_save_checkpoint=True", (10, 50), of_checkpoint, learned="--weight_decay=0.0",
    ),
    "fine_tuning": Outcome(
        "--text TEXT --minilm MINILM --seed SEED", (10, 2), printed(r"test loss (\S+),"),
        alone=("", "--alone"), joined=("", "--joined"),
    ),
    "vae": Outcome(
        "--epochs 1 --seed SEED", (10, 25), printed(r"Test set loss: (\S+)"), warmup=100, alone=("--inert", ""),
    ),
    "gcn": Outcome("", (10,), printed(r"Test: (\S+)", lambda share: 100 * share), joined=None),
    "time_sequence_prediction": Outcome("--steps 8", (1,), printed(r"test loss: (\S+)"), alone=("--inert", "")),
}  # fmt: skip


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """The trainings of each script, seed by seed; the waves have a single one, since their script sets its seed."""
    for seed in options.seeds:
        for name in options.scripts:
            outcome = OUTCOMES[name]
            if name == "time_sequence_prediction" and seed != min(options.seeds):
                continue
            plain = ["alone", "kept"] + ["joined"] * (outcome.joined is not None)
            yield from ({"script": name, "way": way, "every": 0, "seed": seed} for way in plain)
            ways = ((way, every) for every in outcome.every for way in ("learned", "no levels"))
            yield from ({"script": name, "way": way, "every": every, "seed": seed} for way, every in ways)


def prepare(name: str, original: Path, root: Path, piece: str, seed: int) -> None:
    """Give the original its data: a piece of Moby-Dick, MNIST, or shorter waves."""
    folder = original / "data" / piece
    if name == "nanogpt":
        text = (root / "text/moby_dick.txt").read_text(encoding="utf-8")
        letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
        ids = np.array([letters[letter] for letter in text[160_000 * seed : 160_000 * (seed + 1)]], dtype=np.uint16)
        folder.mkdir(parents=True, exist_ok=True)
        ids[: 88_000 if piece.endswith("joined") else 80_000].tofile(folder / "train.bin")
        ids[80_000:88_000].tofile(folder / "val.bin")
        ids[88_000:].tofile(folder / "test.bin")
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(letters)}))
    elif name == "word_language_model":
        lines = (root / "text/moby_dick.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        size = len(lines) // 5
        own, val, test = size * seed, size * seed + int(0.8 * size), size * seed + int(0.9 * size)
        parts = {"train": (own, test if piece.endswith("joined") else val), "valid": (val, test), "test": (test, own + size)}
        folder.mkdir(parents=True, exist_ok=True)
        for part, (first, last) in parts.items():
            (folder / f"{part}.txt").write_text("".join(lines[first:last]), encoding="utf-8")
    elif name == "vae":
        (original / "results").mkdir(exist_ok=True)
        (original.parent / "data").mkdir(exist_ok=True)
        if not (link := original.parent / "data/MNIST").exists():
            link.symlink_to((root / "MNIST").resolve())
    elif name == "time_sequence_prediction":
        made = (original / "generate_sine_wave.py").read_text().replace("L = 1000", "L = 250")
        subprocess.run([sys.executable, "-c", made], cwd=original, check=True)


def run(root: Path, script: str, way: str, every: int, seed: int) -> Iterator[dict[str, Any]]:
    """The test loss of a training, how many hypersteps it had, and its processor seconds."""
    outcome, piece = OUTCOMES[script], f"moby{seed}{'joined' if way == 'joined' else ''}"
    if script == "fine_tuning":
        original = HERE
        changed = file = HERE / "fine_tuning.py"
    else:
        file = root.resolve() / "originals" / SCRIPTS[script].path
        original, changed = file.parent, apply(script, root / "originals")
        prepare(script, original, root, piece, seed)
    before, words = {"alone": outcome.alone, "joined": outcome.joined}.get(way, ("", outcome.learned))
    options = before.split() + (["--seed", str(seed)] if script == "gcn" else [])
    if way in ("kept", "learned", "no levels"):
        options += ["--every", str(every or NEVER)]
        options += ["--warmup", str(outcome.warmup)] if outcome.warmup is not None else []
        options += ["--rate", "0.1"] if way == "no levels" else []
    is_original = way == "joined" or (way == "alone" and not before)
    with tempfile.TemporaryDirectory() as folder:
        local = root.resolve() / "minilm"
        names = {
            "SEED": seed, "PIECE": piece, "FOLDER": folder, "TEXT": root.resolve() / "text/sotu.txt",
            "MINILM": local if local.is_dir() else "sentence-transformers/all-MiniLM-L6-v2",
        }  # fmt: skip
        arguments = re.sub("|".join(names), lambda found: str(names[found[0]]), f"{outcome.arguments} {words}").split()
        environment = {
            **os.environ, "PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "MPLBACKEND": "agg", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        }  # fmt: skip
        command = [sys.executable, HERE / "run.py", *options, file if is_original else changed, *arguments]
        begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        ended = subprocess.run(command, cwd=original, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{' '.join(map(str, command))}\n{ended.stderr[-2000:]}")
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun
        hypersteps = re.findall(r"run.py: (\d+) hypersteps", ended.stdout)
        test = outcome.test(ended.stdout, original, Path(folder))
    yield {"test": test, "hypersteps": int(hypersteps[0]) if hypersteps else 0, "seconds": round(seconds, 1)}


def show(rows: Sequence[Row]) -> Iterator[str]:
    """hoptim's test loss, and its differences to the trainings of the same seeds in other ways."""
    lines, ways = [], ("joined", "alone", "kept", "no levels")
    for name, outcome in OUTCOMES.items():
        for every in outcome.every:
            own = by_seed(rows, "test", script=name, way="learned", every=every)
            if not own:
                continue
            count = next(r["hypersteps"] for r in rows if (r["script"], r["way"], r["every"]) == (name, "learned", every))
            # a loss of 1e-5 has other digits than one of 100
            form = ".1e" if name == "time_sequence_prediction" else ".2f" if name in ("vae", "gcn") else ".3f"
            cells = [mean_and_error(list(own.values()), form)]
            for way in ways:
                other = by_seed(rows, "test", script=name, way=way, every=every if way == "no levels" else 0)
                cells.append(mean_and_error(differences(own, other), form))
            lines.append([name, str(count), str(len(own)), *(cell.replace("-", "−") for cell in cells)])
    yield markdown(["script", "hypersteps", "seeds", "test", *(f"less {way}" for way in ways)], lines)


if __name__ == "__main__":
    Study(
        file=__file__, seeds=(0, 1), jobs=jobs, run=run, show=show,
        more={"scripts": {"nargs": "+", "choices": list(OUTCOMES), "default": list(OUTCOMES), "help": "default: all"}},
    ).main(__doc__)  # fmt: skip
