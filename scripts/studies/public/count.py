"""Ten public scripts with hoptim in them: how many lines that takes, and how to run them.

    python scripts/studies/public/count.py                       # the table of added, changed and dropped lines
    python scripts/studies/public/count.py --originals DIR       # also writes hoptim_NAME.py beside each original

Each .ed file here is the change to one script, as `diff -e` writes it, which has no line of the original in it. Where n
lines become m, min(n, m) count as changed and the rest as added or dropped. Imports, losses, blank lines and comments count
like any other line. In DIR: git clone each repository, and git checkout its commit, as README.md has them.
"""

import argparse
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Script(NamedTuple):
    """A public script: its path among the clones, the original's hash by `git hash-object`, and arguments of a short run."""

    path: str
    blob: str
    arguments: str


SCRIPTS = {
    "mnist": Script("examples/mnist/main.py", "dee5a384cb2c43acf7c7ce8e521330ccd01c6e92", "--epochs 1"),
    "word_language_model": Script(
        "examples/word_language_model/main.py", "581b17cecd7d8008387c89f8e4b708dd33d88d01",
        "--use-optimizer --lr 0.005 --emsize 32 --nhid 32 --epochs 1 --model LSTM",  # or Transformer
    ),
    "nanogpt": Script(
        "nanoGPT/train.py", "de5785051050d64bbda37a4964c2c079f0739b2b",
        "config/train_shakespeare_char.py --device=cpu --compile=False --weight_decay=0.0 --max_iters=100 --eval_iters=2",
    ),
    "torchvision": Script(
        "vision/references/classification/train.py", "d52124fcf33111a7fc033d39c0bbf0b2541bfb39",
        "--data-path IMAGES --device cpu --wd 0 --mixup-alpha 0.2 --label-smoothing 0.1 --clip-grad-norm 1 --model-ema",
    ),
    "imagenet": Script(
        "examples/imagenet/main.py", "42e5e9fa64f023f019689ab871332d5e3ffa2ab8", "IMAGES --no-accel --wd 0 --epochs 1",
    ),
    "lightning": Script(
        "pytorch-lightning/examples/pytorch/basics/backbone_image_classifier.py", "965f636d7fc0bffc53d4a59682cccaa7ae5b1b13",
        "--trainer.max_epochs=1",
    ),
    "accelerate": Script("accelerate/examples/nlp_example.py", "7f7877120fd240f0b7d0d7c152aaa4479d648bbf", "--cpu"),
    "vae": Script("examples/vae/main.py", "63909658102e8f7e0ab7f2ee12d229841cc45e02", "--epochs 3"),
    "time_sequence_prediction": Script(
        "examples/time_sequence_prediction/train.py", "2ccc85dc5a8f340c632bfa307e7b049d9fc2286e", "--steps 8",
    ),
    "gcn": Script("pytorch_geometric/examples/gcn.py", "390fc9a7b3abec8b40a1ec1dd8c912ff514f5420", ""),
}  # fmt: skip


def hunks(text):
    """The changes of an ed script from the end of the file on: (first, last, new lines); last < first drops nothing."""
    lines, found = iter(text.splitlines()), []
    for line in lines:
        first, last, command = re.fullmatch(r"(\d+)(?:,(\d+))?([acd])", line).groups()
        new = [] if command == "d" else list(iter(lambda: next(lines), "."))
        first, last = int(first), int(last or first)
        found.append((first + 1, first, new) if command == "a" else (first, last, new))
    return found


def counts(text):
    """How many lines an ed script adds, changes and drops."""
    pairs = [(last - first + 1, len(new)) for first, last, new in hunks(text)]
    return tuple(sum(part) for part in zip(*[(max(m - n, 0), min(n, m), max(n - m, 0)) for n, m in pairs], strict=True))


def apply(name, originals):
    """Write the changed script beside its original, which has to be that of the commit; return its path."""
    path = Path(originals) / SCRIPTS[name].path
    content = path.read_bytes()
    if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != SCRIPTS[name].blob:
        raise SystemExit(f"{path} is not the file of README.md's commit: git checkout that one")
    lines = content.decode().splitlines(keepends=True)
    for first, last, new in hunks((HERE / f"{name}.ed").read_text()):  # from the end on, so that the numbers stay right
        lines[first - 1 : last] = [line + "\n" for line in new]
    target = path.with_name(f"hoptim_{path.name}")
    target.write_text("".join(lines))
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", metavar="DIR", help="a folder with the clones")
    options = parser.parse_args()
    print(f"{'':24} added  changed  dropped")
    for name, script in SCRIPTS.items():
        print("{:24} {:5} {:8} {:8}".format(name, *counts((HERE / f"{name}.ed").read_text())))
        if options.originals and (Path(options.originals) / script.path).is_file():
            target = apply(name, options.originals)
            print(f"  cd {target.parent}\n  python {HERE / 'run.py'} {target.name} {script.arguments}")
