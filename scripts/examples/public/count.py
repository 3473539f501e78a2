"""Ten public scripts with hoptim in them: how many lines that takes, and how to run them.

    python scripts/examples/public/count.py                       # the table of added, changed and dropped lines
    python scripts/examples/public/count.py --originals DIR       # also writes hoptim_NAME.py beside each original

Each .ed file here is the change to one script, as `diff -e` writes it, which has no line of the original in it. Where n
lines become m, min(n, m) count as changed and the rest as added or dropped. Imports, losses, blank lines and comments count
like any other line.
"""

import argparse
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Script:
    """A public script: where it comes from, and the arguments of a short run."""

    repository: str  # on github.com
    commit: str
    path: str
    blob: str  # the hash of the original, as `git hash-object` prints it
    arguments: str

    @property
    def folder(self):
        """Where `git clone` puts the repository."""
        return self.repository.rpartition("/")[2]


EXAMPLES = ("pytorch/examples", "77f55b912142e11fcfdf5b530231fb9c52f181e8")
SCRIPTS = {
    "mnist": Script(*EXAMPLES, "mnist/main.py", "dee5a384cb2c43acf7c7ce8e521330ccd01c6e92", "--epochs 1"),
    "word_language_model": Script(
        *EXAMPLES,
        "word_language_model/main.py",
        "581b17cecd7d8008387c89f8e4b708dd33d88d01",
        "--use-optimizer --lr 0.005 --emsize 32 --nhid 32 --epochs 1 --model LSTM",  # or Transformer
    ),
    "nanogpt": Script(
        "karpathy/nanoGPT",
        "3adf61e154c3fe3fca428ad6bc3818b27a3b8291",
        "train.py",
        "de5785051050d64bbda37a4964c2c079f0739b2b",
        "config/train_shakespeare_char.py --device=cpu --compile=False --weight_decay=0.0 --max_iters=100 --eval_iters=2",
    ),
    "torchvision": Script(
        "pytorch/vision",
        "7af698794eded568735f9519593603c1ec889eba",
        "references/classification/train.py",
        "d52124fcf33111a7fc033d39c0bbf0b2541bfb39",
        "--data-path IMAGES --device cpu --wd 0 --mixup-alpha 0.2 --label-smoothing 0.1 --clip-grad-norm 1 --model-ema",
    ),
    "imagenet": Script(
        *EXAMPLES, "imagenet/main.py", "42e5e9fa64f023f019689ab871332d5e3ffa2ab8", "IMAGES --no-accel --wd 0 --epochs 1"
    ),
    "lightning": Script(
        "Lightning-AI/pytorch-lightning",
        "7f0c3436cd3f6ad3753125672024fc415cbcb414",
        "examples/pytorch/basics/backbone_image_classifier.py",
        "965f636d7fc0bffc53d4a59682cccaa7ae5b1b13",
        "--trainer.max_epochs=1",
    ),
    "accelerate": Script(
        "huggingface/accelerate",
        "16cb6eb80dd9aa8b4df1a63ef57863e455d53b83",
        "examples/nlp_example.py",
        "7f7877120fd240f0b7d0d7c152aaa4479d648bbf",
        "--cpu",
    ),
    "vae": Script(*EXAMPLES, "vae/main.py", "63909658102e8f7e0ab7f2ee12d229841cc45e02", "--epochs 3"),
    "time_sequence_prediction": Script(
        *EXAMPLES, "time_sequence_prediction/train.py", "2ccc85dc5a8f340c632bfa307e7b049d9fc2286e", "--steps 8"
    ),
    "gcn": Script(
        "pyg-team/pytorch_geometric",
        "5c6461b2305ad068a6d61165b3c55852a11aaa41",
        "examples/gcn.py",
        "390fc9a7b3abec8b40a1ec1dd8c912ff514f5420",
        "",
    ),
}


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


def changed(original, text):
    """The original with the changes of an ed script."""
    lines = original.splitlines(keepends=True)
    for first, last, new in hunks(text):  # from the end on, so that the line numbers before stay right
        lines[first - 1 : last] = [line + "\n" for line in new]
    return "".join(lines)


def blob_hash(content):
    """Git's hash of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def apply(name, originals):
    """Write the changed script beside its original, which has to be that of the commit; return its path."""
    script = SCRIPTS[name]
    path = Path(originals) / script.folder / script.path
    content = path.read_bytes()
    if blob_hash(content) != script.blob:
        raise SystemExit(f"{path} is not the file of commit {script.commit}: git checkout {script.commit}")
    target = path.with_name(f"hoptim_{path.name}")
    target.write_text(changed(content.decode(), (HERE / f"{name}.ed").read_text()))
    return target


def clones():
    """The commands that fetch the originals."""
    pairs = dict.fromkeys((one.repository, one.commit, one.folder) for one in SCRIPTS.values())
    return "\n".join(
        f"  git clone https://github.com/{name} && git -C {folder} checkout {commit}" for name, commit, folder in pairs
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"In DIR:\n{clones()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--originals", metavar="DIR", help="a folder with the checkouts below")
    options = parser.parse_args(arguments)
    print(f"{'':24} added  changed  dropped")
    for name in SCRIPTS:
        print("{:24} {:5} {:8} {:8}".format(name, *counts((HERE / f"{name}.ed").read_text())))
    for name, script in SCRIPTS.items() if options.originals else ():
        if not (Path(options.originals) / script.folder).is_dir():
            print(f"\n{name}: there is no {script.folder} in {options.originals}")
            continue
        target = apply(name, options.originals)
        print(f"\n{name}: cd {target.parent}\n  python {HERE / 'run.py'} {target.name} {script.arguments}")


if __name__ == "__main__":
    main()
